"""Calls of the forward and dX launchers, plain and packed, and their definition; for every file that tests a variant."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from helpers import Operands, make_operands

from fastlora import reference
from fastlora.triton_kernels import rank_lora_dx, rank_lora_fwd

SCALING = 1.7


@dataclass
class Call:
    """Operands of one call; packed: op.lora_b is flat. kappa: 0-d or [R]."""

    op: Operands
    dy: torch.Tensor
    kappa: torch.Tensor
    ranks: tuple[int, int, int] | None = None


def make_call(m, k, n, r, dtype=torch.float32, gate_rows=None):
    op = make_operands((m,), k, n, r, dtype, gate_shape=None if gate_rows is None else (gate_rows, r))
    return Call(op, torch.randn(m, n).to(dtype), torch.tensor(0.3))


def make_packed(m, k, d, ranks, dtype=torch.float32):
    op = make_operands((m,), k, 3 * d, sum(ranks), dtype)
    op.lora_b = torch.cat([(torch.randn(d, r) / max(r, 1) ** 0.5).to(dtype).flatten() for r in ranks])
    return Call(op, torch.randn(m, 3 * d).to(dtype), torch.rand(sum(ranks)), ranks)


def run(call, variant="split", p=None, scaling=SCALING, tile=None):
    """y, s, dx and p of the launchers."""
    op, options = call.op, {"ranks": call.ranks, "variant": variant, "tile": tile}
    y, s = rank_lora_fwd(*op.tensors(), call.kappa, scaling, **options)
    dx, p = rank_lora_dx(call.dy, op.weight, op.lora_a, op.lora_b, op.gate, call.kappa, scaling, p=p, **options)
    return {"y": y, "s": s, "dx": dx, "p": p}


def definition(call, dtype):
    """The reference, of each projection by itself, in `dtype`."""
    op, dy, kappa = call.op, call.dy, call.kappa
    if dtype == torch.float64:
        op, dy, kappa = op.double(), dy.double(), kappa.double()
    ranks = call.ranks or (op.gate.shape[-1],)
    d, r0, results = op.weight.shape[0] // len(ranks), 0, []
    for part, r in enumerate(ranks):
        rows, of = slice(part * d, (part + 1) * d), slice(r0, r0 + r)
        lora_b = op.lora_b if call.ranks is None else op.lora_b[d * r0 : d * (r0 + r)].view(d, r)
        k, gate = kappa if kappa.dim() == 0 else kappa[of], op.gate[..., of]
        x = op.x.detach().requires_grad_(True)
        bias = None if op.bias is None else op.bias[rows]
        y = reference.rank_lora_linear(x, op.weight[rows], bias, op.lora_a[of], lora_b, gate, k, SCALING)
        (dx,) = torch.autograd.grad(y, x, dy[:, rows])
        results.append((y.detach(), op.x @ op.lora_a[of].t(), dy[:, rows] @ lora_b, dx))
        r0 += r
    y, s, p = (torch.cat(list(values), 1) for values in list(zip(*results))[:3])
    return {"y": y, "s": s, "dx": sum(result[3] for result in results), "p": p}
