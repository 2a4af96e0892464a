"""rank_lora_grad with row gates, packed projections, several row blocks a program; what it reads, and how often."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import Operands, make_operands, reference_in

from fastlora.triton_kernels import TileConfig, is_interpreted, rank_grad_one_read, rank_lora_grad

if not is_interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("dlora_a", "dlora_b", "dgate", "p")
PATHS = ("one_read", "columns")
RANKS = ((3, 0, 5), (4, 4, 4), (0, 17, 1))


def split(op, dy, ranks):
    """One projection's operands and dy after the other; lora_b of `op` flat, gate stacked."""
    width = dy.shape[-1] // 3
    matrices = op.lora_b.split([width * r for r in ranks])
    for part, (a, b, gate) in enumerate(zip(op.lora_a.split(ranks), matrices, op.gate.split(ranks))):
        own = slice(part * width, (part + 1) * width)
        yield Operands(op.x, op.weight[own], None, a, b.view(width, -1), gate), dy[..., own]


def packed_operands(m, k, width, ranks, dtype=torch.float32):
    parts = [make_operands((m,), k, width, r, dtype, bias=False) for r in ranks]
    stacked = (torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "lora_a", "gate"))
    weight, lora_a, gate = stacked
    lora_b = torch.cat([part.lora_b.reshape(-1) for part in parts])
    return Operands(parts[0].x, weight, None, lora_a, lora_b, gate)


def plain(op, dy, kappa, scaling, dtype, ranks=None):
    """Gradients of the definition in `dtype`, and p."""
    if ranks is None:
        found = reference_in(dtype, op, dy, kappa, scaling)
        return found | {"p": (dy.to(dtype) @ op.lora_b.to(dtype)).flatten(0, -2)}
    kappas = kappa.split(ranks) if isinstance(kappa, torch.Tensor) else (kappa,) * 3
    parts = [plain(*own, kap, scaling, dtype) for own, kap in zip(split(op, dy, ranks), kappas)]
    dims = {"y": 1, "dlora_a": 0, "dlora_b": 0, "dgate": 0, "p": 1}
    flat = [part | {"dlora_b": part["dlora_b"].reshape(-1)} for part in parts]
    return {name: torch.cat([part[name] for part in flat], dim) for name, dim in dims.items()}


def ours(op, dy, kappa, scaling, **options):
    kappa = torch.as_tensor(kappa, dtype=torch.float32)
    x, dy = (t.flatten(0, -2) for t in (op.x, dy))
    s = options.pop("s", None)
    call = (x, s, dy, None, op.lora_a, op.lora_b, op.gate, kappa)
    return dict(zip(NAMES, rank_lora_grad(*call, scaling, **{"need_p": True} | options)))


@pytest.fixture
def assert_exact(check):
    def compare(op, dy, kappa=0.3, scaling=1.7, ranks=None, **options):
        exact, torch_error = (plain(op, dy, kappa, scaling, dtype, ranks) for dtype in (torch.float64, op.x.dtype))
        results = ours(op, dy, kappa, scaling, ranks=ranks, **options)
        results = {name: value for name, value in results.items() if value is not None}
        truth = {name: exact[name].reshape(value.shape) for name, value in results.items()}
        assert {name: value.dtype for name, value in results.items()} == {
            name: op.x.dtype if name == "p" else torch.float32 for name in results
        }
        check(
            results, {name: value.reshape(truth.get(name, value).shape) for name, value in torch_error.items()}, truth
        )

    return compare


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate_shape", ((3, 5), (69, 5)), ids=("a sample", "a token"))
def test_row_gates(gate_shape, dtype, path, assert_exact):
    """69 rows: tiles of 32 cross the borders of samples of 23."""
    op = make_operands((3, 23), 41, 37, 5, dtype, gate_shape=gate_shape)
    assert_exact(op, torch.randn(3, 23, 37).to(dtype), path=path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("need_a, need_b, need_gate, need_p", list(itertools.product((False, True), repeat=4)))
def test_only_what_is_needed_with_row_gates(need_a, need_b, need_gate, need_p, path, assert_exact):
    op, dy = make_operands((2, 5), 10, 9, 3, gate_shape=(2, 3)), torch.randn(2, 5, 9)
    assert_exact(op, dy, path=path, need_a=need_a, need_b=need_b, need_gate=need_gate, need_p=need_p)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_packed(ranks, dtype, path, assert_exact):
    op = packed_operands(37, 41, 36, ranks, dtype)
    assert_exact(op, torch.randn(37, 108).to(dtype), ranks=ranks, path=path)


def test_packed_with_the_largest_sum_of_ranks(assert_exact):
    op = packed_operands(5, 33, 20, (100, 90, 66))
    assert_exact(op, torch.randn(5, 60), ranks=(100, 90, 66))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("need_a, need_b, need_gate, need_p", list(itertools.product((False, True), repeat=4)))
def test_only_what_is_needed_packed(need_a, need_b, need_gate, need_p, path, assert_exact):
    op, dy = packed_operands(5, 10, 9, (2, 0, 3)), torch.randn(5, 27)
    needs = {"need_a": need_a, "need_b": need_b, "need_gate": need_gate, "need_p": need_p}
    assert_exact(op, dy, ranks=(2, 0, 3), path=path, **needs)
    results = ours(op, dy, 0.3, 1.7, ranks=(2, 0, 3), path=path, **needs)
    assert [results[name] is not None for name in NAMES[:3]] == [need_a, need_b, need_gate]
    assert results["p"] is not None or not need_p


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ("one", "row", "packed"))
def test_a_threshold_for_each_rank(kind, path, assert_exact):
    kappa, ranks = torch.tensor([0.0, 0.5, 0.5, 1.0, 0.2, 3.0]), (2, 1, 3) if kind == "packed" else None
    op = packed_operands(17, 24, 20, ranks) if ranks else make_operands((17,), 24, 20, 6)
    op.gate = torch.tensor([0.0, 0.5, -0.5, 1.5, -0.1, -2.9])
    if kind == "row":
        op.gate = torch.stack([op.gate * (1 + row % 2) for row in range(17)])
    dy = torch.randn(17, 60 if ranks else 20)
    assert_exact(op, dy, kappa=kappa, ranks=ranks, path=path)
    dgate = ours(op, dy, kappa, 1.7, ranks=ranks, path=path)["dgate"]
    alive = [True, False, False, True, False, False]
    assert dgate.view(-1, 6)[0].ne(0).tolist() == alive
    strided = kappa.repeat_interleave(2)[::2]
    assert torch.equal(ours(op, dy, strided, 1.7, ranks=ranks, path=path)["dgate"], dgate)


@pytest.mark.parametrize("kind", ("one", "row", "packed"))
def test_programs_with_several_row_blocks(kind, monkeypatch, assert_exact):
    """11 blocks of 16 rows by 4 programs: the sums are added to; the parts of the last one are the shorter ones."""
    monkeypatch.setattr(rank_grad_one_read, "MAX_PROGRAMS", 4)
    ranks, tile = (3, 2, 4) if kind == "packed" else None, TileConfig(16, 32, 16, 1, 1)
    op = packed_operands(165, 24, 36, ranks) if ranks else make_operands((165,), 24, 108, 9)
    if kind == "row":
        op.gate = torch.randn(165, 9)
    dy = torch.randn(165, 108)
    assert_exact(op, dy, ranks=ranks, tile=tile)
    first, second = (ours(op, dy, 0.3, 1.7, ranks=ranks, tile=tile) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ("row", "packed"))
@pytest.mark.parametrize("view", ("transposed", "columns sliced", "expanded"))
def test_strided_operands(view, kind, path, assert_exact):
    ranks = (3, 0, 5) if kind == "packed" else None
    op = packed_operands(40, 41, 12, ranks) if ranks else make_operands((40,), 41, 36, 3, gate_shape=(40, 3))
    dy = torch.randn(40, 36)
    if view == "columns sliced":
        op.x, dy = (torch.cat((t, t), 1)[:, : t.shape[1]] for t in (op.x, dy))
    elif view == "expanded":
        dy = torch.ones(()).expand(40, 36)
    else:
        op.x, dy = (t.t().contiguous().t() for t in (op.x, dy))
    op.lora_a = op.lora_a.t().contiguous().t()
    assert_exact(op, dy, ranks=ranks, path=path)


@pytest.mark.parametrize(
    "m, width, k, ranks", [(0, 5, 6, (1, 2, 0)), (3, 0, 6, (1, 2, 0)), (3, 5, 0, (1, 2, 0)), (3, 5, 6, (0, 0, 0))]
)
def test_empty_sizes(m, width, k, ranks):
    op = packed_operands(m, k, width, ranks)
    results = ours(op, torch.randn(m, 3 * width), 0.1, 1.0, ranks=ranks)
    r = sum(ranks)
    assert [tuple(results[name].shape) for name in NAMES] == [(r, k), (width * r,), (r,), (m, r)]
    assert all(results[name].eq(0).all() for name in NAMES[:3])
    row = make_operands((m,), k, width, r, gate_shape=(m, r))
    assert ours(row, torch.randn(m, width), 0.1, 1.0)["dgate"].shape == (m, r)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ("one", "row", "packed"))
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_nan_and_inf_travel_as_in_torch(bad, kind, path):
    ranks = (2, 1, 2) if kind == "packed" else None
    op = packed_operands(35, 24, 12, ranks) if ranks else make_operands((35,), 24, 36, 5)
    if kind == "row":
        op.gate = torch.randn(35, 5)
    dy = torch.randn(35, 36)
    dy[33, 30], op.x[2, 7] = bad, bad
    s = op.x @ op.lora_a.t()
    results, truth = ours(op, dy, 0.3, 1.7, ranks=ranks, path=path, s=s), plain(op, dy, 0.3, 1.7, torch.float32, ranks)
    for name in NAMES:
        expected = truth[name].reshape(results[name].shape)
        finite = expected.isfinite()
        assert torch.equal(results[name].isfinite(), finite) and not finite.all(), name
        torch.testing.assert_close(results[name][finite], expected[finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strides", ((70_000_000, 1), (1, 70_000_000)), ids=("rows apart", "columns apart"))
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ("x", "dy"))
def test_more_than_2_to_the_31_elements_packed(name, strides, path, spread):
    tensors = {"x": torch.randn(40, 42).half(), "dy": torch.randn(40, 42).half(), "s": None, "p": None}
    tensors |= {"lora_a": torch.randn(6, 42).half(), "lora_b": torch.randn(14 * 6).half()}
    call = {"gate": torch.randn(6), "kappa": torch.tensor(0.3), "scaling": 1.7, "ranks": (3, 2, 1), "path": path}
    expected = rank_lora_grad(**tensors, **call, need_p=True)
    results = rank_lora_grad(**tensors | {name: spread(tensors[name], strides)}, **call, need_p=True)
    assert all(torch.equal(left, right) for left, right in zip(results, expected))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ("row", "packed"))
def test_a_planted_error_of_one_percent_fails(kind, name, path, check):
    ranks = (3, 4, 5) if kind == "packed" else None
    op = packed_operands(37, 41, 36, ranks) if ranks else make_operands((37,), 41, 108, 12, gate_shape=(37, 12))
    dy = torch.randn(37, 108)
    results = ours(op, dy, 0.3, 1.7, ranks=ranks, path=path)
    truth, torch_error = (plain(op, dy, 0.3, 1.7, dtype, ranks) for dtype in (torch.float64, torch.float32))
    truth = {key: truth[key] for key in NAMES}
    check(results, torch_error, truth)
    results[name] *= 1.01
    with pytest.raises(AssertionError, match=f"^{name}: error"):
        check(results, torch_error, truth)


@pytest.mark.parametrize("kind", ("one", "row", "packed"))
def test_one_read_loads_every_element_of_x_and_dy_once(kind, reads):
    ranks = (3, 1, 5) if kind == "packed" else None
    op = packed_operands(70, 41, 37, ranks) if ranks else make_operands((70,), 41, 111, 9)
    if kind == "row":
        op.gate = torch.randn(70, 9)
    dy, s = torch.randn(70, 111), op.x @ op.lora_a.t()
    ours(op, dy, 0.3, 1.7, ranks=ranks, path="one_read", s=s)
    assert reads(op.x) == {1} and reads(dy) == {1}


def test_columns_reads_dy_twice_where_it_makes_p(reads):
    op, dy = make_operands((70,), 41, 37, 9), torch.randn(70, 37)
    ours(op, dy, 0.3, 1.7, path="columns", s=op.x @ op.lora_a.t())
    assert reads(op.x) == {1} and reads(dy) == {2}


@pytest.mark.parametrize(
    "needs, x_reads, s_reads, dy_reads",
    [
        ({"need_a": False}, {0}, {1}, {1}),
        ({"need_b": False, "need_gate": False}, {1}, {0}, {1}),
        ({"need_a": False, "need_b": False, "need_gate": False}, {0}, {0}, {1}),
    ],
)
def test_what_is_not_needed_is_not_read(needs, x_reads, s_reads, dy_reads, reads):
    op, dy = make_operands((40,), 41, 37, 3), torch.randn(40, 37)
    s = op.x @ op.lora_a.t()
    ours(op, dy, 0.3, 1.7, path="one_read", s=s, **needs)
    assert (reads(op.x), reads(s), reads(dy)) == (x_reads, s_reads, dy_reads)


def test_a_projection_without_ranks_is_not_read(reads):
    op, dy = packed_operands(40, 41, 12, (3, 0, 5)), torch.randn(40, 36)
    ours(op, dy, 0.3, 1.7, ranks=(3, 0, 5), path="one_read", s=op.x @ op.lora_a.t())
    columns = [reads(dy[:, part * 12 : part * 12 + 1].t()[0][:1]) for part in range(3)]
    assert columns == [{1}, {0}, {1}]
