"""The torch backend: forward, dx and adapter gradients as library GEMMs plus rank-sized updates in place.

    y  = x @ weight.T + bias + (s * g) @ lora_b.T       s = x @ lora_a.T,  g = scaling * soft_threshold(gate, kappa)
    dx = dy @ weight + (p * g) @ lora_a                 p = dy @ lora_b

The rank update is accumulated into the base product by the GEMM itself (`addmm_`), so no second [M, N] tensor is
written and read: that is where the time of the formula as written goes. Runs on any device and floating dtype, and
its backward is differentiable itself. Same functions as `fastlora.triton_kernels`; here the gate may also be [M, R], one row a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import reference


def effective_gate(gate: Tensor, kappa: float | Tensor, scaling: float) -> Tensor:
    """scaling * soft_threshold(gate, kappa) in the dtype of `gate`."""
    if not isinstance(kappa, Tensor) and kappa == 0:
        return gate if scaling == 1 else gate * scaling
    g = reference.soft_threshold(gate, kappa)
    return g if scaling == 1 else g * scaling


def _gated_addmm(base: Tensor, s: Tensor, g: Tensor, lora_b: Tensor) -> Tensor:
    """base + (s * g) @ lora_b.T; in place on `base`, unless a graph is being recorded through it."""
    gated = (s * g).to(s.dtype)
    if torch.is_grad_enabled():
        return torch.addmm(base, gated, lora_b.t())
    return base.addmm_(gated, lora_b.t())


def rank_lora_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor,
    kappa: float | Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """x [M, K] -> y [M, N], s [M, R]."""
    s = x @ lora_a.t()
    return _gated_addmm(F.linear(x, weight, bias), s, effective_gate(gate, kappa, scaling), lora_b), s


def rank_lora_dx(
    dy: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor,
    kappa: float | Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """dy [M, N] -> dx [M, K], p [M, R]."""
    p = dy @ lora_b
    return _gated_addmm(dy @ weight, p, effective_gate(gate, kappa, scaling), lora_a.t()), p


def rank_lora_grad(
    x: Tensor,
    s: Tensor,
    dy: Tensor,
    p: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor,
    kappa: float | Tensor,
    scaling: float,
    need_a: bool = True,
    need_b: bool = True,
    need_gate: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dlora_a [R, K], dlora_b [N, R], dgate in the shape of `gate`; None where not needed."""
    g = effective_gate(gate, kappa, scaling)
    if gate.dim() == 2:
        return _row_gate_grad(x, s, dy, p, gate, g, kappa, scaling, need_a, need_b, need_gate)
    # [R, N]: at 788 x 3072 and R = 16 twice as fast as dy.t() @ s on a CPU (1.2 against 2.4 ms)
    raw_b = s.t() @ dy if need_b or need_gate else None
    dlora_a = g[:, None] * (p.t() @ x) if need_a else None
    dlora_b = (raw_b * g[:, None]).t() if need_b else None
    dgate = None
    if need_gate:
        # <B, dB'> sums over N rows, not over the M tokens: the gate gradient costs nothing
        dgate = _through_threshold((lora_b.t().to(gate.dtype) * raw_b.to(gate.dtype)).sum(1) * scaling, gate, kappa)
    return dlora_a, dlora_b, dgate


def _row_gate_grad(
    x: Tensor,
    s: Tensor,
    dy: Tensor,
    p: Tensor,
    gate: Tensor,
    g: Tensor,
    kappa: float | Tensor,
    scaling: float,
    need_a: bool,
    need_b: bool,
    need_gate: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dlora_a = (p * g).to(x.dtype).t() @ x if need_a else None
    dlora_b = dy.t() @ (s * g).to(dy.dtype) if need_b else None
    dgate = None
    if need_gate:
        dgate = _through_threshold(p.to(gate.dtype) * s.to(gate.dtype) * scaling, gate, kappa)
    return dlora_a, dlora_b, dgate


def _through_threshold(dgate: Tensor, gate: Tensor, kappa: float | Tensor) -> Tensor:
    """Zero where the threshold is flat; kappa = 0 is the identity, so there nothing is cut."""
    if not isinstance(kappa, Tensor) and kappa == 0:
        return dgate
    kappa = torch.as_tensor(kappa, dtype=gate.dtype, device=gate.device)
    return dgate.masked_fill((gate.abs() <= kappa) & (kappa > 0), 0.0)
