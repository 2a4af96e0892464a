"""What cannot be resumed, and what is told; and what else is done with a run directory that is there."""

import dataclasses
import random

import pytest
import torch
from continual.resume.cases import (
    CONFIGS,
    FILES,
    Killed,
    assert_same_results,
    content,
    results,
    stop,
)
from safetensors import safe_open
from safetensors.torch import save_file

from fastlora.continual import LoRAConfig, Task, TaskStream, Trainer, read_run
from fastlora.continual.run_state import read_state


def refused(trainer, out, message, error=ValueError):
    before = content(out)
    with pytest.raises(error, match=message):
        trainer.fit()
    assert content(out) == before


def test_another_configuration(train, stopped, make_clip, tokenizer, make_stream):
    config = dataclasses.replace(CONFIGS["codyra"], lr=0.5, rank=7)
    options = {"out": stopped, "resume": True, "progress": False}
    trainer = Trainer(make_clip(), tokenizer, make_stream(), config, seed=2, **options)
    refused(trainer, stopped, r"run cannot .* seed was 1 and is 2 now; log_every was 2 .* and 2 more.* lr|lr was 0.01")
    trainer = Trainer(make_clip(), tokenizer, make_stream(), LoRAConfig(), seed=1, log_every=2, **options)
    refused(trainer, stopped, "another configuration: method was 'codyra' and is 'lora' now. Give the options")


def test_what_may_change(train, whole, stopped):
    trainer, model = train("codyra", stopped, resume=True, eval_batch_size=7, device="cpu", checkpoints="last")
    trainer.fit()
    found = {key: value for key, value in results(stopped, model).items() if key.startswith("weights")}
    assert all(torch.equal(value, whole("codyra")[key]) for key, value in found.items())
    assert read_run(stopped).config["eval_batch_size"] == 7


def test_another_model(train, stopped, make_clip, tokenizer, make_stream):
    def trainer(model):
        options = {"out": stopped, "resume": True, "progress": False, "seed": 1, "log_every": 2}
        return Trainer(model, tokenizer, make_stream(), CONFIGS["codyra"], **options)

    model = make_clip()
    model.visual.proj.data[0, 0] += 1
    refused(trainer(model), stopped, r"another model than it was started with \(visual.proj has other values\)")
    refused(
        trainer(make_clip(layers=2)), stopped, "visual.transformer.resblocks.1.ln_1.weight is new; .* and [0-9]+ more"
    )
    message = r"positional_embedding was float32\[16, 32\] and is float16\[16, 32\] now"
    refused(trainer(make_clip().half()), stopped, message)


def test_another_benchmark(train, stopped, make_task, make_stream):
    def with_tasks(*tasks, held_out=None):
        trainer, _ = train("codyra", stopped, resume=True)
        trainer.stream = TaskStream("tiny", tasks, held_out=held_out or make_stream().held_out)
        return trainer

    red, green, blue = make_stream().tasks
    other = Task("green", tuple(reversed(green.classes)), ("{}",), None, green.test)
    message = "classes, prompts or images .* cannot go on: 'green' has its classes in another order; .* 'green' has other prompts"
    refused(with_tasks(red, other, blue), stopped, message)
    refused(with_tasks(red, green, make_task("pink", 2)), stopped, "'pink' is no task of the run; task 'blue' is gone")
    refused(with_tasks(green, red, blue), stopped, "the tasks were red, green, blue and are green, red, blue")
    refused(with_tasks(red, green, blue, held_out=make_task("grey", 3)), stopped, "the held-out set is another")


def test_a_file_of_another_version(train, stopped):
    path = stopped / "checkpoints" / "state.safetensors"
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    save_file({}, path, header | {"format": "fastlora.state/9"})
    message = "state.safetensors has format 'fastlora.state/9'; this version of fastlora reads 'fastlora.state/1'"
    refused(train("codyra", stopped, resume=True)[0], stopped, message)


def test_every_flipped_bit_is_found(train, tmp_path):
    """In the file of a method that keeps weights: header and tensors."""
    out = tmp_path / "run"
    trainer, _ = train("plain", out)
    trainer.method.begin_task = stop()(trainer.method.begin_task)
    with pytest.raises(Killed):
        trainer.fit()
    path = out / "checkpoints" / "state.safetensors"
    whole, rng = path.read_bytes(), random.Random(0)
    for position in [*rng.sample(range(len(whole)), 40), *range(0, 400, 9), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="state.safetensors (is damaged|has format)"):
            read_state(path)
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="state.safetensors is damaged"):
            read_state(path)
    refused(train("plain", out, resume=True)[0], out, "is damaged: .* Restore it from a copy, or train again")


def test_lost_and_exchanged_files(train, stopped, tmp_path):
    trainer, _ = train("codyra", tmp_path / "other", seed=5)
    trainer.fit()
    adapter = stopped / "adapters" / "task_01.safetensors"
    own = adapter.read_bytes()
    adapter.write_bytes((tmp_path / "other" / "adapters" / "task_01.safetensors").read_bytes())
    message = "not those that .*state.safetensors was written with, so a file in it is of another run"
    refused(train("codyra", stopped, resume=True)[0], stopped, message)
    adapter.unlink()
    message = "adapters holds 0 of the 1 adapter files that .*state.safetensors follows on"
    refused(train("codyra", stopped, resume=True)[0], stopped, message, FileNotFoundError)
    adapter.write_bytes(own)
    (stopped / "checkpoints" / "state.safetensors").unlink()
    message = "state.safetensors is missing, so the 1 finished tasks of .* cannot be taken up"
    refused(train("codyra", stopped, resume=True)[0], stopped, message, FileNotFoundError)


def test_tables_and_log_are_written_again(train, whole, stopped):
    """They follow from the commit point: whatever became of them."""
    for name in FILES:
        (stopped / name).unlink()
    (stopped / "manifest.json").unlink()
    (stopped / ".manifest.json.0123abcd").write_text("half")
    trainer, model = train("codyra", stopped, resume=True)
    trainer.fit()
    assert_same_results(results(stopped, model), whole("codyra"))
    assert not list(stopped.rglob(".*")) and read_run(stopped).status == "finished"


def test_a_finished_run(train, whole, tmp_path):
    out = tmp_path / "run"
    train("codyra", out)[0].fit()
    trainer, model = train("codyra", out, resume=True)
    trainer.method.begin_task = stop(task=1)(trainer.method.begin_task)  # nothing is left to train
    trainer.fit()
    assert_same_results(results(out, model), whole("codyra"))


def test_nothing_to_resume(train, whole, tmp_path):
    trainer, model = train("codyra", tmp_path / "new", resume=True)
    trainer.fit()
    assert_same_results(results(tmp_path / "new", model), whole("codyra"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    with pytest.raises(FileExistsError, match="mine is no run directory .it holds thesis.tex and no manifest.json."):
        train("codyra", tmp_path / "mine", resume=True)
    with pytest.raises(FileExistsError, match="or --resume to go on with it"):
        train("codyra", tmp_path / "new")


def test_a_directory_in_the_making(train, whole, tmp_path):
    """Killed before the first commit: there is no manifest yet."""
    out = tmp_path / "run"
    (out / "adapters").mkdir(parents=True)
    (out / "log.csv").write_text("task,iter")
    (out / ".config.yaml.x1y2z3_4").write_text("half")
    trainer, model = train("codyra", out, resume=True)
    trainer.fit()
    assert_same_results(results(out, model), whole("codyra"))
    assert not list(out.rglob(".*"))


def test_two_processes(train, tmp_path):
    out = tmp_path / "run"
    trainer, _ = train("codyra", out)
    seen, begin_task = [], trainer.method.begin_task

    def second(ctx):
        with pytest.raises(RuntimeError, match="run is in use: another process trains into it"):
            train("codyra", out, resume=True)[0].fit()
        seen.append(ctx.number)
        begin_task(ctx)

    trainer.method.begin_task = second
    trainer.fit()
    assert seen == [1, 2, 3]
    train("codyra", out, resume=True)[0].fit()  # the lock went with the run


def test_after_a_loss_that_is_not_finite(train, whole, tmp_path, capsys):
    out = tmp_path / "run"
    trainer, _ = train("codyra", out)
    trainer.method.extra_loss = lambda ctx: torch.tensor(float("nan")) if ctx.number == 2 else None
    with pytest.raises(FloatingPointError, match="loss is nan at iteration 0 .* of task 2"):
        trainer.fit()
    assert read_run(out).status == "failed"
    trainer, model = train("codyra", out, resume=True, progress=True)
    trainer.fit()
    assert_same_results(results(out, model), whole("codyra"))
    line = capsys.readouterr().out.splitlines()[0]
    assert (
        "resumed after task 1/3; before, the run was stopped by an error (FloatingPointError: the loss is nan" in line
    )
