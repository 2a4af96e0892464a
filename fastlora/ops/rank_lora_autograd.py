"""Autograd of the op over every variant.

    y  = x @ weight.T + bias + scaling * ((x @ lora_a.T) * T(gate)) @ lora_b.T            T = soft_threshold(., kappa)
    dx = dy @ weight + scaling * (p * T(gate)) @ lora_a                                   p = dy @ lora_b
    dlora_a = scaling * diag(T(gate)) @ p.T @ x        dlora_b = scaling * (dy.T @ s) @ diag(T(gate))
    dgate_i = scaling * <lora_b[:, i], (dy.T @ s)[:, i]> where the threshold is not flat

Saved for backward: x, which the caller holds anyway, and s [M, R]; x alone with `recompute` and in the merged variant.

Three classes over one pair of functions, because no single one serves: `_Eager` (plain tensors) is the fastest to call;
`_Compiled` separates setup_context from forward, which torch.compile and torch.func ask for and which costs 40 us a
call; `_Transformed` adds vmap and forward-mode AD, whose presence torch.compile refuses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastlora.ops import rank_lora_torch, rank_lora_triton
from fastlora.ops.rank_lora_torch import Gradients, Needs, Ranks

TORCH_VARIANTS = ("library", "merged")
# what marks the tensors of torch.autograd.grad(..., is_grads_batched=True), which torch.func knows nothing of
_BATCHED = torch._C._dispatch_key_parse("Batched")


def apply(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate: Tensor,
    kappa: float | Tensor, scaling: float, ranks: Ranks, variant: str, recompute: bool,
) -> Tensor:  # fmt: skip
    """x [M, K] -> y [M, N], recorded by autograd. Operands were checked."""
    if torch.compiler.is_compiling():
        function = _Compiled
    elif _is_plain(x) and _is_plain(weight) and _is_plain(lora_a) and not _is_observed():
        if not torch.is_grad_enabled():
            return _forward(False, x, weight, bias, lora_a, lora_b, gate, kappa, scaling, ranks, variant)[0]
        return _Eager.apply(x, weight, bias, lora_a, lora_b, gate, kappa, scaling, ranks, variant, recompute)
    else:
        function = _Transformed
    return function.apply(x, weight, bias, lora_a, lora_b, gate, kappa, scaling, ranks, variant, recompute)[0]


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is Tensor or type(tensor) is torch.nn.Parameter


def _is_observed() -> bool:
    """A torch.func transform, a forward-mode level, or a dispatch mode (fake tensors, FLOP counters) is active."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _is_transformed(dy: Tensor) -> bool:
    """Whether torch.func is at work, or autograd batches several backward passes (is_grads_batched)."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or torch._C._dispatch_keys(dy).has(_BATCHED)
    )


def _forward(
    traced: bool, x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate: Tensor,
    kappa: float | Tensor, scaling: float, ranks: Ranks, variant: str,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """y and s; s is None in the merged variant."""
    a = lora_a if lora_a.dtype == x.dtype else lora_a.to(x.dtype)
    b = lora_b if lora_b.dtype == x.dtype else lora_b.to(x.dtype)
    if variant == "library":
        return rank_lora_torch.rank_lora_fwd(x, weight, bias, a, b, gate, kappa, scaling, ranks)
    if variant == "merged":
        return rank_lora_torch.merged_fwd(x, weight, bias, a, b, gate, kappa, scaling, ranks)
    run = rank_lora_triton.traced_fwd if traced else rank_lora_triton.launch_fwd
    return run(x, weight, bias, a, b, gate, kappa, scaling, ranks, variant)


def _backward(
    traced: bool, dy: Tensor, saved: tuple[Any, ...], scaling: float, ranks: Ranks, variant: str, needs: Needs
) -> Gradients:
    x, s, weight, lora_a, lora_b, gate, kappa = saved
    a = lora_a if lora_a.dtype == dy.dtype else lora_a.to(dy.dtype)
    b = lora_b if lora_b.dtype == dy.dtype else lora_b.to(dy.dtype)
    if variant in TORCH_VARIANTS or torch.is_grad_enabled() or _is_transformed(dy):
        # double backward: plain differentiable ops, and s as a function of x and lora_a instead of a constant
        s = None if torch.is_grad_enabled() else s
        merged = variant == "merged"
        grads = rank_lora_torch.rank_lora_bwd(dy, x, s, weight, a, b, gate, kappa, scaling, ranks, needs, merged)
    else:
        run = rank_lora_triton.traced_bwd if traced else rank_lora_triton.launch_bwd
        grads = run(dy, x, s, weight, a, b, gate, kappa, scaling, ranks, needs, variant)
    dx, dlora_a, dlora_b, dgate = grads
    return _as(dx, x), _as(dlora_a, lora_a), _as(dlora_b, lora_b), _as(dgate, gate)


def _as(grad: Tensor | None, of: Tensor) -> Tensor | None:
    """The gradient in the dtype of what it differentiates."""
    return None if grad is None else grad if grad.dtype == of.dtype else grad.to(of.dtype)


def _save(
    ctx: Any, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor,
    kappa: float | Tensor, scaling: float, ranks: Ranks, variant: str, s: Tensor | None,
) -> None:  # fmt: skip
    ctx.set_materialize_grads(False)
    kappa_tensor = kappa if isinstance(kappa, Tensor) else None
    ctx.save_for_backward(x, s, weight, lora_a, lora_b, gate, kappa_tensor)
    ctx.kappa, ctx.scaling, ctx.ranks, ctx.variant = (
        (None if kappa_tensor is not None else kappa),
        scaling,
        ranks,
        variant,
    )


def _saved(ctx: Any) -> tuple[Any, ...]:
    *tensors, kappa = ctx.saved_tensors
    return *tensors, ctx.kappa if kappa is None else kappa


def _needs(ctx: Any) -> Needs:
    """Which of x, lora_a, lora_b and gate need a gradient; never a silent zero for the frozen ones."""
    need_x, need_weight, need_bias, need_a, need_b, need_gate = ctx.needs_input_grad[:6]
    if need_weight or need_bias:
        raise RuntimeError(
            f"{'weight' if need_weight else 'bias'} requires a gradient; weight and bias of rank_lora_linear are frozen "
            "and get none. Call requires_grad_(False) on them, or compute with fastlora.reference.rank_lora_linear."
        )
    return need_x, need_a, need_b, need_gate


class _Eager(torch.autograd.Function):
    """x [M, K] -> y [M, N]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate: Tensor,
        kappa: float | Tensor, scaling: float, ranks: Ranks, variant: str, recompute: bool,
    ) -> Tensor:  # fmt: skip
        y, s = _forward(False, x, weight, bias, lora_a, lora_b, gate, kappa, scaling, ranks, variant)
        _save(ctx, x, weight, lora_a, lora_b, gate, kappa, scaling, ranks, variant, None if recompute else s)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 11
        grads = _backward(False, dy, _saved(ctx), ctx.scaling, ctx.ranks, ctx.variant, _needs(ctx))
        return grads[0], None, None, *grads[1:], None, None, None, None, None


class _Compiled(torch.autograd.Function):
    """x [M, K] -> y [M, N], s [M, R]; s is returned only so that it can be saved, and is empty where it is not."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate: Tensor,
        kappa: float | Tensor, scaling: float, ranks: Ranks, variant: str, recompute: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        y, s = _forward(True, x, weight, bias, lora_a, lora_b, gate, kappa, scaling, ranks, variant)
        return y, (x.new_empty(0) if recompute or s is None else s)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _bias, lora_a, lora_b, gate, kappa, scaling, ranks, variant, recompute = inputs
        s = output[1]
        ctx.mark_non_differentiable(s)
        keep_s = None if recompute or variant == "merged" else s
        _save(ctx, x, weight, lora_a, lora_b, gate, kappa, scaling, ranks, variant, keep_s)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _ds: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 11
        grads = _backward(True, dy, _saved(ctx), ctx.scaling, ctx.ranks, ctx.variant, _needs(ctx))
        return grads[0], None, None, *grads[1:], None, None, None, None, None


class _Transformed(_Compiled):
    """With vmap and forward-mode AD."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _Compiled.setup_context(ctx, inputs, output)
        x, weight, _bias, lora_a, lora_b, gate, kappa, *_ = inputs
        ctx.save_for_forward(x, weight, lora_a, lora_b, gate, kappa if isinstance(kappa, Tensor) else None)

    @staticmethod
    def jvp(
        ctx: Any, x_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None,
        lora_a_t: Tensor | None, lora_b_t: Tensor | None, gate_t: Tensor | None, *_: None,
    ) -> tuple[Tensor, None]:  # fmt: skip
        x, weight, lora_a, lora_b, gate, kappa = ctx.saved_tensors
        kappa = ctx.kappa if kappa is None else kappa
        primals = (x, lora_a, lora_b, gate)
        tangents = (x_t, lora_a_t, lora_b_t, gate_t)
        if weight_t is not None or bias_t is not None:
            raise RuntimeError(
                "a tangent of weight or bias was given to rank_lora_linear; both are frozen and take none. "
                "Give tangents to x, lora_a, lora_b and gate."
            )
        y_t = rank_lora_torch.rank_lora_jvp(*primals, *tangents, weight, kappa, ctx.scaling, ctx.ranks)
        return y_t, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...],
        x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate: Tensor,
        kappa: float | Tensor, scaling: float, ranks: Ranks, variant: str, recompute: bool,
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:  # fmt: skip
        operands = (x, weight, bias, lora_a, lora_b, gate, kappa)
        rest = (scaling, ranks, variant, recompute)
        x_dim, *other_dims = in_dims[: len(operands)]
        if x_dim is not None and gate.dim() == 1 and all(dim is None for dim in other_dims):
            rows = x.movedim(x_dim, 0)
            y, s = _Transformed.apply(rows.flatten(0, 1), *operands[1:], *rest)
            y = y.unflatten(0, rows.shape[:2])
            return ((y, s.unflatten(0, rows.shape[:2])), (0, 0)) if s.numel() else ((y, s), (0, None))
        # adapters or gates that differ: one call each
        results = []
        for index in range(info.batch_size):
            own = (
                t.select(dim, index) if isinstance(t, Tensor) and dim is not None else t
                for t, dim in zip(operands, in_dims)
            )
            results.append(_Transformed.apply(*own, *rest))
        ys, ss = zip(*results)
        return (torch.stack(ys), torch.stack(ss)), (0, 0)
