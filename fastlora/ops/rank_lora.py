"""The fused layer as an op: the public functions, their checks, and autocast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from fastlora import checks
from fastlora.ops import backend as backends
from fastlora.ops import rank_lora_autograd
from fastlora.ops.rank_lora_torch import Ranks


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
    recompute: bool = False,
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
        backend: "auto" (the rule of `fastlora.ops.backend`), "torch", "triton", or a variant by name.
        recompute: save x alone for backward, and compute s = x @ lora_a.T again there.
    Returns:
        y: [..., N], dtype of `x`; under autocast the autocast dtype.
    Raises:
        ValueError: a shape or device does not fit, kappa is negative or not finite in float32, unknown backend.
        TypeError: a dtype does not fit, or an operand is no tensor, or a nested one.
        RuntimeError: a backend asked for by name cannot run this call.
    Numerics:
        Error stays within twice that of the same formula in PyTorch in the same dtype. The triton backend accumulates
        in float32 and rounds y once; the torch backend rounds the base product, then the sum. Deterministic. The
        gradient of the gate is zero where |gate| <= kappa, and passes everywhere when kappa is 0.
    """
    if not torch.compiler.is_compiling():  # a traced float may be symbolic; it was checked when the layer took it
        checks.check_kappa(kappa)
        checks.check_scaling(scaling)
    fits = checks.plainly_fits(x, weight, bias, lora_a, lora_b, gate)
    if not fits:
        checks.check_tensors(x=x, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b, gate=gate)
    device_type = x.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x, weight, lora_a, lora_b = (_autocast(t, dtype) for t in (x, weight, lora_a, lora_b))
        bias = _autocast(bias, dtype)
        with torch.autocast(device_type, enabled=False):
            return rank_lora_linear(
                x, weight, bias, lora_a, lora_b, gate, kappa, scaling, backend=backend, recompute=recompute
            )
    if not fits:
        checks.check_rank_lora(x, weight, bias, lora_a, lora_b, gate)
    return _apply(x, weight, bias, lora_a, lora_b, gate, kappa, scaling, None, backend, recompute)


def rank_lora_packed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_as: Sequence[Tensor | None],
    lora_bs: Sequence[Tensor | None],
    gates: Sequence[Tensor | None],
    kappas: Sequence[float | Tensor],
    scaling: float = 1.0,
    *,
    backend: str = "auto",
    recompute: bool = False,
) -> Tensor:
    """Three projections of one input in one product, each with its own adapter: q, k and v of attention.

        y[..., p d : (p + 1) d] = rank_lora_linear(x, weight[p d : (p + 1) d], ..., lora_as[p], lora_bs[p], gates[p])

    Args:
        x: [..., K], floating.
        weight: [3 d, K], dtype of `x`, frozen.
        bias: [3 d] or None, dtype of `x`, frozen.
        lora_as: three, [r_p, K] each; None where a projection has no adapter. Ranks may differ. Dtypes of these and the
            next two as for `rank_lora_linear`.
        lora_bs: three, [d, r_p] each, or None.
        gates: three, [r_p] each, or None.
        kappas: three thresholds, floats or 0-d tensors on the device.
        scaling: of all three, dimensionless.
        backend: as for `rank_lora_linear`. Triton's kernels take ranks whose sum is at most 256.
        recompute: as for `rank_lora_linear`.
    Returns:
        y: [..., 3 d], dtype of `x`; under autocast the autocast dtype.
    Raises:
        ValueError, TypeError, RuntimeError: as `rank_lora_linear`.
    """
    checks.check_packed_lists(x, weight, bias, lora_as, lora_bs, gates, kappas)
    if not torch.compiler.is_compiling():
        checks.check_scaling(scaling)
        for kappa in kappas:
            checks.check_kappa(kappa)
    device_type = x.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x, weight, bias = _autocast(x, dtype), _autocast(weight, dtype), _autocast(bias, dtype)
        lora_as, lora_bs = ([_autocast(t, dtype) for t in ts] for ts in (lora_as, lora_bs))
        with torch.autocast(device_type, enabled=False):
            return rank_lora_packed(
                x, weight, bias, lora_as, lora_bs, gates, kappas, scaling, backend=backend, recompute=recompute
            )
    checks.check_packed(x, weight, bias, lora_as, lora_bs, gates)
    present = [
        (a, b, gate, kappa)
        for a, b, gate, kappa in zip(lora_as, lora_bs, gates, kappas)
        if a is not None and b is not None and gate is not None
    ]
    if not present:
        return torch.nn.functional.linear(x, weight, bias)
    rank_q, rank_k, rank_v = (0 if gate is None else gate.shape[0] for gate in gates)
    ranks = rank_q, rank_k, rank_v
    # copies of rank size, through which autograd hands each adapter its own gradient
    lora_a = torch.cat([a for a, _, _, _ in present])
    lora_b = torch.cat([b.reshape(-1) for _, b, _, _ in present])
    gate = torch.cat([own for _, _, own, _ in present])
    kappa = _stacked_kappa([own for *_, own in present], [own for _, _, own, _ in present])
    return _apply(x, weight, bias, lora_a, lora_b, gate, kappa, scaling, ranks, backend, recompute)


def _stacked_kappa(kappas: Sequence[float | Tensor], gates: Sequence[Tensor]) -> float | Tensor:
    """One threshold where all are the same number, else one a rank, [R], on the device of the gates."""
    if all(kappa is kappas[0] for kappa in kappas):
        return kappas[0]
    if not any(isinstance(kappa, Tensor) for kappa in kappas) and len(set(kappas)) == 1:
        return kappas[0]
    return torch.cat([torch.as_tensor(k, dtype=g.dtype, device=g.device).expand_as(g) for k, g in zip(kappas, gates)])


def _apply(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate: Tensor,
    kappa: float | Tensor, scaling: float, ranks: Ranks, backend: str, recompute: bool,
) -> Tensor:  # fmt: skip
    variant = backends.variant_for(backend, x, gate, ranks)
    flat = x.dim() == 2
    rows = x if flat else x.reshape(-1, x.shape[-1])
    y = rank_lora_autograd.apply(rows, weight, bias, lora_a, lora_b, gate, kappa, scaling, ranks, variant, recompute)
    return y if flat else y.reshape(*x.shape[:-1], weight.shape[0])


@overload
def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def _autocast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...
def _autocast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As torch.autocast does: float64 and what is not floating stay, and are refused by the checks."""
    if tensor is None or tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)
