"""rank_lora_grad against float64 autograd by both paths, under Triton's interpreter; [R] gates, one projection."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import make_operands, reference_in

from fastlora.triton_kernels import (
    TileConfig,
    is_interpreted,
    rank_lora_dx,
    rank_lora_fwd,
    rank_lora_grad,
    rank_project,
)
from fastlora.triton_kernels.rank_grad_columns import num_row_splits
from fastlora.triton_kernels.rank_lora_grad import grad_path

if not is_interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("dlora_a", "dlora_b", "dgate")
PATHS = ("one_read", "columns")


def ours(op, dy, kappa, scaling, path="columns", **needs):
    s, p = op.x @ op.lora_a.t(), dy @ op.lora_b if path == "columns" else None
    call = (op.x, s, dy, p, op.lora_a, op.lora_b, op.gate, torch.tensor(kappa), scaling)
    return dict(zip(NAMES, rank_lora_grad(*call, **needs, path=path)))


def plain(op, dy, kappa, scaling, dtype):
    return reference_in(dtype, op, dy, kappa, scaling)


@pytest.fixture
def assert_exact(check):
    def compare(op, dy, kappa=0.3, scaling=1.7, paths=PATHS, **needs):
        exact, torch_error = (plain(op, dy, kappa, scaling, dtype) for dtype in (torch.float64, op.x.dtype))
        for path in paths:
            results = ours(op, dy, kappa, scaling, path, **needs)
            results = {name: value for name, value in results.items() if value is not None}
            truth = {name: exact[name] for name in results}
            assert all(value.dtype == torch.float32 and value.is_contiguous() for value in results.values())
            assert {name: v.shape for name, v in results.items()} == {name: v.shape for name, v in truth.items()}
            check(results, torch_error, truth)

    return compare


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", (1, 3, 16, 33))
@pytest.mark.parametrize("m", (1, 17))
def test_ragged_sizes_and_ranks(m, r, dtype, assert_exact):
    op = make_operands((m,), 41, 37, r, dtype)
    assert_exact(op, torch.randn(m, 37).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tiles_and_row_ranges(dtype, assert_exact):
    op = make_operands((197,), 40, 70, 33, dtype)
    assert_exact(op, torch.randn(197, 70).to(dtype))


def test_largest_rank(assert_exact):
    op = make_operands((5,), 33, 20, 256)
    assert_exact(op, torch.randn(5, 20), paths=("columns",))
    op = make_operands((5,), 33, 20, 64)
    assert_exact(op, torch.randn(5, 20), paths=("one_read",))


def test_many_blocks_of_the_gate_gradient(assert_exact):
    op = make_operands((3,), 24, 600, 2)
    assert_exact(op, torch.randn(3, 600))


def test_row_ranges_of_several_tiles(assert_exact):
    """38 tiles of 16 rows in 32 ranges: 19 ranges of two tiles, and 13 that are empty but added all the same."""
    op, tile = make_operands((600,), 9, 7, 2), TileConfig(16, 32, 0, 1, 1)
    assert num_row_splits(m=600, blocks=2, block_m=16) == 32
    assert_exact(op, torch.randn(600, 7), paths=("columns",), tile=tile)


@pytest.mark.parametrize("need_a, need_b, need_gate", list(itertools.product((False, True), repeat=3)))
def test_only_what_is_needed(need_a, need_b, need_gate, assert_exact):
    op, dy = make_operands((40,), 41, 37, 3), torch.randn(40, 37)
    assert_exact(op, dy, need_a=need_a, need_b=need_b, need_gate=need_gate)
    for path in PATHS:
        results = ours(op, dy, 0.3, 1.7, path, need_a=need_a, need_b=need_b, need_gate=need_gate)
        assert [results[name] is not None for name in NAMES] == [need_a, need_b, need_gate]


@pytest.mark.parametrize("unused, needs", [("p", {"need_a": False}), ("s", {"need_b": False})])
def test_what_is_not_needed_is_not_read(unused, needs):
    op, dy = make_operands((40,), 41, 37, 3), torch.randn(40, 37)
    kappa, given = torch.tensor(0.3), {"s": op.x @ op.lora_a.t(), "p": dy @ op.lora_b}
    call = {"lora_a": op.lora_a, "lora_b": op.lora_b, "gate": op.gate, "kappa": kappa, "scaling": 1.7} | needs
    expected = rank_lora_grad(x=op.x, dy=dy, **given, **call)
    other_side = {"p": {"x": torch.full_like(op.x, float("nan"))}, "s": {"dy": torch.full_like(dy, float("nan"))}}
    poisoned = (
        {"x": op.x, "dy": dy} | other_side[unused] | given | {unused: torch.full_like(given[unused], float("nan"))}
    )
    for left, right in zip(expected[:3], rank_lora_grad(**poisoned, **call)):
        assert (left is None and right is None) or torch.equal(left, right)


def test_s_and_p_are_computed_where_they_are_not_given():
    op, dy = make_operands((40,), 41, 37, 3), torch.randn(40, 37)
    kappa = torch.tensor(0.3)
    s, p = rank_project(op.x, op.lora_a), rank_project(dy, op.lora_b.t())
    rest = (op.lora_a, op.lora_b, op.gate, kappa, 1.7)
    given = rank_lora_grad(op.x, s, dy, p, *rest)
    computed = rank_lora_grad(op.x, None, dy, None, *rest, path="columns")
    assert all(torch.equal(left, right) for left, right in zip(given, computed))
    *_, p_of_one_read = rank_lora_grad(op.x, s, dy, None, *rest, need_p=True, path="one_read")
    torch.testing.assert_close(p_of_one_read, p)


@pytest.mark.parametrize("needs", ({}, {"need_b": False}), ids=("gate from dB", "gate from dA"))
@pytest.mark.parametrize("kappa", (0.0, 0.5))
def test_gates_at_the_threshold(kappa, needs, assert_exact):
    op = make_operands((17,), 24, 20, 6)
    op.gate = torch.tensor([0.5, -0.5, 0.0, -0.0, 0.50001, -2.0])
    dy = torch.randn(17, 20)
    assert_exact(op, dy, kappa=kappa, **needs)
    for path in PATHS:
        dgate = ours(op, dy, kappa, 1.7, path, **needs)["dgate"]
        # kappa = 0: a gate that is exactly zero goes on learning; else exactly +-kappa gets nothing
        assert dgate.ne(0).tolist() == ([True] * 6 if kappa == 0 else [False] * 4 + [True] * 2)


@pytest.mark.parametrize("view", ("transposed", "columns sliced", "one of two transposed", "expanded"))
def test_strided_operands(view, assert_exact):
    op, dy = make_operands((40,), 41, 37, 3, torch.float16), torch.randn(40, 37).half()
    if view == "columns sliced":
        op.x, dy = (torch.cat((t, t), 1)[:, : t.shape[1]] for t in (op.x, dy))
    elif view == "expanded":
        dy = torch.ones((), dtype=torch.float16).expand(40, 37)
    else:
        op.x = op.x.t().contiguous().t()
        dy = dy.t().contiguous().t() if view == "transposed" else dy
    op.lora_a, op.lora_b = op.lora_a.t().contiguous().t(), op.lora_b.t().contiguous().t()
    op.gate = op.gate.repeat_interleave(2)[::2]
    assert_exact(op, dy)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("strides", ((70_000_000, 1), (1, 70_000_000)), ids=("rows apart", "columns apart"))
@pytest.mark.parametrize("name", ("x", "dy", "lora_a", "lora_b"))
def test_more_than_2_to_the_31_elements(name, strides, path, spread):
    """40 rows or columns 70 million elements apart: offsets, and one step of 32 rows, pass 2^31."""
    tensors = {"x": torch.randn(40, 40), "dy": torch.randn(40, 40), "s": torch.randn(40, 40), "p": torch.randn(40, 40)}
    tensors |= {"lora_a": torch.randn(40, 40), "lora_b": torch.randn(40, 40)}
    tensors = {key: value.half() for key, value in tensors.items()}
    call = {
        "gate": torch.randn(40),
        "kappa": torch.tensor(0.3),
        "scaling": 1.7,
        "need_b": name != "lora_a",
        "path": path,
    }
    expected = rank_lora_grad(**tensors, **call)
    results = rank_lora_grad(**tensors | {name: spread(tensors[name], strides)}, **call)
    assert all(left is right is None or torch.equal(left, right) for left, right in zip(results, expected))


@pytest.mark.parametrize("m, n, k, r", [(0, 5, 6, 2), (3, 0, 6, 2), (3, 5, 0, 2), (3, 5, 6, 0)])
def test_empty_sizes_give_zeros(m, n, k, r):
    op = make_operands((m,), k, n, r)
    results = ours(op, torch.randn(m, n), 0.1, 1.0)
    assert [tuple(results[name].shape) for name in NAMES] == [(r, k), (n, r), (r,)]
    assert all(value.eq(0).all() for value in results.values())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_planted_error_of_one_percent_fails(dtype, name, path, check):
    op, dy = make_operands((17,), 41, 37, 16, dtype), torch.randn(17, 37).to(dtype)
    truth, torch_error = (plain(op, dy, 0.3, 1.7, d) for d in (torch.float64, dtype))
    results, truth = ours(op, dy, 0.3, 1.7, path), {key: truth[key] for key in NAMES}
    check(results, torch_error, truth)
    results[name] *= 1.01
    with pytest.raises(AssertionError, match=f"^{name}: error"):
        check(results, torch_error, truth)


def test_nothing_is_read_on_the_host(monkeypatch):
    """kappa and gate stay on the device: on a GPU, each of these would wait for it."""
    op, dy, kappa = make_operands((17,), 24, 20, 3), torch.randn(17, 20), torch.tensor(0.3)

    def refuse(*_):
        raise AssertionError("a tensor was read on the host")

    for method in ("item", "__bool__", "__float__", "__int__", "__index__", "tolist", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, method, refuse)
    rank_lora_fwd(*op.tensors(), kappa, 1.7)
    rank_lora_dx(dy, op.weight, op.lora_a, op.lora_b, op.gate, kappa, 1.7)
    rank_lora_grad(op.x, None, dy, None, op.lora_a, op.lora_b, op.gate, kappa, 1.7)


@pytest.mark.parametrize("path", PATHS)
def test_two_runs_are_bit_equal(path):
    op, dy = make_operands((197,), 40, 36, 5, torch.float16), torch.randn(197, 36).half()
    first, second = (ours(op, dy, 0.3, 1.7, path) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_the_gate_gradient_agrees_from_both_sides():
    op, dy = make_operands((50,), 40, 36, 5), torch.randn(50, 36)
    from_b = ours(op, dy, 0.3, 1.7, need_a=False)["dgate"]
    from_a = ours(op, dy, 0.3, 1.7, need_b=False)["dgate"]
    torch.testing.assert_close(from_a, from_b, rtol=1e-5, atol=1e-5)


def test_another_tile_changes_nothing_but_rounding():
    op, dy, kappa = make_operands((50,), 40, 36, 5), torch.randn(50, 36), torch.tensor(0.3)
    call = (op.x, None, dy, None, op.lora_a, op.lora_b, op.gate, kappa, 1.7)
    expected = rank_lora_grad(*call)[:3]
    for tile in (TileConfig(16, 64, 0, 1, 1), TileConfig(16, 64, 32, 1, 1)):
        for left, right in zip(expected, rank_lora_grad(*call, tile=tile)):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_row_ranges_are_bounded_and_never_more_than_the_tiles():
    assert num_row_splits(m=1, blocks=4, block_m=64) == 1
    assert num_row_splits(m=12608, blocks=24, block_m=64) == 21
    assert num_row_splits(m=10**7, blocks=1, block_m=64) == 32
    assert num_row_splits(m=12608, blocks=4096, block_m=64) == 1


def test_the_path_is_chosen_by_bytes():
    """As the rule says: partial sums of 128 rows against those rows of dy."""
    tile, wide = TileConfig(128, 64, 64, 8, 4), 768
    assert grad_path(4 * wide, wide, (16,), 2, tile) == "one_read"
    assert grad_path(wide, wide, (16,), 2, tile) == "one_read"
    assert grad_path(wide, 4 * wide, (16,), 2, tile) == "columns"
    assert grad_path(wide, wide, (64,), 2, tile) == "columns"
    assert grad_path(wide, wide, (16, 16, 16), 2, tile) == "one_read"
    assert grad_path(wide, wide, (16,), 2, None) == "columns"
