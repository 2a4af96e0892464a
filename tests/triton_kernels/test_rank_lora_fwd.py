"""rank_lora_fwd and rank_lora_dx, variant split with a vector gate, against float64 PyTorch, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from helpers import make_operands, reference_in, relative_error

from fastlora.triton_kernels import common, is_interpreted, rank_lora_dx, rank_lora_fwd, rank_project, tiles

if not is_interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def ours(op, dy, kappa, scaling):
    kappa = torch.tensor(kappa)
    y, s = rank_lora_fwd(*op.tensors(), kappa, scaling)
    dx, p = rank_lora_dx(dy, op.weight, op.lora_a, op.lora_b, op.gate, kappa, scaling)
    return {"y": y, "s": s, "dx": dx, "p": p}


def plain(op, dy, kappa, scaling, dtype):
    results = reference_in(dtype, op, dy, kappa, scaling)
    if dtype == torch.float64:
        op, dy = op.double(), dy.double()
    return {"y": results["y"], "s": op.x @ op.lora_a.t(), "dx": results["dx"], "p": dy @ op.lora_b}


@pytest.fixture
def assert_exact(check):
    def compare(op, dy, kappa=0.3, scaling=1.7):
        truth = plain(op, dy, kappa, scaling, torch.float64)
        results = ours(op, dy, kappa, scaling)
        assert all(value.dtype == op.x.dtype and value.is_contiguous() for value in results.values())
        assert {name: value.shape for name, value in results.items()} == {name: v.shape for name, v in truth.items()}
        check(results, plain(op, dy, kappa, scaling, op.x.dtype), truth)

    return compare


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", (0, 1, 3, 16, 33))
@pytest.mark.parametrize("m", (1, 17))
def test_ragged_sizes_and_ranks(m, r, dtype, assert_exact):
    op = make_operands((m,), 41, 37, r, dtype, bias=r != 3)
    assert_exact(op, torch.randn(m, 37).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tiles(dtype, assert_exact):
    op = make_operands((197,), 70, 40, 33, dtype)
    assert_exact(op, torch.randn(197, 40).to(dtype))


def test_sizes_that_fill_their_tiles(assert_exact):
    op = make_operands((64,), 64, 32, 16, torch.float16)
    assert_exact(op, torch.randn(64, 32).half())


def test_largest_rank(assert_exact):
    op = make_operands((5,), 33, 20, 256)
    assert_exact(op, torch.randn(5, 20))


@pytest.mark.parametrize("kappa", (0.0, 0.5))
def test_gates_at_the_threshold(kappa, assert_exact):
    op = make_operands((17,), 24, 20, 6)
    op.gate = torch.tensor([0.5, -0.5, 0.0, -0.0, 0.50001, -2.0])
    dy = torch.randn(17, 20)
    assert_exact(op, dy, kappa=kappa)
    if kappa:  # exactly +-kappa is dead: only the last two ranks do anything
        y, _ = rank_lora_fwd(*op.tensors(), torch.tensor(kappa), 1.0)
        op.lora_b[:, :4] = 0
        assert torch.equal(y, rank_lora_fwd(*op.tensors(), torch.tensor(kappa), 1.0)[0])


def every_other(t):
    return t.repeat_interleave(2, -1)[..., ::2]


VIEWS = {
    "rows sliced": lambda t: torch.cat((t, t))[: len(t)],
    "columns sliced": lambda t: torch.cat((t, t), -1)[:, : t.shape[1]],
    "every other": every_other,
    "transposed": lambda t: t.t().contiguous().t(),
    "offset": lambda t: torch.cat((torch.zeros(1, dtype=t.dtype), t.flatten()))[1:].view(t.shape),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strided_operands(view, assert_exact):
    op = make_operands((17,), 40, 36, 5, torch.float16)
    strided = VIEWS[view]
    dy = strided(torch.randn(17, 36).half())
    op.x, op.weight, op.lora_a, op.lora_b = (strided(t) for t in (op.x, op.weight, op.lora_a, op.lora_b))
    op.bias, op.gate = every_other(op.bias), every_other(op.gate)
    assert_exact(op, dy)


def test_expanded_rows(assert_exact):
    op = make_operands((1,), 40, 36, 5)
    op.x = op.x.expand(9, 40)
    assert_exact(op, torch.ones(()).expand(9, 36))


@pytest.mark.parametrize("m, n, k, r", [(0, 5, 6, 2), (3, 0, 6, 2), (3, 5, 0, 2), (3, 5, 6, 0), (0, 0, 0, 0)])
def test_empty_sizes(m, n, k, r):
    op = make_operands((m,), k, n, r)
    results, dy = ours(op, torch.randn(m, n), 0.1, 1.0), torch.randn(m, n)
    expected = op.x @ op.weight.t() + op.bias + ((op.x @ op.lora_a.t()) * op.gate) @ op.lora_b.t()
    if k == 0 or r == 0:
        torch.testing.assert_close(results["y"], expected)
    assert [tuple(results[name].shape) for name in ("y", "s", "dx", "p")] == [(m, n), (m, r), (m, k), (m, r)]
    assert not any(value.isnan().any() for value in results.values())
    if n == 0:
        assert results["dx"].eq(0).all() and results["p"].eq(0).all()
    if k == 0:
        assert results["s"].eq(0).all()
    assert dy.shape == results["y"].shape


@pytest.mark.parametrize("name", ("y", "s", "dx", "p"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_planted_error_of_one_percent_fails(dtype, name, check):
    op, dy = make_operands((17,), 41, 37, 3, dtype), torch.randn(17, 37).to(dtype)
    truth, torch_error = (plain(op, dy, 0.3, 1.7, d) for d in (torch.float64, dtype))
    results = ours(op, dy, 0.3, 1.7)
    results[name] = (results[name].double() * 1.01).to(dtype)
    with pytest.raises(AssertionError, match=f"^{name}: error"):
        check(results, torch_error, truth)


@pytest.mark.parametrize("position", ((0, 0), (16, 36)))
def test_one_wrong_element_fails(position, check):
    op, dy = make_operands((17,), 41, 37, 3, torch.bfloat16), torch.randn(17, 37).bfloat16()
    truth, torch_error = (plain(op, dy, 0.3, 1.7, d) for d in (torch.float64, torch.bfloat16))
    results = ours(op, dy, 0.3, 1.7)
    results["y"][position] += 1
    with pytest.raises(AssertionError, match="^y: error"):
        check(results, torch_error, truth)


def test_two_runs_are_bit_equal():
    op, dy = make_operands((50,), 70, 40, 7, torch.float16), torch.randn(50, 40).half()
    first, second = (ours(op, dy, 0.3, 1.7) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_non_finite_values_travel_as_in_torch(bad):
    for spoil in ("x", "weight", "bias", "lora_a", "lora_b", "gate"):
        op = make_operands((17,), 40, 36, 5)
        getattr(op, spoil).view(-1)[3] = bad
        expected = reference_in(torch.float32, op, torch.ones(17, 36), 0.1, 1.0)
        y, _ = rank_lora_fwd(*op.tensors(), torch.tensor(0.1), 1.0)
        torch.testing.assert_close(y, expected["y"], equal_nan=True, msg=spoil)


def test_s_is_the_projection_of_the_forward():
    op = make_operands((17,), 40, 36, 5, torch.bfloat16)
    _, s = rank_lora_fwd(*op.tensors(), torch.tensor(0.0), 1.0)
    assert torch.equal(s, rank_project(op.x, op.lora_a))


def test_bfloat16_rounds_to_nearest_even_in_the_interpreter():
    x = torch.tensor([[1.00390625, 1.01171875, -1.0039, 3e38, 0.0, float("nan"), float("-inf"), 1e-20]])

    @triton.jit
    def round_kernel(x_ptr, out_ptr):
        offs = tl.arange(0, 8)
        tl.store(out_ptr + offs, common.round_to(tl.load(x_ptr + offs), out_ptr.dtype.element_ty))

    out = torch.empty(8, dtype=torch.bfloat16)
    round_kernel[(1,)](x_ptr=x, out_ptr=out)
    torch.testing.assert_close(out, x[0].bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("strides", ((70_000_000, 1), (1, 70_000_000)), ids=("rows apart", "columns apart"))
@pytest.mark.parametrize("name", ("x", "weight", "lora_a", "lora_b", "dy"))
def test_more_than_2_to_the_31_elements(name, strides, spread):
    """40 rows or columns 70 million elements apart: offsets, and one step of 32 along K, pass 2^31."""
    op, dy = make_operands((40,), 40, 40, 40, torch.float16), torch.randn(40, 40).half()
    expected = ours(op, dy, 0.3, 1.7)
    if name == "dy":
        dy = spread(dy, strides)
    else:
        setattr(op, name, spread(getattr(op, name), strides))
    results = ours(op, dy, 0.3, 1.7)
    assert all(torch.equal(results[key], expected[key]) for key in expected)


def test_tiles_come_from_one_table():
    for compute in common.COMPUTE_TYPES:
        for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
            for kernel in ("gemm", "one_pass", "project", "grad"):
                for tile in tiles.tile_configs(kernel, compute, arch).values():
                    assert tile.tuned_on == tiles.UNTUNED
                    assert tile.launch["enable_fp_fusion"] is True


def test_tile_choice(monkeypatch):
    monkeypatch.setattr(tiles, "architecture", lambda tensor: "sm_90")
    gemm = tiles.tile_configs("gemm", "fp16", "sm_90")

    def pick(m, n, k, view=lambda t: t):
        return tiles.pick_gemm_tile(view(torch.zeros(m, k).half()), torch.zeros(n, k).half())

    assert pick(12608, 768, 64) is gemm["large"]
    assert pick(4096, 768, 64) is gemm["medium"]
    assert pick(197, 768, 64) is gemm["small"]
    assert pick(12608, 768, 70) is gemm["ragged"]
    assert pick(12608, 770, 64) is gemm["ragged"]
    assert pick(12608, 768, 64, lambda t: t.t().contiguous().t()) is gemm["ragged"]
    assert pick(12608, 768, 64, lambda t: torch.zeros(12608, 65).half()[:, 1:]) is gemm["ragged"]


def test_tf32_only_where_the_user_allows_it(monkeypatch):
    x = torch.zeros(2, 2)
    monkeypatch.setattr(common, "architecture", lambda tensor: "sm_90")
    assert common.compute_type(x) == "fp32"
    torch.set_float32_matmul_precision("high")
    try:
        assert common.compute_type(x) == "tf32" and common.dot_precision("tf32") == "tf32"
        assert common.compute_type(x.half()) == "fp16" and common.dot_precision("fp16") == "ieee"
        monkeypatch.setattr(common, "architecture", lambda tensor: "gfx942")
        assert common.compute_type(x) == "fp32"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_oracle_sees_a_wrong_scaling():
    """The rank term is a large part of y, so that an error of it alone cannot hide behind the base product."""
    op, dy = make_operands((17,), 41, 37, 3, torch.float16), torch.randn(17, 37).half()
    truth = plain(op, dy, 0.0, 1.7, torch.float64)
    assert relative_error(ours(op, dy, 0.0, 1.7 * 1.01)["y"], truth["y"]) > 2e-3
