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
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from msdcli.errors import UserError
from msdcli.metrics.kernel import Device, float64, rows_at_once

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
    samples: np.ndarray,
    reference: np.ndarray,
    *,
    nearest: int = 3,
    nearest_density: int = 5,
    rows: int | None = None,
    device: Device = "cpu",
) -> Manifold:
    """Compare features of samples [N, d] and reference [M, d]; k is each paper's: 3 for precision and recall, or 5.

    `rows` and four times as many columns of the distances are held at once, by default as the device likes best.
    """
    for side in (samples, reference):
        if len(side) <= max(nearest, nearest_density):
            raise UserError(f"Neighbourhoods need more than {max(nearest, nearest_density)} images, got {len(side)}.")
    if samples.shape[1] != reference.shape[1]:
        raise UserError(f"Features of different dimensions: {samples.shape[1]} and {reference.shape[1]}.")
    x, y = (float64(side, device) for side in _on_grid(samples, reference))
    rows = rows or rows_at_once(x.device)
    radii = _squared_radii(y, (nearest, nearest_density), rows)
    own = _squared_radii(x, (nearest,), rows)[0]
    precision, density = torch.zeros_like(own, dtype=torch.bool), torch.zeros_like(own)
    recall, closest = torch.zeros_like(radii[0], dtype=torch.bool), torch.full_like(radii[0], math.inf)
    for here, there, distances in _squared_distances(x, y, rows):
        precision[here] |= (distances <= radii[0, there]).any(dim=1)
        density[here] += (distances <= radii[1, there]).sum(dim=1)
        recall[there] |= (distances <= own[here, None]).any(dim=0)
        closest[there] = torch.minimum(closest[there], distances.amin(dim=0))
    found = precision, recall, density, closest <= radii[1]
    in_reference, in_samples, balls, covered = (each.double().cpu().numpy() for each in found)
    return Manifold(in_reference, in_samples, balls / nearest_density, covered)


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


def _squared_distances(a: Tensor, b: Tensor, rows: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the distances block by block, each with its rows and columns; a row's blocks come one after the other."""
    squares, columns = (a.square().sum(dim=1), b.square().sum(dim=1)), 4 * rows
    for top in range(0, len(a), rows):
        for left in range(0, len(b), columns):
            here, there = slice(top, top + rows), slice(left, left + columns)
            block = torch.addmm(squares[1][there], a[here], b[there].T, alpha=-2)
            yield here, there, block.add_(squares[0][here, None]).clamp_(min=0)


def _squared_radii(points: Tensor, nearest: tuple[int, ...], rows: int) -> Tensor:
    """Squared distance of every point to its k-th nearest other point, for each k: [len(nearest), N]."""
    most = max(nearest) + 1
    closest = points.new_full((len(points), most), math.inf)
    for here, there, distances in _squared_distances(points, points, rows):
        distances.diagonal(here.start - there.start).fill_(-1)  # a point itself comes first, also among its own copies
        found = torch.cat([closest[here], distances], dim=1)
        closest[here] = found.topk(most, dim=1, largest=False).values
    return torch.stack([closest[:, k] for k in nearest])
