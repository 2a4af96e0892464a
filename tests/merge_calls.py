"""Operands and calls that the tests of the merge share."""

from __future__ import annotations

import pytest
import torch

from fastlora import reference
from fastlora.build import extension
from fastlora.ops.merge import MergeError, merge_

DTYPES = ("float32", "float16", "bfloat16")
HALF_OR_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
NATIVE = HALF_OR_SINGLE if extension() else ()


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


def raw(tensor):
    """Every byte, or None."""
    return None if tensor is None else tensor.contiguous().view(torch.uint8).tolist()


def error(result, weight, lora_a, lora_b, gate, scaling):
    """||result - truth||_F, truth in float64 and not rounded."""
    truth = weight.double() + reference.delta_weight(lora_a, lora_b, gate, scaling=scaling)
    return float((result.double() - truth).norm())


def plain_pytorch(weight, lora_a, lora_b, gate, scaling):
    """What one would write: the product in float32, the sum in the weight's dtype."""
    return weight + (scaling * (lora_b.float() * gate) @ lora_a.float()).to(weight.dtype)


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
