"""Instructions of the extension's loops, counted by Valgrind: a lost vectorization or a second pass fails here.

The limits are the committed figures and 5 %; what the inner loops need at least is counted by hand below.
"""

from __future__ import annotations

import json
import sys

import instruction_counts
import pytest

pytestmark = pytest.mark.slow

RESULT = json.loads(instruction_counts.RESULT.read_text())
FIGURES = RESULT["figures"]
MERGES = [name for name in FIGURES if not name.endswith("adamw")]
MARGIN, NOISE = 1.05, 0.01
# GCC 11 and Clang 14 take up to three times as many as GCC 12 somewhere, and plain C++ 3.6 times as many as AVX2 or more
ANY_COMPILER = 3.3

# AVX2, 4 rows of 16 elements: the panel's 2 loads; for each row a broadcast and 2 fused multiply-adds; 4 of the loop.
# A row's coefficient, lora_b * (scaling * gate), takes 16.
RANK = (2 + 4 * 3 + 4) / 64 + 16 / instruction_counts.COLS["avx2"]
# AVX2, 8 parameters: a load (3 more are operands), 12 of arithmetic, 3 stores, 3 of the loop
PARAMETER = (1 + 12 + 3 + 3) / 8
# AVX2, 16 float16 elements, by halves: 2 loads that widen; 2 sums; 2 comparisons with zero, 2 blends; 7 to round, with what
# makes all NaN one; 2 to widen; a store; 2 differences. The report: 6 comparisons, 6 absolute values, 2 products, 4 fused
# sums of squares, 8 masks to integers and 8 to join them, 5 to count, 4 to branch.
NEAREST = (2 + 2 + 4 + 7 + 2 + 1 + 2 + 6 + 6 + 2 + 4 + 8 + 8 + 5 + 4) / 16
# bytes of an element of the weight, and of its residual beside it
STORED = {"float16": 2, "bfloat16": 2, "float32": 4}


@pytest.fixture(scope="module")
def counted():
    if why := instruction_counts.obstacle():
        pytest.skip(why)
    return instruction_counts.measure()["figures"]


def limits(figure):
    """As wide as compilers differ; for that of the committed figures so narrow that what is gained must be recorded."""
    if instruction_counts.compiler().split(".")[0] == RESULT["compiler"].split(".")[0]:
        return figure / MARGIN - NOISE, figure * MARGIN + NOISE
    return 0, figure * ANY_COMPILER + NOISE


@pytest.mark.parametrize("name", FIGURES)
def test_no_more_instructions_than_committed(counted, name):
    told = f"{instruction_counts.RESULT.name} has {FIGURES[name]}; if the change is meant, run its command again"
    for key in FIGURES[name].keys() - {"bytes"}:
        least, most = limits(FIGURES[name][key])
        assert least <= counted[name][key] <= most, f"{key}: {told}"


@pytest.mark.parametrize("name", [name for name in MERGES if name.startswith("avx2") and "check" not in name])
def test_a_kept_rank_takes_what_its_products_need(counted, name):
    assert counted[name]["rank"] <= limits(RANK)[1]


def test_loops_take_what_their_arithmetic_needs(counted):
    assert PARAMETER / MARGIN <= counted["avx2 adamw"]["element"] <= limits(PARAMETER)[1]
    assert NEAREST <= counted["avx2 nearest float16"]["element"] <= limits(1.6 * NEAREST)[1]


@pytest.mark.parametrize("name", [name for name in FIGURES if name.startswith("avx2")])
def test_operands_come_from_memory_once(counted, name):
    if name.endswith("adamw"):
        operands = 4 * STORED["float32"]
    else:
        _, work, dtype = name.split()
        operands = STORED[dtype] + {"residual": STORED[dtype], "int8": 1}.get(work, 0)
        operands += instruction_counts.RANKS[0] * 4 / instruction_counts.COLS["avx2"]  # lora_b
    assert counted[name]["bytes"] == pytest.approx(operands, rel=0.15)  # lines that the interpreter takes or leaves


@pytest.mark.parametrize("name", [name for name in FIGURES if name.startswith("avx2")])
def test_vectors_save_more_than_compilers_differ_by(counted, name):
    assert counted[name.replace("avx2", "scalar")]["element"] > ANY_COMPILER * counted[name]["element"]


def test_the_page_shows_what_was_counted():
    page = (instruction_counts.CALLS.parent.parent / "docs/merge.md").read_text()
    first, last = instruction_counts.MARKS
    assert page.partition(first)[2].partition(last)[0].strip() == instruction_counts.table(RESULT)


def test_without_valgrind_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(instruction_counts, "extension", lambda: type("Module", (), {"simd_levels": lambda: ["avx2"]}))
    monkeypatch.setattr(sys, "argv", ["instruction_counts.py"])
    with pytest.raises(SystemExit):
        instruction_counts.main()
    assert "no valgrind on PATH" in capsys.readouterr().err
