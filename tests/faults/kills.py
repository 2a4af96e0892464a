"""kill -9 at random moments, and what is there afterwards."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from faults.case import Outcome, group
from faults.judge import content, right, worst
from faults.models import theirs
from faults.runs import Stopped, finished, resumed, trainer
from journal.cases import Net, learn, same, settle
from killing import killed_after
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora
from fastlora.adapter_file import read_adapter
from fastlora.files import write_atomically
from fastlora.merge_files import merge_files

processes = group("process")


def wide(rank: int = 256) -> nn.Module:
    """Large files, so that many kills fall into a write."""
    model = nn.Sequential(nn.Linear(1024, 1024))
    fastlora.inject(model, rank=rank, where=["0"])
    return model


@processes("the old file or the new one, whole", few=6, many=200)
def killed_while_an_adapter_is_saved(folder: Path, count: int) -> Outcome:
    """kill -9 at random moments of save_adapter, over the same file."""
    path, model = folder / "a.safetensors", wide()
    fastlora.save_adapter(model, path)

    def save_the_next() -> None:
        for parameter in fastlora.adapter_parameters(model):
            parameter.data.add_(1)
        fastlora.save_adapter(model, path)

    bad = 0
    for seed in range(count):
        killed_after(random.Random(seed).uniform(0.0, 0.15), lambda: [save_the_next() for _ in range(50)])
        try:
            file = read_adapter(path)
            bad += len({round(float(t.flatten()[0] - s.flatten()[0])) for t, s in zip(*_both(file, model))}) != 1
        except ValueError:
            bad += 1
    return right(not bad, f"{bad} of {count} kills left a file of no step", kills=count, whole=count - bad)


@killed_while_an_adapter_is_saved.peft
def _(folder: Path, count: int) -> Outcome:
    """Each step saves tensors full of its number beside a config with the same alpha."""
    import json

    model = theirs(nn.Sequential(nn.Linear(1024, 1024)), where=["0"], r=256)

    def save_the_next(step: int) -> None:
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.data.fill_(step)
        model.peft_config["default"].lora_alpha = step
        model.save_pretrained(folder)

    save_the_next(1)
    mixed = unreadable = 0
    for seed in range(count):
        killed_after(random.Random(seed).uniform(0.0, 0.25), lambda: [save_the_next(step) for step in range(2, 60)])
        try:
            alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
            values = {float(t.flatten()[0]) for t in load_file(folder / "adapter_model.safetensors").values()}
            mixed += values != {float(alpha)}
        except Exception:
            unreadable += 1
    bad = f"{mixed} of {count} kills mixed two steps, {unreadable} left nothing readable"
    return right(not mixed + unreadable, bad, kills=count, whole=count - mixed - unreadable)


def _both(file: Any, model: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    adapter = next(fastlora.adapters(model))[1]
    return list(file.adapter("0")), [adapter.lora_a, adapter.lora_b, adapter.gate]


@processes("the journal with the task or without it, and the next append goes on", few=5, many=100)
def killed_while_a_task_is_written(folder: Path, count: int) -> Outcome:
    """kill -9 at random moments of Journal.append."""
    journal, model = fastlora.Journal(folder / "journal"), wide()

    def append_the_next() -> None:
        for parameter in fastlora.adapter_parameters(model):
            parameter.data.normal_()
        journal.append(model)

    for seed in range(count):
        torch.manual_seed(seed)  # the children draw other adapters each
        killed_after(random.Random(seed).uniform(0.0, 0.3), lambda: [append_the_next() for _ in range(3)])
        numbers = [entry.number for entry in journal]
        if numbers != list(range(1, len(numbers) + 1)):
            return right(False, f"tasks {numbers} after a kill")
        torch.manual_seed(10_000 + seed)
        append_the_next()
        if len(journal) > 6:  # each append reads what is there
            shutil.rmtree(journal.directory)
    return right(True, "", kills=count)


def _learn_task_by_task(folder: Path, tasks: int) -> None:
    """What a user's script does: the state is rebuilt from the untouched base, and each task is learned, kept, merged."""
    model, journal = Net(), fastlora.Journal(folder / "journal")
    model.load_state_dict(load_file(folder / "base.safetensors"))
    journal.rebuild(model)
    for task in range(len(journal) + 1, tasks + 1):
        journal.append(learn(model, task), f"task {task}")
        settle(model)
    from safetensors.torch import save

    write_atomically(folder / "merged.safetensors", save(model.state_dict()))


@processes("the weights of a sequence that nobody killed, bit for bit: no update twice, none lost", few=6, many=200)
def killed_between_journal_and_merge(folder: Path, count: int) -> Outcome:
    """kill -9 at random moments of a script that learns tasks, appends them to a journal and merges; then started again."""
    ended = kills = bad = 0
    expected = folder / "whole"
    expected.mkdir()
    save_file(Net().state_dict(), expected / "base.safetensors")
    started = time.monotonic()
    _learn_task_by_task(expected, 5)
    typical = time.monotonic() - started
    choose = random.Random(0)
    while kills < count or not ended:
        place = folder / f"run{ended}"
        if not place.exists():
            place.mkdir()
            shutil.copy(expected / "base.safetensors", place)
        if killed_after(choose.uniform(0.0, typical), lambda place=place: _learn_task_by_task(place, 5)):
            kills += 1
            continue
        found, whole = (load_file(each / "merged.safetensors") for each in (place, expected))
        bad += not same(found, whole)
        ended += 1
    return right(not bad, f"{bad} of {ended} sequences have other weights", kills=kills, sequences=ended)


@processes("the merged file whole, or the one from before", few=5, many=100)
def killed_while_weights_are_merged(folder: Path, count: int) -> Outcome:
    """kill -9 at random moments of `fastlora merge`, over the output of an earlier one."""
    model = nn.Sequential(nn.Linear(1024, 1024))
    base, adapter, out = (folder / f"{name}.safetensors" for name in ("base", "adapter", "out"))
    save_file(model.state_dict(), base)
    fastlora.inject(model, rank=16, where=["0"])
    model[0].lora_b.data.normal_()
    fastlora.save_adapter(model, adapter)
    merge_files(base, [adapter], out)
    whole, kept = out.read_bytes(), content(base)
    bad = 0
    for seed in range(count):
        merges = lambda: [merge_files(base, [adapter], out, force=True) for _ in range(20)]  # noqa: E731
        killed_after(random.Random(seed).uniform(0.0, 0.2), merges)
        bad += out.read_bytes() != whole or content(base) != kept
    return right(not bad, f"{bad} of {count} kills left a part of a file", kills=count)


@processes("the bits of a run that nobody killed: weights, figures, tables, log, adapters", few=3, many=200)
def killed_while_training(folder: Path, count: int) -> Outcome:
    """kill -9 at random moments of a run of three tasks, and the same command again until it ends."""
    started = time.monotonic()
    expected = finished(folder / "whole")
    typical = time.monotonic() - started
    choose, kills, ends = random.Random(0), 0, 0
    found: list[Outcome] = []
    while kills < count or not ends:
        out = folder / f"run{ends}"
        if killed_after(choose.uniform(0.05, 0.9) * typical, lambda out=out: finished(out)):
            kills += 1
            continue
        found.append(resumed(out, expected))
        ends += 1
    bad = [outcome for outcome in found if outcome.verdict != "survived"]
    return bad[0] if bad else right(True, "", f"{kills} of {kills} kills resumed", kills=kills, runs=ends)


@processes("the bits of a run that nobody stopped", few=1, many=20)
def stopped_at_a_random_step(folder: Path, count: int) -> Outcome:
    """A run ends in the middle of a random iteration of a random task, and is resumed."""
    expected, choose, found = finished(folder / "whole"), random.Random(0), []
    for place in range(count):
        run, at = trainer(folder / f"run{place}"), choose.randrange(9)

        def after_step(ctx: Any, at: int = at) -> None:
            if 3 * (ctx.number - 1) + ctx.step["iteration"] == at:
                raise Stopped

        run.method.after_step = after_step
        try:
            run.fit()
            found.append(Outcome("unclear error", "the run did not stop"))
        except Stopped:
            found.append(resumed(folder / f"run{place}", expected))
    return worst(found)
