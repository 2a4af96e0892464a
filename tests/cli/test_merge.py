"""`fastlora merge`: adapter files into a file of weights."""

import os
import re

import torch
from cli.tiny import tiny
from helpers import run
from safetensors.torch import load_file, save_file

import fastlora
from fastlora import merge_files


def test_merge_of_files_is_the_merge_of_the_trainer(capsys, tmp_path, trained):
    """Task by task from the base to the last checkpoint, bit for bit, q, k and v rows of the packed weight included."""
    first, second = (trained / "adapters" / f"task_0{i}.safetensors" for i in (1, 2))
    assert run(capsys, "merge", "base.safetensors", first, "--out", "one.safetensors")[0] == 0
    code, out, _ = run(capsys, "merge", "one.safetensors", second, "--out", "two.safetensors")
    assert code == 0 and "written: two.safetensors" in out
    for name, number in (("one", 1), ("two", 2)):
        merged, expected = (
            load_file(f"{name}.safetensors"),
            load_file(trained / "checkpoints" / f"task_0{number}.safetensors"),
        )
        assert merged.keys() == expected.keys()
        for key in merged:
            assert torch.equal(merged[key], expected[key]), key


def test_merge_of_a_journal_at_once(capsys, tmp_path, trained):
    first, second = (trained / "adapters" / f"task_0{i}.safetensors" for i in (1, 2))
    code, out, _ = run(capsys, "merge", "base.safetensors", first, second, "--out", "two.safetensors")
    assert code == 0 and f"{first}\n" in out and f"{second}\n" in out and out.count("modules merged by") == 2
    merged, expected = load_file("two.safetensors"), load_file(trained / "checkpoints" / "task_02.safetensors")
    assert merged.keys() == expected.keys() and all(torch.equal(merged[key], expected[key]) for key in merged)
    assert run(capsys, "merge", "base.safetensors", second, "--out", "alone.safetensors")[0] == 0  # task 1 dropped
    model = tiny().model
    fastlora.Journal(trained / "adapters").rebuild(model, tasks=[2])
    alone = load_file("alone.safetensors")
    assert all(torch.equal(value, alone[key]) for key, value in model.state_dict().items())


def test_merge_in_another_order_than_that_of_the_journal(capsys, tmp_path, trained):
    first, second = (trained / "adapters" / f"task_0{i}.safetensors" for i in (1, 2))
    for files in ((second, first), (first, first)):
        code, _, err = run(capsys, "merge", "base.safetensors", *files, "--out", "out.safetensors")
        assert code == 1 and "merged in the order of its tasks, each once" in err
    assert not (tmp_path / "out.safetensors").exists()


def test_merge_into_weights_that_are_not_the_base(capsys, tmp_path, trained):
    first, second = (trained / "adapters" / f"task_0{i}.safetensors" for i in (1, 2))
    state = load_file("base.safetensors")
    state["logit_scale"] += 1
    save_file(state, tmp_path / "other.safetensors")
    run(capsys, "merge", "base.safetensors", first, "--out", "one.safetensors")
    for base, message in (
        ("one.safetensors", "one.safetensors differs from the adapters' base model .* it has been merged already"),
        ("other.safetensors", "other.safetensors differs .* another model of the same shapes"),
    ):
        code, _, err = run(capsys, "merge", base, first, second, "--out", "out.safetensors")
        assert code == 1 and re.search(message, err)
    assert not (tmp_path / "out.safetensors").exists()


def test_merge_of_files_of_which_the_last_is_damaged(capsys, tmp_path, trained):
    first, second = (trained / "adapters" / f"task_0{i}.safetensors" for i in (1, 2))
    (tmp_path / "out.safetensors").write_text("mine")
    content = bytearray(second.read_bytes())
    content[-9] ^= 8
    second.write_bytes(content)
    code, out, err = run(capsys, "merge", "base.safetensors", first, second, "--out", "out.safetensors", "--force")
    assert code == 1 and out == "" and f"{second} is damaged" in err
    assert (tmp_path / "out.safetensors").read_text() == "mine"


def test_merge_never_overwrites_unless_told(capsys, tmp_path, trained):
    adapter = trained / "adapters" / "task_01.safetensors"
    (tmp_path / "out.safetensors").write_text("mine")
    code, _, err = run(capsys, "merge", "base.safetensors", adapter, "--out", "out.safetensors")
    assert code == 1 and "out.safetensors exists; it is not overwritten without --force" in err
    assert (tmp_path / "out.safetensors").read_text() == "mine"
    assert run(capsys, "merge", "base.safetensors", adapter, "--out", "out.safetensors", "--force")[0] == 0
    assert load_file("out.safetensors").keys() == load_file("base.safetensors").keys()


def test_merge_of_what_does_not_fit(capsys, tmp_path, trained):
    adapter = trained / "adapters" / "task_01.safetensors"
    state = load_file("base.safetensors")
    cases = {
        "other": (
            {"fc.weight": torch.zeros(2, 2)},
            "has no weight for the adapter of visual.transformer.resblocks.0.attn.q",
        ),
        "narrow": (
            state | {"transformer.resblocks.0.attn.in_proj_weight": torch.zeros(9, 32)},
            "in_proj_weight is float32[9, 32], there float32[96, 32]",
        ),
    }
    for name, (content, message) in cases.items():
        save_file(content, tmp_path / f"{name}.safetensors")
        code, _, err = run(capsys, "merge", f"{name}.safetensors", adapter, "--out", "out.safetensors")
        assert code == 1 and message in err
    for base, file, message in (
        ("run/log.csv", adapter, "run/log.csv is not a readable safetensors file"),
        ("base.safetensors", "base.safetensors", "has format None"),
        ("absent.safetensors", adapter, "absent.safetensors"),
    ):
        code, _, err = run(capsys, "merge", base, file, "--out", "out.safetensors")
        assert code == 1 and message in err
    code, _, err = run(capsys, "merge", "base.safetensors", adapter, "--out", "missing/out.safetensors")
    assert code == 1 and "missing is no directory" in err
    assert not (tmp_path / "out.safetensors").exists() and not list(tmp_path.glob(".*"))


def test_merge_refuses_a_broken_adapter(capsys, tmp_path, trained):
    model = tiny().model
    fastlora.inject(model, rank=2)
    model.visual.transformer.resblocks[0].attn.k.lora_a.data[:] = float("nan")
    fastlora.save_adapter(model, tmp_path / "broken.safetensors")
    code, _, err = run(capsys, "merge", "base.safetensors", "broken.safetensors", "--out", "out.safetensors")
    assert code == 1 and "visual.transformer.resblocks.0.attn.k" in err and not (tmp_path / "out.safetensors").exists()


def test_weights_that_are_replaced_while_they_are_read(capsys, monkeypatch, tmp_path, trained):
    """Their header is read in one opening and their tensors in another."""
    base, opened = tmp_path / "base.safetensors", merge_files.safe_open
    (tmp_path / "other.safetensors").write_bytes(base.read_bytes())

    def replaced(path, framework):
        file = opened(path, framework)
        os.replace(tmp_path / "other.safetensors", base)
        return file

    monkeypatch.setattr(merge_files, "safe_open", replaced)
    adapter = trained / "adapters" / "task_01.safetensors"
    code, _, err = run(capsys, "merge", "base.safetensors", adapter, "--out", "out.safetensors")
    assert code == 1 and "base.safetensors was replaced while it was read. Start again" in err
    assert not (tmp_path / "out.safetensors").exists()
