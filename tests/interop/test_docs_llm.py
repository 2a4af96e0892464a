"""Every pattern of the table in docs/llm.md; its blocks run with those of all pages."""

import re
from pathlib import Path

import pytest
from interop.tiny import clip_model, language_model

pytest.importorskip("accelerate", reason="accelerate is not installed (pip install 'fastlora[dev]')")

import fastlora

PAGE = (Path(__file__).parents[2] / "docs" / "llm.md").read_text()


def test_the_table_of_patterns():
    rows = re.findall(r"^\| (Llama|GPT-2|CLIP)[^|]*\| (.*) \| (.*) \| (.*) \|$", PAGE, flags=re.M)
    # a block has 4 + 3 matrices, 2 + 2, and in each of the two towers 4 + 2; each model has 2 blocks
    expected = {"Llama": (8, 6, 14), "GPT-2": (4, 4, 8), "CLIP": (16, 8, 24)}
    assert {name for name, *_ in rows} == set(expected)
    for name, *cells in rows:
        for cell, count in zip(cells, expected[name]):
            model = clip_model() if name == "CLIP" else language_model(name.lower().replace("-", ""))
            assert len(fastlora.inject(model, rank=2, where=re.findall(r"`([^`]+)`", cell))) == count, (name, cell)
