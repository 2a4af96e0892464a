"""AdamW and the proximal step over every tensor of an optimizer in one launch, by a table of their addresses.

    cpp     CPU: a loop in the extension (csrc/prox_adamw.cpp), with as many threads as torch has
    triton  CUDA and ROCm: one kernel (ops/prox_adamw_triton.py)
    torch   whatever these two do not take (`OneLaunch.why_not`): the caller's business

The table is kept from step to step and written anew only where an address changed: tensors stay where they are, and
there is no flat buffer. Flat state or parameters gain 0 to 4 % in the loop (2.4 ms for the 432 tensors, 4.43 M
parameters, of ViT-B/16 at rank 16; one core of an EPYC 9004). A flat gradient costs nearly as much as it: autograd then
adds into the buffer, 4.5 ms with the zeroing, instead of handing over what the backward wrote, 2.4 ms.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlora.build import extension
from fastlora.ops.backend import TRITON_INSTALLED

Groups = Sequence[Mapping[str, Any]]
State = MutableMapping[Tensor, dict[str, Any]]

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE = (*MOMENTS, "step")
# int64 columns of the table; csrc/prox_adamw.h has them as a struct
COLUMNS = ("param", "grad", "exp_avg", "exp_avg_sq", "step", "numel", "group", "gate")
GRAD = COLUMNS.index("grad")
# instruction set of the extension's loop: auto, scalar or avx2, all with the same bits
SIMD = "auto"
# the address of an empty gradient, since 0 says that there is none
EMPTY = 1


@dataclass(frozen=True)
class Row:
    """One parameter. entry: its state, None before its first gradient. gate: its place among the gates, or -1."""

    param: Tensor
    entry: dict[str, Any] | None
    group: int
    gate: int
    has_grad: bool


class Runner(Protocol):
    """A table and what runs over it."""

    kept: Tensor

    def step(self, grads: list[int], groups: Groups) -> None:
        """grads: an address for each row, 0 for none."""

    def write_scalars(self, groups: Groups) -> None:
        """Options of the groups to where a step reads them."""


class OneLaunch:
    """One AdamW step with the proximal step on the gates, for one optimizer; see the module docstring.

    Args:
        operator: "exact" or "released", as in `soft_threshold`.
        backend: "auto", or "triton" by name, which takes CPU tensors in Triton's interpreter.
    """

    def __init__(self, operator: str, backend: str = "auto") -> None:
        self.operator, self.backend = operator, backend
        self._params: list[Tensor] = []
        self._strange = ""  # why parameters like these have no memory to point to
        # what the table was built from
        self._facts: Any = None
        self._layout: list[tuple[int, bool]] = []
        self._cells: list[Tensor] = []
        self._addresses: list[int] = []
        self._turn = 0
        self._obstacle = "no step was taken"
        self._runner: Runner | None = None

    @property
    def why_not(self) -> str:
        """Why the last step was left to torch; empty where it was not."""
        return self._obstacle

    @property
    def kept(self) -> Tensor | None:
        """Gates != 0 of each gate tensor after the last step, int64 [gate tensors], on the device of the gates."""
        return self._runner.kept if self._runner else None

    def step(self, groups: Groups, state: State) -> bool:
        """param, exp_avg, exp_avg_sq and step in place, gates thresholded and counted; nothing waits for the device.

        A parameter without a gradient is skipped as torch skips it; a gate without one is still thresholded.

        Args:
            groups, state: of a torch.optim optimizer; a group of gates also has "prox": True and "kappa". State that is
                missing is made as torch.optim.AdamW makes it.
        Returns:
            False where torch has to do the step (see `why_not`); nothing is changed then.
        Raises:
            RuntimeError: a parameter was resized without its state, or a CUDA graph is being captured and cannot hold
                this step; the message says what to do.
        """
        params = [p for group in groups for p in group["params"]]
        obstacle = self._obstacle_of_step(groups, params)
        if not obstacle:
            facts, grads, copies = _look(params)
            obstacle = "a gradient is sparse or not float32" if copies is None else ""
        if obstacle:
            self._obstacle, self._facts, self._runner = obstacle, None, None
            return False
        if not self._knows(groups, facts, state):
            self._build(groups, params, state)
            self._note(groups, facts, state)
        if self._runner is None:
            return False
        # autograd does not see a raw write: with this, a backward that saved a parameter raises
        torch.autograd.graph.increment_version(params)
        self._runner.step(grads, groups)
        return True

    def write_scalars(self, groups: Groups) -> None:
        """lr, betas, eps, weight_decay and kappa to where a captured step reads them; does not wait for the device."""
        if self._runner is not None:
            self._runner.write_scalars(groups)

    def _obstacle_of_step(self, groups: Groups, params: list[Tensor]) -> str:
        """What can be said without an address."""
        if torch.compiler.is_compiling():
            return "torch.compile traces the step"
        for group in groups:
            asked = [option for option in ("amsgrad", "maximize", "differentiable") if group.get(option)]
            if asked:
                return f"a group asks for {asked[0]}"
            if any(isinstance(beta, Tensor) for beta in group["betas"]):
                return "the betas of a group are tensors"
        if not _same_objects(params, self._params):
            self._params, self._strange, self._facts = params, _strange(params), None
        return self._strange

    def _knows(self, groups: Groups, facts: Any, state: State) -> bool:
        """Whether the table is right but for gradients.

        State is compared by object: to read the addresses of three cold tensors a parameter would take a quarter of the
        time of the step itself. Those of one parameter are read, in turn: what moves state by its .data moves it all.
        """
        if facts != self._facts or _layout(groups) != self._layout:
            return False
        cells = _cells(state)
        if not _same_objects(cells, self._cells):
            return False
        self._turn = self._turn + len(STATE) if self._turn + len(STATE) < len(cells) else 0
        looked_at = slice(self._turn, self._turn + len(STATE))
        return [cell.data_ptr() for cell in cells[looked_at]] == self._addresses[looked_at]

    def _note(self, groups: Groups, facts: Any, state: State) -> None:
        self._facts, self._layout, self._cells = facts, _layout(groups), _cells(state)
        self._addresses = [cell.data_ptr() for cell in self._cells]

    def _build(self, groups: Groups, params: list[Tensor], state: State) -> None:
        kind, self._obstacle = choose(self.backend, params)
        if kind is not None:
            kind.check_can_build(params[0].device)
            self._obstacle = _complete(state, params)
        if self._obstacle:
            self._runner = None
        else:
            self._runner = kind(_rows(groups, state), len(groups), self.operator == "released")


def _look(params: Sequence[Tensor]) -> tuple[list[Any], list[int], list[Tensor] | None]:
    """What the table depends on, and the addresses of the gradients.

    In one pass: all this is cold after a backward, and a fifth of the time of a step on a CPU.

    Returns:
        For each parameter (address, elements, contiguous, without gradient); for each the address of its gradient, 0
        for none; copies of gradients that were not contiguous, to hold until the launch, or None where a gradient has
        no address that serves.
    """
    facts: list[Any] = []
    grads: list[int] = []
    copies: list[Tensor] = []
    float32, strided = torch.float32, torch.strided
    for p in params:
        g = p.grad
        facts.append((p.data_ptr(), p.numel(), p.is_contiguous(), g is None))
        if g is None:
            grads.append(0)
            continue
        if g.dtype is not float32 or g.layout is not strided:
            return facts, grads, None
        if not g.is_contiguous():
            g = g.contiguous()
            copies.append(g)
        grads.append(g.data_ptr() or EMPTY)
    return facts, grads, copies


def _layout(groups: Groups) -> list[tuple[int, bool]]:
    return [(len(group["params"]), bool(group.get("prox"))) for group in groups]


def _cells(state: State) -> list[Tensor]:
    return list(chain.from_iterable([entry.values() for entry in state.values()]))


def _same_objects(these: Sequence[Any], those: Sequence[Any]) -> bool:
    return len(these) == len(those) and all(map(operator.is_, these, those))


def _strange(params: Sequence[Tensor]) -> str:
    for p in params:
        ordinary = type(p) in (Tensor, torch.nn.Parameter) and p.layout is torch.strided
        if not ordinary or p.is_meta or p.is_inference():
            return f"a parameter is no ordinary tensor: {type(p).__name__}, {p.layout}, on {p.device}"
    return ""


def choose(backend: str, params: Sequence[Tensor]) -> tuple[Any, str]:
    """The Runner class for these tensors and "", or None and the reason."""
    devices = {p.device for p in params}
    if len(devices) != 1:
        return None, f"the parameters are on {len(devices)} devices"
    for p in params:
        if p.dtype != torch.float32 or not p.is_contiguous():
            return None, f"a parameter is {p.dtype} with strides {list(p.stride())}, not contiguous float32"
        if p.grad is not None and p.grad.shape != p.shape:
            return None, f"a gradient has shape {list(p.grad.shape)}, its parameter {list(p.shape)}"
    device = devices.pop().type
    if device == "cuda" or backend == "triton":
        if not TRITON_INSTALLED:
            return None, "Triton is not installed (pip install triton, Linux only)"
        from fastlora.ops.prox_adamw_triton import TritonRunner

        return TritonRunner, ""
    if device != "cpu":
        return None, f"the parameters are on {device}"
    return (CppRunner, "") if extension() else (None, "the extension was not built; build_info() says why")


def _complete(state: State, params: Sequence[Tensor]) -> str:
    """Make the state that is missing; returns why the state cannot be stepped by address, or ""."""
    for p in params:
        if p.grad is None and p not in state:
            continue
        entry = state[p]
        if not entry and p.grad is not None:
            entry["step"] = torch.tensor(0.0, dtype=torch.float32)
            entry.update({name: torch.zeros_like(p, memory_format=torch.contiguous_format) for name in MOMENTS})
        for name in MOMENTS if entry else ():
            moment = entry[name]
            if moment.shape != p.shape:
                raise RuntimeError(
                    f"a parameter has shape {list(p.shape)} and its {name} {list(moment.shape)}; they must be equal. "
                    "Remove ranks with ProxAdamW.drop_dead_ranks_, which keeps both together, or make a new optimizer."
                )
            if (moment.dtype, moment.device) != (p.dtype, p.device):
                return f"{name} is {moment.dtype} on {moment.device}, unlike its parameter"
            entry[name] = moment.contiguous()
    return ""


def _rows(groups: Groups, state: State) -> list[Row]:
    rows: list[Row] = []
    gates = 0
    for number, group in enumerate(groups):
        for p in group["params"]:
            is_gate = bool(group.get("prox"))
            rows.append(Row(p, state.get(p) or None, number, gates if is_gate else -1, p.grad is not None))
            gates += is_gate
    return rows


def table(rows: Sequence[Row]) -> Tensor:
    """int64 [rows, COLUMNS] on the CPU, without the gradients."""
    listed = []
    for row in rows:
        state = [row.entry[name].data_ptr() if row.entry else 0 for name in STATE]
        listed.append([row.param.data_ptr(), 0, *state, row.param.numel(), row.group, row.gate])
    return torch.tensor(listed, dtype=torch.int64)


def gate_count(rows: Sequence[Row]) -> int:
    """Number of gate tensors."""
    return sum(row.gate >= 0 for row in rows)


def scalars(groups: Groups) -> list[tuple[float, ...]]:
    """lr, beta1, beta2, eps, weight_decay, kappa, log beta1, log beta2 of each group; an lr on a device counts as 0."""
    return [
        (
            0.0 if is_on_device(group["lr"]) else float(group["lr"]),
            *group["betas"],
            float(group["eps"]),
            float(group["weight_decay"]),
            float(group.get("kappa", 0.0)),
            *(math.log(beta) if beta else -math.inf for beta in group["betas"]),
        )
        for group in groups
    ]


def is_on_device(value: Any) -> bool:
    """Whether reading this lr would wait for a device."""
    return isinstance(value, Tensor) and value.device.type != "cpu"


class CppRunner:
    """The extension's loop."""

    def __init__(self, rows: Sequence[Row], groups: int, released: bool) -> None:
        for row in rows:
            if row.entry:
                row.entry["step"] = _float32_on_cpu(row.entry["step"])
        self._table, self._released, self._grads = table(rows), released, [0] * len(rows)
        self.kept = torch.zeros(gate_count(rows), dtype=torch.int64)

    @staticmethod
    def check_can_build(device: torch.device) -> None:
        """A table of a CPU can be built at any time."""

    def step(self, grads: list[int], groups: Groups) -> None:
        module = extension()
        assert isinstance(module, ModuleType), "choose() decides before anything here runs"
        if grads != self._grads:
            self._table[:, GRAD] = torch.tensor(grads, dtype=torch.int64)
            self._grads = grads
        options = torch.tensor(scalars(groups), dtype=torch.float64)
        module.prox_adamw_cpu(
            self._table.data_ptr(), len(self._table), options.data_ptr(), self._released, self.kept.data_ptr(),
            threads=torch.get_num_threads(), simd=SIMD,
        )  # fmt: skip

    def write_scalars(self, groups: Groups) -> None:
        """Nothing: every step reads the groups."""


def _float32_on_cpu(step: Any) -> Tensor:
    if isinstance(step, Tensor) and step.dtype == torch.float32 and step.device.type == "cpu":
        return step
    return torch.tensor(float(step), dtype=torch.float32)
