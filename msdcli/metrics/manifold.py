"""Fidelity and variety apart: precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), density and coverage
(Naeem et al. 2020, arXiv 2002.09797).

A set's manifold is the union of balls around its images, each reaching to the k-th nearest other image of the set.
Distances are taken block by block in float64, so memory grows with the number of images and not with its square.

An image on a ball's surface belongs to it, and where images are equal or features have few levels, many are. So
features are rounded to a grid of powers of two that is just so fine that products and sums of them are exact: equal
distances come out equal, however a library orders its sums. Features that are multiples of such a power already
(levels, counts, pixels) are not changed; others by less than a millionth of their range at 64 dimensions, and eight
millionths at 2,048, which is what networks compute them to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from msdcli.errors import UserError

ROWS = 1024  # rows of a distance matrix held at once
MANTISSA = 53  # bits of an integer that float64 holds exactly


@dataclass(frozen=True)
class Manifold:
    """What every image adds to the four figures; each figure is the mean of its array."""

    precision: np.ndarray  # [samples] the sample lies in the reference's manifold
    recall: np.ndarray  # [reference] the reference image lies in the samples' manifold
    density: np.ndarray  # [samples] how many reference balls hold it, over k
    coverage: np.ndarray  # [reference] its ball holds a sample

    def figures(self) -> dict[str, float]:
        return {name: float(np.mean(values)) for name, values in vars(self).items()}


def manifold(
    samples: np.ndarray, reference: np.ndarray, *, nearest: int = 3, nearest_density: int = 5, rows: int = ROWS
) -> Manifold:
    """Compare features of samples [N, d] and reference [M, d]; k is each paper's: 3 for precision and recall, or 5."""
    for side in (samples, reference):
        if len(side) <= max(nearest, nearest_density):
            raise UserError(f"Neighbourhoods need more than {max(nearest, nearest_density)} images, got {len(side)}.")
    if samples.shape[1] != reference.shape[1]:
        raise UserError(f"Features of different dimensions: {samples.shape[1]} and {reference.shape[1]}.")
    x, y = _on_grid(samples, reference)
    radii = _squared_radii(y, (nearest, nearest_density), rows)
    own = _squared_radii(x, (nearest,), rows)[0]
    precision, density = np.empty(len(x)), np.empty(len(x))
    recall, closest = np.zeros(len(y), dtype=bool), np.full(len(y), np.inf)
    for start in range(0, len(x), rows):
        block = slice(start, start + rows)
        distances = _squared_distances(x[block], y)
        precision[block] = (distances <= radii[0]).any(axis=1)
        density[block] = (distances <= radii[1]).sum(axis=1) / nearest_density
        recall |= (distances <= own[block, None]).any(axis=0)
        closest = np.minimum(closest, distances.min(axis=0))
    return Manifold(precision, recall.astype(float), density, (closest <= radii[1]).astype(float))


def _on_grid(samples: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both sides around the reference's median, as integers in the unit of the grid.

    |a|^2 + |b|^2 - 2ab of d integers up to m is at most 4 d m^2. A quarter of m is for 99 of 100 reference images; of
    those farther out than m, such as broken samples, distances are as exact as float64, and there are no ties to keep.
    """
    largest = 2 ** ((MANTISSA - 2 - math.ceil(math.log2(reference.shape[1]))) // 2)
    middle = np.median(reference, axis=0).astype(np.float64)
    reach = float(np.quantile(np.abs(reference - middle).max(axis=1), 0.99))
    unit = 2.0 ** math.ceil(math.log2(4 * reach / largest)) if 0 < reach < math.inf else 1 / largest
    centre = np.round(middle / unit) * unit
    x, y = (np.round((side.astype(np.float64) - centre) / unit) for side in (samples, reference))
    return x, y


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squares = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1)
    return np.asarray(np.maximum(squares - 2 * (a @ b.T), 0))


def _squared_radii(points: np.ndarray, nearest: tuple[int, ...], rows: int) -> np.ndarray:
    """Squared distance of every point to its k-th nearest other point, for each k: [len(nearest), N]."""
    radii = np.empty((len(nearest), len(points)))
    for start in range(0, len(points), rows):
        distances = _squared_distances(points[start : start + rows], points)
        np.fill_diagonal(distances[:, start:], -1)  # the point itself comes first, also among its own copies
        distances.partition(nearest, axis=1)
        radii[:, start : start + rows] = distances[:, list(nearest)].T
    return radii
