"""A run that is stopped, anywhere and anyhow, and resumed ends with the bits of one that was left alone."""

import dataclasses
import errno
import json
import os
import random
import time

import pytest
import torch
from continual.resume.cases import (
    CONFIGS,
    Killed,
    assert_same_results,
    results,
    stop,
)
from killing import killed_after
from safetensors.torch import load_file

import fastlora
from fastlora.continual import TaskStream, Trainer, read_run, run_keeper, run_state
from fastlora.continual import config as configs
from fastlora.continual.evaluation import evaluate
from fastlora.continual.restore import method_of, restore
from fastlora.continual.run_dir import STATE
from fastlora.continual.stream import Reference

# ---- stopped by an exception, at every kind of point


@pytest.mark.parametrize("kind", ["codyra", "lora", "stateful", "plain"])
@pytest.mark.parametrize(
    ("hook", "options"),
    [
        ("begin_task", {"task": 1}),
        ("begin_task", {"after": True}),
        ("after_step", {"step": 1}),
        ("after_step", {"step": 0, "task": 3, "error": KeyboardInterrupt}),
        ("end_task", {}),
        ("end_task", {"after": True, "task": 3}),
    ],
    ids=str,
)
def test_stopped_in_a_hook(train, whole, tmp_path, kind, hook, options):
    out = tmp_path / "run"
    trainer, _ = train(kind, out)
    setattr(trainer.method, hook, stop(**options)(getattr(trainer.method, hook)))
    with pytest.raises((Killed, KeyboardInterrupt)):
        trainer.fit()
    before = read_run(out).record.finished_tasks
    assert before == options.get("task", 2) - 1
    trainer, model = train(kind, out, resume=True)
    record = trainer.fit()
    assert_same_results(results(out, model), whole(kind))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["status"] == "finished" and "error" not in manifest and record.finished_tasks == 3
    assert [entry["after_tasks"] for entry in manifest["resumes"]] == [before]


def test_stopped_between_the_journal_and_the_merge(train, whole, tmp_path, monkeypatch):
    """The adapters of a task that was never finished are on disk; the task is trained again, and merged once."""
    out = tmp_path / "run"
    trainer, _ = train("codyra", out)

    def killed(model):
        if len(fastlora.Journal(out / "adapters")) == 2:
            raise Killed
        return merge(model)

    merge = fastlora.merge
    with monkeypatch.context() as patch:
        patch.setattr(fastlora, "merge", killed)
        with pytest.raises(Killed):
            trainer.fit()
    assert len(fastlora.Journal(out / "adapters")) == 2 and read_run(out).record.finished_tasks == 1
    trainer, model = train("codyra", out, resume=True)
    trainer.fit()
    assert_same_results(results(out, model), whole("codyra"))


@pytest.mark.parametrize("kind", ["codyra", "plain"])
def test_a_trained_task_is_not_trained_again(train, whole, tmp_path, monkeypatch, kind):
    """Stopped in the evaluation after it."""
    from fastlora.continual import trainer as module

    out, calls = tmp_path / "run", []

    def evaluate(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return original(*arguments, **options)

    original = module.evaluate
    monkeypatch.setattr(module, "evaluate", evaluate)
    with pytest.raises(Killed):
        train(kind, out)[0].fit()
    assert read_run(out).record.finished_tasks == 1
    trainer, model = train(kind, out, resume=True)
    begun, begin_task = [], trainer.method.begin_task
    trainer.method.begin_task = lambda ctx: (begun.append(ctx.number), begin_task(ctx))
    trainer.fit()
    assert begun == [3]
    assert_same_results(results(out, model), whole(kind))


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", ["codyra", "lora", "stateful", "plain", "zero_shot"])
def test_stopped_at_every_commit(train, whole, tmp_path, kind, after, monkeypatch):
    """Each process commits once more than the one before, and stops: just before a commit, or just after it."""
    from fastlora.continual import run_keeper as module

    expected, out, stops, commits = whole(kind), tmp_path / "run", 0, []

    def write_state(path, state):
        commits.append(path)
        if after or len(commits) == 1:
            original(path, state)
        if after or len(commits) == 2:
            raise Killed

    original = module.write_state
    monkeypatch.setattr(module, "write_state", write_state)
    while True:
        commits.clear()
        trainer, model = train(kind, out, resume=True)
        try:
            trainer.fit()
            break
        except Killed:
            stops += 1
    assert stops >= 3
    assert_same_results(results(out, model), expected)


def test_wall_times_add_up(train, tmp_path):
    out = tmp_path / "run"
    trainer, _ = train("codyra", out)
    trainer.method.begin_task = stop(task=3)(trainer.method.begin_task)
    with pytest.raises(Killed):
        trainer.fit()
    first = json.loads((out / "manifest.json").read_text())
    train("codyra", out, resume=True)[0].fit()
    second = json.loads((out / "manifest.json").read_text())
    for key in ("train", "evaluate"):
        assert second["seconds"][key] > first["seconds"][key] > 0
    assert second["duration_seconds"] > first["duration_seconds"]
    assert second["duration_seconds"] >= sum(second["seconds"].values())


def test_weights_that_no_journal_rebuilds(train, tmp_path, make_clip):
    """Restored from the commit point after the last task, from a checkpoint after any that was kept."""
    out = tmp_path / "run"
    trainer, model = train("plain", out, checkpoints="none")
    trainer.fit()
    restored = make_clip()
    assert restore(restored, read_run(out), 3) == "checkpoints/state.safetensors"
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in restored.state_dict().items())
    with pytest.raises(FileNotFoundError, match="its weights were not kept. Train with --checkpoints all"):
        restore(make_clip(), read_run(out), 2)
    assert restore(make_clip(), read_run(out), 0) == "the base model"


def test_what_stays_beside_the_weights_is_there_again(make_clip, tokenizer, make_stream, tmp_path):
    """In the evaluation that a kill cut short, and in that of the finished run."""
    config = configs.method_config("expert_pool", iterations=10, batch_size=16, lr=1e-2)

    def trainer(out, **options):
        return Trainer(make_clip(), tokenizer, make_stream(), config, out=out, progress=False, **options)

    whole = trainer(tmp_path / "whole").fit()
    plain = evaluate(make_clip(), tokenizer, make_stream())
    assert whole.own[3] != list(plain.own), "the pool changes nothing that this test could see"
    stopped = trainer(tmp_path / "run")
    evaluation = stopped._evaluate
    stopped._evaluate = lambda *given: evaluation(*given) if len(stopped.record.own) < 3 else stop_here()
    with pytest.raises(Killed):
        stopped.fit()
    assert trainer(tmp_path / "run", resume=True).fit().own == whole.own

    run, model = read_run(tmp_path / "run"), make_clip()
    method = method_of(run)
    assert restore(model, run, 3, method) == "checkpoints/state.safetensors"
    assert list(evaluate(model, tokenizer, make_stream()).own) == whole.own[3]
    with pytest.raises(ValueError, match="holds it as after task 3; task 2 was asked for. Give 3, or 0"):
        restore(make_clip(), run, 2)


def stop_here():
    raise Killed


@pytest.mark.parametrize("name", configs.CONFIGS)
def test_every_method(make_clip, tokenizer, make_task, tmp_path, name):
    """Stopped in the second task, and in the evaluation after it."""
    config = configs.CONFIGS[name]
    known = {field.name for field in dataclasses.fields(config)}
    quick = {"iterations": 4, "batch_size": 16, "rank": 2, "lr": 1e-3, "average_every": 2}
    config = config(**{key: value for key, value in quick.items() if key in known})

    def trainer(out, **options):
        reference = Reference(make_task("grey", 3).test, ("a sentence", "another one"))
        tasks = [make_task("red", 3, seed=1), make_task("green", 4, seed=2), make_task("blue", 2, seed=3)]
        stream = TaskStream("tiny", tasks, reference=reference)
        return Trainer(make_clip(), tokenizer, stream, config, out=out, progress=False, **options)

    whole = trainer(tmp_path / "whole")
    whole.fit()
    stopped = trainer(tmp_path / "run")
    stopped.method.after_step = stop(task=1 if config.name == "joint" else 2, step=2)(stopped.method.after_step)
    if stopped.method.trains:
        with pytest.raises(Killed):
            stopped.fit()
    stopped = trainer(tmp_path / "run", resume=True)
    evaluate, rows = stopped._evaluate, []

    def killed(*arguments):
        rows.append(evaluate(*arguments))
        if len(stopped.record.own) == 3:
            raise Killed
        return rows[-1]

    stopped._evaluate = killed
    with pytest.raises(Killed):
        stopped.fit()
    resumed = trainer(tmp_path / "run", resume=True)
    resumed.fit()
    assert_same_results(results(tmp_path / "run", resumed.model), results(tmp_path / "whole", whole.model))
    assert torch.equal(*(torch.tensor(each.record.own) for each in (whole, resumed)))


# ---- killed


@pytest.mark.slow
def test_killed_at_random_moments(train, whole, tmp_path):
    """SIGKILL at least 24 times in a process of its own, the same command each time, until it comes to an end."""
    rng, kills, ends = random.Random(0), 0, 0
    expected, started = whole("codyra"), time.perf_counter()
    train("codyra", tmp_path / "timed")[0].fit()
    typical = time.perf_counter() - started
    while kills < 24 or not ends:
        out, model = tmp_path / f"run{ends}", None
        if killed_after(rng.uniform(0.05, 0.9) * typical, lambda out=out: train("codyra", out, resume=True)[0].fit()):
            kills += 1
            continue
        trainer, model = train("codyra", out, resume=True)  # finished: the weights are there to compare
        trainer.fit()
        assert_same_results(results(out, model), expected)
        assert not [path for path in out.rglob(".*")]
        ends += 1


# ---- a full disk


class FullFile:
    """Half of the first write finds room."""

    def __init__(self, file):
        self.file, self.room = file, True

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room = False
        return self.file.write(data[: len(data) // 2])


@pytest.fixture
def disk(monkeypatch):
    """`disk.room` writes succeed, then none."""
    from fastlora.continual import run_dir

    class Disk:
        room, refused = 10**9, None  # name of the first file that found none

        def take(self, name):
            self.room -= 1
            if self.room < 0 and self.refused is None:
                self.refused = name
            return self.room >= 0

    disk = Disk()

    def fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.path.isfile(path) and not disk.take(os.path.basename(path)[1:].rpartition(".")[0]):  # .NAME.x1y2z3_4
            raise OSError(errno.ENOSPC, "No space left on device")

    def append_whole(file, data):
        append(file if disk.take(os.path.basename(file.name)) else FullFile(file), data)

    append = run_dir.append_whole
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(run_dir, "append_whole", append_whole)
    return disk


@pytest.mark.parametrize(("kind", "every"), [("quick", 1), ("plain", 5)])
def test_disk_full_at_any_write(train, whole, tmp_path, disk, kind, every):
    """One write more in each run; then the disk has room again."""
    room, finished = 0, False
    while not finished:
        out = tmp_path / f"{room}"
        disk.room, disk.refused = room, None
        try:
            train(kind, out)[0].fit()
            finished = True
        except OSError as error:
            assert f"{disk.refused} was not written (No space left on device)" in str(error) and str(out) in str(error)
            assert "what was there before is whole" in str(error)
        disk.room = 10**9
        if (out / "accuracy.csv").exists():
            record = read_run(out).record  # every table is whole, and they end with one evaluation
            assert len(record.own) == len(record.union)
            lines = (out / "log.csv").read_text().splitlines(keepends=True)
            assert all(line.endswith("\n") and line.count(",") == 5 for line in lines)
        if room % 4 == 0 or finished:
            trainer, model = train(kind, out, resume=True)
            trainer.fit()
            assert_same_results(results(out, model), whole(kind))
        room += every
    assert room > 35


# ---- nothing of the images


@pytest.mark.parametrize("kind", ["codyra", "stateful", "plain"])
def test_the_commit_point_holds_nothing_of_the_images(make_clip, tokenizer, make_task, tmp_path, kind):
    """Its tensors are the model's and those that the method names; their size does not depend on the number of images;
    no row of them is an image, or a feature of one, up to its length."""
    shapes = []
    for shots in (4, 8):
        tasks = [make_task("red", 3, shots=shots, seed=1), make_task("green", 4, shots=shots, seed=2)]
        images = torch.cat([task.train.images for task in tasks])
        model = make_clip()
        base = {name: value.clone() for name, value in model.state_dict().items()}
        out = tmp_path / f"run{shots}"
        trainer = Trainer(model, tokenizer, TaskStream("s", tasks), CONFIGS[kind], out=out, progress=False)
        trainer.fit()
        tensors = load_file(out / "checkpoints" / "state.safetensors")
        named = {f"model.{name}" for name in base} | {f"method.{name}" for name in trainer.method.state_dict()}
        assert tensors.keys() <= named
        shapes.append({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        before = make_clip()
        with torch.no_grad():
            features = [each.eval().encode_image(images) for each in (before, model)]
        old = torch.nn.functional.normalize(torch.cat(features), dim=-1)  # [images, D]
        pixels = torch.nn.functional.normalize(images.flatten(1), dim=-1)
        for name, tensor in tensors.items():
            for known in (old, pixels):
                if tensor.numel() and tensor.numel() % known.shape[1] == 0:
                    rows = torch.nn.functional.normalize(tensor.float().reshape(-1, known.shape[1]), dim=-1)
                    assert (rows @ known.t()).max() < 0.999, name
    assert shapes[0] == shapes[1]


# ---- what is written and read back


def test_the_weights_are_hashed_once_for_both_commits_of_a_task(train, tmp_path, monkeypatch):
    hashed, original = [], run_keeper.weights_sha256
    monkeypatch.setattr(run_keeper, "weights_sha256", lambda model: hashed.append(original(model)) or hashed[-1])
    train("codyra", tmp_path / "run")[0].fit()
    assert len(hashed) == 1 + 3 == len(set(hashed))
    assert run_state.read_state(tmp_path / "run" / STATE).weights == hashed[-1]
