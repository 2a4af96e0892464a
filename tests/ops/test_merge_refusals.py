"""What merge_ refuses: broken adapters, overflow, arguments that do not fit; and not one byte has changed."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from merge_calls import assert_refused, bytes_of, make, three_modules
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlora
from fastlora import reference
from fastlora.ops.merge import MergeError, merge_, new_residuals, unmerge_

# ---- check=True: an error, and not one byte


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


BAD_ROUNDING = {
    "unknown": (dict(rounding="up"), "rounding 'up' is unknown; accepted: 'nearest', 'stochastic'"),
    "seed of nothing": (dict(seed=3), 'seed 3 was given with rounding="nearest"'),
    "seed": (dict(rounding="stochastic", seed=-1), "seed is -1; it must be an integer from 0"),
    "both": (dict(rounding="stochastic", residuals=[torch.zeros(6, 8)]), "there is nothing to draw for"),
}


@pytest.mark.parametrize(("options", "match"), BAD_ROUNDING.values(), ids=BAD_ROUNDING)
def test_bad_rounding_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        merge_(*case(), **options)


BAD_RESIDUALS = {
    "dtype": (
        torch.zeros(6, 8, dtype=torch.float16),
        TypeError,
        r"dtype torch.float16; .* torch.float32, as its weight",
    ),
    "shape": (torch.zeros(8, 6), ValueError, r"residual of weights\[0\] is \[8, 6\] on cpu; it must be \[6, 8\]"),
    "layout": (torch.zeros(8, 6).t(), ValueError, r"strides \[1, 6\] and its weight \[8, 1\]; they must run the same"),
    "none": (None, TypeError, r"residual of weights\[0\]|must be a list"),
}


@pytest.mark.parametrize(("residual", "kind", "match"), BAD_RESIDUALS.values(), ids=BAD_RESIDUALS)
def test_bad_residuals_are_refused(residual, kind, match):
    lists = case()
    before = bytes_of(lists[0][0])
    for call in (merge_, unmerge_):
        with pytest.raises(kind, match=match):
            call(*lists, residuals=[residual] if residual is not None else torch.zeros(1))
    assert torch.equal(bytes_of(lists[0][0]), before)


def test_a_residual_of_int8_does_not_serve_float64():
    with pytest.raises(TypeError, match=r"dtype torch.int8; it must be torch.float64, as its weight\."):
        merge_(*case(weight=torch.zeros(6, 8).double()), residuals=[torch.zeros(6, 8, dtype=torch.int8)])


def test_a_residual_that_is_its_weight_is_refused():
    lists = case()
    with pytest.raises(ValueError, match=r"weights\[0\] and the residual of weights\[0\] share memory"):
        merge_(*lists, residuals=lists[0])


def test_a_residual_that_is_not_finite_is_told(backend):
    lists = three_modules()
    residuals = new_residuals(lists[0])
    residuals[1][5, 5] = float("nan")
    before = [bytes_of(residual) for residual in residuals]
    match = r"weights\[1\]: residual holds 1 non-finite of 33280"
    assert_refused(lists, match, ("weights[1]",), residuals=residuals)
    assert all(torch.equal(bytes_of(residual), old) for residual, old in zip(residuals, before))


def test_an_overflow_that_the_residual_makes_is_counted(backend):
    lists = case(weight=torch.full((6, 8), 60000.0, dtype=torch.float16))
    residual = torch.zeros(6, 8, dtype=torch.float16)
    residual[2, 3] = 6000.0
    with pytest.raises(MergeError, match=r"weights\[0\]: 1 of 48 results are not finite in float16"):
        merge_(*lists, residuals=[residual])


# ---- memory that a merge must not write to


@pytest.fixture
def mapped(tmp_path):
    """A file of 6 x 8 ones in float32, and a function that maps it."""
    path = tmp_path / "weight.bin"
    np.ones((6, 8), np.float32).tofile(path)

    def open_as(mode):
        return torch.from_numpy(np.memmap(path, np.float32, mode, shape=(6, 8)))

    return path, open_as


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_read_only_memory_is_refused(mapped):
    _, open_as = mapped
    with pytest.raises(ValueError, match=r"weights\[0\] lies in memory that is read-only \(.*weight.bin\)"):
        merge_(*case(weight=open_as("r")))


def test_a_mapping_that_a_file_shares_is_refused(mapped):
    path, open_as = mapped
    with pytest.raises(ValueError, match=r"mapped from .*weight.bin and shared with that file"):
        merge_(*case(weight=open_as("r+")))
    assert (np.fromfile(path, np.float32) == 1).all()


def test_private_mappings_and_shared_memory_are_merged(mapped):
    path, open_as = mapped
    private, shared = open_as("c"), torch.ones(6, 8).share_memory_()
    for weight in (private, shared):
        lists = case(weight=weight)
        expected = reference.merge(*(each[0] for each in lists))
        merge_(*lists)
        torch.testing.assert_close(weight, expected)
    assert (np.fromfile(path, np.float32) == 1).all()
