"""Every op in plain PyTorch: the definition of what the library computes, and the oracle of its tests.

    y = x @ weight.T + bias + scaling * ((x @ lora_a.T) * soft_threshold(gate, kappa)) @ lora_b.T

CoDyRA, arXiv 2412.01004: the gated low-rank update, and the proximal operator T_kappa of its l1 penalty. Works in any
floating dtype, float64 included, and differentiates through autograd alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

OPERATORS = ("exact", "released")


def soft_threshold(v: Tensor, kappa: float | Tensor, *, operator: str = "exact") -> Tensor:
    """Proximal operator of kappa * ||v||_1, elementwise, in one of two forms.

        exact:     0 where |v| <= kappa, else v - sign(v) kappa                       (the paper's equation)
        released:  t = v - sign(v) kappa where |v| > kappa, else v;  0 where |t| < kappa, else t

    The released form is what CoDyRA's and SoRA's published code computes: it clears every |v| < 2 kappa, and lets
    |v| = kappa and |v| >= 2 kappa live. kappa = 0 is the identity in both, with derivative 1 everywhere: a gate that
    is exactly zero goes on learning. NaN stays NaN.

    Args:
        v: any shape, floating.
        kappa: threshold >= 0 in the unit of `v`; a float or a 0-d tensor.
        operator: "exact" or "released".
    Returns:
        Same shape and dtype as `v`.
    Raises:
        ValueError: unknown operator.
    """
    if operator not in OPERATORS:
        raise ValueError(f"operator {operator!r} is unknown; accepted: {', '.join(OPERATORS)}.")
    kappa = torch.as_tensor(kappa, dtype=v.dtype, device=v.device)
    shrunk = v - torch.sign(v) * kappa
    if operator == "released":
        shrunk = torch.where(v.abs() > kappa, shrunk, v)
        dead = shrunk.abs() < kappa
    else:
        dead = (v.abs() <= kappa) & (kappa > 0)
    return torch.where(dead, torch.zeros_like(v), shrunk)


def expand_gate(gate: Tensor, x: Tensor) -> Tensor:
    """The gate as something that multiplies s = x @ lora_a.T, [M, R], where M is the number of rows of `x`.

    Args:
        gate: [R], [batch, R] or [M, R].
        x: [..., K].
    Returns:
        [R] as it is, else [M, R].
    """
    if gate.dim() == 1:
        return gate
    rows = x.shape[:-1].numel()
    if gate.shape[0] == rows:
        return gate
    return gate.repeat_interleave(rows // gate.shape[0], dim=0)


def rank_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor,
    kappa: float | Tensor = 0.0,
    scaling: float = 1.0,
) -> Tensor:
    """Linear layer plus gated low-rank update, as written.

    Args:
        x: [..., K], floating.
        weight: [N, K], dtype of `x`.
        bias: [N] or None, dtype of `x`.
        lora_a: [R, K], any floating dtype.
        lora_b: [N, R], likewise.
        gate: [R], [batch, R] (broadcast over the tokens of a sample) or [M, R].
        kappa: threshold in gate units.
        scaling: dimensionless.
    Returns:
        [..., N] in the dtype of `x`.
    """
    rows = x.reshape(-1, x.shape[-1])
    g = expand_gate(soft_threshold(gate, kappa), x)
    s = rows @ lora_a.to(x.dtype).t()
    update = (s * g).to(x.dtype) @ lora_b.to(x.dtype).t()
    y = rows @ weight.t() + scaling * update
    if bias is not None:
        y = y + bias
    return y.reshape(*x.shape[:-1], weight.shape[0])


def delta_weight(lora_a: Tensor, lora_b: Tensor, gate: Tensor, *, scaling: float = 1.0) -> Tensor:
    """The update of a weight, in float64.

        scaling * lora_b @ diag(gate) @ lora_a

    Args:
        lora_a: [R, K], any floating dtype.
        lora_b: [N, R], likewise.
        gate: [R], effective (already thresholded).
        scaling: dimensionless.
    Returns:
        [N, K], float64.
    """
    return scaling * (lora_b.double() * gate.double()) @ lora_a.double()


def merge(weight: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor, *, scaling: float = 1.0) -> Tensor:
    """weight + delta_weight, summed in float64 and rounded once.

    Args:
        weight: [N, K], any floating dtype; it does not change.
        lora_a: [R, K], likewise.
        lora_b: [N, R], likewise.
        gate: [R], effective (already thresholded).
        scaling: dimensionless.
    Returns:
        [N, K], a new tensor in the dtype of `weight`.
    """
    return (weight.double() + delta_weight(lora_a, lora_b, gate, scaling=scaling)).to(weight.dtype)
