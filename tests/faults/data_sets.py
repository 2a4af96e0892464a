"""Data sets that are not what they should be, and readers of files that somebody has mutated."""

from __future__ import annotations

import json
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from continual.datasets import layouts
from continual.tiny import tiny_task
from faults.case import Outcome, group
from faults.judge import refused, right, worst
from faults.runs import stopped, trainer
from faults.stored import saved

from fastlora.adapter_file import read_adapter
from fastlora.continual import TaskStream
from fastlora.continual.datasets.catalogue import SOURCES
from fastlora.continual.datasets.coop import coop_split
from fastlora.continual.datasets.formats import read_idx, read_pickle
from fastlora.continual.datasets.images import Decoder
from fastlora.continual.datasets.split import check_split
from fastlora.continual.datasets.verify import check_images
from fastlora.continual.run_state import read_state

files = group("files")


def _split_of(name: str, root: Path) -> Any:
    source = SOURCES[name]
    split = source.read(*source.find(root, source.files))
    check_split(name, split, source.classes)
    return split


@files("an error with the place where the file belongs")
def data_set_or_label_file_missing(folder: Path) -> Outcome:
    """No data set at all; its label file is gone; its split is no JSON."""
    dtd, (labels, split) = SOURCES["DTD"], ("labels/test1.txt", "split_zhou_DescribableTextures.json")
    outcomes = [refused(lambda: _split_of("DTD", folder), "DTD: neither layout is in", "Download it from")]
    layouts.dtd(folder, "coop")
    home = folder / dtd.coop.home
    (home / split).write_text("{")
    outcomes.append(refused(lambda: coop_split(dtd, folder), split, "is not JSON"))
    (home / labels).unlink()
    return worst([*outcomes, refused(lambda: _split_of("DTD", folder), "test1.txt", "missing")])


@files("an error that names the class")
def class_without_images(folder: Path) -> Outcome:
    """A class has lost its images, and one its training images."""
    layouts.dtd(folder, "coop")
    layouts.eurosat(folder, "coop")
    for image in (folder / str(SOURCES["EuroSAT"].coop) / "River").iterdir():
        image.unlink()
    listed = folder / "dtd" / "labels" / "train1.txt"
    listed.write_text("\n".join(line for line in listed.read_text().split() if not line.startswith("blotchy")))
    return worst(
        [
            refused(lambda: _split_of("EuroSAT", folder), "no images in", "River"),
            refused(lambda: _split_of("DTD", folder), "no training images of 1 classes", "'blotchy'"),
        ]
    )


@files("an error that counts and names them, before anything is trained")
def images_missing_or_damaged(folder: Path) -> Outcome:
    """One image is missing, one is a web page, one ends early."""
    layouts.dtd(folder, "coop")
    split = _split_of("DTD", folder)
    paths = [split.folder / name for name in split.train.names]
    paths[0].unlink()
    paths[1].write_bytes(b"<html>404</html>")
    paths[2].write_bytes(layouts.jpeg((10, 20, 30), (200, 200))[:900])
    told = (paths[0].name, paths[1].name, paths[2].name, "1 are missing and 2 cannot be read", "Nothing was trained")
    return refused(lambda: check_images(paths, Decoder(1), "decode"), *told, keeps=[folder])


@files("an error that names the image")
def image_outside_of_its_data_set(folder: Path) -> Outcome:
    """A label file names ../../secret.jpg and /etc/passwd as images."""
    layouts.dtd(folder, "coop")
    path = folder / "dtd" / "split_zhou_DescribableTextures.json"
    whole, outcomes = path.read_text(), []
    first = json.loads(whole)["train"][0][0]
    for image in ("../../secret.jpg", "..\\..\\secret.jpg"):
        path.write_text(whole.replace(f'"{first}"', f'"{image}"'.replace("\\", "\\\\"), 1))
        outcomes.append(refused(lambda: _checked(folder), "lies outside of", "secret.jpg"))
    return worst(outcomes)


def _checked(folder: Path) -> None:
    check_split("DTD", coop_split(SOURCES["DTD"], folder))


@files("figures that are finite, and a loss of zero")
def task_of_one_class(folder: Path) -> Outcome:
    """There is nothing to tell apart in a task of a single class."""
    stream = TaskStream("tiny", [tiny_task("red", 1), tiny_task("green", 3)], held_out=tiny_task("grey", 2))
    run = trainer(folder / "run", stream=stream)
    record = run.fit()
    finite = all(bool(torch.isfinite(value).all()) for value in run.model.state_dict().values())
    return right(finite and record.own[1][0] == 100.0, f"accuracies {record.own}")


# ---- fuzzing


def _mutated(whole: bytes, choose: random.Random) -> bytes:
    """Some bytes of the first 400 are others, gone, doubled or many more; or the end is missing."""
    changed, head = bytearray(whole), min(len(whole), 400)
    for _ in range(choose.randint(1, 4)):
        at = choose.randrange(head)
        kind = choose.randrange(6)
        if kind == 0:
            changed[at] = choose.randrange(256)
        elif kind == 1:
            del changed[at : at + choose.randint(1, 9)]
        elif kind == 2:
            changed[at:at] = changed[at : at + choose.randint(1, 30)]
        elif kind == 3:
            changed[at : at + 8] = choose.choice(
                [b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, b"[" * 3000, b"9" * 400]
            )
        elif kind == 4:
            del changed[choose.randrange(1, len(whole)) :]
        else:
            changed[at : at + 4] = choose.choice([b'":{}', b"null", b"-1e9", b"\xc3\x28\xf0\x9f", b'"\\ud'])
        head = max(1, min(len(changed), 400))
        changed = changed or bytearray(b"\0")
    return bytes(changed)


def _sources(folder: Path) -> dict[str, tuple[bytes, Path, Callable[[], Any]]]:
    """Name -> (a good file, where it lies, what reads it)."""
    layouts.dtd(folder, "coop")
    adapter = saved(folder)
    state = stopped(folder / "run", "plain") / "checkpoints" / "state.safetensors"
    idx, cifar = folder / "file-idx1-ubyte", folder / "cifar"
    idx.write_bytes(b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (3, 4, 5)) + bytes(60))
    cifar.write_bytes(pickle.dumps({"fine_labels": [1, 2], "data": torch.zeros(2, 9).numpy(), "names": ["a", "b"]}))
    split = folder / "dtd" / "split_zhou_DescribableTextures.json"
    labels = folder / "dtd" / "labels" / "test1.txt"
    reads = {
        adapter: lambda: read_adapter(adapter),
        state: lambda: read_state(state),
        idx: lambda: read_idx(idx),
        cifar: lambda: read_pickle(cifar),
        split: lambda: _checked(folder),
        labels: lambda: _split_of("DTD", folder),
    }
    return {path.name: (path.read_bytes(), path, read) for path, read in reads.items()}


@files("an error for users or a result; no other error, no crash, none longer than a second", few=600, many=12_000)
def readers_of_mutated_files(folder: Path, count: int) -> Outcome:
    """Headers of adapter files, commit points, idx files, pickles, JSON splits and label lists, mutated at random."""
    sources, choose, bad, longest, errors = _sources(folder), random.Random(0), [], 0.0, 0
    each = count // len(sources)
    for name, (whole, path, read) in sources.items():
        for _ in range(each):
            path.write_bytes(_mutated(whole, choose))
            started = time.perf_counter()
            try:
                read()
            except (ValueError, OSError):  # DataError among them
                errors += 1
            except Exception as error:
                bad.append(f"{name}: {type(error).__name__}: {error}")
            longest = max(longest, time.perf_counter() - started)
        path.write_bytes(whole)
    counts = {"files": each * len(sources), "errors": errors, "longest ms": round(1000 * longest, 1)}
    if bad:
        return Outcome("unclear error", f"{len(bad)} times, such as {bad[0][:150]}", counts)
    return right(longest < 1.0, f"one took {longest:.1f} s", **counts)
