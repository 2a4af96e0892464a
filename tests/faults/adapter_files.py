"""Adapter files that are damaged, hostile, or of another model."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from faults.case import Outcome, group
from faults.judge import content, harm, refused, right, short, their_refusal, warns, worst
from faults.models import RANK, K, N, ours, theirs, two_linears
from faults.stored import flipped, flips, loading, rewritten, saved, their_load, their_saved
from journal.cases import Net, write_tasks
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora
from fastlora.adapter_file import read_adapter
from fastlora.merge_files import merge_files

files = group("files")
NAN = float("nan")


# ---- damage


@files("an error that names the file, for every flip; the model has not changed", few=150, many=1000)
def flipped_bit_in_an_adapter_file(folder: Path, count: int) -> Outcome:
    """One random bit of the file is another: header, names, settings, tensors."""
    path, model = saved(folder), ours()
    return flipped(path, count, lambda: fastlora.load_adapter(model, path), model)


@flipped_bit_in_an_adapter_file.peft
def _(folder: Path, count: int) -> Outcome:
    path, loaded = their_saved(folder), 0
    right_values = {name: value.clone() for name, value in load_file(path).items()}  # no part of the file any more

    expected = {name.replace(".weight", ".default.weight"): value for name, value in right_values.items()}

    def load() -> None:
        nonlocal loaded
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a warning is as good as an error here
            tensors = dict(their_load(folder).named_parameters())
        loaded += any(not torch.equal(tensors[name], value) for name, value in expected.items())

    errors, _ = flips(path, count, load)
    return right(not loaded, f"{loaded} of {count} flips were loaded as other values", flips=count, found=errors)


@files("an error that names the file, whatever the length; the model has not changed", few=40, many=200)
def truncated_file(folder: Path, count: int) -> Outcome:
    """The file ends early, anywhere; also after no byte at all."""
    path = saved(folder)
    whole = path.read_bytes()
    lengths = [0, *random.Random(0).sample(range(1, len(whole)), count - 1)]

    def shortened(length: int) -> Outcome:
        path.write_bytes(whole[:length])
        return loading(path, "not a readable safetensors file")

    return worst(map(shortened, lengths))


@truncated_file.peft
def _(folder: Path, count: int) -> Outcome:
    path = their_saved(folder)
    whole = path.read_bytes()
    lengths = [0, *random.Random(0).sample(range(1, len(whole)), count - 1)]

    def shortened(length: int) -> Outcome:
        path.write_bytes(whole[:length])
        return their_refusal(lambda: their_load(folder))

    return worst(map(shortened, lengths))


@files("the adapters that were loaded")
def file_overwritten_after_it_was_loaded(folder: Path) -> Outcome:
    """Other bytes are written into the very file whose adapters a model holds."""
    path, model = saved(folder), ours()
    fastlora.load_adapter(model, path)
    before = content(model)
    path.write_bytes(b"\x11" * path.stat().st_size)
    return right(content(model) == before, "the adapters changed with the file")


@file_overwritten_after_it_was_loaded.peft
def _(folder: Path) -> Outcome:
    path = their_saved(folder)
    model = their_load(folder)
    before = content(model)
    path.write_bytes(b"\x11" * path.stat().st_size)
    return right(content(model) == before, "the adapters changed with the file")


@files("an error that names file and module; the model has not changed")
def values_that_are_not_finite(folder: Path) -> Outcome:
    """A NaN in a file whose checksum is right."""
    broken = ours()
    broken[0].lora_b.data[0, 0] = NAN
    fastlora.save_adapter(broken, folder / "adapter.safetensors")
    return loading(folder / "adapter.safetensors", "0 holds non-finite values")


@values_that_are_not_finite.peft
def _(folder: Path) -> Outcome:
    path = their_saved(folder)
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = NAN
    save_file(tensors, path)
    return their_refusal(lambda: their_load(folder), "nan", accepted="loaded")


@files("an error that names file and tensor; the model has not changed")
def tensors_missing_or_too_many(folder: Path) -> Outcome:
    """One tensor is not in the file; one more is; a whole module more is."""
    path = saved(folder)
    tensors, settings = read_adapter(path).tensors, json.loads(read_adapter(path).header["settings"])
    less = {key: value for key, value in tensors.items() if key != "2.gate"}
    more = tensors | {"2.extra": torch.zeros(2)}
    module = tensors | {f"9.{key}": tensors[f"2.{key}"].clone() for key in ("lora_a", "lora_b", "gate")}
    return worst(
        [
            loading(rewritten(path, less), "incomplete", "2.gate"),
            loading(rewritten(saved(folder), more), "incomplete", "2.extra"),
            loading(rewritten(saved(folder), module, settings=json.dumps(settings | {"9": settings["2"]})), "has 9"),
        ]
    )


@tensors_missing_or_too_many.peft
def _(folder: Path) -> Outcome:
    path = their_saved(folder)
    tensors = load_file(path)
    first = next(iter(tensors))
    outcomes = []
    for changed, told in (({k: v for k, v in tensors.items() if k != first}, "missing"),
                          (tensors | {"base_model.model.9.lora_A.weight": torch.zeros(RANK, K)}, "unexpected")):  # fmt: skip
        save_file(changed, path)
        outcomes.append(their_refusal(lambda: their_load(folder), told, accepted=f"loaded with a tensor {told}"))
    return worst(outcomes)


@files("an error that names file and dtype; the model has not changed")
def tensors_of_another_kind(folder: Path) -> Outcome:
    """Integers, booleans and complex numbers where an adapter's values are expected."""
    outcomes = []
    for dtype in (torch.int32, torch.bool, torch.complex64):
        path = saved(folder)
        tensors = read_adapter(path).tensors
        outcomes.append(loading(rewritten(path, {k: v.to(dtype) for k, v in tensors.items()}), str(dtype)[6:]))
    return worst(outcomes)


@tensors_of_another_kind.peft
def _(folder: Path) -> Outcome:
    path = their_saved(folder)
    tensors = load_file(path)
    outcomes = []
    for dtype in (torch.int32, torch.bool, torch.complex64):
        save_file({key: value.to(dtype) for key, value in tensors.items()}, path)
        outcomes.append(their_refusal(lambda: their_load(folder), str(dtype)[6:], accepted=f"loaded {dtype}"))
    return worst(outcomes)


@files("an error that names the file; the model has not changed")
def settings_damaged(folder: Path) -> Outcome:
    """kappa and scaling of the modules: not JSON, of another form, nested a hundred thousand deep, beyond any number."""
    bad = ["{", "[1]", '{"0": {}}', "[" * 100_000, '{"0": {"kappa": NaN, "scaling": 1}}']
    bad += ['{"0": {"kappa": -1, "scaling": 1}}', '{"0": {"kappa": 0, "scaling": ' + "9" * 400 + "}}"]
    bad += ['{"0": {"kappa": 1e300, "scaling": 1}}']
    return worst(loading(rewritten(saved(folder), settings=text), "kappa and scaling") for text in bad)


@settings_damaged.peft
def _(folder: Path) -> Outcome:
    their_saved(folder)
    config = folder / "adapter_config.json"
    whole = config.read_text()
    outcomes = []
    for text in ("{", "[1]", "{}", "[" * 100_000, whole.replace(f'"lora_alpha": {RANK}', '"lora_alpha": NaN')):
        config.write_text(text)
        what = "an alpha of NaN" if "NaN" in text else short(text, 9)
        outcomes.append(their_refusal(lambda: their_load(folder), accepted=f"loaded with {what}"))
    return worst(outcomes)


@files("an error that names the file; the model has not changed")
def settings_of_another_step(folder: Path) -> Outcome:
    """The scaling of one save beside the tensors of another."""
    path = saved(folder)
    file = read_adapter(path)
    settings = {name: each | {"scaling": 2.0} for name, each in file.settings.items()}
    save_file(file.tensors, path, file.header | {"settings": json.dumps(settings)})
    return loading(path, "damaged", "SHA-256")


@settings_of_another_step.peft
def _(folder: Path) -> Outcome:
    (folder / "later").mkdir()
    their_saved(folder)
    their_saved(folder / "later", lora_alpha=2 * RANK)
    shutil.copy(folder / "later" / "adapter_config.json", folder)  # as a kill between two files leaves it
    return their_refusal(lambda: their_load(folder), "alpha", accepted="loaded with the other scaling")


@files("an error that names the file; the model has not changed")
def settings_missing_or_half_written(folder: Path) -> Outcome:
    """What tells kappa and scaling is not there, empty, or ends in the middle."""
    path = saved(folder)
    header = read_adapter(path).header
    half = header["settings"][: len(header["settings"]) // 2]
    outcomes = [loading(rewritten(saved(folder), settings=text), "kappa and scaling") for text in ("", half)]
    file = read_adapter(saved(folder))
    save_file(file.tensors, path, {"format": "fastlora.adapter/1"})
    return worst([*outcomes, loading(path, "kappa and scaling", "settings")])


@settings_missing_or_half_written.peft
def _(folder: Path) -> Outcome:
    their_saved(folder)
    config = folder / "adapter_config.json"
    whole = config.read_text()
    outcomes = []
    for text in ("", whole[: len(whole) // 2], None):
        config.unlink() if text is None else config.write_text(text)
        outcomes.append(their_refusal(lambda: their_load(folder), accepted="loaded"))
    return worst(outcomes)


# ---- another model, and somebody else


@files("an error that names the model's own shapes; the model has not changed")
def adapter_of_another_width(folder: Path) -> Outcome:
    """The file is of a model whose layers are wider."""
    path = folder / "adapter.safetensors"
    fastlora.save_adapter(ours(nn.Sequential(nn.Linear(K, 9), nn.Tanh(), nn.Linear(9, N))), path)
    return loading(path, "0 has shapes", "[8, 4]")


@adapter_of_another_width.peft
def _(folder: Path) -> Outcome:
    theirs(nn.Sequential(nn.Linear(K, 9), nn.Tanh(), nn.Linear(9, N))).save_pretrained(folder)
    return their_refusal(lambda: their_load(folder), "size mismatch", "[9, 4]")


def _another_base() -> nn.Module:
    model = two_linears()
    nn.init.normal_(model[0].bias)
    return model


@files("a warning that names the file: adapters are moved to another model on purpose, too")
def adapter_of_another_base(folder: Path) -> Outcome:
    """The file is loaded into a model of the same shapes with other frozen weights."""
    path, model = saved(folder), ours(_another_base())
    quiet = refused(lambda: fastlora.load_adapter(ours(), path), "other weights", accepted="as it should be")
    found = warns(lambda: fastlora.load_adapter(model, path), path.name, "other weights", without="no warning")
    return worst([found, right(quiet.seen == "as it should be", f"its own base: {quiet.seen}")])


@adapter_of_another_base.peft
def _(folder: Path) -> Outcome:
    import peft

    their_saved(folder)
    return warns(lambda: peft.PeftModel.from_pretrained(_another_base(), folder), "base", without="no warning")


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@files("an error that names the file; nothing of it is executed")
def pickle_with_a_payload(folder: Path) -> Outcome:
    """Code in a pickle, given as adapter file, as a journal's task, as weights to merge into, and as data of CIFAR."""
    from fastlora.continual.datasets.formats import read_pickle

    path, model = folder / "adapter.safetensors", ours()
    journal, _ = write_tasks(folder / "journal", count=2)
    base = Net()
    for target in (path, folder / "journal" / "task_02.safetensors"):
        target.write_bytes(pickle.dumps(Payload(folder / "executed")))
    reads = [
        (lambda: fastlora.load_adapter(model, path), path.name),
        (lambda: journal.rebuild(base), "task_02.safetensors"),
        (lambda: merge_files(path, [folder / "journal" / "task_01.safetensors"], folder / "out"), path.name),
        (lambda: read_pickle(path), path.name),
    ]
    found = worst(refused(work, told, keeps=[model, base, folder]) for work, told in reads)
    return harm("the code was executed") if (folder / "executed").exists() else found


@pickle_with_a_payload.peft
def _(folder: Path) -> Outcome:
    their_saved(folder).unlink()
    torch.save(Payload(folder / "executed"), folder / "adapter_model.bin")
    found = their_refusal(lambda: their_load(folder))
    return harm("the code was executed") if (folder / "executed").exists() else found
