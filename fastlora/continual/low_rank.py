"""Singular values of low-rank updates, and how many of them hold a share of the energy."""

from __future__ import annotations

import torch
from torch import Tensor


def svd_of_product(lora_b: Tensor, lora_a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of lora_b @ lora_a, which is never formed.

        B = Q_b R_b,  A^T = Q_a R_a,  R_b R_a^T = U' S V'^T  =>  B A = (Q_b U') S (Q_a V')^T

    Exact: orthogonal factors change no singular value, and the product in the middle has only R x R entries.

    Args:
        lora_b: [N, R]. lora_a: [R, K].
    Returns:
        U [N, r], S [r] falling, Vh [r, K] with r = min(N, R, K), float64.
    """
    q_b, r_b = torch.linalg.qr(lora_b.double())
    q_a, r_a = torch.linalg.qr(lora_a.double().t())
    u, s, vh = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    return q_b @ u, s, vh @ q_a.t()


def smallest_rank(energies: Tensor, share: float) -> int:
    """The smallest k for which the first k of `energies` sum to `share` of all.

    Args:
        energies: [n], not negative, falling: squared singular values, or eigenvalues of a covariance.
        share: in [0, 1].
    Returns:
        0 to n; 0 where every energy is 0.
    """
    total = energies.sum()
    if not bool(total > 0):
        return 0
    # the running sum may miss the total by a rounding, which must not be read as one more component
    return min(len(energies), int((energies.cumsum(0) < share * total * (1 - 1e-12)).sum()) + 1)
