"""What a table's tile becomes for the operands at hand, seen through the op: the launchers get variant and tile."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import make_operands, relative_error

import fastlora
from fastlora import reference
from fastlora.ops import dispatch, rank_lora_linear
from fastlora.ops.plan import make_plan

POINTERS = {"block_m": 32, "block_n": 32, "block_k": 32, "num_warps": 1, "num_stages": 1, "group_m": 2}
DESCRIPTORS = POINTERS | {"tma": True}


@pytest.fixture
def table(monkeypatch, tmp_path):
    """table(variant, tile): a user's table with one forward entry for 40 rows, 48 -> 32, rank 16, float16."""
    path = tmp_path / "dispatch.json"
    monkeypatch.setenv("FASTLORA_TABLE", str(path))

    def write(variant, tile):
        row = {"device": "interpreter", "role": "fwd", "m": 64, "n": 32, "k": 48, "r": 16, "aligned": True, "parts": 1}
        row |= {"dtype": "float16", "variant": variant, "tile": tile, "measured": "by a test", "time_us": 1.0}
        path.write_text(json.dumps({"version": 1, "entries": [row]}))
        dispatch.reload()

    yield write
    monkeypatch.undo()
    dispatch.reload()


def operands():
    return make_operands((40,), 48, 32, 16, torch.float16)


def plan_of(op):
    return make_plan("fwd", op.x, op.weight, 16, None, "triton")


@pytest.mark.parametrize("tile", [POINTERS, DESCRIPTORS], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("variant", ["split", "one_pass", "leader"])
def test_an_entry_decides_variant_and_tile(variant, tile, table):
    table(variant, tile)
    op = operands()
    plan = plan_of(op)
    assert plan.variant == variant and plan.tile.tma == (tile is DESCRIPTORS) and "by a test" in plan.reason
    choice = fastlora.explain(*op.tensors(), backend="triton")
    assert choice.variant == variant and ("descriptors" in choice.tile) == (tile is DESCRIPTORS)
    y = rank_lora_linear(*op.tensors(), 0.1, backend="triton")
    assert relative_error(y, reference.rank_lora_linear(*op.double().tensors(), 0.1)) < 1e-3


def test_the_library_may_be_the_fastest(table):
    table("library", None)
    op = operands()
    assert fastlora.explain(*op.tensors(), backend="triton").backend == "torch"
    assert torch.equal(
        rank_lora_linear(*op.tensors(), 0.1, backend="triton"), rank_lora_linear(*op.tensors(), 0.1, backend="torch")
    )


def test_rows_that_are_not_aligned_keep_the_variant_and_lose_the_tile(table):
    table("one_pass", POINTERS)
    op = operands()
    op.x = torch.cat((op.x, op.x), 1)[:, 3:51]
    plan = plan_of(op)
    assert (plan.variant, plan.tile) == ("one_pass", None) and "measured on aligned rows" in plan.reason


def test_descriptors_give_way_and_explain_says_so(table):
    table("split", DESCRIPTORS)
    op = operands()
    op.weight = torch.cat((op.weight, op.weight), 1)[:, 4:52]  # rows start 8 bytes into 16
    plan = plan_of(op)
    assert (plan.variant, plan.tile) == ("split", None)
    assert "pointer kernel instead of the table's descriptors: rows of weight do not all start" in plan.reason
    assert "pointer kernel instead" in str(fastlora.explain(*op.tensors(), backend="triton"))
    y = rank_lora_linear(*op.tensors(), 0.1, backend="triton")
    assert relative_error(y, reference.rank_lora_linear(*op.double().tensors(), 0.1)) < 1e-3
