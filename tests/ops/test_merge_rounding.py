"""Stochastic rounding, residuals, undo: against exact sums, and the extension against PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from merge_calls import HALF_OR_SINGLE, bytes_of, make, merged

import fastlora
from fastlora import FusedRankLoRALinear, reference
from fastlora.build import extension
from fastlora.ops import merge as merge_module
from fastlora.ops.merge import merge_, new_residuals, unmerge_
from fastlora.ops.merge_rounding import _philox

HALVES = (torch.float16, torch.bfloat16)


def neighbours(exact, dtype):
    """The values of `dtype` below and above float64 numbers."""
    near = exact.to(dtype)
    down, up = (torch.nextafter(near, torch.full_like(near, sign * math.inf)) for sign in (-1, 1))
    below = torch.where(near.double() <= exact, near, down)
    return below, torch.where(below.double() == exact, below, torch.where(near.double() > exact, near, up))


def sum_of(weight, lora_a, lora_b, gate):
    """The exact sum's float32 value: the update of one rank with powers of two is exact."""
    return weight.double() + reference.delta_weight(lora_a.double(), lora_b.double(), gate.double())


def one_rank(n, k, dtype, size=2.0**-6):
    """A weight, and an update that is one product, exact in float32, as its sum is."""
    weight = (torch.randint(-128, 128, (n, k)) / 128 * 4).to(dtype)
    lora_a, lora_b = torch.randint(-64, 64, (1, k)) / 64 * size, torch.randint(1, 8, (n, 1)) / 8
    return weight, lora_a, lora_b, torch.ones(1)


# ---- stochastic


def test_philox_is_the_published_one():
    """Known answers of the Random123 distribution."""
    ones, word = [0xFFFFFFFF] * 4, torch.tensor
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    for counter, key, expected in (
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (ones, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (pi, 0x299F31D0A4093822, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ):
        assert [int(w) for w in _philox([word(c) for c in counter], key)] == expected


@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_takes_one_of_the_two_neighbours_and_has_no_bias(backend, dtype):
    weight, *adapter = one_rank(64, 640, dtype)
    exact = sum_of(weight, *adapter)
    below, above = neighbours(exact, dtype)
    total = torch.zeros_like(exact)
    for seed in range(24):
        out, report = merged(weight, *adapter, rounding="stochastic", seed=seed)
        assert ((out == below) | (out == above)).all()
        total += out.double()
    step = above.double() - below.double()
    # a draw has variance p (1 - p) <= 1/4 of its step
    deviation = float((total / 24 - exact).sum()) / math.sqrt(float((step**2).sum()) / 4 / 24)
    assert abs(deviation) < 4
    nearest = float((merged(weight, *adapter)[0].double() - exact).sum()) / math.sqrt(float((step**2).sum()) / 4)
    assert report.relative_error > 0 and math.isfinite(nearest)


@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_share_of_ups_is_the_dropped_part(backend, dtype):
    """weight 1 and updates of 1/8 to 7/8 of a step: the share that goes up, within four deviations."""
    step, n = torch.finfo(dtype).eps, 4000
    eighths = torch.arange(1, 8)
    weight, lora_b = torch.ones(n, 7, dtype=dtype), torch.ones(n, 1)
    out, _ = merged(weight, eighths[None] / 8 * step, lora_b, torch.ones(1), rounding="stochastic", seed=5)
    ups = (out == 1 + step).double().mean(0)
    assert ((ups - eighths / 8).abs() < 4 * torch.sqrt(eighths / 8 * (1 - eighths / 8) / n)).all()


def test_stochastic_subnormals_of_float16(backend):
    """Below 2^-14 the step is 2^-24: a quarter of it, and the negative of that."""
    weight, lora_b = torch.zeros(8000, 2, dtype=torch.float16), torch.ones(8000, 1)
    weight[:, 1] = -3 * 2.0**-24
    lora_a = torch.tensor([[2.0**-26, -(2.0**-26)]])
    out, _ = merged(weight, lora_a, lora_b, torch.ones(1), rounding="stochastic", seed=1)
    for column, low in ((out[:, 0], 0.0), (-out[:, 1], 3 * 2.0**-24)):
        assert sorted(column.unique().tolist()) == [low, low + 2.0**-24]
        assert float((column > low).double().mean()) == pytest.approx(0.25, abs=0.02)


def test_stochastic_depends_on_seed_module_and_place_alone():
    if extension() is None:
        pytest.skip("no extension")
    lists = [[each] * 2 for each in make(40, 50, 3, torch.bfloat16)]

    def run(seed, backend_serves=None, threads=1):
        weights = [weight.clone() for weight in lists[0]]
        torch.set_num_threads(threads)
        try:
            report = merge_(weights, *lists[1:], rounding="stochastic", seed=seed)
        finally:
            torch.set_num_threads(1)
        assert report.seed == seed
        return weights

    first, again, other = run(7), run(7, threads=3), run(8)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], first[1]), "two modules of one call draw apart"
    assert not torch.equal(first[0], other[0])
    torch.manual_seed(3)
    drawn = merge_([lists[0][0].clone()], *([each[0]] for each in lists[1:]), rounding="stochastic").seed
    again = [merge_([lists[0][0].clone()], *([each[0]] for each in lists[1:]), rounding="stochastic").seed]
    torch.manual_seed(3)
    again.append(merge_([lists[0][0].clone()], *([each[0]] for each in lists[1:]), rounding="stochastic").seed)
    assert again[0] != drawn == again[1]


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", HALVES)
def test_pytorch_draws_what_the_extension_draws(dtype, layout, monkeypatch):
    if extension() is None:
        pytest.skip("no extension")
    weight, *adapter = one_rank(37, 41, dtype)
    weight[0, :5] *= 2.0**-16  # subnormal in float16
    weight = weight.t().contiguous().t() if layout == "transposed" else weight
    out, report = merged(weight, *adapter, rounding="stochastic", seed=11)
    monkeypatch.setattr(merge_module, "serves", lambda weight: False)
    monkeypatch.setattr("fastlora.ops.merge_torch._CHUNK", 41 * 6)
    expected, expected_report = merged(weight, *adapter, rounding="stochastic", seed=11)
    assert torch.equal(bytes_of(out), bytes_of(expected))
    assert report.error_norm == pytest.approx(expected_report.error_norm, rel=1e-5)


def test_stochastic_float32_is_nearest(backend):
    weight, *adapter = make()
    assert torch.equal(merged(weight, *adapter, rounding="stochastic", seed=1)[0], merged(weight, *adapter)[0])


# ---- residuals


def updates(count, n, k, r, dtype, norm):
    """A weight of ViT-B/16's size of elements, and adapters whose updates have this Frobenius norm."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(n, k, generator=generator) * 0.02).to(dtype)
    adapters = []
    for _ in range(count):
        lora_a, lora_b = torch.randn(r, k, generator=generator), torch.randn(n, r, generator=generator)
        adapters.append((lora_a, lora_b * (norm / float((lora_b @ lora_a).norm())), torch.ones(r)))
    return weight, adapters


def accumulated_error(weight, start, adapters, residual=None):
    """Relative error of the accumulated update, of the weight alone and with its residual's value."""
    update = sum(reference.delta_weight(*adapter).double() for adapter in adapters)
    held = weight.double() + (0 if residual is None else residual.double())
    return [float((w - start.double() - update).norm() / update.norm()) for w in (weight.double(), held)]


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("dtype", "floor"), [(torch.float16, 0.02), (torch.bfloat16, 0.16)])
def test_ten_merges_with_a_residual_are_one_rounding(backend, dtype, floor, int8):
    """The weight is the exact sum, rounded once; nearest without a residual is several times as far off."""
    start, adapters = updates(10, 96, 128, 8, dtype, norm=0.05)
    plain, weight = start.clone(), start.clone()
    residuals = new_residuals([weight], int8=int8)
    for adapter in adapters:
        merge_([plain], *([each] for each in adapter))
        report = merge_([weight], *([each] for each in adapter), residuals=residuals)
    exact = start.double() + sum(reference.delta_weight(*adapter).double() for adapter in adapters)
    once = exact.to(dtype)
    assert float((weight != once).double().mean()) < 0.03  # ties of the residual's own rounding
    lost_once = float((once.double() - exact).norm())
    assert float((weight.double() - exact).norm()) < 1.02 * lost_once
    assert float((plain.double() - exact).norm()) > 2.5 * lost_once
    assert report.modules[0].relative_error < floor / 4 and report.modules[0].unchanged > 0
    if not int8:
        assert float((weight.double() + residuals[0].double() - exact).norm()) < lost_once / 50


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", HALF_OR_SINGLE)
def test_merges_and_unmerges_restore_the_weight(backend, dtype, int8):
    """Updates of 0.0004 an element beside weights of 0.02, as in ViT-B/16 at ||delta||_F = 3 for all its matrices."""
    start, adapters = updates(10, 96, 128, 8, dtype, norm=0.044)
    weight, residuals = start.clone(), new_residuals([start], int8=int8)
    for adapter in adapters:
        merge_([weight], *([each] for each in adapter), residuals=residuals, scaling=0.5)
    for adapter in reversed(adapters):
        unmerge_([weight], *([each] for each in adapter), residuals=residuals, scaling=0.5)
    differ = float((bytes_of(weight) != bytes_of(start)).double().mean())
    if dtype == torch.float16 and int8:
        assert differ == 0
    # the others restore all but what is tiny beside the updates
    limits = {torch.float32: 0.018 if int8 else 0.01, torch.float16: 0.0005, torch.bfloat16: 0.0005}
    assert differ < limits[dtype]


def test_unmerge_without_a_residual_tells_what_is_gone(backend):
    start, (adapter,) = updates(1, 96, 128, 8, torch.bfloat16, norm=0.3)
    weight = start.clone()
    merge_report = merge_([weight], *([each] for each in adapter)).modules[0]
    report = unmerge_([weight], *([each] for each in adapter)).modules[0]
    off = float((weight.double() - start.double()).norm())
    assert 0 < off <= (merge_report.error_norm + report.error_norm) * 1.001
    assert report.delta_norm == pytest.approx(merge_report.delta_norm)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", HALF_OR_SINGLE)
def test_residuals_of_pytorch_are_those_of_the_extension(dtype, int8, monkeypatch):
    """One rank and exact products, so that fused or not makes no difference."""
    if extension() is None:
        pytest.skip("no extension")
    weight, *adapter = one_rank(37, 41, dtype, size=2.0**-9 + 2.0**-17)
    weight[0, :7] *= 2.0**-16
    results = []
    for serves in (merge_module.serves, lambda weight: False):
        monkeypatch.setattr(merge_module, "serves", serves)
        ours, residuals = weight.clone(), new_residuals([weight], int8=int8)
        for _ in range(3):
            report = merge_([ours], *([each] for each in adapter), residuals=residuals).modules[0]
        results.append((ours, residuals[0], report))
    (a, ra, first), (b, rb, second) = results
    assert torch.equal(bytes_of(a), bytes_of(b))
    # each of the three merges may round a tie of the residual apart, by its last digit
    last_digit = dict(rtol=0, atol=3) if int8 else dict(rtol=3 * torch.finfo(dtype).eps, atol=2e-7)
    torch.testing.assert_close(ra.float(), rb.float(), **last_digit)
    assert first.error_norm == pytest.approx(second.error_norm, rel=0.02, abs=1e-12)


@pytest.mark.parametrize("int8", [False, True])
def test_an_update_of_zero_leaves_weight_and_residual(backend, int8):
    weight, lora_a, lora_b, gate = make(dtype=torch.float16)
    residual = torch.full_like(weight, 3, dtype=torch.int8 if int8 else None)
    kept, before = residual.clone(), bytes_of(weight)
    merge_([weight], [lora_a], [torch.zeros_like(lora_b)], [gate], residuals=[residual])
    assert torch.equal(bytes_of(weight), before) and torch.equal(residual, kept)


def test_views_and_transposed_weights_take_residuals_that_run_as_they_do(backend):
    whole = (torch.randn(48, 40) * 0.02).to(torch.float16)
    _, *adapter = make(16, 40, 2)
    expected, expected_residuals = whole[16:32].clone(), new_residuals([whole[16:32]])
    merge_([expected], *([each] for each in adapter), residuals=expected_residuals)
    for frame in (whole.clone(), whole.t().contiguous().t()):
        part, before = frame[16:32], frame.clone()
        residuals = new_residuals([part])
        merge_([part], *([each] for each in adapter), residuals=residuals)
        assert torch.equal(part, expected) and torch.equal(residuals[0], expected_residuals[0])
        assert torch.equal(frame[:16], before[:16]) and torch.equal(frame[32:], before[32:])


def test_float64_weights_keep_a_residual_of_their_own(backend):
    start, adapters = updates(5, 24, 32, 2, torch.float64, norm=1e-9)
    weight, residuals = start.clone(), new_residuals([start])
    for adapter in adapters:
        report = merge_([weight], *([each] for each in adapter), residuals=residuals)
    assert report.backend == "torch"
    for adapter in adapters:
        unmerge_([weight], *([each] for each in adapter), residuals=residuals)
    assert float((weight - start).abs().max()) <= 1e-17


# ---- of a model


@pytest.mark.parametrize("int8", [False, True])
def test_residuals_of_a_model_are_carried_by_name(int8):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({name: FusedRankLoRALinear(16, 16, rank=3) for name in "ab"}).to(torch.float16)
    before = {name: layer.weight.clone() for name, layer in model.items()}
    weights = [layer.weight for layer in model.values()]
    residuals = dict(zip("ab", new_residuals(weights, int8=True))) if int8 else {}
    history = []
    for _ in range(3):
        for layer in model.values():
            layer.lora_b.data.normal_(std=1e-3)
        history.append({name: [t.detach().clone() for t in (a.lora_a, a.lora_b, a.gate)] for name, a in model.items()})
        report = fastlora.merge(model, residuals=residuals)
    assert len(report) == 2 and set(residuals) == {"a", "b"}
    assert all(residual.dtype == (torch.int8 if int8 else torch.float16) for residual in residuals.values())
    for adapters in reversed(history):
        for name, layer in model.items():
            layer._set(*adapters[name])
        fastlora.unmerge(model, residuals=residuals)
    assert all(torch.equal(layer.weight, before[name]) for name, layer in model.items())
