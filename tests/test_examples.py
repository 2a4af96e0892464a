"""The examples run as they stand, and what they print is right."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from fastlora.continual.metrics import trace

FOLDER = Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(f"examples.{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def llm_stream():
    for name in ("transformers", "accelerate"):
        pytest.importorskip(name, reason=f"{name} is not installed (pip install 'fastlora[dev]')")
    return example("llm_stream")


def test_a_stream_of_language_tasks_prints_both_matrices_and_their_figures(capsys):
    module = llm_stream()
    module.main(["--steps", "20"])
    tables = capsys.readouterr().out.split("\n\n")
    assert [table.strip().split(",")[0] for table in tables] == ["LoRA", "CoDyRA"]
    kept = {}
    for table in tables:
        *rows, figures = [line for line in table.strip().splitlines()][1:]
        values = [[float(value) for value in re.findall(r"-?[\d.]+", row)] for row in rows]
        assert [row[:8].strip() for row in rows] == list(module.TASKS)
        matrix = [row[:-1] for row in values]
        op, bwt, learning = map(float, re.findall(r"-?[\d.]+", figures))
        expected = trace(matrix)
        assert op == pytest.approx(expected["op"], abs=0.11) and bwt == pytest.approx(expected["bwt"], abs=0.21)
        assert learning > 25, "chance is 10 %, and 25 % for sorting"
        kept[table.strip().split(",")[0]] = [row[-1] for row in values]
    assert kept["LoRA"] == [16.0] * 4 and all(4 < rank < 13 for rank in kept["CoDyRA"])


def test_answers_and_labels_of_the_language_tasks():
    module = llm_stream()
    for task in module.TASKS:
        for row in module.rows(task, 3, seed=1):
            digits, answer = row["input_ids"][1:5].tolist(), row["input_ids"][6:].tolist()
            right = {"copy": digits, "add one": [(d + 1) % 10 for d in digits], "sort": sorted(digits),
                     "reverse": digits[::-1]}  # fmt: skip
            assert answer == right[task] and row["labels"].tolist() == [-100] * 6 + answer


def test_open_clips_own_loop_trains_the_adapters_and_the_checkpoint_loads_plainly(capsys, tmp_path):
    pytest.importorskip("open_clip_train.train", reason="this open_clip_torch has no open_clip_train")
    import open_clip

    module = example("open_clip_training")
    module.main(["--epochs", "1", "--pictures", "256", "--out", str(tmp_path / "adapted.safetensors")])
    printed = capsys.readouterr().out
    assert "42 adapters" in printed and float(re.search(r"differ .* by ([\d.e-]+)", printed)[1]) < 1e-5
    # another weight than the shipped one, under the plain model's names
    before = open_clip.create_model(module.NAME, pretrained=str(module.WEIGHTS)).state_dict()
    after = open_clip.create_model(module.NAME, pretrained=str(tmp_path / "adapted.safetensors")).state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(
        name.endswith(("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight")) for name in changed
    )
