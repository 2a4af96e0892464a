"""Adapter files: what is written is read back bit for bit, for drawn names, dtypes, ranks, thresholds and strides."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from drawn import laid_out, names
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import fastlora
from fastlora.adapter_file import adapter_tensors, read_adapter
from fastlora.tensor_file import read_tensors

NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32)
ADAPTERS = st.dictionaries(
    names.filter(lambda name: name not in dir(nn.Module())),
    st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(0, 5), st.floats(0, 3, width=32), NUMBERS,
              st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])),
    min_size=1, max_size=4,
)  # fmt: skip


def model_of(adapters, seed):
    """Linear layers of these names, whose adapters hold these dtypes, ranks, thresholds and scalings."""
    torch.manual_seed(seed)
    model = nn.Module()
    for name, (k, n, *_) in adapters.items():
        model.add_module(name, nn.Linear(k, n))
    fastlora.inject(model, rank=5, where=lambda name, module: isinstance(module, nn.Linear))
    for name, (_, _, rank, kappa, scaling, dtype) in adapters.items():
        adapter = dict(fastlora.adapters(model))[name]
        adapter.keep_ranks_(torch.arange(rank))
        adapter.kappa, adapter.scaling = kappa, scaling
        for parameter in (adapter.lora_a, adapter.lora_b):
            parameter.data = laid_out(torch.randn(parameter.shape).to(dtype), "transposed")
    return model


@settings(max_examples=25)
@given(ADAPTERS, st.integers(0, 2**31), st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=3))
def test_what_is_saved_is_loaded(adapters, seed, metadata):
    model, other = model_of(adapters, seed), model_of(adapters, seed)
    for _, adapter in fastlora.adapters(other):
        adapter.keep_ranks_(torch.arange(0))
        adapter.kappa = 0.5
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        metadata = {key: text for key, text in metadata.items() if key not in ("format", "settings", "sha256", "frame")}
        fastlora.save_adapter(model, path, metadata)
        file = read_adapter(path)
        assert {key: file.header[key] for key in metadata} == metadata
        fastlora.load_adapter(other, path)
        fastlora.save_adapter(other, path, metadata)
        assert read_adapter(path).hashes == file.hashes
    for (name, ours), (_, theirs) in zip(adapter_tensors(model).items(), adapter_tensors(other).items()):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
    assert [(a.kappa, a.scaling) for _, a in fastlora.adapters(model)] == [
        (a.kappa, a.scaling) for _, a in fastlora.adapters(other)
    ]


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool)


@given(st.dictionaries(names, st.tuples(st.lists(st.integers(0, 4), max_size=4), st.sampled_from(DTYPES)), max_size=5),
       st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=3))  # fmt: skip
def test_tensor_files(tensors, header):
    made = {name: (3 * torch.randn(shape)).to(dtype) for name, (shape, dtype) in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        save_file(made, Path(folder) / "file", header or None)
        found_header, found = read_tensors(Path(folder) / "file")
    assert json.loads(json.dumps(found_header)) == header and found.keys() == made.keys()
    for name, tensor in made.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
