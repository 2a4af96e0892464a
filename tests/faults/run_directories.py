"""Run directories that are damaged, exchanged, full, or resumed as something else."""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from continual.resume.cases import CONFIGS, FILES
from continual.tiny import tiny_clip, tiny_stream, tiny_task, tokenize
from faults.case import Outcome, group
from faults.judge import harm, refused, right, worst
from faults.runs import finished, resumed, stopped, trainer
from faults.stored import flips
from safetensors import safe_open
from safetensors.torch import save_file

from fastlora.continual import LoRAConfig, TaskStream, Trainer, read_run
from fastlora.continual.run_state import read_state

files = group("files")


@files("an error that names the file, for every flip and every length", few=60, many=1000)
def flipped_bit_in_a_commit_point(folder: Path, count: int) -> Outcome:
    """One random bit of a run's state.safetensors is another, with weights in it; or the file ends early."""
    path = stopped(folder / "run", "plain") / "checkpoints" / "state.safetensors"
    errors, clear = flips(path, count, lambda: read_state(path), path.name)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    half = refused(trainer(folder / "run", "plain", resume=True).fit, path.name, "damaged", keeps=[folder])
    if errors < count:
        return harm(f"{count - errors} of {count} flips were read", flips=count, found=errors)
    counts = {"flips": count, "found": errors}
    return Outcome(half.verdict if clear == count else "unclear error", half.seen, counts)


def _other_version(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    save_file({}, path, header | {"format": "fastlora.state/9"})


@files("an error that names the file; nothing in the directory has changed")
def file_of_a_run_lost_or_exchanged(folder: Path) -> Outcome:
    """The commit point is missing or of another version; an adapter file is missing or of another run."""
    source, other = stopped(folder / "source"), stopped(folder / "other", seed=5)
    state, adapter = Path("checkpoints/state.safetensors"), Path("adapters/task_01.safetensors")
    damages: dict[str, Callable[[Path], Any]] = {
        "state.safetensors is missing": lambda out: (out / state).unlink(),
        "fastlora.state/9": lambda out: _other_version(out / state),
        "holds 0 of the 1 adapter files": lambda out: (out / adapter).unlink(),
        "a file in it is of another run": lambda out: shutil.copy(other / adapter, out / adapter),
    }
    outcomes = []
    for place, (told, damage) in enumerate(damages.items()):
        out = folder / f"run{place}"
        shutil.copytree(source, out)
        damage(out)
        outcomes.append(refused(trainer(out, resume=True).fit, told, keeps=[out]))
    return worst(outcomes)


@files("written again: the results of a run that nobody disturbed")
def tables_of_a_run_lost(folder: Path) -> Outcome:
    """Tables, log, configuration and manifest are gone, and a killed writer left half a file."""
    expected, out = finished(folder / "whole"), stopped(folder / "run")
    for name in FILES:
        (out / name).unlink()
    (out / "manifest.json").unlink()
    (out / ".manifest.json.0123abcd").write_text("half")
    found, left = resumed(out, expected), [path.name for path in out.rglob(".*")]
    return worst([found, right(not left, f"left behind: {left}")])


@files("an error that tells every difference; nothing in the directory has changed")
def run_resumed_with_other_options(folder: Path) -> Outcome:
    """Another rank and learning rate, another seed, another method."""
    out = stopped(folder / "run")
    config = dataclasses.replace(CONFIGS["codyra"], lr=0.5, rank=7)

    def again(method: Any = CONFIGS["codyra"], **options: Any) -> Callable[[], Any]:
        options = {
            "seed": 1,
            "log_every": 2,
            "checkpoints": "all",
            "progress": False,
            "out": out,
            "resume": True,
        } | options
        return Trainer(tiny_clip(), tokenize, tiny_stream(), method, **options).fit

    return worst(
        [
            refused(again(config), "method.lr was 0.01 and is 0.5 now", "rank was 4 and is 7", keeps=[out]),
            refused(again(seed=2), "seed was 1 and is 2 now", keeps=[out]),
            refused(again(LoRAConfig()), "method was 'codyra' and is 'lora' now", keeps=[out]),
        ]
    )


@files("an error that names the weight; nothing in the directory has changed")
def run_resumed_with_another_model(folder: Path) -> Outcome:
    """Another value in one weight, another depth, another dtype."""
    out, other = stopped(folder / "run"), tiny_clip()
    other.visual.proj.data[0, 0] += 1
    models = {"visual.proj has other values": other, "is new": tiny_clip(layers=2), "float16": tiny_clip().half()}
    return worst(
        refused(trainer(out, model=model, resume=True).fit, "another model", told, keeps=[out])
        for told, model in models.items()
    )


@files("an error that names the task and what of it differs; nothing in the directory has changed")
def run_resumed_with_other_data(folder: Path) -> Outcome:
    """Tasks in another order, a task less, another held-out set."""
    out, (red, green, blue) = stopped(folder / "run"), tiny_stream().tasks
    grey = tiny_stream().held_out
    streams = {
        "the tasks were red, green, blue": TaskStream("tiny", [green, red, blue], held_out=grey),
        "is no task of the run": TaskStream("tiny", [red, green, tiny_task("pink", 2)], held_out=grey),
        "held-out set is another": TaskStream("tiny", [red, green, blue], held_out=tiny_task("brown", 3)),
    }
    return worst(
        refused(trainer(out, stream=stream, resume=True).fit, told, keeps=[out]) for told, stream in streams.items()
    )


@files("an error that names the file; the run goes on from its last task to the same bits", few=2, many=12)
def disk_full_in_a_run(folder: Path, count: int) -> Outcome:
    """Files of a run may grow to some bytes and no further (RLIMIT_FSIZE), from 200 bytes to 40 kilobytes."""
    expected, outcomes = finished(folder / "whole"), []
    for place in range(count):
        out, room = folder / f"run{place}", int(200 * 200 ** (place / max(count - 1, 1)))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            outcomes.append(refused(lambda o=out: trainer(o).fit(), "was not written", "room"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        outcomes.append(resumed(out, expected))
    return worst(outcomes)


@files("an error that names the directory and says what to do; nothing in it has changed")
def run_directory_that_cannot_be_used(folder: Path) -> Outcome:
    """In a directory that is missing or read-only, over a run that is there, over somebody's own files."""
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.tex").write_text("all of it")
    stopped(folder / "run")
    (folder / "closed").mkdir(mode=0o555)
    calls = {
        "missing is no directory": lambda: trainer(folder / "missing" / "run"),
        "run exists already": lambda: trainer(folder / "run"),
        "mine exists already": lambda: trainer(folder / "mine"),
        "no run directory": lambda: trainer(folder / "mine", resume=True),
    }
    outcomes = [refused(lambda c=call: c().fit(), told, keeps=[folder]) for told, call in calls.items()]
    if os.geteuid() == 0:
        os.setuid(65534)  # for good: the case ends here, and so does its process
    return worst([*outcomes, refused(lambda: trainer(folder / "closed" / "run"), "closed cannot be written")])


@files("an error that names the file")
def files_of_a_run_half_written(folder: Path) -> Outcome:
    """Manifest, configuration or metrics end in the middle, a table ends within a row, and the run is read."""
    source, outcomes = stopped(folder / "source"), []
    for name in ("manifest.json", "config.yaml", "accuracy.csv", "metrics.json"):
        out = folder / name.partition(".")[0]
        shutil.copytree(source, out)
        text = (out / name).read_text()
        # what ends between two entries, or within a number, is not noticed: these files have no checksum, and are written
        # in one step, and anew from the commit point
        ends = {"accuracy.csv": len(text.rpartition(",")[0]), "config.yaml": text.find("method:")}
        (out / name).write_text(text[: ends.get(name, len(text) // 2)])
        outcomes.append(refused(lambda o=out: read_run(o), name, "Restore it", keeps=[out]))
    return worst(outcomes)
