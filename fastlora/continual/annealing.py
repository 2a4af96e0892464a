"""The learning rate over a task."""

from __future__ import annotations

import math


def cosine(lr: float, iteration: int, iterations: int) -> float:
    """lr at iteration 0, falling to 0 after the last one; no warm-up."""
    return lr * 0.5 * (1.0 + math.cos(math.pi * iteration / iterations))
