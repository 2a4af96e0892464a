"""Header and tensors of one file, in memory of torch's own."""

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fastlora.tensor_file import read_tensors


@pytest.mark.parametrize("filler", range(0, 64, 8))
def test_tensors_are_aligned_whatever_stands_before_them(filler, tmp_path):
    """Products of a library depend in the last bits on where in memory their operands begin."""
    path = tmp_path / "a.safetensors"
    tensors = {name: torch.randn(3, 5) for name in "abc"}
    save_file(tensors, path, {"config": "x" * filler})
    header, read = read_tensors(path)
    assert header == {"config": "x" * filler} and read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor) and read[name].data_ptr() % 64 == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool])
def test_dtypes_and_empty_tensors(tmp_path, dtype):
    tensors = {"a": torch.ones(2, 3).to(dtype), "b": torch.zeros(0, 4, dtype=dtype), "c": torch.ones((), dtype=dtype)}
    save_file(tensors, tmp_path / "a.safetensors")
    header, read = read_tensors(tmp_path / "a.safetensors")
    assert header == {} and all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert all(read[name].dtype == dtype for name in tensors)


def test_what_is_no_such_file(tmp_path):
    (tmp_path / "a").write_bytes(b"\xff" * 40)
    with pytest.raises(SafetensorError):
        read_tensors(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="none"):
        read_tensors(tmp_path / "none")
