"""Distances between clouds of points in the plane."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def histogram_l1(a: Tensor, b: Tensor, *, bins: int = 100, extent: float = 1.5) -> float:
    """L1 distance of two normalised 2-D histograms over [-extent, extent]^2, from 0 (equal) to 2 (disjoint).

    `a`, `b` [points, 2]. Points outside count in the border cells. It has a floor of its own at finite samples: compare
    with the distance between two independent samples of one distribution. (MSD, arXiv 2410.23274, Section 5.1.)
    """
    return float((_histogram(a, bins, extent) - _histogram(b, bins, extent)).abs().sum())


def _histogram(points: Tensor, bins: int, extent: float) -> Tensor:
    cells = ((points + extent) / (2 * extent) * bins).long().clamp(0, bins - 1)
    counts = torch.bincount(cells[:, 0] * bins + cells[:, 1], minlength=bins * bins)
    return counts.double() / len(points)


def sliced_wasserstein(a: Tensor, b: Tensor, *, num_directions: int = 128) -> float:
    """Sliced 2-Wasserstein distance in the plane: root mean square over evenly spaced directions.

    `a`, `b` [points, 2], of any two sizes: quantile functions are compared at the midpoints of the larger set's ranks.
    """
    angles = torch.arange(num_directions, dtype=torch.float64) * (torch.pi / num_directions)
    directions = torch.stack([angles.cos(), angles.sin()])
    # One direction's points lie side by side, and NumPy sorts them: a fifth of the time of torch's sort of columns.
    pa, pb = (np.sort((points.double() @ directions).T.contiguous().numpy()) for points in (a, b))
    ranks = (np.arange(max(len(a), len(b))) + 0.5) / max(len(a), len(b))
    qa, qb = (p[:, np.minimum((ranks * p.shape[1]).astype(np.int64), p.shape[1] - 1)] for p in (pa, pb))
    return float(torch.from_numpy((qa - qb).T.copy()).square().mean().sqrt())
