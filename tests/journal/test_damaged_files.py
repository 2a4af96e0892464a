"""Journals with something wrong in their files: nothing is changed and nothing appended."""

import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from journal.cases import Net, learn, not_finite, rewrite, same, state, write_tasks
from torch import nn

import fastlora
from fastlora.adapter_file import read_adapter


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-30] ^= 4
    path.write_bytes(content)


def pickled(path):
    torch.save({"lora_a": torch.zeros(3)}, path)


def of_another_base(path):
    write_tasks(path.parent.parent / "foreign", seed=5)
    shutil.copy(path.parent.parent / "foreign" / path.name, path)


def of_another_task(path):
    shutil.copy(path.parent / "task_03.safetensors", path)


def of_no_journal(path):
    fastlora.save_adapter(learn(Net(), 2), path)


def of_the_old_format(path):
    from safetensors.torch import save_file

    file = read_adapter(path)
    header = {key: file.header[key] for key in ("settings", "task", "task_name")}
    save_file(file.tensors, path, header | {"format": "fastlora.adapter/1"})


def entry(**changed):
    """Entries of the header are others, with a right checksum; None takes one out."""

    def damage(path):
        file = read_adapter(path)
        header = {key: file.header[key] for key in ("task", "task_name", "base", "merge")} | changed
        model = learn(Net(), 2)
        fastlora.save_adapter(model, path, {key: value for key, value in header.items() if value is not None})

    return damage


def without_a_checksum(path):
    from safetensors.torch import save_file

    file = read_adapter(path)
    save_file(file.tensors, path, file.header | {"format": "fastlora.adapter/1"})


def too_wide(path):
    rewrite(path, learn(Net(width=10), 2))


def of_other_modules(path):
    model = nn.Sequential(nn.Linear(8, 8))
    fastlora.inject(model, rank=2, where=["0"])
    rewrite(path, model)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "task_02.safetensors is not a readable safetensors file .* Restore it from a copy"),
        (flip, "task_02.safetensors is damaged: its content has another SHA-256 .* Restore it from a copy"),
        (pickled, "task_02.safetensors is not a readable safetensors file"),
        (lambda path: path.write_bytes(b""), "task_02.safetensors is not a readable safetensors file"),
        (Path.unlink, r"task_02.safetensors is missing; .* Put the file back, or leave the task out .*tasks="),
        (of_another_base, "task_02.safetensors belongs to another base model than .*task_01.safetensors"),
        (of_another_task, "task_02.safetensors holds task 3, not 2"),
        (of_no_journal, "names no base model .format 'fastlora.adapter/2'.* Merge it by itself"),
        (of_the_old_format, "names no base model .format 'fastlora.adapter/1'.* Merge it by itself"),
        (without_a_checksum, "names no base model .format 'fastlora.adapter/1'.* Merge it by itself"),
        (entry(task="two"), "task_02.safetensors does not tell its task, .*ValueError.*'two'.* Put back the file"),
        (entry(task=None), "task_02.safetensors does not tell its task, .*KeyError: 'task'"),
        (entry(base="[1]"), "task_02.safetensors does not tell .*base is no mapping of names"),
        (entry(base='{"a": 1}'), "task_02.safetensors does not tell .*base is no mapping of names"),
        (entry(merge="{"), "task_02.safetensors does not tell .*JSONDecodeError"),
        (not_finite, "task_02.safetensors: attn.k holds non-finite values"),
        (too_wide, r"attn.in_proj_weight has shape \[24, 8\]; with 10 rows in lora_b of attn.q it must have 30 rows"),
        (of_other_modules, "Net has no weight for the adapter of 0"),
    ],
)
def test_a_bad_file_changes_no_weight(journal, damage, message):
    """The first task's file is whole, so that merging as one reads would have changed the model."""
    damage(journal.directory / "task_02.safetensors")
    model = Net()
    before = state(model)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        journal.rebuild(model)
    assert same(state(model), before)
    journal.rebuild(model, after=1)  # what comes before it is not affected


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink, of_another_base, of_the_old_format])
def test_nothing_is_appended_to_a_bad_journal(journal, damage):
    model = Net()
    journal.rebuild(model)
    damage(journal.directory / "task_02.safetensors")
    files = sorted(os.listdir(journal.directory))
    with pytest.raises((ValueError, FileNotFoundError), match="task_02.safetensors"):
        journal.append(learn(model, 4))
    assert sorted(os.listdir(journal.directory)) == files


def test_every_flipped_bit_is_found(journal):
    path = journal.directory / "task_01.safetensors"
    whole, choose = path.read_bytes(), random.Random(0)
    for bit in choose.sample(range(8 * len(whole)), 1000):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(ValueError, match="task_01.safetensors"):
            read_adapter(path)
    for length in choose.sample(range(len(whole)), 200):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="task_01.safetensors"):
            read_adapter(path)
    path.write_bytes(whole)
    read_adapter(path)
