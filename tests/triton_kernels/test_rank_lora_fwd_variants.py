"""Variants, row gates and packed projections of rank_lora_fwd and rank_lora_dx, under Triton's interpreter."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from kernel_calls import SCALING, definition, make_call, make_packed, run

from fastlora.triton_kernels import common, is_interpreted, rank_lora_dx, rank_lora_fwd, tiles

if not is_interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
VARIANTS = ("split", "one_pass", "leader")
ONE_LAUNCH = ("one_pass", "leader")


@pytest.fixture
def assert_exact(check):
    def compare(call, results):
        truth = definition(call, torch.float64)
        assert {name: v.shape for name, v in results.items()} == {name: v.shape for name, v in truth.items()}
        assert all(value.dtype == call.op.x.dtype and value.is_contiguous() for value in results.values())
        check(results, definition(call, call.op.x.dtype), truth)

    return compare


# leader runs the K loops of both other variants, so it gets every dtype; they get each dtype once
GATES = [("leader", rows, dtype) for rows in (None, 7, 70) for dtype in DTYPES]
GATES += [(variant, rows, dtype) for variant in VARIANTS[:2] for rows, dtype in zip((None, 7, 70), DTYPES)]
RANKS = [("leader", (3, 0, 5), dtype) for dtype in DTYPES]
RANKS += [(v, ranks, dtype) for v in VARIANTS for ranks, dtype in zip(((0, 0, 0), (4, 4, 4), (16, 48, 16)), DTYPES)]


@pytest.mark.parametrize("variant, gate_rows, dtype", GATES, ids=str)
def test_variants_and_row_gates(variant, gate_rows, dtype, assert_exact):
    """3 row tiles in 2 groups, 2 column tiles; a row tile crosses samples of 10 rows."""
    call = make_call(70, 41, 40, 5, dtype, gate_rows)
    assert_exact(call, run(call, variant))


@pytest.mark.parametrize("variant, ranks, dtype", RANKS, ids=str)
def test_packed_projections(variant, ranks, dtype, assert_exact):
    call = make_packed(40, 41, 36, ranks, dtype)
    assert_exact(call, run(call, variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_tiles_that_are_filled(variant, assert_exact):
    call = make_packed(64, 64, 32, (16, 16, 16), torch.float16)
    assert_exact(call, run(call, variant))


@pytest.mark.parametrize("variant", ONE_LAUNCH)
def test_most_ranks_of_a_projection(variant, assert_exact):
    call = make_call(33, 40, 36, 64, torch.float16)
    assert_exact(call, run(call, variant))
    call = make_packed(33, 40, 36, (64, 1, 64))
    assert_exact(call, run(call, variant))


@pytest.mark.parametrize("r", (65, 256))
@pytest.mark.parametrize("variant", ONE_LAUNCH)
def test_too_many_ranks_are_refused(variant, r):
    text = f'variant "{variant}" was asked for with rank {r}; .* at most 64. Use variant="split".'
    for call in (make_call(3, 8, 9, r), make_packed(3, 8, 3, (0, r, 0))):
        with pytest.raises(RuntimeError, match=text):
            run(call, variant)
        op = call.op
        with pytest.raises(RuntimeError, match=text):
            rank_lora_dx(
                call.dy, op.weight, op.lora_a, op.lora_b, op.gate, call.kappa, 1.0, ranks=call.ranks, variant=variant
            )


CALLS = {
    "plain": lambda: make_call(40, 41, 36, 5),
    "row gate": lambda: make_call(40, 41, 36, 20, torch.bfloat16, 4),
    "packed": lambda: make_packed(17, 41, 36, (3, 0, 5), torch.float16),
}


@pytest.mark.parametrize("kind", CALLS)
def test_s_is_one_in_all_variants_and_two_runs_are_bit_equal(kind):
    call = CALLS[kind]()
    split = run(call)
    for variant in ONE_LAUNCH:
        first, second = run(call, variant), run(call, variant)
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert torch.equal(first["s"], split["s"]) and torch.equal(first["p"], split["p"])


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_given_p_is_used_and_nothing_else_runs(variant, kind, monkeypatch):
    call = CALLS[kind]()
    expected = run(call, variant)
    module, op = sys.modules[rank_lora_dx.__module__], call.op
    for name in ("rank_project", "rank_project_packed"):
        monkeypatch.setattr(module, name, None)
    rest = (call.kappa, SCALING)
    dx, p = rank_lora_dx(
        call.dy, op.weight, op.lora_a, op.lora_b, op.gate, *rest, ranks=call.ranks, variant=variant, p=expected["p"]
    )
    assert p is expected["p"]
    torch.testing.assert_close(dx, expected["dx"])
    if variant != "split":  # no other launch makes s
        y, _ = rank_lora_fwd(*op.tensors(), *rest, ranks=call.ranks, variant=variant)
        assert torch.equal(y, expected["y"])


@pytest.mark.parametrize("m, n, k, r", [(0, 5, 6, 2), (3, 0, 6, 2), (3, 5, 0, 2), (3, 5, 6, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("variant", ONE_LAUNCH)
def test_empty_sizes(variant, m, n, k, r):
    for call in (make_call(m, k, n, r), make_call(m, k, n, r, gate_rows=m), make_packed(m, k, n, (r, 0, r))):
        results, op = run(call, variant), call.op
        # nothing is left of the rank products
        expected = {"y": op.x @ op.weight.t() + op.bias, "s": op.x @ op.lora_a.t(), "dx": call.dy @ op.weight}
        for name in expected:
            torch.testing.assert_close(results[name], expected[name])
        assert results["p"].shape == expected["s"].shape and not results["p"].isnan().any()


def every_other(t):
    return t.repeat_interleave(2, -1)[..., ::2]


VIEWS = {
    "columns sliced": lambda t: torch.cat((t, t), -1)[:, : t.shape[1]],
    "every other": every_other,
    "transposed": lambda t: t.t().contiguous().t(),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("variant", ONE_LAUNCH)
def test_strided_operands(variant, view, assert_exact):
    strided = VIEWS[view]
    for call in (make_call(17, 40, 36, 5, torch.float16, 17), make_packed(17, 40, 36, (3, 0, 5), torch.float16)):
        op = call.op
        call.dy, op.x, op.weight, op.lora_a = (strided(t) for t in (call.dy, op.x, op.weight, op.lora_a))
        op.bias, op.gate = every_other(op.bias), every_other(op.gate)
        if call.ranks is None:
            op.lora_b = strided(op.lora_b)
        else:
            call.kappa = every_other(call.kappa)
        assert_exact(call, run(call, variant))


@pytest.mark.parametrize("strides", ((70_000_000, 1), (1, 70_000_000)), ids=("rows apart", "columns apart"))
@pytest.mark.parametrize("name", ("x", "weight", "lora_a", "lora_b", "dy"))
def test_more_than_2_to_the_31_elements(name, strides, spread):
    """Of leader, whose two K loops are those of split and one_pass."""
    call = make_call(40, 40, 40, 40, torch.float16)
    expected = run(call, "leader")
    owner = call if name == "dy" else call.op
    setattr(owner, name, spread(getattr(owner, name), strides))
    results = run(call, "leader")
    assert all(torch.equal(results[key], expected[key]) for key in expected)


@pytest.mark.parametrize("strides", ((70_000_000, 1), (1, 70_000_000)), ids=("rows apart", "columns apart"))
def test_more_than_2_to_the_31_elements_of_a_packed_weight(strides, spread):
    call = make_packed(5, 40, 14, (3, 4, 5), torch.float16)
    expected = run(call, "one_pass")
    call.op.weight = spread(call.op.weight, strides)
    results = run(call, "one_pass")
    assert all(torch.equal(results[key], expected[key]) for key in expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
@pytest.mark.parametrize("variant", VARIANTS)
def test_non_finite_values_travel_as_in_torch(variant, bad):
    for make in (lambda: make_call(5, 20, 12, 5, gate_rows=5), lambda: make_packed(5, 20, 12, (3, 0, 5))):
        for spoil in ("x", "weight", "bias", "lora_a", "lora_b", "gate"):
            call = make()
            getattr(call.op, spoil).view(-1)[3] = bad
            y, _ = rank_lora_fwd(*call.op.tensors(), call.kappa, SCALING, ranks=call.ranks, variant=variant)
            expected = definition(call, torch.float32)["y"]
            torch.testing.assert_close(y, expected, equal_nan=True, msg=f"{spoil} {call.ranks}")


@pytest.mark.parametrize("kind", CALLS)
def test_planted_errors_of_one_percent_fail(kind, assert_exact):
    call = CALLS[kind]()
    results = run(call, "one_pass")
    for name in results:
        wrong = results | {name: (results[name].double() * 1.01).to(results[name].dtype)}
        with pytest.raises(AssertionError, match=f"^{name}: error"):
            assert_exact(call, wrong)
    if kind != "row gate":  # an error of the rank product alone is below what bfloat16 rounds off
        with pytest.raises(AssertionError, match="^y: error"):
            assert_exact(call, run(call, "one_pass", scaling=SCALING * 1.01))


@pytest.mark.parametrize("kappa", (0.0, 0.5))
def test_gates_at_the_threshold(kappa, assert_exact):
    call = make_call(18, 24, 20, 6, gate_rows=2)
    call.op.gate = torch.tensor([[0.5, -0.5, 0.0, -0.0, 0.50001, -2.0], [2.0, 0.0, 0.5, 0.49999, -0.5, 1.0]])
    call.kappa = torch.full((6,), kappa)
    assert_exact(call, run(call, "one_pass"))


@pytest.mark.parametrize("num_m, num_n, group_m", [(1, 1, 8), (5, 3, 2), (8, 4, 8), (9, 7, 4), (3, 1, 2)])
def test_a_leader_comes_before_the_tiles_that_wait_for_it(num_m, num_n, group_m):
    """What the order of tiles must give so that `leader` cannot wait for ever, with one program or with many."""

    @triton.jit
    def order_kernel(out_ptr, M, N, GROUP_M: tl.constexpr):
        pid_m, pid_n = common.grouped_program(tl.program_id(0), M, N, 16, 16, GROUP_M)
        tl.store(out_ptr + tl.program_id(0) * 2, pid_m)
        tl.store(out_ptr + tl.program_id(0) * 2 + 1, pid_n)

    out = torch.zeros(num_m * num_n, 2, dtype=torch.int32)
    order_kernel[(num_m * num_n,)](out_ptr=out, M=16 * num_m - 3, N=16 * num_n, GROUP_M=group_m)
    index = {tuple(tile): i for i, tile in enumerate(out.tolist())}
    assert len(index) == num_m * num_n
    assert all(index[m, n] < index[m, n + 1] for m in range(num_m) for n in range(num_n - 1))


def test_descriptor_tiles_run_elsewhere(monkeypatch):
    """A tile of the descriptor kernels goes to their launcher, with what the pointer launcher would get."""
    seen = {}

    def tma_gemm(x, weight, bias, down, up, gate, kappa, scaling, s, *, ranks, variant, tile):
        seen.update(s=s, down=down, variant=variant, ranks=ranks, tile=tile)
        return "y", "s"

    name = "fastlora.triton_kernels.rank_lora_tma"
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(tma_gemm=tma_gemm))
    tile = replace(tiles.tile_configs("gemm", "fp32", common.INTERPRETER)["ragged"], tma=True)
    call = make_call(5, 6, 7, 2)
    assert rank_lora_fwd(*call.op.tensors(), call.kappa, 1.0, variant="leader", tile=tile) == ("y", "s")
    assert seen == {"s": None, "down": call.op.lora_a, "variant": "leader", "ranks": None, "tile": tile}
    rank_lora_fwd(*call.op.tensors(), call.kappa, 1.0, tile=tile)
    assert seen["variant"] == "split" and torch.equal(seen["s"], run(call)["s"])


def test_tile_choice(monkeypatch):
    monkeypatch.setattr(tiles, "architecture", lambda tensor: "sm_90")
    one_pass = tiles.tile_configs("one_pass", "fp16", "sm_90")

    def pick(m, n, k, ranks, variant="leader"):
        return tiles.pick_gemm_tile(torch.zeros(m, k).half(), torch.zeros(n, k).half(), variant, ranks)

    assert pick(12608, 768, 64, (16,)) is one_pass["large"]
    assert pick(12608, 768, 64, (64,)) is one_pass["medium"]
    assert pick(12608, 768, 64, (15,)) is one_pass["medium"]
    assert pick(12608, 2304, 64, (16, 0, 16)) is one_pass["large"]
    assert pick(12608, 2304, 64, (16, 17, 16), "one_pass") is one_pass["medium"]
    assert pick(197, 768, 64, (16,)) is one_pass["small"]
    assert pick(12608, 72, 64, (16, 16, 16)) is one_pass["ragged"]  # 24 columns a projection
    assert pick(12608, 768, 64, (16,), "split") is tiles.tile_configs("gemm", "fp16", "sm_90")["large"]
