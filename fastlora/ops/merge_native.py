"""Merge by the extension fastlora._C: addresses and strides of checked tensors, handed over."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastlora.build import extension
from fastlora.ops.merge_checks import MergeJob
from fastlora.ops.merge_memory import residual_strides, strides

if TYPE_CHECKING:
    from fastlora._C import ItemReport, Matrix, MergeItem
    from fastlora.ops.merge_report import Counts

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_RESIDUAL_DTYPES = {**_DTYPES, torch.int8: "int8"}
# what a captured graph reads and writes whenever it is replayed; nothing tells when the last replay was
_CAPTURED: list[Any] = []


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

    def __init__(self, jobs: Sequence[MergeJob], seed: int | None) -> None:
        self._written = [t for job in jobs for t in (job.weight, job.residual) if t is not None]
        self._seed = seed
        self.device = jobs[0].weight.device
        self.kind = "cuda" if self.device.type == "cuda" else "cpp"
        self.capturing = self.kind == "cuda" and torch.cuda.is_current_stream_capturing()
        self._alive: list[Tensor] = []  # what the items point to
        self._items = [self._item(job) for job in jobs]
        if self.kind == "cuda":
            self._allocate()

    def _allocate(self) -> None:
        """The device's table of jobs and figures, and pinned memory from which the table is copied without waiting."""
        table, size = _extension().cuda_workspace(self._items)
        self._workspace = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._table = torch.empty(table, dtype=torch.uint8, pin_memory=True)
        if self.capturing:
            _CAPTURED.append((self._workspace, self._table, self._alive, self._written))

    def check(self) -> Sequence[Counts]:
        if self.capturing:
            raise ValueError(
                "check=True reads what it finds on the host, which a stream that is being captured cannot wait for; "
                "pass check=False and look at the report's `not_finite` after the replay."
            )
        if self.kind == "cpp":
            return self._on_cpu("check_cpu")
        return self._launch("check_cuda")()

    def merge(self) -> Callable[[], Sequence[Counts]]:
        """Write, and return what reads the figures."""
        if self.kind == "cpp":
            counts = self._on_cpu("merge_cpu")
            read = lambda: counts  # noqa: E731
        else:
            read = self._launch("merge_cuda")
        for tensor in self._written:
            # Autograd does not see a raw write: with this, a backward that saved the weight raises instead of using the
            # new values. Inference tensors keep no version, and no backward can have saved them.
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
        return read

    def _on_cpu(self, function: str) -> list[ItemReport]:
        try:
            return getattr(_extension(), function)(self._items, threads=torch.get_num_threads())
        except MemoryError:  # of its tables, which it makes before it writes
            raise MemoryError(
                f"there is no memory for the tables of a merge of {len(self._items)} modules; no weight has been changed. "
                "Free some, or merge fewer modules in a call."
            ) from None

    def _launch(self, function: str) -> Callable[[], list[ItemReport]]:
        """Enqueue on the caller's stream; what is returned waits for the device and reads the figures."""
        stream = torch.cuda.current_stream(self.device).cuda_stream
        addresses = {"workspace": self._workspace.data_ptr(), "table": self._table.data_ptr(), "stream": stream}
        getattr(_extension(), function)(self._items, device=self.device.index, **addresses)

        def read() -> list[ItemReport]:
            figures = self._workspace.cpu()
            return _extension().cuda_reports(self._items, figures.data_ptr(), function == "check_cuda")

        return read

    def _item(self, job: MergeJob) -> MergeItem:
        adapters = [
            tensor.detach() if tensor.dtype in _DTYPES else tensor.detach().to(torch.float32)
            for tensor in (job.lora_a, job.lora_b)
        ]
        gate = job.gate.detach().to(torch.float32).contiguous()
        self._alive += [*adapters, gate]
        by_rows = strides(job.weight)[1] == 1
        matrices = [_matrix(job.weight, strides(job.weight)), *(_matrix(each, strides(each)) for each in adapters)]
        residual = None if job.residual is None else _matrix(job.residual, residual_strides(job.residual, by_rows))
        options = {"residual": residual, "seed": self._seed, "module": job.place}
        return _extension().MergeItem(*matrices, gate=gate.data_ptr(), scaling=job.scaling, **options)


def _matrix(tensor: Tensor, strides_: tuple[int, int]) -> Matrix:
    module, (row, col) = _extension(), strides_
    dtype = getattr(module.DType, _RESIDUAL_DTYPES[tensor.dtype])
    return module.Matrix(tensor.data_ptr(), dtype, *tensor.shape, stride_row=row, stride_col=col)
