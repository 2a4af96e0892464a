"""AdamW with a proximal step on the gates, and the schedule of its threshold (CoDyRA, arXiv 2412.01004)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn

from fastlora import adapt
from fastlora.checks import check_kappa, check_operator
from fastlora.modules.adapter import RankAdapter
from fastlora.ops.prox import soft_threshold_
from fastlora.ops.prox_adamw import OneLaunch


class ProxAdamW(torch.optim.AdamW):
    """AdamW on adapters, then the proximal step gate <- soft_threshold(gate, kappa), in one launch where it can be.

    One launch: float32 parameters on one CUDA, ROCm or CPU device, dense gradients, no amsgrad or maximize. Anything
    else (`why_not` says what) is torch's own AdamW step followed by `soft_threshold_`. State, state_dict and parameter
    groups are those of torch.optim.AdamW, either way.

    Args:
        model_or_groups: a module with adapters (see `fastlora.inject`), or parameter groups as for torch.optim; the
            group of the gates carries "prox": True.
        lr: learning rate.
        betas: as torch.optim.AdamW; the default is CoDyRA's.
        weight_decay: as torch.optim.AdamW; the default is CoDyRA's.
        operator: "exact" (the paper's equation) or "released" (its code's; dead zone 2 kappa).
    Raises:
        ValueError: nothing to train, unknown operator, no gates among the groups.
    Numerics:
        float32, in torch's order of operations; on a CPU exp_avg and exp_avg_sq have torch's bits. Bias corrections in
        float64. Deterministic.
    CUDA graphs:
        Take a step outside of the capture first. Replays read kappa as it was set last, and the lr of the groups as
        `write_scalars` wrote it last (or an lr tensor on the device as it is); neither needs a new capture.
    """

    def __init__(
        self,
        model_or_groups: nn.Module | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.9999),
        weight_decay: float = 0.0,
        operator: str = "exact",
    ) -> None:
        check_operator(operator)
        groups = _groups_of(model_or_groups) if isinstance(model_or_groups, nn.Module) else _checked(model_or_groups)
        super().__init__(groups, lr=lr, betas=betas, weight_decay=weight_decay)
        self.operator = operator
        self._one_launch = OneLaunch(operator)

    @property
    def kappa(self) -> float:
        """Threshold of the next step, settable, in gate units (not multiplied by lr).

        It starts at 0, which is plain AdamW, and is saved in the state_dict.
        """
        return self._prox_groups()[0]["kappa"]

    @kappa.setter
    def kappa(self, value: float) -> None:
        check_kappa(value)
        for group in self._prox_groups():
            group["kappa"] = float(value)
        self._one_launch.write_scalars(self.param_groups)

    @property
    def why_not(self) -> str:
        """Why the last step was torch's own and not one launch; empty where it was one launch."""
        return self._one_launch.why_not

    def _prox_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["prox"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("prox", False)
        if group["prox"]:
            group.setdefault("kappa", self.kappa if len(self._prox_groups()) > 1 else 0.0)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One AdamW step, then one proximal step on the gates. Waits for no device.

        Args:
            closure: as for torch.optim: computes the loss and its gradients anew.
        Returns:
            What the closure gave, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._one_launch.step(self.param_groups, self.state):
            _TORCH_STEP(self)
            for group in self._prox_groups():
                soft_threshold_(group["params"], group["kappa"], operator=self.operator)
        return loss

    def kept_counts(self) -> Tensor:
        """Number of gates != 0 in each gate tensor after the last step.

        The step counted them on the device of the gates; reading the values is what waits for it.

        Returns:
            [gate tensors], int64, in the groups' order.
        """
        if self._one_launch.kept is not None:
            return self._one_launch.kept.clone()
        gates = [gate for group in self._prox_groups() for gate in group["params"]]
        return torch.stack([torch.count_nonzero(gate.detach()) for gate in gates]) if gates else torch.zeros(0).long()

    @torch.no_grad()
    def drop_dead_ranks_(self, model: nn.Module) -> int:
        """Remove every rank whose gate is 0 from the adapters of `model` and from the state of this optimizer.

        The outputs do not change, and parameters stay the same objects, without their gradients. Training goes on as if
        nothing was removed where a gate at 0 would stay there: see `KappaSchedule.exact_from`. What looks at all
        gradients at once, as clipping by their norm does, no longer sees those of the removed gates.

        Args:
            model: the one whose adapters this optimizer steps.
        Returns:
            How many ranks were removed. Finding out waits for the device, once.
        """
        found = [adapter for _, adapter in adapt.adapters(model) if adapter.gate.numel()]
        if not found:
            return 0
        found[0].check_whole()
        alive = torch.cat([adapter.gate.detach() != 0 for adapter in found]).cpu()
        masks = alive.split([adapter.gate.numel() for adapter in found])
        ranks = torch.cat([mask.nonzero().flatten() for mask in masks]).to(found[0].gate.device)
        for adapter, mask, kept in zip(found, masks, ranks.split([int(mask.sum()) for mask in masks])):
            if not bool(mask.all()):
                self._keep_ranks(adapter, kept)
        return int((~alive).sum())

    def _keep_ranks(self, adapter: RankAdapter, ranks: Tensor) -> None:
        for parameter, dim in ((adapter.lora_a, 0), (adapter.lora_b, 1), (adapter.gate, 0)):
            entry = self.state.get(parameter, {})
            for name, value in entry.items():
                if name != "step":
                    entry[name] = value.index_select(dim, ranks)
        adapter.keep_ranks_(ranks)

    def write_scalars(self) -> None:
        """lr and the other options of the groups to where a captured step reads them. Does not wait for the device."""
        self._one_launch.write_scalars(self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"operator": self.operator}

    def __setstate__(self, state: dict[str, Any]) -> None:
        known = self.__dict__.get("param_groups", [])  # when a state_dict is loaded, not when unpickled
        super().__setstate__(state)
        for group, before in zip(self.param_groups, known):
            # a state_dict of torch.optim.AdamW does not know which groups are gates
            for key in {"prox", "kappa"} & before.keys():
                group.setdefault(key, before[key])
        self._one_launch = OneLaunch(self.operator)


# Without the wrapper that torch puts around step when an AdamW is made: hooks would run twice, ours and its own.
_TORCH_STEP = inspect.unwrap(torch.optim.AdamW.step)


def _groups_of(model: nn.Module) -> list[dict[str, Any]]:
    directions, gates = [], []
    for _, adapter in adapt.adapters(model):
        directions += [p for p in (adapter.lora_a, adapter.lora_b) if p.requires_grad]
        if adapter.gate.requires_grad:
            gates.append(adapter.gate)
    if not directions and not gates:
        raise ValueError(
            f"{type(model).__name__} has no trainable adapter; call fastlora.inject(model, rank=...) first."
        )
    return [{"params": directions, "prox": False}, {"params": gates, "prox": True}]


def _checked(groups: Iterable[Any]) -> list[dict[str, Any]]:
    groups = list(groups)
    if not all(isinstance(group, dict) for group in groups) or not any(group.get("prox") for group in groups):
        raise ValueError(
            "the parameter groups do not say which of them are gates; give dicts, the gates' one with 'prox': True, "
            "or pass the model itself."
        )
    return [{"prox": False, **group} for group in groups]


# what float32 may add to a step: exp_avg_sq sums up to 1 / (1 - beta2) roundings of 6e-8
_ROUNDING = 1e-3


def largest_adam_step(step: int, betas: tuple[float, float] = (0.9, 0.9999)) -> float:
    """The most that Adam's step number `step` (from 1) can move a parameter, in units of lr, for any gradients at all.

        |m_t| / sqrt(v_t) <= sqrt(sum_i a_i^2 / b_i),  a_i = (1 - beta1) beta1^(t - i),  b_i = (1 - beta2) beta2^(t - i)

    by the inequality of Cauchy and Schwarz, times both bias corrections. Gradients in proportion to a_i / b_i attain it.
    Kingma & Ba (arXiv 1412.6980, section 2.1) say lr, or lr (1 - beta1) / sqrt(1 - beta2) where that is more. This holds
    for gradients that come often, or once; those that grow reach 22.9 lr with betas (0.9, 0.9999), where it says 10.

    Args:
        step: counted from 1.
        betas: of Adam.
    Returns:
        A multiple of lr; infinity where beta2 <= beta1^2, since m then remembers longer than v does.
    """
    beta1, beta2 = betas
    if beta1 == 0 or step == 1:
        terms = 1.0
    elif beta1 * beta1 >= beta2:
        return math.inf
    else:
        ratio = beta1 * beta1 / beta2
        terms = (1 - ratio**step) / (1 - ratio)
    corrections = (1 - beta2**step) / (1 - beta1**step) ** 2
    return (1 - beta1) * math.sqrt(terms / (1 - beta2) * corrections)


@dataclass(frozen=True)
class KappaSchedule:
    """Threshold of the proximal step over one task: none while dense, then a ramp of `steps` values up to `kappa_max`.

    With the published settings (0.005, 50, 0.5, 500) the ramp is linspace(0, kappa_max, 50), advanced every 5
    iterations from iteration 250 on, applied from iteration 251 on: a total shrink of 0.65.

    Args:
        kappa_max: last value, in gate units.
        steps: values of the ramp, >= 2.
        dense: share of the iterations without a proximal step.
        total: iterations of the task.
    """

    kappa_max: float = 0.005
    steps: int = 50
    dense: float = 0.5
    total: int = 500

    def __post_init__(self) -> None:
        check_kappa(self.kappa_max)
        if self.steps < 2:
            raise ValueError(f"steps is {self.steps}; a ramp needs at least 2 values.")
        if not 0.0 <= self.dense <= 1.0:
            raise ValueError(f"dense is {self.dense}; it is a share of the iterations, in [0, 1].")
        if self.total < 1:
            raise ValueError(f"total is {self.total}; it must be at least 1 iteration.")

    @property
    def start(self) -> int:
        """The last iteration without a proximal step."""
        return int(self.dense * self.total)

    def kappa(self, iteration: int) -> float:
        """Threshold of the step at `iteration` (from 0), in gate units."""
        if iteration <= self.start:
            return 0.0
        index = 1 + (iteration - self.start) * self.steps // (self.total - self.start)
        return self.kappa_max * min(index, self.steps - 1) / (self.steps - 1)

    def exact_from(self, lr: Callable[[int], float], betas: tuple[float, float] = (0.9, 0.9999)) -> int:
        """The first iteration from which on no step of Adam can lift a gate from 0 past the threshold.

        Ranks whose gate is 0 before that iteration, or later, may be removed: their gates would stay 0. So says
        `largest_adam_step`, for both operators and any weight decay, of gates that were stepped at every iteration.

        Args:
            lr: learning rate of the gates at an iteration, counted from 0.
            betas: of Adam.
        Returns:
            An iteration, `total` where there is none.
        """
        first = self.total
        while first > 0:
            reach = lr(first - 1) * largest_adam_step(first, betas) * (1 + _ROUNDING)
            if self.kappa(first - 1) <= reach:
                break
            first -= 1
        return first

    @property
    def total_shrink(self) -> float:
        """S, what a gate without gradient loses: the sum of kappa over all iterations, in gate units."""
        return sum(self.kappa(iteration) for iteration in range(self.total))

    def expected_survival(self) -> float:
        """The null model: the share of N(0, 1) gates that live through the schedule without a gradient.

        2 (1 - Phi(S)),  Phi the normal distribution, S = total_shrink
        """
        return math.erfc(self.total_shrink / math.sqrt(2))

    @classmethod
    def for_shrink(cls, total_shrink: float, *, steps: int = 50, dense: float = 0.5, total: int = 500) -> KappaSchedule:
        """The schedule of a given total shrink: equal expected sparsity at another length of the task.

        Args:
            total_shrink: S, in gate units; 0.65 with the published settings.
            steps: values of the ramp, >= 2.
            dense: share of the iterations without a proximal step.
            total: iterations of the task.
        Raises:
            ValueError: `dense` leaves no iteration for the proximal step, or an option is out of range.
        """
        unit = cls(1.0, steps, dense, total).total_shrink
        if unit == 0:
            raise ValueError(
                f"dense={dense} of total={total} iterations leaves none for the proximal step; lower dense."
            )
        return cls(total_shrink / unit, steps, dense, total)
