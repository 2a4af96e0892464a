"""The proximal step on the gates: soft threshold, and its in-place form over many tensors at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora import reference
from fastlora.checks import check_kappa, check_operator


def soft_threshold(v: Tensor, kappa: float | Tensor, *, operator: str = "exact") -> Tensor:
    """Proximal operator of kappa * ||v||_1; see `fastlora.reference.soft_threshold` for the two operators.

    Args:
        v: any shape, floating.
        kappa: threshold >= 0 in the unit of `v` (not multiplied by the learning rate); a float or a 0-d tensor.
        operator: "exact" (CoDyRA's equation) or "released" (what its code computes: everything below 2 kappa dies).
    Returns:
        Same shape and dtype as `v`. Its derivative by `v` is 1 where `v` survives and 0 where it dies.
    Raises:
        ValueError: kappa is negative, NaN or infinite, or the operator is unknown.
    """
    check_operator(operator)
    check_kappa(kappa)
    return reference.soft_threshold(v, kappa, operator=operator)


@torch.no_grad()
def soft_threshold_(gates: Sequence[Tensor], kappa: float, *, operator: str = "exact") -> None:
    """Proximal step in place on every tensor of `gates`, which share device and dtype.

    The gates of a model are many and tiny, so they are thresholded as one concatenated vector: a few ops for all. Of
    sharded ones (DTensor) each process thresholds its share.
    """
    check_operator(operator)
    check_kappa(kappa)
    gates = [gate.to_local() if hasattr(gate, "to_local") else gate for gate in gates]
    gates = [gate for gate in gates if gate.numel()]
    if kappa == 0 or not gates:
        return
    flat = reference.soft_threshold(torch.cat([gate.flatten() for gate in gates]), kappa, operator=operator)
    pieces = flat.split([gate.numel() for gate in gates])
    torch._foreach_copy_(gates, [piece.view_as(gate) for piece, gate in zip(pieces, gates)])
