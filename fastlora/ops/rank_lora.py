"""The fused layer as an op: raw custom ops for the Triton kernels, one autograd function over every backend.

    y  = x @ weight.T + bias + scaling * ((x @ lora_a.T) * T(gate)) @ lora_b.T            T = soft_threshold(., kappa)
    dx = dy @ weight + scaling * (p * T(gate)) @ lora_a                                   p = dy @ lora_b
    dlora_a = scaling * diag(T(gate)) @ p.T @ x        dlora_b = scaling * (dy.T @ s) @ diag(T(gate))
    dgate_i = scaling * <lora_b[:, i], (dy.T @ s)[:, i]> where the threshold is not flat

Saved for backward: x, which the caller holds anyway, and s [M, R].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlora import checks, reference
from fastlora.ops import backend as backends
from fastlora.ops import rank_lora_torch


@torch.library.custom_op("fastlora::rank_lora_fwd", mutates_args=())
def _fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate: Tensor, kappa: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from fastlora.triton_kernels import rank_lora_fwd

    return rank_lora_fwd(x, weight, bias, lora_a, lora_b, gate, kappa, scaling)


@_fwd.register_fake
def _(x, weight, bias, lora_a, lora_b, gate, kappa, scaling):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_a.shape[0])


@torch.library.custom_op("fastlora::rank_lora_dx", mutates_args=())
def _dx(
    dy: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor, kappa: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    from fastlora.triton_kernels import rank_lora_dx

    return rank_lora_dx(dy, weight, lora_a, lora_b, gate, kappa, scaling)


@_dx.register_fake
def _(dy, weight, lora_a, lora_b, gate, kappa, scaling):
    return dy.new_empty(dy.shape[0], weight.shape[1]), dy.new_empty(dy.shape[0], lora_a.shape[0])


@torch.library.custom_op("fastlora::rank_lora_grad", mutates_args=())
def _grad(
    x: Tensor, s: Tensor, dy: Tensor, p: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor, kappa: Tensor,
    scaling: float, need_a: bool, need_b: bool, need_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from fastlora.triton_kernels import rank_lora_grad

    grads = rank_lora_grad(x, s, dy, p, lora_a, lora_b, gate, kappa, scaling, need_a, need_b, need_gate)
    # a custom op returns tensors only: an empty one stands for "not needed"
    return tuple(x.new_empty(0, dtype=torch.float32) if grad is None else grad for grad in grads)


@_grad.register_fake
def _(x, s, dy, p, lora_a, lora_b, gate, kappa, scaling, need_a, need_b, need_gate):
    shapes = (lora_a.shape if need_a else (0,), lora_b.shape if need_b else (0,), gate.shape if need_gate else (0,))
    return tuple(x.new_empty(shape, dtype=torch.float32) for shape in shapes)


class _TritonBackend:
    """The Triton kernels behind the functions of `rank_lora_torch`: kappa as a device scalar, None for no gradient."""

    @staticmethod
    def _on_device(kappa: float | Tensor, x: Tensor) -> Tensor:
        if isinstance(kappa, Tensor):
            return kappa
        return torch.full((), kappa, dtype=torch.float32, device=x.device)

    @classmethod
    def rank_lora_fwd(cls, x, weight, bias, lora_a, lora_b, gate, kappa, scaling):
        return _fwd(x, weight, bias, lora_a, lora_b, gate, cls._on_device(kappa, x), scaling)

    @classmethod
    def rank_lora_dx(cls, dy, weight, lora_a, lora_b, gate, kappa, scaling):
        return _dx(dy, weight, lora_a, lora_b, gate, cls._on_device(kappa, dy), scaling)

    @classmethod
    def rank_lora_grad(cls, x, s, dy, p, lora_a, lora_b, gate, kappa, scaling, need_a, need_b, need_gate):
        needed = (need_a, need_b, need_gate)
        grads = _grad(x, s, dy, p, lora_a, lora_b, gate, cls._on_device(kappa, x), scaling, *needed)
        return tuple(grad if need else None for grad, need in zip(grads, needed))


_IMPLEMENTATIONS: dict[str, Any] = {"torch": rank_lora_torch, "triton": _TritonBackend}


class _RankLoRALinear(torch.autograd.Function):
    """x [M, K] -> y [M, N], s [M, R]; s is returned only so that it can be saved."""

    @staticmethod
    def forward(x, weight, bias, lora_a, lora_b, gate, kappa, scaling, backend):
        ops = _IMPLEMENTATIONS[backend]
        return ops.rank_lora_fwd(x, weight, bias, lora_a.to(x.dtype), lora_b.to(x.dtype), gate, kappa, scaling)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _bias, lora_a, lora_b, gate, kappa, scaling, backend = inputs
        s = output[1]
        ctx.mark_non_differentiable(s)
        ctx.set_materialize_grads(False)
        kappa_tensor = kappa if isinstance(kappa, Tensor) else None
        ctx.save_for_backward(x, s, weight, lora_a, lora_b, gate, kappa_tensor)
        ctx.kappa, ctx.scaling, ctx.backend = (None if kappa_tensor is not None else kappa), scaling, backend

    @staticmethod
    def backward(ctx, dy, _ds):
        x, s, weight, lora_a, lora_b, gate, kappa = ctx.saved_tensors
        if dy is None:
            return (None,) * 9
        kappa = ctx.kappa if kappa is None else kappa
        need_x, _, _, need_a, need_b, need_gate = ctx.needs_input_grad[:6]
        a, b = lora_a.to(dy.dtype), lora_b.to(dy.dtype)
        ops = _IMPLEMENTATIONS[ctx.backend]
        if torch.is_grad_enabled():
            # double backward: plain differentiable ops, and s as a function of x and lora_a instead of a constant
            ops, s = rank_lora_torch, x @ a.t()
        if need_x:
            dx, p = ops.rank_lora_dx(dy, weight, a, b, gate, kappa, ctx.scaling)
        else:
            dx, p = None, dy @ b
        grads = ops.rank_lora_grad(x, s, dy, p, a, b, gate, kappa, ctx.scaling, need_a, need_b, need_gate)
        dlora_a, dlora_b, dgate = (
            None if grad is None else grad.to(of.dtype) for grad, of in zip(grads, (lora_a, lora_b, gate))
        )
        return dx, None, None, dlora_a, dlora_b, dgate, None, None, None


def rank_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor,
    kappa: float | Tensor = 0.0,
    scaling: float = 1.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """Linear layer plus gated low-rank update, fused.

        y = x @ weight.T + bias + scaling * ((x @ lora_a.T) * soft_threshold(gate, kappa)) @ lora_b.T

    CoDyRA, arXiv 2412.01004: the update with one gate per rank, the gate behind its proximal operator.

    Args:
        x: [..., K], floating; any strides, any number of rows (0 too).
        weight: [N, K], dtype of `x`, frozen: it gets no gradient.
        bias: [N] or None, dtype of `x`, frozen.
        lora_a: [R, K], dtype of `x` or float32 (cast once on the way in; its gradient is float32). R may be 0.
        lora_b: [N, R], likewise.
        gate: [R], [batch, R] (one row a sample, broadcast over its tokens) or [M, R] (one row a token); float32.
        kappa: threshold in gate units (not multiplied by the learning rate); a float, or a 0-d tensor on the device.
        scaling: dimensionless.
        backend: "auto" (the rule of `fastlora.ops.backend`), "torch" or "triton".
    Returns:
        y: [..., N], dtype of `x`; under autocast the autocast dtype.
    Raises:
        ValueError: a shape or device does not fit, kappa is negative or not finite, unknown backend.
        TypeError: a dtype does not fit.
        RuntimeError: a backend asked for by name cannot run this call.
    Numerics:
        Error stays within twice that of the same formula in PyTorch in the same dtype. The triton backend accumulates
        in float32 and rounds y once; the torch backend rounds the base product, then the sum. Deterministic. The
        gradient of the gate is zero where |gate| <= kappa, and passes everywhere when kappa is 0.
    """
    if not torch.compiler.is_compiling():  # a traced float may be symbolic; it was checked when the layer took it
        checks.check_kappa(kappa)
        checks.check_scaling(scaling)
    checks.check_tensors(x=x, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b, gate=gate)
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x, weight, bias, lora_a, lora_b = (_autocast(t, dtype) for t in (x, weight, bias, lora_a, lora_b))
        with torch.autocast(device_type, enabled=False):
            return rank_lora_linear(x, weight, bias, lora_a, lora_b, gate, kappa, scaling, backend=backend)
    checks.check_rank_lora(x, weight, bias, lora_a, lora_b, gate)
    chosen = backends.choose(backend, x.device, x.dtype, gate.shape).backend
    rows, gate = x.reshape(-1, x.shape[-1]), reference.expand_gate(gate, x)
    y, _ = _RankLoRALinear.apply(rows, weight, bias, lora_a, lora_b, gate, kappa, scaling, chosen)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _autocast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As torch.autocast does: float64 and what is not floating stay, and are refused by the checks."""
    if tensor is None or tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)
