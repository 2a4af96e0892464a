"""Merge by the extension fastlora._C: addresses and strides of checked tensors, handed over."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastlora.build import extension
from fastlora.ops.merge_checks import MergeJob, strides

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def serves(weight: Tensor) -> bool:
    """Whether the extension merges into this weight."""
    if extension() is None or weight.dtype not in _DTYPES:
        return False
    return weight.device.type == "cpu" or (weight.device.type == "cuda" and not cuda_obstacle(weight.device.index))


def _extension() -> ModuleType:
    module = extension()
    assert module is not None, "serves() decides before anything here runs"
    return module


@functools.cache
def cuda_obstacle(device: int) -> str:
    """Why the extension cannot run on this CUDA device, or "". A build with CUDA that cannot is told once."""
    if not hasattr(_extension(), "cuda_obstacle"):
        return "fastlora._C was built without CUDA"
    obstacle = _extension().cuda_obstacle(device)
    if obstacle:
        warnings.warn(f"merge_ runs in PyTorch on cuda:{device}: {obstacle}", RuntimeWarning, stacklevel=4)
    return obstacle


class NativeMerge:
    """Jobs of one device as the extension takes them. Everything that a merge allocates is allocated here."""

    def __init__(self, jobs: Sequence[MergeJob]) -> None:
        self.weights = [job.weight for job in jobs]
        self.device = self.weights[0].device
        self.kind = "cuda" if self.device.type == "cuda" else "cpp"
        self._alive: list[Tensor] = []  # what the items point to
        self._items = [self._item(job) for job in jobs]
        if self.kind == "cuda":
            size = _extension().cuda_workspace(self._items)
            self._workspace = torch.empty(size, dtype=torch.uint8, device=self.device)

    def check(self) -> list[Any]:
        return self._call("check")

    def merge(self) -> list[Any]:
        reports = self._call("merge")
        for weight in self.weights:
            # Autograd does not see a raw write: with this, a backward that saved the weight raises instead of using the
            # new values. Inference tensors keep no version, and no backward can have saved them.
            if not weight.is_inference():
                torch.autograd.graph.increment_version(weight)
        return reports

    def _call(self, what: str) -> list[Any]:
        function = getattr(_extension(), f"{what}_{'cuda' if self.kind == 'cuda' else 'cpu'}")
        if self.kind == "cpp":
            return function(self._items, threads=torch.get_num_threads())
        stream = torch.cuda.current_stream(self.device).cuda_stream
        return function(self._items, device=self.device.index, workspace=self._workspace.data_ptr(), stream=stream)

    def _item(self, job: MergeJob) -> Any:
        adapters = [
            tensor.detach() if tensor.dtype in _DTYPES else tensor.detach().to(torch.float32)
            for tensor in (job.lora_a, job.lora_b)
        ]
        gate = job.gate.detach().to(torch.float32).contiguous()
        self._alive += [*adapters, gate]
        matrices = [_matrix(tensor) for tensor in (job.weight, *adapters)]
        return _extension().MergeItem(*matrices, gate=gate.data_ptr(), scaling=job.scaling)


def _matrix(tensor: Tensor) -> Any:
    module, (row, col) = _extension(), strides(tensor)
    dtype = getattr(module.DType, _DTYPES[tensor.dtype])
    return module.Matrix(tensor.data_ptr(), dtype, *tensor.shape, stride_row=row, stride_col=col)
