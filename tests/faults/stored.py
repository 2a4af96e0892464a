"""Adapter files of both libraries: written, loaded, rewritten, and flipped bit by bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from faults.case import Outcome
from faults.judge import content, harm, refused
from faults.models import ours, theirs, two_linears
from safetensors.torch import save_file
from torch import nn

import fastlora
from fastlora.adapter_file import read_adapter


def saved(folder: Path, **options: Any) -> Path:
    path = folder / "adapter.safetensors"
    fastlora.save_adapter(ours(**options), path)
    return path


def their_saved(folder: Path, **options: Any) -> Path:
    theirs(**options).save_pretrained(folder)
    return folder / "adapter_model.safetensors"


def their_load(folder: Path) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(two_linears(), folder)


def loading(path: Path, *told: str, **options: Any) -> Outcome:
    """Loading this file into a model with adapters must be refused."""
    model = ours()
    return refused(lambda: fastlora.load_adapter(model, path), path.name, *told, keeps=[model], **options)


def rewritten(path: Path, tensors: dict[str, torch.Tensor] | None = None, **header: str) -> Path:
    """The file with other tensors or entries of its header, as somebody could write it who knows the format."""
    file = read_adapter(path)
    known = file.header | {"format": "fastlora.adapter/1"} | header  # the older format has no checksum in the way
    save_file(file.tensors if tensors is None else tensors, path, known)
    return path


def flips(path: Path, count: int, load: Callable[[], Any], *told: str) -> tuple[int, int]:
    """(errors, errors that hold the texts of `told`) among so many loads of a file in which one bit is another."""
    whole, errors, clear = path.read_bytes(), 0, 0
    for bit in random.Random(0).sample(range(8 * len(whole)), min(count, 8 * len(whole))):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            load()
        except Exception as error:
            errors += 1
            clear += isinstance(error, ValueError) and all(text in str(error) for text in told)
    path.write_bytes(whole)
    return errors, clear


def flipped(path: Path, count: int, load: Callable[[], Any], keeps: nn.Module) -> Outcome:
    before = content(keeps)
    errors, clear = flips(path, count, load, path.name)
    if content(keeps) != before:
        return Outcome("half done", "the model changed", {"flips": count, "found": errors})
    if errors < count:
        return harm(f"{count - errors} of {count} flips were loaded", flips=count, found=errors)
    return Outcome(
        "survived" if clear == count else "unclear error", "each is refused", {"flips": count, "found": errors}
    )
