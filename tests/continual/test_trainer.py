import csv
import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file

import fastlora
from fastlora.continual import CoDyRAConfig, LoRAConfig, TaskStream, Trainer, ZeroShotConfig
from fastlora.continual.metrics import FIGURES, summarize
from fastlora.continual.restore import restore
from fastlora.continual.saved_run import read_run
from fastlora.continual.stream import InMemoryImages
from fastlora.continual.trainer import cosine
from fastlora.optim import KappaSchedule

MODULES = 2 * 6  # one block per tower


def codyra(**options):
    return CoDyRAConfig(**{"rank": 4, "iterations": 6, "batch_size": 16, "lr": 1e-2, "kappa_max": 0.3} | options)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def plain_state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(a, b):
    assert list(a) == list(b)
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_it_learns(clip, tokenizer, stream):
    record = Trainer(clip, tokenizer, stream, codyra(iterations=40, kappa_max=0.01), progress=False).fit()
    figures = record.metrics()
    assert figures["learning"] > sum(record.own[0]) / 3 + 25


def test_run_directory(clip, tokenizer, stream, tmp_path):
    """Every file of the contract, and the figures of one in agreement with those of another."""
    before, out = plain_state(clip), tmp_path / "run"
    record = Trainer(clip, tokenizer, stream, codyra(), seed=3, out=out, progress=False, log_every=4).fit()

    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["method"] == codyra().as_dict() and config["seed"] == 3 and config["benchmark"] == "tiny"

    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["status"] == "finished" and manifest["finished_tasks"] == 3
    assert manifest["tasks"] == ["red", "green", "blue"] and manifest["seed"] == 3
    assert manifest["versions"]["torch"] and manifest["duration_seconds"] > 0
    assert set(manifest["hashes"]) == {"red", "green", "blue", "grey"}
    assert manifest["hashes"]["green"]["classes"] == 4 and len(manifest["hashes"]["green"]["test_labels_sha256"]) == 64

    metrics = json.loads((out / "metrics.json").read_text())
    for name, values, space in (("accuracy", metrics, "own"), ("accuracy_union", metrics["union"], "union")):
        table = rows_of(out / f"{name}.csv")
        assert [row["after_task"] for row in table] == ["0", "1", "2", "3"]
        matrix = [[float(row[task]) for task in ("red", "green", "blue")] for row in table]
        assert matrix == getattr(record, space)
        expected = summarize(matrix[1:], matrix[0])
        assert {key: values[key] for key in FIGURES} == {key: expected[key] for key in FIGURES}
        assert values["held_out_before"] == record.held_out[0] and values["held_out"] == record.held_out[3]

    ranks = rows_of(out / "ranks.csv")
    assert len(ranks) == 3 * MODULES and {row["rank"] for row in ranks} == {"4"}
    assert ranks[0]["module"] == "visual.transformer.resblocks.0.attn.q"
    kept = [int(row["active_rank"]) for row in ranks]
    assert 0 < sum(kept) < 4 * len(kept) and metrics["mean_rank"] == pytest.approx(sum(kept) / len(kept))
    assert all(float(row["delta_norm"]) > 0 for row in ranks if row["active_rank"] != "0")

    log = rows_of(out / "log.csv")
    assert [(row["task"], row["iteration"]) for row in log] == [(t, i) for t in "123" for i in ("0", "4", "5")]
    schedule = KappaSchedule(0.3, total=6)
    for row in log:
        assert float(row["lr"]) == cosine(1e-2, int(row["iteration"]), 6)
        assert float(row["kappa"]) == schedule.kappa(int(row["iteration"]))
    assert log[0]["active_rank"] == "4.0" and float(log[2]["active_rank"]) == sum(kept[:MODULES]) / MODULES

    assert sorted(path.name for path in (out / "adapters").iterdir()) == [f"task_0{i}.safetensors" for i in (1, 2, 3)]
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"task_03.safetensors", "state.safetensors"}
    assert not list(out.rglob(".*"))  # no temporary file is left
    assert_same_state(load_file(out / "checkpoints" / "task_03.safetensors"), dict(sorted(clip.state_dict().items())))
    assert list(clip.state_dict()) == list(before)  # a plain model again


def test_only_the_adapted_weights_change(clip, tokenizer, stream):
    before = plain_state(clip)
    Trainer(clip, tokenizer, stream, codyra(targets=("v", "fc1")), progress=False).fit()
    changed = {key for key, value in clip.state_dict().items() if not torch.equal(value, before[key])}
    blocks = ("visual.transformer.resblocks.0", "transformer.resblocks.0")
    assert changed == {f"{block}.{name}" for block in blocks for name in ("attn.in_proj_weight", "mlp.c_fc.weight")}
    for block in blocks:  # of the packed projection, v alone
        q, k, v = (clip.state_dict()[f"{block}.attn.in_proj_weight"] - before[f"{block}.attn.in_proj_weight"]).chunk(3)
        assert not q.any() and not k.any() and v.any()


@pytest.mark.parametrize("config", [codyra(), LoRAConfig(rank=2, iterations=4, batch_size=16)], ids=["codyra", "lora"])
def test_same_seed_same_bits(make_clip, tokenizer, make_stream, tmp_path, config):
    states = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        model = make_clip()
        torch.manual_seed(ord(name))  # the caller's generator plays no part
        Trainer(model, tokenizer, make_stream(), config, seed=seed, out=tmp_path / name, progress=False).fit()
        states.append(plain_state(model))
    assert_same_state(states[0], states[1])
    for file in ("log.csv", "accuracy.csv", "accuracy_union.csv", "ranks.csv", "metrics.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_adapters_rebuild_the_model_after_any_task(make_clip, tokenizer, stream, tmp_path):
    """Bit for bit, from the base and the adapter files alone."""
    out = tmp_path / "run"
    Trainer(make_clip(), tokenizer, stream, codyra(), out=out, progress=False, checkpoints="all").fit()
    run = read_run(out)
    for task in (1, 2, 3):
        checkpoint = out / "checkpoints" / f"task_0{task}.safetensors"
        expected = load_file(checkpoint)
        checkpoint.unlink()
        model = make_clip()
        assert restore(model, run, task) == f"{task} adapter files"
        assert_same_state(dict(sorted(model.state_dict().items())), expected)
    with pytest.raises(ValueError, match="task 4 was asked for; .* has finished 3 tasks"):
        restore(make_clip(), run, 4)
    (out / "adapters" / "task_02.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="task_02.safetensors is missing; what has task 2 in it"):
        restore(make_clip(), run, 3)


def test_a_run_is_not_restored_into_another_base(make_clip, tokenizer, stream, tmp_path):
    out = tmp_path / "run"
    Trainer(make_clip(), tokenizer, stream, codyra(), out=out, progress=False, checkpoints="none").fit()
    assert [entry.name for entry in fastlora.Journal(out / "adapters")] == ["red", "green", "blue"]
    other = make_clip()
    other.token_embedding.weight.data[0, 0] += 1
    before = plain_state(other)
    with pytest.raises(ValueError, match=r"CLIP differs from .* \(token_embedding.weight\), .* same shapes"):
        restore(other, read_run(out), 2)
    assert_same_state(other.state_dict(), before)


def test_lora_keeps_every_rank_and_every_gate_at_one(clip, tokenizer, stream, tmp_path):
    Trainer(
        clip, tokenizer, stream, LoRAConfig(rank=3, iterations=4, batch_size=16), out=tmp_path / "run", progress=False
    ).fit()
    assert {row["active_rank"] for row in rows_of(tmp_path / "run" / "ranks.csv")} == {"3"}
    assert {row["kappa"] for row in rows_of(tmp_path / "run" / "log.csv")} == {"0.0"}
    adapters = load_file(tmp_path / "run" / "adapters" / "task_02.safetensors")
    gates = [value for key, value in adapters.items() if key.endswith(".gate")]
    assert len(gates) == MODULES and all(torch.equal(gate, torch.ones(3)) for gate in gates)


def test_merge_scale_merges_a_share_and_the_journal_holds_it(make_clip, tokenizer, make_task, tmp_path):
    merged = {}
    for scale in (1.0, 0.25):
        model, base = make_clip(), make_clip()
        config = LoRAConfig(rank=4, iterations=6, batch_size=16, lr=1e-2, merge_scale=scale)
        stream = TaskStream("one", [make_task("red", 3)])
        Trainer(model, tokenizer, stream, config, out=tmp_path / f"{scale}", progress=False).fit()
        merged[scale] = {key: value - plain_state(base)[key] for key, value in plain_state(model).items()}
        restore(base, read_run(tmp_path / f"{scale}"), 1)
        assert_same_state(base.state_dict(), model.state_dict())
    for key, whole in merged[1.0].items():
        torch.testing.assert_close(merged[0.25][key], 0.25 * whole, rtol=1e-4, atol=1e-6)
    drifts = [read_run(tmp_path / name).record.drift for name in ("1.0", "0.25")]
    assert drifts[0][0] == drifts[1][0] == 0
    assert drifts[1][1] == pytest.approx(0.25 * drifts[0][1], rel=1e-4)


def test_everything_may_be_pruned(clip, tokenizer, stream, tmp_path):
    """A threshold beyond every gate: rank 0 everywhere, nothing learned, no weight changed, and a readable run."""
    before = plain_state(clip)
    record = Trainer(clip, tokenizer, stream, codyra(kappa_max=50.0), out=tmp_path / "run", progress=False).fit()
    assert record.mean_rank() == 0.0 and record.own[3] == record.own[0]
    assert_same_state(clip.state_dict(), before)
    assert restore(clip, read_run(tmp_path / "run"), 2) == "2 adapter files"
    assert_same_state(clip.state_dict(), before)


def test_zero_shot_trains_nothing(clip, tokenizer, stream, tmp_path):
    before = plain_state(clip)
    record = Trainer(clip, tokenizer, stream, ZeroShotConfig(), out=tmp_path / "run", progress=False).fit()
    assert record.own == [record.own[0]] * 4 and record.held_out == [record.held_out[0]] * 4
    assert_same_state(clip.state_dict(), before)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["forgetting"] == 0.0 and metrics["mean_rank"] is None
    assert "no task was trained" in metrics["reasons"]["mean_rank"]


class Watched:
    """Wraps a trainer's hooks and writes down what they see."""

    def __init__(self, trainer, on_step=None):
        self.calls, self.trainer, method = [], trainer, trainer.method
        for hook in ("begin_task", "extra_loss", "after_step", "end_task"):
            setattr(method, hook, self._wrap(hook, getattr(method, hook), on_step))

    def _wrap(self, hook, original, on_step):
        def wrapped(ctx):
            self.calls.append((hook, ctx.number, ctx.step.get("iteration"), ctx.seen_classes))
            if hook == "after_step" and on_step:
                on_step(ctx)
            return original(ctx)

        return wrapped


def test_hooks_are_called_in_order(clip, tokenizer, stream):
    trainer = Trainer(clip, tokenizer, stream, codyra(iterations=2), progress=False)
    watched = Watched(trainer)
    trainer.fit()
    expected = []
    for task, seen in ((1, 0), (2, 3), (3, 7)):
        expected.append(("begin_task", task, None, seen))
        expected += [(hook, task, i, seen) for i in (0, 1) for hook in ("extra_loss", "after_step")]
        expected.append(("end_task", task, 1, seen))
    assert watched.calls == expected


def test_extra_loss_is_added(make_clip, tokenizer, make_stream, tmp_path):
    losses = []
    for extra in (None, torch.tensor(5.0)):
        out = tmp_path / str(extra)
        trainer = Trainer(make_clip(), tokenizer, make_stream(), codyra(iterations=1), out=out, progress=False)
        trainer.method.extra_loss = lambda ctx, extra=extra: extra
        trainer.fit()
        losses.append(float(rows_of(out / "log.csv")[0]["loss"]))
    assert losses[1] - losses[0] == pytest.approx(5.0, abs=1e-5)


def test_released_operator_has_the_wider_dead_zone(make_clip, tokenizer, make_stream):
    """From the same adapters, 'released' kills at least what 'exact' kills, and with a step of 0.2 visibly more."""
    ranks = [
        Trainer(make_clip(), tokenizer, make_stream(), codyra(lr=1e-6, kappa_max=0.2, prox=prox), progress=False)
        .fit()
        .mean_rank()
        for prox in ("exact", "released")
    ]
    assert ranks[1] < ranks[0] - 0.2


@pytest.mark.parametrize("prox", ["exact", "released"])
def test_dropping_dead_ranks_during_a_task_changes_the_work_alone(prox, make_clip, tokenizer, make_stream):
    runs = {}
    for drop in (True, False):
        model = make_clip()
        # a total shrink of 1.1: most gates die
        config = CoDyRAConfig(rank=4, iterations=40, batch_size=6, lr=2e-3, kappa_max=0.1, prox=prox, drop_dead=drop)
        trainer = Trainer(model, tokenizer, make_stream(), config, progress=False)
        sizes, after_step = [], trainer.method.after_step

        def watched(ctx, sizes=sizes, after_step=after_step):
            after_step(ctx)
            sizes.append(sum(p.numel() for p in fastlora.adapter_parameters(ctx.model)))

        trainer.method.after_step = watched
        runs[drop] = trainer.fit(), sizes, plain_state(model)
    (small, small_sizes, dropped), (whole, whole_sizes, kept) = runs[True], runs[False]
    assert len(set(whole_sizes)) == 1
    assert small_sizes[0] == whole_sizes[0] and small_sizes[-1] < 0.8 * whole_sizes[-1]
    assert [(row.module, row.active_rank) for row in small.ranks] == [
        (row.module, row.active_rank) for row in whole.ranks
    ]
    for name, value in kept.items():
        torch.testing.assert_close(dropped[name], value, rtol=1e-4, atol=1e-5)


def test_frozen_text_tower_is_encoded_once_per_task(make_clip, tokenizer, make_stream, monkeypatch):
    """Saves work, changes nothing: the twin encodes at every step."""
    from fastlora.continual import step as module

    calls, original = [], module.text_features
    monkeypatch.setattr(module, "text_features", lambda *args, **kw: calls.append(1) or original(*args, **kw))
    Trainer(make_clip(), tokenizer, make_stream(), codyra(iterations=4, where="vision"), progress=False).fit()
    assert len(calls) == 3
    calls.clear()
    Trainer(make_clip(), tokenizer, make_stream(), codyra(iterations=4), progress=False).fit()
    assert len(calls) == 12


def test_loss_is_logged_as_mean_since_the_last_line(make_clip, tokenizer, make_stream, tmp_path):
    for every in (1, 4):
        config = codyra(iterations=6)
        Trainer(
            make_clip(), tokenizer, make_stream(), config, out=tmp_path / str(every), progress=False, log_every=every
        ).fit()
    single = [float(row["loss"]) for row in rows_of(tmp_path / "1" / "log.csv")][:6]
    means = [float(row["loss"]) for row in rows_of(tmp_path / "4" / "log.csv")][:3]
    assert means == pytest.approx([single[0], sum(single[1:5]) / 4, single[5]])


def test_cosine_has_no_warm_up_and_ends_near_zero():
    assert cosine(2.0, 0, 100) == 2.0
    assert cosine(2.0, 50, 100) == pytest.approx(1.0)
    assert cosine(2.0, 99, 100) == pytest.approx(1.0 + math.cos(math.pi * 0.99))


def test_nan_loss_stops_with_the_step_named(clip, tokenizer, make_task, tmp_path):
    first, second = make_task("red", 3, seed=1), make_task("green", 2, seed=2)
    second.train.images[:] = math.nan
    trainer = Trainer(
        clip, tokenizer, TaskStream("tiny", [first, second]), codyra(), out=tmp_path / "run", progress=False
    )
    states = []
    watched_end = trainer.method.end_task
    trainer.method.end_task = lambda ctx: (watched_end(ctx), states.append(plain_state(clip)))[0]
    with pytest.raises(FloatingPointError, match=r"loss is nan at iteration 0 \(from 0\) of task 2 \(green\)"):
        trainer.fit()
    assert_same_state(clip.state_dict(), states[0])  # plain, as after task 1
    run = read_run(tmp_path / "run")
    assert run.status == "failed" and "iteration 0" in run.manifest["error"]
    assert run.record.finished_tasks == 1 and len(run.record.own) == 2


def test_nan_between_two_log_lines_names_its_own_step(clip, tokenizer, stream):
    trainer = Trainer(clip, tokenizer, stream, codyra(iterations=30), progress=False, log_every=10)
    trainer.method.extra_loss = lambda ctx: torch.tensor(math.nan) if ctx.step["iteration"] == 13 else None
    with pytest.raises(FloatingPointError, match="at iteration 13"):
        trainer.fit()


@pytest.mark.parametrize(("stop", "status"), [(KeyboardInterrupt, "interrupted"), (OSError, "failed")])
def test_stopped_in_the_middle_of_a_task(clip, tokenizer, stream, tmp_path, stop, status):
    states = []

    def on_step(ctx):
        if (ctx.number, ctx.step["iteration"]) == (2, 3):
            raise stop("enough")

    trainer = Trainer(clip, tokenizer, stream, codyra(), out=tmp_path / "run", progress=False)
    Watched(trainer, on_step)
    end = trainer.method.end_task
    trainer.method.end_task = lambda ctx: (end(ctx), states.append(plain_state(clip)))[0]
    with pytest.raises(stop):
        trainer.fit()
    assert_same_state(clip.state_dict(), states[0])
    assert not list(fastlora.adapters(clip))
    run = read_run(tmp_path / "run")
    assert run.status == status and run.record.finished_tasks == 1
    figures = run.record.metrics()
    assert figures["learning"] == run.record.own[1][0] and figures["forgetting"] is None
    assert len(run.record.ranks) == MODULES


def test_lines_in_a_pipe(clip, tokenizer, stream, capsys):
    Trainer(clip, tokenizer, stream, codyra(iterations=1)).fit()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("codyra  before training: ") and "% held-out" in lines[0]
    assert lines[2].startswith("codyra  task 2/3 green: ") and "mean rank" in lines[2]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed is -1; it must be an integer >= 0"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'; accepted: auto, torch, triton"),
        ({"device": "gpu"}, ValueError, "device is 'gpu'; it must be auto or a torch device"),
        ({"eval_batch_size": 0}, ValueError, "eval_batch_size is 0"),
        ({"log_every": 0}, ValueError, "log_every is 0"),
        ({"checkpoints": "some"}, ValueError, "checkpoints is 'some'; accepted: last, all, none"),
        ({"method": "codyra"}, ValueError, "method is 'codyra'; it must be a config"),
    ],
)
def test_bad_options(clip, tokenizer, stream, options, error, message):
    with pytest.raises(error, match=message):
        Trainer(clip, tokenizer, stream, progress=False, **options)


def test_a_gpu_that_is_not_there(clip, tokenizer, stream, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="device 'cuda:0' was asked for but torch sees no GPU"):
        Trainer(clip, tokenizer, stream, device="cuda:0", progress=False)


def test_run_directory_that_exists(clip, tokenizer, stream, tmp_path):
    Trainer(clip, tokenizer, stream, ZeroShotConfig(), out=tmp_path / "run", progress=False).fit()
    content = (tmp_path / "run" / "accuracy.csv").read_bytes()
    with pytest.raises(
        FileExistsError, match=r"run exists already \(a run, finished, 3 of 3 tasks\); .* Pass another --out"
    ):
        Trainer(clip, tokenizer, stream, ZeroShotConfig(), out=tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "accuracy.csv").read_bytes() == content


def test_run_directory_without_a_parent(clip, tokenizer, stream, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing is no directory, so the run 'run' cannot be made in it"):
        Trainer(clip, tokenizer, stream, out=tmp_path / "missing" / "run", progress=False)


def test_a_file_in_the_way(clip, tokenizer, stream, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(FileExistsError, match="run exists already; a run needs a new or an empty directory"):
        Trainer(clip, tokenizer, stream, out=tmp_path / "run", progress=False)


def test_read_only_parent(clip, tokenizer, stream, tmp_path, monkeypatch):
    import os

    monkeypatch.setattr(
        os, "access", lambda path, mode: False
    )  # root may write anywhere, so permissions alone prove nothing
    with pytest.raises(PermissionError, match="cannot be written. Pass an --out that can"):
        Trainer(clip, tokenizer, stream, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_one_task_and_no_held_out_set(clip, tokenizer, make_task, tmp_path):
    """Undefined figures are null with their reason, also on disk."""
    stream = TaskStream("one", [make_task("red", 2)])
    Trainer(clip, tokenizer, stream, codyra(iterations=2), out=tmp_path / "run", progress=False).fit()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for name in ("transfer", "forgetting", "bwt", "fwt", "held_out", "held_out_before"):
        assert metrics[name] is None and metrics["union"][name] is None
        assert metrics["reasons"][name] and metrics["union"]["reasons"][name]


def test_a_task_without_training_data_can_only_be_evaluated(clip, tokenizer, make_task):
    import dataclasses

    stream = TaskStream("closed", [dataclasses.replace(make_task("red", 2), train=None)])
    Trainer(clip, tokenizer, stream, ZeroShotConfig(), progress=False).fit()
    with pytest.raises(ValueError, match="has no training data"):
        Trainer(clip, tokenizer, stream, codyra(), progress=False).fit()


def test_a_batch_larger_than_the_task(clip, tokenizer, make_task):
    task = make_task("red", 2, shots=1)
    assert isinstance(task.train, InMemoryImages) and len(task.train) == 2
    Trainer(clip, tokenizer, TaskStream("small", [task]), codyra(iterations=3, batch_size=64), progress=False).fit()
