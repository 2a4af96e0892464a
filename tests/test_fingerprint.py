import hashlib

import pytest
import torch

from fastlora.fingerprint import fingerprint


def test_it_is_dtype_shape_and_the_hash_of_the_bytes():
    value = torch.arange(6, dtype=torch.float16).reshape(2, 3)
    digest = hashlib.sha256(value.numpy().tobytes()).hexdigest()
    assert fingerprint({"a": value}) == {"a": f"float16[2, 3] {digest}"}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64]
)
def test_one_bit_more_is_another_one(dtype):
    value = torch.zeros(3, 5).to(dtype)
    changed = value.clone()
    changed.view(torch.uint8)[2, -1] ^= 1
    assert fingerprint({"a": value}) != fingerprint({"a": changed})


def test_strides_do_not_count_and_shapes_do():
    value = torch.randn(4, 6)
    expected = fingerprint({"a": value})
    assert fingerprint({"a": value.t().contiguous().t()}) == expected
    assert fingerprint({"a": torch.cat([value, value], 1)[:, :6]}) == expected
    assert fingerprint({"a": value.reshape(6, 4)}) != expected
    assert fingerprint({"a": value.view(torch.int32)}) != expected


def test_scalars_empty_tensors_and_parameters():
    found = fingerprint({"a": torch.tensor(2.0), "b": torch.empty(0, 3), "c": torch.nn.Parameter(torch.tensor(2.0))})
    assert found["a"] == found["c"] and found["a"].startswith("float32[] ") and found["b"].startswith("float32[0, 3] ")


def test_a_meta_tensor_has_no_content():
    with pytest.raises(ValueError, match="fc.weight is on the meta device and has no content; load its values first"):
        fingerprint({"fc.weight": torch.empty(2, device="meta")})
