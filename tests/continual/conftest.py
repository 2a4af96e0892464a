"""The tiny CLIP and its stream as fixtures, and run directories with hand-made figures."""

from __future__ import annotations

import pytest
import torch
from continual.tiny import tiny_clip, tiny_stream, tiny_task, tokenize

from fastlora.continual.config import CoDyRAConfig, RunConfig
from fastlora.continual.record import RankEntry, Record
from fastlora.continual.run_dir import RunDir
from fastlora.continual.stream import TaskStream


@pytest.fixture
def clip() -> torch.nn.Module:
    return tiny_clip()


@pytest.fixture
def tokenizer():
    return tokenize


@pytest.fixture
def stream() -> TaskStream:
    return tiny_stream()


@pytest.fixture
def make_clip():
    return tiny_clip


@pytest.fixture
def make_stream():
    return tiny_stream


@pytest.fixture
def make_task():
    return tiny_task


def saved_run(
    path,
    method=CoDyRAConfig(rank=4, iterations=20),
    seed=0,
    own=((40.0, 10.0), (80.0, 20.0), (60.0, 90.0)),
    held_out=(50.0, 45.0, 30.0),
    status="finished",
    tasks=("red", "green"),
    null_model=None,
):
    """A run directory with hand-made figures; the union label space is half of the own one."""
    config = RunConfig(benchmark="tiny", method=method, seed=seed)
    manifest = {"benchmark": "tiny", "tasks": list(tasks), "hashes": {name: {"classes": 3} for name in tasks}}
    manifest |= {"seed": seed, "device": "cpu", "null_model": null_model, "versions": {}}
    run, record = RunDir.create(path, config.as_dict(), manifest), Record(list(tasks))
    for i, row in enumerate(own):
        record.add(row, [value / 2 for value in row], held_out[i] if held_out else None)
        if i and method.name != "zero_shot":
            blocks = ("visual.transformer.resblocks.0", "transformer.resblocks.0")
            names = [f"{block}.{part}" for block in blocks for part in ("attn.q", "mlp.c_fc")]
            record.ranks += [RankEntry(i, name, 4, (i + k) % 5, 0.1 * k) for k, name in enumerate(names)]
            run.append_log([(i, step, 5.0 / (step + 1), 1e-3, 0.01 * step, 4.0 - 0.1 * step) for step in (0, 10, 19)])
    run.write_record(record)
    run.update(status=status)
    return path


@pytest.fixture
def make_run(tmp_path):
    """name, options of `saved_run` -> directory."""
    return lambda name="run", **options: saved_run(tmp_path / name, **options)
