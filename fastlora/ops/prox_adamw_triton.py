"""The one-launch optimizer step on a CUDA or ROCm device: tables in its memory, and a CUDA graph's claims on them.

Steps, lr, betas, eps, weight_decay and kappa are read from the device. A captured step keeps every table that it reads
alive, and its replays see what `write_scalars` wrote last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.ops import prox_adamw
from fastlora.ops.prox_adamw import GRAD, Groups, Row, is_on_device
from fastlora.triton_kernels import prox_adamw as kernel

# a capture may not ask for pinned memory, and each of its steps may find its gradients elsewhere
SPARES = 16


class TritonRunner:
    """One launch of `triton_kernels/prox_adamw.py` over the rows.

    Each program of the kernel counts its own steps, in float32 [programs]: no program then waits for another to have
    read a shared count. The state of a parameter shows the count of its first program.
    """

    def __init__(self, rows: Sequence[Row], groups: int, released: bool) -> None:
        self._released, self._device = released, rows[0].param.device
        self._chunks, self._steps = _chunks(rows, self._device)
        self._rows = prox_adamw.table(rows)
        self._grads: list[int] = []
        self._aligned = False
        self._table = torch.empty(0, dtype=torch.int64, device=self._device)
        self._scalars = torch.empty(groups, kernel.SCALARS, dtype=torch.float64, device=self._device)
        self._written: list[tuple[float, ...]] = []  # what is in _scalars
        self._spares: list[Tensor] = []  # pinned, for tables that are written during a capture
        self._captured: list[Tensor] = []  # what graphs read
        self.kept = torch.zeros(prox_adamw.gate_count(rows), dtype=torch.int64, device=self._device)

    @staticmethod
    def check_can_build(device: torch.device) -> None:
        """Raises RuntimeError during a capture: tables of new tensors cannot be made within a graph."""
        if _is_capturing(device):
            raise RuntimeError(
                "the optimizer has no table of these tensors, and a CUDA graph is being captured; take a step outside "
                "of the capture first, after every change of the parameters, their state or which of them have a gradient."
            )

    def step(self, grads: list[int], groups: Groups) -> None:
        capturing = _is_capturing(self._device)
        while len(self._spares) < SPARES and not capturing:
            self._spares.append(_pinned(torch.empty_like(self._rows), self._device))
        self.write_scalars(groups)
        if grads != self._grads:
            self._write_table(grads, capturing)
        for number, group in enumerate(groups):
            if is_on_device(group["lr"]):
                self._scalars[number, 0].copy_(group["lr"])
        if capturing:
            self._captured += [self._table, self._chunks, self._steps, self._scalars, self.kept]
        kernel.prox_adamw(
            self._table, self._chunks, self._steps, self._scalars, self.kept, released=self._released,
            aligned=self._aligned,
        )  # fmt: skip

    def write_scalars(self, groups: Groups) -> None:
        """Raises RuntimeError during a capture, which would write today's values at every replay."""
        values = prox_adamw.scalars(groups)
        if values == self._written:
            return
        if _is_capturing(self._device):
            raise RuntimeError(
                "lr, kappa or another option of the optimizer changed since its last step, and a CUDA graph is being "
                "captured; call optimizer.write_scalars() before the capture."
            )
        # memory of its own for each copy, since the device may still be reading that of the last
        values_here = torch.tensor(values, dtype=torch.float64)
        self._scalars.copy_(_pinned(values_here, self._device), non_blocking=True)
        self._written = values

    def _write_table(self, grads: list[int], capturing: bool) -> None:
        """A new table on the device, since a launch or a graph may read the old one."""
        self._rows[:, GRAD] = torch.tensor(grads, dtype=torch.int64)
        if capturing:
            if not self._spares:
                raise RuntimeError(
                    f"the gradients moved in each of {SPARES} captured steps of the optimizer; take a step outside of "
                    "a capture before the next one."
                )
            rows = self._spares.pop().copy_(self._rows)
            self._captured.append(rows)
        else:
            rows = _pinned(self._rows.clone(), self._device)
        self._table = torch.empty_like(self._rows, device=self._device)
        self._table.copy_(rows, non_blocking=True)
        self._grads = grads
        self._aligned = not bool((self._rows[:, : len(prox_adamw.MOMENTS) + 2] % 16).any())


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _chunks(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor]:
    """What each program does, int64 [programs, 3]: row, first and last element; and the steps that it has taken.

    A gate tensor has one program, which counts what is kept of it; others have one for every BLOCK elements.
    """
    listed: list[tuple[int, int, int]] = []
    first_chunk: dict[int, int] = {}
    for number, row in enumerate(rows):
        size = row.param.numel()
        if not row.has_grad and row.gate < 0:
            continue
        first_chunk[number] = len(listed)
        step = max(size, 1) if row.gate >= 0 else kernel.BLOCK
        # an empty tensor has a program, too: its steps are counted as torch counts them
        listed += [(number, start, min(start + step, size)) for start in range(0, max(size, 1), step)]
    chunks = torch.tensor(listed, dtype=torch.int64).view(-1, 3)
    taken = _taken(rows, device)
    steps = taken.index_select(0, _upload(chunks[:, 0].contiguous(), device))
    for number, row in enumerate(rows):
        if row.entry:
            row.entry["step"] = steps[first_chunk[number]] if number in first_chunk else taken[number]
    return _upload(chunks, device), steps


def _taken(rows: Sequence[Row], device: torch.device) -> Tensor:
    """Steps that each row has taken, float32 [rows] on the device, from state that may be on either side."""
    steps: list[Any] = [row.entry["step"] if row.entry else 0.0 for row in rows]  # numbers, or tensors on either side
    there = [number for number, step in enumerate(steps) if is_on_device(step)]
    here = [0.0 if is_on_device(step) else float(step) for step in steps]
    taken = _upload(torch.tensor(here, dtype=torch.float32), device)
    if there:
        # where the state is on the device, reading it here would wait
        stacked = torch.stack([steps[number].to(device, torch.float32).reshape(()) for number in there])
        taken.index_copy_(0, _upload(torch.tensor(there), device), stacked)
    return taken


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    return _pinned(tensor, device).to(device, non_blocking=True)
