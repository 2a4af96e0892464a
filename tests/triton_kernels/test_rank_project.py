"""rank_project and rank_project_packed against float64 PyTorch, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error

from fastlora.triton_kernels import is_interpreted, rank_project, rank_project_packed, tiles

if not is_interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def make_packed(m, d, ranks, dtype=torch.float32):
    """dy, lora_b flat, and its matrices."""
    matrices = [(torch.randn(d, r) / max(d, 1) ** 0.5).to(dtype) for r in ranks]
    return torch.randn(m, 3 * d).to(dtype), torch.cat([b.flatten() for b in matrices]), matrices


def product(dy, matrices):
    width = dy.shape[1] // 3
    return torch.cat([share @ b for share, b in zip(dy.split(width, 1) if width else [dy] * 3, matrices)], 1)


def assert_exact(ours, dy, matrices, check):
    truth, plain = product(dy.double(), [b.double() for b in matrices]), product(dy, matrices)
    assert ours.dtype == dy.dtype and ours.is_contiguous() and ours.shape == truth.shape
    check({"y": ours}, {"y": plain}, {"y": truth})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, k, r", [(1, 7, 1), (17, 41, 3), (70, 64, 33), (64, 96, 16)])
def test_one_projection(m, k, r, dtype, check):
    x, down = torch.randn(m, k).to(dtype), (torch.randn(r, k) / k**0.5).to(dtype)
    s = rank_project(x, down)
    check({"y": s}, {"y": x @ down.t()}, {"y": x.double() @ down.double().t()})
    assert torch.equal(s, rank_project(x, down.t().contiguous().t()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "m, d, ranks", [(17, 41, (3, 0, 5)), (70, 64, (16, 32, 16)), (1, 7, (1, 1, 1)), (40, 33, (0, 0, 40))]
)
def test_packed_projections(m, d, ranks, dtype, check):
    dy, flat, matrices = make_packed(m, d, ranks, dtype)
    assert_exact(rank_project_packed(dy, flat, ranks), dy, matrices, check)


def test_largest_ranks(check):
    dy, flat, matrices = make_packed(5, 20, (100, 56, 100))
    assert_exact(rank_project_packed(dy, flat, (100, 56, 100)), dy, matrices, check)


@pytest.mark.parametrize("m, d, ranks", [(0, 4, (1, 2, 3)), (4, 0, (1, 2, 3)), (4, 4, (0, 0, 0)), (0, 0, (0, 0, 0))])
def test_empty_sizes(m, d, ranks):
    dy, flat, _ = make_packed(m, d, ranks)
    p = rank_project_packed(dy, flat, ranks)
    assert p.shape == (m, sum(ranks)) and p.eq(0).all()
    s = rank_project(dy, torch.randn(sum(ranks), 3 * d))
    assert s.shape == (m, sum(ranks)) and (d > 0 or s.eq(0).all())


@pytest.mark.parametrize(
    "view",
    (
        lambda t: torch.cat((t, t), -1)[:, : t.shape[1]],
        lambda t: t.repeat_interleave(2, -1)[:, ::2],
        lambda t: t.t().contiguous().t(),
        lambda t: torch.cat((torch.zeros(1, dtype=t.dtype), t.flatten()))[1:].view(t.shape),
    ),
    ids=("columns sliced", "every other", "transposed", "offset"),
)
def test_strided_rows(view, check):
    dy, flat, matrices = make_packed(17, 40, (3, 0, 5), torch.float16)
    assert_exact(rank_project_packed(view(dy), flat, (3, 0, 5)), dy, matrices, check)


def test_a_part_without_ranks_is_neither_read_nor_written():
    dy, flat, matrices = make_packed(17, 40, (3, 0, 5))
    expected = product(dy, matrices)
    dy[:, 40:80] = float("nan")
    torch.testing.assert_close(rank_project_packed(dy, flat, (3, 0, 5)), expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_non_finite_values_travel_as_in_torch(bad):
    dy, flat, matrices = make_packed(17, 40, (3, 2, 5))
    dy[3, 41] = matrices[2][7, 1] = bad
    flat = torch.cat([b.flatten() for b in matrices])
    torch.testing.assert_close(rank_project_packed(dy, flat, (3, 2, 5)), product(dy, matrices), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_planted_error_of_one_percent_fails_and_two_runs_are_bit_equal(dtype, check):
    dy, flat, matrices = make_packed(50, 40, (3, 4, 5), dtype)
    p = rank_project_packed(dy, flat, (3, 4, 5))
    assert torch.equal(p, rank_project_packed(dy, flat, (3, 4, 5)))
    with pytest.raises(AssertionError, match="^y: error"):
        assert_exact((p.double() * 1.01).to(dtype), dy, matrices, check)


def test_the_oracle_sees_ranks_of_another_part():
    dy, flat, matrices = make_packed(17, 40, (4, 4, 4))
    assert relative_error(rank_project_packed(dy, flat, (5, 4, 3)), product(dy, matrices)) > 0.1


@pytest.mark.parametrize("strides", ((70_000_000, 1), (1, 70_000_000)), ids=("rows apart", "columns apart"))
def test_more_than_2_to_the_31_elements(strides, spread):
    dy, flat, _ = make_packed(40, 14, (3, 4, 5), torch.float16)
    expected = rank_project_packed(dy, flat, (3, 4, 5))
    assert torch.equal(rank_project_packed(spread(dy, strides), flat, (3, 4, 5)), expected)


def test_tile_choice(monkeypatch):
    monkeypatch.setattr(tiles, "architecture", lambda tensor: "sm_90")
    ranks = tiles.tile_configs("project", "fp16", "sm_90")
    x = torch.zeros(8, 64).half()
    chosen = {r: tiles.pick_rank_tile("project", r, x) for r in (1, 64, 128, 100)}
    assert chosen == {1: ranks["narrow"], 64: ranks["narrow"], 128: ranks["wide"], 100: ranks["ragged"]}
    # 128 ranks beside some that 16 does not divide
    assert tiles.pick_rank_tile("project", 128, x, aligned=False) is ranks["ragged"]
    assert tiles.pick_rank_tile("project", 64, x, aligned=False) is ranks["narrow"]
    assert tiles.pick_rank_tile("project", 64, x.t()) is ranks["ragged"]
