"""merge_ against float64, its checks, and what an error must leave alone; by the extension and by PyTorch."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlora
from fastlora import reference
from fastlora.build import build_info, extension
from fastlora.ops import merge as merge_module
from fastlora.ops.merge import MergeError, merge_

HALF_OR_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
NATIVE = HALF_OR_SINGLE if extension() else ()


@pytest.fixture(params=["cpp", "torch"])
def backend(request, monkeypatch):
    """Each path in turn; the report of a merge must name it."""
    if request.param == "torch":
        monkeypatch.setattr(merge_module, "serves", lambda weight: False)
    elif extension() is None:
        pytest.skip(f"no extension: {build_info()['extension_reason']}")
    return request.param


def make(n=48, k=40, r=5, dtype=torch.float32, adapter_dtype=torch.float32, size=1.0):
    """weight, lora_a, lora_b, gate: weight and update near `size`, one dead rank."""
    weight = (torch.randn(n, k) * size).to(dtype)
    lora_a, lora_b = (
        torch.randn(r, k).to(adapter_dtype),
        (torch.randn(n, r) * size / max(r, 1) ** 0.5).to(adapter_dtype),
    )
    gate = torch.randn(r)
    gate[1:2] = 0.0
    return weight, lora_a, lora_b, gate


def merged(weight, *adapter, **options):
    """The merged copy, with its strides, and the module's report."""
    out = weight.clone(memory_format=torch.preserve_format)
    report = merge_([out], *([tensor] for tensor in adapter), **options)
    return out, report.modules[0]


def bytes_of(tensor):
    """A copy to compare in every bit, NaN and the sign of zero included."""
    return tensor.detach().clone().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def error(result, weight, lora_a, lora_b, gate, scaling):
    """||result - truth||_F, truth in float64 and not rounded."""
    truth = weight.double() + reference.delta_weight(lora_a, lora_b, gate, scaling=scaling)
    return float((result.double() - truth).norm())


def plain_pytorch(weight, lora_a, lora_b, gate, scaling):
    """What one would write: the product in float32, the sum in the weight's dtype."""
    return weight + (scaling * (lora_b.float() * gate) @ lora_a.float()).to(weight.dtype)


def make_case(n, k, r, dtype, adapter_dtype=torch.float32):
    weight, *adapter = make(n, k, r, dtype, adapter_dtype)
    limit = 2 * error(plain_pytorch(weight, *adapter, 0.7), weight, *adapter, 0.7)
    return weight, adapter, limit


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", HALF_OR_SINGLE)
@pytest.mark.parametrize(("n", "k", "r"), [(1, 1, 1), (33, 17, 3), (64, 768, 16), (197, 50, 257)])
def test_error_is_at_most_twice_that_of_pytorch(backend, n, k, r, dtype, adapter_dtype):
    weight, adapter, limit = make_case(n, k, r, dtype, adapter_dtype)
    out, report = merged(weight, *adapter, scaling=0.7)
    assert error(out, weight, *adapter, 0.7) <= limit
    assert report.dtype is dtype and report.shape == (n, k) and report.kept_rank == int((adapter[2] != 0).sum())


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE)
def test_the_limit_catches_one_percent(dtype):
    weight, adapter, limit = make_case(64, 768, 16, dtype)
    out, _ = merged(weight, *adapter, scaling=0.7 * 1.01)
    assert error(out, weight, *adapter, 0.7) > limit


def test_float64_weights_are_merged_in_float64():
    weight, *adapter = make(dtype=torch.float64)
    out, _ = merged(weight, *adapter)
    assert error(out, weight, *adapter, 1.0) < 1e-13
    assert merge_([weight], *([tensor] for tensor in adapter)).backend == "torch"


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(0, 20)),
    dtype=st.sampled_from(HALF_OR_SINGLE),
    adapter_dtype=st.sampled_from((*HALF_OR_SINGLE, torch.float64)),
    layout=st.sampled_from(["contiguous", "transposed", "rows", "columns"]),
    steps=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 2**31),
)
def test_any_shape_dtype_and_stride(shape, dtype, adapter_dtype, layout, steps, seed):
    """Equal to the contiguous merge in every bit, near float64, and nothing beside the view is written."""
    torch.manual_seed(seed)
    n, k, r = shape
    weight, lora_a, lora_b, gate = make(n, k, r, dtype, adapter_dtype)
    plain, plain_report = merged(weight, lora_a, lora_b, gate)
    limit = 2 * error(plain_pytorch(weight, lora_a, lora_b, gate, 1.0), weight, lora_a, lora_b, gate, 1.0)
    # PyTorch may hit the truth of a tiny case by luck; float32's own spacing is always allowed
    limit += 4e-7 * float(weight.float().norm() + reference.delta_weight(lora_a, lora_b, gate).norm())
    assert error(plain, weight, lora_a, lora_b, gate, 1.0) <= limit

    frame = torch.full((n + 4, k + 6), 7.0, dtype=dtype)
    frame = frame.t().contiguous().t() if layout == "transposed" else frame
    view = {"rows": frame[2 : n + 2], "columns": frame[:, 3 : k + 3]}.get(layout, frame)
    view = {"rows": view[:, :k], "columns": view[:n]}.get(layout, view[1 : n + 1, 1 : k + 1]).copy_(weight)
    before, outside = frame.clone(), torch.ones_like(frame, dtype=torch.bool)
    outside[
        {"rows": slice(2, n + 2), "columns": slice(0, n)}.get(layout, slice(1, n + 1)),
        {"rows": slice(0, k), "columns": slice(3, k + 3)}.get(layout, slice(1, k + 1)),
    ] = False
    wide_a = lora_a.repeat_interleave(steps[0], 0).repeat_interleave(steps[1], 1)[:: steps[0], :: steps[1]]
    report = merge_([view], [wide_a], [lora_b.t().contiguous().t()], [gate.repeat_interleave(2)[::2]]).modules[0]
    assert torch.equal(bytes_of(view), bytes_of(plain))
    assert torch.equal(frame[outside], before[outside])
    assert report.kept_rank == plain_report.kept_rank
    assert report.delta_norm == pytest.approx(plain_report.delta_norm)
    assert (report.unchanged, report.max_relative_error) == (plain_report.unchanged, plain_report.max_relative_error)


def test_many_modules_of_many_dtypes_in_one_call():
    cases = [make(dtype=dtype) for dtype in (*HALF_OR_SINGLE, torch.float64, torch.float16)]
    expected = [merged(*case, scaling=float(i + 1)) for i, case in enumerate(cases)]
    weights, *adapters = map(list, zip(*cases))
    report = merge_(weights, *adapters, scaling=[1.0, 2.0, 3.0, 4.0, 5.0], names=list("abcde"))
    assert report.backend == ("cpp+torch" if NATIVE else "torch")
    for name, weight, module, (alone, alone_report) in zip("abcde", weights, report, expected):
        assert torch.equal(weight, alone)
        assert module == replace(alone_report, name=name)


def test_no_modules():
    report = merge_([], [], [], [])
    assert len(report) == 0 and report.backend == "none"


def test_packed_projection_is_merged_through_its_rows(backend):
    packed = torch.nn.Parameter(torch.randn(96, 32))
    before, adapters = packed.detach().clone(), [make(32, 32, r)[1:] for r in (4, 0, 2)]
    merge_(list(packed.detach().chunk(3)), *map(list, zip(*adapters)))
    expected = torch.cat([reference.merge(row, *adapter) for row, adapter in zip(before.chunk(3), adapters)])
    torch.testing.assert_close(packed.detach(), expected)
    assert torch.equal(packed.detach()[32:64], before[32:64])


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE)
def test_nothing_kept_leaves_every_byte(backend, dtype):
    weight, lora_a, lora_b, gate = make(dtype=dtype)
    weight[0, :3] = torch.tensor([-0.0, float("nan"), float("inf")], dtype=dtype)
    for adapter in ((lora_a[:0], lora_b[:, :0], gate[:0]), (lora_a, lora_b, torch.zeros_like(gate))):
        out, report = merged(weight, *adapter)
        assert torch.equal(bytes_of(out), bytes_of(weight))
        assert (report.kept_rank, report.delta_norm, report.unchanged, report.max_relative_error) == (0, 0.0, 0.0, 0.0)


def test_an_update_of_zero_leaves_every_byte(backend):
    weight, lora_a, lora_b, gate = make(dtype=torch.float16)
    weight[0, 0] = -0.0
    out, report = merged(weight, lora_a, torch.zeros_like(lora_b), gate)
    assert torch.equal(bytes_of(out), bytes_of(weight)) and report.kept_rank == 4


def test_report_tells_what_rounding_did(backend):
    """Weights of 1 in float16, the next number 2^-10 away: a quarter of that step vanishes, one and a half round up."""
    weight, lora_a, lora_b = torch.ones(8, 32, dtype=torch.float16), torch.ones(1, 32), torch.ones(8, 1)
    lora_a[0, :8], lora_a[0, 8:16], lora_a[0, 16:] = 2.0**-12, 1.5 * 2.0**-10, 0.0
    out, report = merged(weight, lora_a, lora_b, torch.ones(1))
    assert out[0].tolist() == [1.0] * 8 + [1 + 2.0**-9] * 8 + [1.0] * 16
    assert report.unchanged == 0.5
    assert report.delta_norm == pytest.approx(float((lora_b @ lora_a).norm()), rel=1e-6)
    assert report.max_relative_error == pytest.approx(2.0**-11 / (1 + 1.5 * 2.0**-10), rel=1e-6)


def test_relative_error_of_float32_is_that_of_the_sum(backend):
    weight, lora_a, lora_b, gate = make(r=2)
    out, report = merged(weight, lora_a, lora_b, gate)
    delta = lora_b[:, :1] * gate[0] @ lora_a[:1]
    truth = weight.double() + delta.double()
    assert report.max_relative_error == pytest.approx(float(((out.double() - truth) / truth).abs().max()), rel=1e-3)


def test_report_reads_as_a_table(backend):
    report = merge_(*([tensor] for tensor in make(dtype=torch.bfloat16)), names=["visual.q"])
    text = str(report)
    assert "visual.q" in text and "bfloat16" in text and f"1 modules merged by {backend}" in text
    assert len(report) == 1 and [module.name for module in report] == ["visual.q"]


# ---- check=True: an error, and not one byte


def three_modules(dtype=torch.float16):
    return tuple(map(list, zip(*(make(64, 520, dtype=dtype) for _ in range(3)))))


def assert_refused(lists, match, modules, **options):
    before = [bytes_of(weight) for weight in lists[0]]
    versions = [weight._version for weight in lists[0]]
    with pytest.raises(MergeError, match=match) as caught:
        merge_(*lists, **options)
    assert "no weight has been changed" in str(caught.value)
    assert caught.value.modules == modules
    assert all(torch.equal(bytes_of(weight), old) for weight, old in zip(lists[0], before))
    assert [weight._version for weight in lists[0]] == versions


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("what", ["lora_a", "lora_b", "gate"])
def test_non_finite_adapter_in_the_second_of_many(backend, what, value):
    lists = three_modules()
    broken = {"lora_a": lists[1], "lora_b": lists[2], "gate": lists[3]}[what][1]
    broken.view(-1)[-1] = value
    match = rf"1 of 3 modules.*\n.*second: {what} holds 1 non-finite of {broken.numel()} values"
    assert_refused(lists, match, ("second",), names=["first", "second", "third"])


def test_non_finite_value_in_a_dead_rank_is_told(backend):
    lists = three_modules()
    assert lists[3][2][1] == 0
    lists[1][2][1, 3] = float("nan")
    assert_refused(lists, r"weights\[2\]: lora_a holds 1 non-finite", ("weights[2]",))


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float16, 65504), (torch.bfloat16, 3.38e38), (torch.float32, 3.4e38)]
)
def test_overflow_is_counted(backend, dtype, limit):
    lists = three_modules(dtype)
    lists[0][1][5, 7], lists[0][1][63, 519] = limit, -limit
    lists[1][1][:], lists[2][1][:], lists[3][1][:] = 0.0, 0.0, 1.0
    lists[1][1][0, 7], lists[2][1][5, 0] = 1.0, limit / 4
    lists[1][1][2, 519], lists[2][1][63, 2] = 1.0, -limit / 4
    name = str(dtype).removeprefix("torch.")
    assert_refused(lists, rf"weights\[1\]: 2 of 33280 results are not finite in {name} \(largest", ("weights[1]",))


def test_the_largest_value_and_every_module_at_fault_are_named(backend):
    lists = three_modules()
    lists[0][0][0, 0] = 65504.0
    lists[1][0][:], lists[2][0][:], lists[3][0][:] = 0.0, 0.0, 0.0
    lists[1][0][0, 0], lists[2][0][0, 0], lists[3][0][0] = 1.0, 96.0, 1.0
    lists[3][2][0] = float("nan")
    match = r"2 of 3 modules(.|\n)*largest 65600, limit 65504(.|\n)*gate holds 1 non-finite(.|\n)*check=False"
    assert_refused(lists, match, ("weights[0]", "weights[2]"))


def test_long_lists_of_faults_are_cut():
    lists = tuple(map(list, zip(*(make(4, 4) for _ in range(12)))))
    for gate in lists[3]:
        gate[0] = float("nan")
    with pytest.raises(MergeError, match=r"weights\[7\].*\n  and 4 more") as caught:
        merge_(*lists)
    assert len(caught.value.modules) == 12
    assert pickle.loads(pickle.dumps(caught.value)).modules == caught.value.modules


def test_a_fault_behind_another_path_stops_both():
    """The float64 weight runs in PyTorch, and its fault must stop the extension too."""
    single, double = make(), make(dtype=torch.float64)
    double[1][0, 0] = float("nan")
    assert_refused(tuple(map(list, zip(single, double))), "lora_a holds 1 non-finite", ("weights[1]",))


def test_unchecked_merge_goes_on_and_flags(backend):
    lists = three_modules()
    lists[0][1][0, 0] = 65504.0
    lists[1][1][:], lists[2][1][:], lists[3][1][:] = 0.0, 0.0, 0.0
    lists[1][1][0, 0], lists[2][1][0, 0], lists[3][1][0] = 1.0, 96.0, 1.0
    lists[2][2][3, 0] = float("nan")
    report = merge_(*lists, check=False)
    assert [module.not_finite for module in report] == [0, 1, 520]
    assert lists[0][1][0, 0] == float("inf") and lists[0][2][3].isnan().all()
    assert lists[0][2][4:].isfinite().all()
    assert "520 NOT FINITE" in str(report)


# ---- autograd


@pytest.mark.parametrize("view", [False, True])
def test_backward_after_a_merge_raises(backend, view):
    """The linear layer saved the weight for the gradient of x; a merge in between would make that gradient wrong."""
    weight, *adapter = make()
    x = torch.randn(3, 40, requires_grad=True)
    loss = torch.nn.functional.linear(x, weight[8:24] if view else weight).sum()
    part = weight[8:24] if view else weight
    merge_([part], [adapter[0]], [adapter[1][8:24] if view else adapter[1]], [adapter[2]])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_with_gradients_and_inference_tensors_are_merged(backend):
    weight, *adapter = make()
    expected, _ = merged(weight, *adapter)
    parameters = [torch.nn.Parameter(tensor) for tensor in (weight.clone(), *adapter)]
    merge_(*([parameter] for parameter in parameters))
    assert torch.equal(parameters[0].detach(), expected) and parameters[0].requires_grad
    with torch.inference_mode():
        frozen = weight.clone()
        merge_([frozen], *([tensor] for tensor in adapter))
        assert torch.equal(frozen, expected)


# ---- bad arguments


class Tagged(torch.Tensor):
    pass


def case(**changes):
    """Arguments of one module, with some of them replaced."""
    weight, lora_a, lora_b, gate = make(6, 8, 2)
    parts = {"weight": weight, "lora_a": lora_a, "lora_b": lora_b, "gate": gate} | changes
    return [[parts[name]] for name in ("weight", "lora_a", "lora_b", "gate")]


BAD_TENSORS = {
    "no tensor": (dict(weight=3.0), TypeError, r"weight of weights\[0\] is a float; it must be a plain torch.Tensor"),
    "subclass": (dict(weight=torch.zeros(6, 8).as_subclass(Tagged)), TypeError, "is a Tagged; it must be a plain"),
    "meta": (dict(weight=torch.zeros(6, 8, device="meta")), TypeError, "is on the meta device and has no data"),
    "sparse": (dict(lora_a=torch.zeros(2, 8).to_sparse()), TypeError, "lora_a of .* is not plain strided memory"),
    "integer": (
        dict(weight=torch.zeros(6, 8, dtype=torch.int32)),
        TypeError,
        "has dtype torch.int32; it must be float32",
    ),
    "negated view": (dict(weight=torch.zeros(6, 8, dtype=torch.complex64).conj().imag), TypeError, "not plain strided"),
    "no storage": (dict(weight=torch.zeros(6, 8)), TypeError, "has no memory behind it"),
    "vector": (dict(weight=torch.zeros(8)), ValueError, r"has shape \[8\]; it must be \[N, K\]"),
    "lora_a": (dict(lora_a=torch.zeros(2, 9)), ValueError, r"lora_a of .* has shape \[2, 9\]; .* must be \[R, 8\]"),
    "lora_b": (dict(lora_b=torch.zeros(6, 3)), ValueError, r"lora_b of .* has shape \[6, 3\]; .* must be \[6, 2\]"),
    "gate": (dict(gate=torch.zeros(4, 2)), ValueError, r"gate of .* has shape \[4, 2\]; .* one row a sample"),
    "stride 0": (dict(weight=torch.zeros(1, 8).expand(6, 8)), ValueError, r"strides \[0, 1\]; one stride must be 1"),
    "both strides": (dict(weight=torch.zeros(12, 16)[::2, ::2]), ValueError, "one stride must be 1"),
    "overlapping rows": (dict(weight=torch.zeros(99).as_strided((6, 8), (4, 1))), ValueError, "its own memory"),
}
BAD_TENSORS["no storage"][0]["weight"].untyped_storage().resize_(0)


@pytest.mark.parametrize(("changes", "kind", "match"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_bad_tensors_are_refused(changes, kind, match):
    with pytest.raises(kind, match=match):
        merge_(*case(**changes))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_weights_are_refused():
    with pytest.raises(TypeError, match="weight of .* has dtype torch.qint8"):
        merge_(*case(weight=torch.quantize_per_tensor(torch.zeros(6, 8), 0.1, 0, torch.qint8)))


def test_fake_tensors_are_refused():
    with FakeTensorMode() as mode, pytest.raises(TypeError, match="is a FakeTensor; it must be a plain"):
        merge_(*case(weight=mode.from_tensor(torch.zeros(6, 8))))


BAD_CALLS = {
    "a tensor for a list": (
        lambda lists: merge_(torch.zeros(2, 6, 8), *lists[1:]),
        TypeError,
        "weights is a Tensor; .* list",
    ),
    "lengths": (
        lambda lists: merge_(lists[0] * 2, *lists[1:]),
        ValueError,
        r"different lengths \(weights 2, lora_as 1",
    ),
    "names": (lambda lists: merge_(*lists, names=["a", "b"]), ValueError, "names has 2 entries and weights 1"),
    "scalings": (lambda lists: merge_(*lists, scaling=[1.0, 2.0]), ValueError, "scaling has 2 entries"),
    "scaling nan": (
        lambda lists: merge_(*lists, scaling=float("nan")),
        ValueError,
        "scaling is nan; it must be finite",
    ),
    "scaling text": (lambda lists: merge_(*lists, scaling="1"), TypeError, "scaling is a str; it must be a float"),
}


@pytest.mark.parametrize(("call", "kind", "match"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_are_refused(call, kind, match):
    lists = case()
    before = bytes_of(lists[0][0])
    with pytest.raises(kind, match=match):
        call(lists)
    assert torch.equal(bytes_of(lists[0][0]), before)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1)])
def test_single_rows_and_columns_of_any_stride(backend, shape):
    """The stride of a dimension of size 1 means nothing, and PyTorch sets it to anything."""
    _, *adapter = make(*shape, 3)
    for frame in (torch.randn(11, 13), torch.randn(13, 11).t()):
        for view in (frame[2 : 2 + shape[0], 4 : 4 + shape[1]], frame[2:3, 4:5].as_strided(shape, frame.stride())):
            expected, before = reference.merge(view, *adapter), frame.clone()
            merge_([view], *([tensor] for tensor in adapter))
            torch.testing.assert_close(view, expected)
            assert int((frame != before).sum()) == view.numel()


@pytest.mark.parametrize("pair", ["same", "rows", "inside", "transposed", "columns"])
def test_weights_that_share_memory_are_refused(pair):
    whole, (_, lora_a, lora_b, gate) = torch.randn(8, 8), make(4, 4, 2)
    two = {
        "same": (whole[:4, :4], whole[:4, :4]),
        "rows": (whole[:4, :4], whole[3:7, :4]),
        "inside": (whole[:4, 2:6], whole[2:6, :4]),
        "transposed": (whole[:4, :4], whole.t()[:4, :4]),
        "columns": (whole[:4, 1:5], whole[1:5, 4:]),
    }[pair]
    before = whole.clone()
    with pytest.raises(ValueError, match="first and second share memory"):
        merge_(list(two), [lora_a] * 2, [lora_b] * 2, [gate] * 2, names=["first", "second"])
    assert torch.equal(whole, before)


def test_weights_side_by_side_do_not_share_memory():
    whole, (_, lora_a, lora_b, gate) = torch.randn(8, 8), make(4, 4, 2)
    quarters = [whole[:4, :4], whole[:4, 4:], whole[4:, :4], whole[4:, 4:]]
    expected = [reference.merge(quarter, lora_a, lora_b, gate) for quarter in quarters]
    merge_(quarters, [lora_a] * 4, [lora_b] * 4, [gate] * 4)
    for quarter, value in zip(quarters, expected):
        torch.testing.assert_close(quarter, value)
    assert fastlora.MergeError is MergeError


# ---- CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_OR_SINGLE)
@pytest.mark.parametrize(("n", "k", "r"), [(1, 1, 1), (33, 17, 3), (768, 768, 16), (100, 300, 70)])
def test_cuda_merges_the_same_bits_as_the_cpu(n, k, r, dtype):
    weight, *adapter = make(n, k, r, dtype)
    out, report = merged(weight, *adapter, scaling=0.3)
    for layout in (weight.cuda(), weight.t().contiguous().cuda().t()):
        on_device = layout.clone(memory_format=torch.preserve_format)
        device_report = merge_([on_device], *([tensor.cuda()] for tensor in adapter), scaling=0.3)
        assert device_report.backend == "cuda"
        assert torch.equal(bytes_of(on_device.cpu()), bytes_of(out))
        module = device_report.modules[0]
        assert (module.kept_rank, module.unchanged) == (report.kept_rank, report.unchanged)
        assert module.delta_norm == pytest.approx(report.delta_norm)
        assert module.max_relative_error == report.max_relative_error


@pytest.mark.gpu
def test_cuda_checks_before_it_writes():
    lists = [[tensor.cuda() for tensor in group] for group in three_modules()]
    lists[2][1][3, 0] = float("nan")
    assert_refused(lists, r"weights\[1\]: lora_b holds 1 non-finite", ("weights[1]",))
    lists[2][1][3, 0] = 1e30
    assert_refused(lists, r"weights\[1\]: \d+ of 33280 results are not finite in float16", ("weights[1]",))


@pytest.mark.gpu
def test_operands_on_two_devices_are_refused():
    weight, lora_a, lora_b, gate = make()
    with pytest.raises(ValueError, match="lora_a of .* is on cpu and its weight on cuda:0"):
        merge_([weight.cuda()], [lora_a], [lora_b], [gate])
