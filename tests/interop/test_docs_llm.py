"""Every Python block of docs/llm.md, in order and in one namespace; and every pattern of its table."""

import re
from pathlib import Path

import pytest
from interop.tiny import clip_model, language_model

pytest.importorskip("accelerate", reason="accelerate is not installed (pip install 'fastlora[dev]')")

import fastlora

PAGE = (Path(__file__).parents[2] / "docs" / "llm.md").read_text()


def test_the_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    assert len(blocks) == 5
    namespace = {}
    for block in blocks:
        exec(compile(block, "docs/llm.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "4 adapters, 4,160 trainable parameters" in printed and "mean active rank" in printed
    assert "{'op': 70.0, 'bwt': -15.0}" in printed
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_the_table_of_patterns():
    rows = re.findall(r"^\| (Llama|GPT-2|CLIP)[^|]*\| (.*) \| (.*) \| (.*) \|$", PAGE, flags=re.M)
    # a block has 4 + 3 matrices, 2 + 2, and in each of the two towers 4 + 2; each model has 2 blocks
    expected = {"Llama": (8, 6, 14), "GPT-2": (4, 4, 8), "CLIP": (16, 8, 24)}
    assert {name for name, *_ in rows} == set(expected)
    for name, *cells in rows:
        for cell, count in zip(cells, expected[name]):
            model = clip_model() if name == "CLIP" else language_model(name.lower().replace("-", ""))
            assert len(fastlora.inject(model, rank=2, where=re.findall(r"`([^`]+)`", cell))) == count, (name, cell)
