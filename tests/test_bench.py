"""Benchmarks rot unseen: each runs here on tiny shapes, and the committed table can be printed."""

import contextlib
import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu import goals, parts, report, supervise, timing
from gpu.state import NAME, State
from gpu.work import LOST_DEVICE, work

ROOT = Path(__file__).parent.parent
GOALS = {f"G{number}" for number in range(1, 12)}


def run(*command, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


def test_every_benchmark_runs_on_tiny_shapes():
    done = run(
        sysconfig.get_path("scripts") + "/pytest",
        "bench",
        "--small",
        "-q",
        "--benchmark-disable",
        "-p",
        "no:cacheprovider",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "failed" not in done.stdout


def test_the_figures_of_the_merge_run_on_tiny_shapes(tmp_path):
    page = tmp_path / "merge.md"
    page.write_text("text\n\n<!-- figures -->\n\nold")
    command = ["bench/merge_figures.py", "--small", "--out", str(tmp_path / "merge.json"), "--docs", str(page)]
    done = run(sys.executable, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "merge.json").read_text())
    errors = found["repeated"]["fp16 3"]["2"]
    assert errors["residual, int8"] == pytest.approx(errors["the exact sum, cast once"], rel=0.01)
    assert errors["residual, int8"] < 0.9 * errors["nearest"]
    assert found["undone"]["fp16 3"]["residual, int8"] == 0 < found["undone"]["fp16 3"]["nearest"]
    assert page.read_text().startswith("text\n\n<!-- figures -->\n\nRelative error") and "old" not in page.read_text()


def gpu_suite(out, *options, **environment):
    done = run(
        sys.executable, "bench/gpu_suite.py", "--small", "--build", "never", "--out", str(out), *options, **environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / NAME).read_text()), done.stdout


def assert_every_goal_is_accounted_for(result, printed):
    assert {row["goal"] for row in result["goals"]} == GOALS
    for row in result["goals"]:
        measured = [row[how]["median"] for how in ("eager", "graph") if row[how]]
        if measured:
            assert all(value > 0 for value in measured)
        else:
            assert row["reason"] and row["verdict"] == goals.NOT_YET, row
        assert row["what"] in printed
        assert row["verdict"] != "reached", "tiny shapes are no measurement"


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu_suite")
    return out, *gpu_suite(out)


def test_the_gpu_suite_runs_end_to_end(whole_run):
    _, result, printed = whole_run
    expected = [name for name, part in parts.PARTS.items() if not part.optional]
    assert list(result["parts"]) == expected
    assert {name: part["status"] for name, part in result["parts"].items()} == dict.fromkeys(expected, "done"), printed
    assert not result["excluded"]
    assert_every_goal_is_accounted_for(result, printed)
    assert {"device", "driver", "torch", "triton", "commit", "python"} <= set(result["parts"]["facts"]["data"])
    assert result["parts"]["ceilings"]["data"]["gemm_tflops"] > 0
    for name, verdict in result["parts"]["correctness"]["data"]["variants"].items():
        assert verdict["ok"], f"{name}: {verdict['reason']}"


def test_every_layer_entry_has_its_share_of_the_ceiling_and_a_reason_for_what_is_missing(whole_run):
    for entry in whole_run[1]["parts"]["backward"]["data"].values():
        assert {"shape", "dtype", "flops", "bytes", "rotations", "rivals"} <= set(entry)
        for name, rival in entry["rivals"].items():
            assert rival["eager_us"]["median"] > 0, name
            assert rival["share_of_limit"] > 0
            assert rival["graph_us"] == {
                "median": None,
                "reason": "no CUDA graph: RuntimeError: a CPU has no CUDA graphs",
            }
            low, middle, high = (rival["to"]["linear"]["eager"][key] for key in ("low", "median", "high"))
            assert 0 < low <= middle <= high


def test_resume_measures_only_what_is_not_there(whole_run, tmp_path):
    earlier = State.load(whole_run[0] / NAME)
    del earlier.data["parts"]["merge"]
    earlier.path = tmp_path / "earlier.json"
    earlier.save()
    result, printed = gpu_suite(tmp_path / "again", "--resume", str(earlier.path))
    assert [line for line in printed.splitlines() if line.startswith("-- ")] == ["-- merge"]
    assert result["parts"]["merge"]["status"] == "done" and result["parts"]["merge"]["data"]
    assert result["parts"]["forward"] == whole_run[1]["parts"]["forward"]


def test_it_runs_without_open_clip_and_peft(tmp_path):
    # what importing a package that is not installed looks like, to find_spec as well
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules.update(open_clip=None, peft=None)")
    # the kernels had their turn in the whole run
    environment = {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "0"}
    result, printed = gpu_suite(tmp_path / "out", "--only", "G6", "G10", **environment)
    for name in ("backward", "step"):
        assert result["parts"][name]["status"] == "done", printed
    layer = next(iter(result["parts"]["backward"]["data"].values()))
    assert "written out" in layer["rivals"]["peft"]["note"] and layer["rivals"]["peft"]["eager_us"]["median"] > 0
    assert result["parts"]["step"]["data"]["model"].startswith("stand-in")
    assert all("losses" in result["parts"]["step"]["data"][name] for name in ("ours bf16 base", "released float32"))
    assert_every_goal_is_accounted_for(result, printed)


def test_without_time_everything_is_skipped_and_the_table_printed(tmp_path):
    result, printed = gpu_suite(tmp_path, "--budget-seconds", "0")
    assert {part["status"] for part in result["parts"].values()} == {"skipped"}
    assert_every_goal_is_accounted_for(result, printed)


def test_a_part_that_fails_is_recorded_and_the_others_run(tmp_path):
    def load(name):
        def part(context):
            context.put("figure", float("nan"))
            if name == "merge":
                raise RuntimeError("planted")

        return part

    state, names = State.new(tmp_path / NAME, small=True), ["facts", "merge", "optimizer"]
    assert work(state, names, load, dict.fromkeys(names, 9.0), time.time() + 60, torch.device("cpu")) == 0
    data = json.loads(state.path.read_text())
    assert [data["parts"][name]["status"] for name in names] == ["done", "failed", "done"]
    assert data["parts"]["merge"]["error"] == "RuntimeError: planted"
    assert data["parts"]["merge"]["data"] == {"figure": None}, "JSON has no NaN"
    data["goals"] = goals.goals(data)
    assert "part merge: failed RuntimeError: planted" in report.table(data)


# a process that measures, of which nothing is left to report
DYING = """
import sys, time
sys.path.insert(0, {bench!r})
from pathlib import Path
from gpu.state import State
state = State.load(Path({path!r}))
for name in ("forward", "merge"):
    part = state.part(name)
    if part["status"] != "pending":
        continue
    variant = name == "forward" and not state.data["excluded"]
    part.update(status="running", item="ours leader" if variant else name, item_until=time.time() + 1)
    state.save()
    if variant:
        time.sleep(60)
    if name == "merge":
        sys.exit({code})
    state.finish(name, "done")
"""


def test_a_hanging_variant_is_left_out_and_a_dying_part_does_not_end_the_run(tmp_path):
    state = State.new(tmp_path / NAME, small=True)
    for name in ("forward", "merge"):
        state.part(name)
    state.save()
    code = DYING.format(bench=str(ROOT / "bench"), path=str(state.path), code=LOST_DEVICE)
    supervise.supervise(state.path, ["forward", "merge"], lambda: [sys.executable, "-c", code], time.time() + 60)
    data = State.load(state.path).data
    assert data["excluded"] == {"ours leader": "in part forward: killed: ours leader did not end"}
    assert data["parts"]["forward"]["status"] == "done"
    assert data["parts"]["merge"]["status"] == "failed"
    assert data["parts"]["merge"]["error"] == "the process exited with 77 (at merge)"


def test_a_process_that_never_begins_costs_no_endless_loop(tmp_path):
    state, names = State.new(tmp_path / NAME, small=True), ["facts", "merge"]
    state.save()
    supervise.supervise(state.path, names, lambda: [sys.executable, "-c", "raise SystemExit(3)"], time.time() + 60)
    found = State.load(state.path).data["parts"]
    assert {found[name]["error"] for name in names} == {"the process exited with 3 (at its start)"}


class FakeDevice:
    """A CUDA device by its clock alone: events, streams and graphs, where replaying takes half of what launching takes."""

    type, index = "cuda", 0

    def __init__(self, monkeypatch):
        self.now = 0.0
        fake, nothing = self, contextlib.nullcontext

        class Event:
            def __init__(self, enable_timing):
                pass

            def record(self):
                self.at = fake.now

            def elapsed_time(self, end):
                return end.at - self.at

        class Graph:
            def replay(self):
                fake.now += self.cost

        @contextlib.contextmanager
        def graph(captured):
            before = fake.now
            yield
            captured.cost, fake.now = (fake.now - before) / 2, before

        stream = SimpleNamespace(wait_stream=lambda other: None)
        properties = SimpleNamespace(L2_cache_size=60 << 20)
        for name, value in {
            "Event": Event, "CUDAGraph": Graph, "graph": graph, "Stream": lambda: stream, "stream": lambda s: nothing(),
            "current_stream": lambda: stream, "synchronize": lambda *_: None, "get_device_properties": lambda _: properties,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    def call(self, milliseconds, refuses=False):
        def run(i):
            if refuses:
                raise RuntimeError("planted")
            self.now += milliseconds

        return run


def test_timing_on_a_device(monkeypatch):
    device, begun = FakeDevice(monkeypatch), []
    monkeypatch.setattr(timing, "_recover", lambda device: None)
    assert [timing.rotations_for(device, size) for size in (1, 19 << 20, 1 << 34)] == [12, 10, 2]
    calls = {"ours": device.call(0.02), "theirs": device.call(0.04), "bad": device.call(1, refuses=True)}
    for graph in (False, True):
        found = timing.interleaved(
            calls, device, 10, graph=graph, uncapturable={"theirs": "planted"}, begin=begun.append
        )
        assert found["ours"].median == pytest.approx(10 if graph else 20)
        assert "planted" in found["bad"].summary()["reason"]
        ratio = found["ours"].over(found["theirs"])
        if graph:
            assert ratio == {"median": None, "reason": "no CUDA graph: planted"}
        else:
            assert ratio["median"] == pytest.approx(0.5)
    assert begun == ["ours", "theirs", "bad", "ours", "bad"]


def test_only_takes_goals_and_parts_and_refuses_other_words():
    assert parts.select(["G8", "launch"], tune=False) == ["facts", "ceilings", "merge", "launch"]
    assert "tune" in parts.select([], tune=True) and "tune" not in parts.select([], tune=False)
    assert {goal for part in parts.PARTS.values() for goal in part.goals} == GOALS
    with pytest.raises(ValueError, match="--only G12"):
        parts.select(["G12"], tune=False)
