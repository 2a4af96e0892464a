"""What a run writes is read back as it was: the commit point bit for bit, and the tables."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from drawn import names
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlora.continual.config import CoDyRAConfig, RunConfig
from fastlora.continual.record import RankEntry, Record
from fastlora.continual.run_dir import RunDir
from fastlora.continual.run_state import RunState, read_state, write_state
from fastlora.continual.saved_run import read_run

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8)
TENSORS = st.dictionaries(
    names, st.tuples(st.lists(st.integers(0, 3), max_size=3), st.sampled_from(DTYPES)), max_size=4
)
JSON = st.dictionaries(st.text(max_size=5), st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), max_size=3)  # fmt: skip
PERCENT = st.floats(0, 100)
TEXTS = st.text("aZ é漢\"',;\\", min_size=1, max_size=8)


@st.composite
def records(draw):
    tasks = draw(st.lists(TEXTS, min_size=1, max_size=3, unique=True))
    rows = draw(st.integers(0, len(tasks) + 1))
    tables = [[[draw(PERCENT) for _ in tasks] for _ in range(rows)] for _ in range(2)]
    curves = [[draw(PERCENT) for _ in range(rows)] if draw(st.booleans()) else [] for _ in range(2)]
    ranks = [RankEntry(task, draw(TEXTS), 4, draw(st.integers(0, 4)), draw(PERCENT)) for task in range(1, rows)]
    return Record(tasks, *tables, held_out=curves[0], ranks=ranks, drift=curves[1])


@settings(max_examples=20)
@given(TENSORS, TENSORS, records(), JSON, st.text(), st.integers(0, 9))
def test_commit_points(model, method, record, settings_, log, number):
    made = [{name: (9 * torch.randn(shape)).to(dtype).t() if len(shape) == 2 else torch.randn(shape).to(dtype)
             for name, (shape, dtype) in each.items()} for each in (model, method)]  # fmt: skip
    state = RunState(
        config=settings_, data={"tasks": record.tasks}, base={"weight": "float32[2] 00"}, record=record, trained=number,
        journal=number, log=log, steps=number, seconds={"train": 0.5}, device="cpu", weights="00", model=made[0], method=made[1],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_state(Path(folder) / "state", state)
        found = read_state(Path(folder) / "state")
    for ours, theirs in ((found.model, made[0]), (found.method, made[1])):
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    plain = {"model": {}, "method": {}}
    assert found.__dict__ | plain == state.__dict__ | plain


@settings(max_examples=20)
@given(records(), st.integers(0, 99), st.floats(1e-6, 1), st.integers(1, 64))
def test_run_directories(record, seed, lr, rank):
    config = RunConfig(seed=seed, method=CoDyRAConfig(lr=lr, rank=rank))
    manifest = {"tasks": record.tasks, "benchmark": "drawn", "seed": seed, "device": "cpu", "hashes": {}}
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir.create(Path(folder) / "run", config.as_dict(), manifest)
        run.write_record(record, status="interrupted")
        run.append_log([(1, 2, 0.5, lr, None, 3)])
        run.close()
        found = read_run(Path(folder) / "run")
    assert found.record == record and found.run_config == config and found.status == "interrupted"
    assert found.log == [{"task": 1, "iteration": 2, "loss": 0.5, "lr": lr, "kappa": None, "active_rank": 3}]
