"""What `msd bench` compares by: what the device can multiply, and the spread of figures and of their ratios."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from msdcli.engine.train.precision import dtype, timed


def peak_flops(precision: str, on: torch.device, *, repeats: int = 5) -> float:
    """Return the most operations per second that a large matrix product reaches, in this type, on the device.

    In float32 that is what convolutions multiply in too, if it is asked for inside `fast_float32`.
    """
    n = 8192 if on.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=on).to(dtype(precision) or torch.float32) for _ in range(2))
    best = min(timed(lambda: a @ b, on) for _ in range(repeats + 1))
    return 2 * n**3 / best


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the least and the greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(mine: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Return the spread of `mine` over `others`, repeat by repeat: they were taken in turn."""
    return spread([a / b for a, b in zip(mine, others, strict=True)])
