"""The Triton kernels as an implementation of the op: the launchers behind two custom ops with fakes.

`launch_fwd` and `launch_bwd` choose variant and tile and call the launchers; they are what eager autograd calls. The
custom ops `fastlora::rank_lora_fwd` and `fastlora::rank_lora_bwd` wrap the same two functions for whatever traces:
torch.compile, torch.export, fake tensors, tensor subclasses, torch.func. An op boundary costs host time at every call,
so eager calls on plain tensors do without.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from fastlora.ops import rank_lora_torch
from fastlora.ops.backend import TMA_VARIANTS
from fastlora.ops.plan import make_plan
from fastlora.ops.rank_lora_torch import Gradients, Needs, Ranks


def launch_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate: Tensor, kappa: float | Tensor,
    scaling: float, ranks: Ranks, variant: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x [M, K] -> y [M, N], s [M, R]; variant "triton" follows the dispatch table."""
    from fastlora.triton_kernels import rank_lora_fwd

    plan = make_plan("fwd", x, weight, lora_a.shape[0], ranks, variant)
    if plan.variant == "library":
        return rank_lora_torch.rank_lora_fwd(x, weight, bias, lora_a, lora_b, gate, kappa, scaling, ranks)
    return rank_lora_fwd(
        x, weight, bias, lora_a, lora_b, gate, on_device(kappa, x), scaling,
        ranks=ranks, variant=plan.variant, tile=plan.tile,
    )  # fmt: skip


def launch_bwd(
    dy: Tensor, x: Tensor, s: Tensor | None, weight: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor,
    kappa: float | Tensor, scaling: float, ranks: Ranks, needs: Needs, variant: str,
) -> Gradients:  # fmt: skip
    """dy [M, N] -> dx, dlora_a, dlora_b, dgate; None where not needed.

    The adapter's gradients come first: the kernel that reads dy and x for them makes p, which dx then only adds.
    """
    from fastlora.triton_kernels import rank_lora_dx, rank_lora_grad

    need_x, need_a, need_b, need_gate = needs
    adapter = need_a or need_b or need_gate
    kappa = on_device(kappa, dy)
    if variant in TMA_VARIANTS and (adapter or ranks):
        variant = "split_tma"  # p is there before dx
    plan = make_plan("dx", dy, weight, lora_a.shape[0], ranks, variant) if need_x else None
    dx = dlora_a = dlora_b = dgate = p = None
    if adapter:
        dlora_a, dlora_b, dgate, p = rank_lora_grad(
            x, s, dy, None, lora_a, lora_b, gate, kappa, scaling, need_a, need_b, need_gate, need_x, ranks=ranks
        )
    if plan and plan.variant == "library":
        p = rank_lora_torch.project_back(dy, lora_b, ranks) if p is None else p
        g = rank_lora_torch.effective_gate(gate, kappa, scaling)
        dx = torch.mm(dy, weight).addmm_(rank_lora_torch.times_gate(p, g), lora_a)
    elif plan:
        dx, _ = rank_lora_dx(
            dy, weight, lora_a, lora_b, gate, kappa, scaling, ranks=ranks, p=p, variant=plan.variant, tile=plan.tile
        )
    return dx, dlora_a, dlora_b, dgate


def on_device(kappa: float | Tensor, like: Tensor) -> Tensor:
    """kappa as the device scalar that kernels read."""
    return kappa if isinstance(kappa, Tensor) else torch.full((), kappa, dtype=torch.float32, device=like.device)


@custom_op("fastlora::rank_lora_fwd", mutates_args=())
def fwd_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate: Tensor, kappa: Tensor,
    scaling: float, ranks: Sequence[int] | None, variant: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return launch_fwd(x, weight, bias, lora_a, lora_b, gate, kappa, scaling, _tuple(ranks), variant)


@fwd_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate: Tensor, kappa: Tensor,
    scaling: float, ranks: Sequence[int] | None, variant: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_a.shape[0])


@custom_op("fastlora::rank_lora_bwd", mutates_args=())
def bwd_op(
    dy: Tensor, x: Tensor, s: Tensor | None, weight: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor,
    kappa: Tensor, scaling: float, ranks: Sequence[int] | None, needs: Sequence[bool], variant: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    need_x, need_a, need_b, need_gate = needs
    wanted = need_x, need_a, need_b, need_gate
    grads = launch_bwd(dy, x, s, weight, lora_a, lora_b, gate, kappa, scaling, _tuple(ranks), wanted, variant)
    # a custom op returns tensors only: an empty one stands for "not needed"
    dx, dlora_a, dlora_b, dgate = (dy.new_empty(0) if grad is None else grad for grad in grads)
    return dx, dlora_a, dlora_b, dgate


@bwd_op.register_fake
def _(
    dy: Tensor, x: Tensor, s: Tensor | None, weight: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor,
    kappa: Tensor, scaling: float, ranks: Sequence[int] | None, needs: Sequence[bool], variant: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtypes = (dy.dtype, torch.float32, torch.float32, torch.float32)
    dx, dlora_a, dlora_b, dgate = (
        of.new_empty(of.shape, dtype=dtype) if need else dy.new_empty(0)
        for of, dtype, need in zip((x, lora_a, lora_b, gate), dtypes, needs)
    )
    return dx, dlora_a, dlora_b, dgate


def _tuple(ranks: Sequence[int] | None) -> Ranks:
    if ranks is None:
        return None
    rank_q, rank_k, rank_v = ranks
    return rank_q, rank_k, rank_v


def traced_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate: Tensor, kappa: float | Tensor,
    scaling: float, ranks: Ranks, variant: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`launch_fwd` through its custom op."""
    return fwd_op(x, weight, bias, lora_a, lora_b, gate, on_device(kappa, x), scaling, ranks, variant)


def traced_bwd(
    dy: Tensor, x: Tensor, s: Tensor | None, weight: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor,
    kappa: float | Tensor, scaling: float, ranks: Ranks, needs: Needs, variant: str,
) -> Gradients:  # fmt: skip
    """`launch_bwd` through its custom op."""
    kappa = on_device(kappa, dy)
    grads = bwd_op(dy, x, s, weight, lora_a, lora_b, gate, kappa, scaling, ranks, list(needs), variant)
    dx, dlora_a, dlora_b, dgate = (grad if need else None for grad, need in zip(grads, needs))
    return dx, dlora_a, dlora_b, dgate
