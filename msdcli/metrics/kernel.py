"""Scores that need features or class probabilities one by one: KID (Binkowski et al. 2018, arXiv 1801.01401) and the
inception score (Salimans et al. 2016, arXiv 1606.03498).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from msdcli.errors import UserError

CPU_ROWS, GPU_ROWS = 256, 1024  # of a matrix of all pairs, held at once
Device = str | torch.device
SPLITS = 10  # of the inception score, as everybody reports it


@dataclass(frozen=True)
class KernelDistance:
    """The squared maximum mean discrepancy and, where it was estimated from subsets, their standard deviation."""

    value: float
    deviation: float | None = None


def float64(rows: np.ndarray, device: Device) -> Tensor:
    """Return rows as float64 on the device, or on the CPU where that has no float64."""
    device = torch.device(device)
    return torch.from_numpy(np.ascontiguousarray(rows)).to("cpu" if device.type == "mps" else device, torch.float64)


def rows_at_once(device: Device) -> int:
    """Return how many rows, or columns, of a matrix of all pairs make a block: many for a GPU; for a CPU what its
    caches hold, and what the allocator keeps (blocks of 40 MB cost four times the arithmetic in fresh pages).
    """
    return CPU_ROWS if torch.device(device).type == "cpu" else GPU_ROWS


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """The polynomial kernel of KID, (x y / d + 1)^3."""
    k = torch.addmm(x.new_ones(()), x, y.T, alpha=1 / x.shape[1])
    return k * k * k  # three times as fast as a power


def kernel_distance(x: np.ndarray, y: np.ndarray, *, device: Device = "cpu") -> KernelDistance:
    """KID over all pairs: the unbiased U-statistic itself, in memory that does not grow with the number of images."""
    ones = np.ones((1, len(x)))
    return KernelDistance(float(reweighted_kernel_distance(x, y, ones, device=device)[0]))


def reweighted_kernel_distance(
    x: np.ndarray, y: np.ndarray, weights: np.ndarray, *, device: Device = "cpu"
) -> np.ndarray:
    """KID of x under each row of `weights` [R, len(x)] (counts) to a fixed y; an image is never paired with itself."""
    return kernel_distances(x, y, [weights], device=device)[0]


def kernel_distances(
    x: np.ndarray, y: np.ndarray, weightings: Sequence[np.ndarray], *, device: Device = "cpu"
) -> list[np.ndarray]:
    """`reweighted_kernel_distance` under several sets of weights, bit for bit, for one look at all pairs."""
    if any((weights.sum(axis=1) ** 2 <= np.square(weights).sum(axis=1)).any() for weights in weightings):
        raise UserError("KID needs at least 2 different images on each side.")
    found = _reweighted(*_checked(x, y, device), [float64(weights, device) for weights in weightings])
    return [values.cpu().numpy() for values in found]


def _reweighted(x: Tensor, y: Tensor, weightings: Sequence[Tensor]) -> list[Tensor]:
    within = [weights.sum(dim=1) ** 2 - weights.square().sum(dim=1) for weights in weightings]
    pairs, cross = [torch.zeros_like(w) for w in within], [torch.zeros_like(w) for w in within]
    at_once = rows_at_once(x.device)
    for start in range(0, len(x), at_once):
        rows = slice(start, start + at_once)
        block = kernel(x[rows], x)
        block[:, start:].fill_diagonal_(0)
        sums = kernel_sums(x[rows], y)
        for i, weights in enumerate(weightings):
            pairs[i] += ((weights[:, rows] @ block) * weights).sum(dim=1)
            cross[i] += weights[:, rows] @ sums
    reference = _off_diagonal_sum(y) / (len(y) * (len(y) - 1))
    return [
        pairs[i] / within[i] + reference - 2 * cross[i] / (weights.sum(dim=1) * len(y))
        for i, weights in enumerate(weightings)
    ]


def kernel_sums(x: Tensor, y: Tensor) -> Tensor:
    """Sum of the kernel of every x over all y, in blocks of y."""
    found = x.new_zeros(len(x))
    for block in y.split(rows_at_once(y.device)):
        found += kernel(x, block).sum(dim=1)
    return found


def subset_kernel_distance(
    x: np.ndarray,
    y: np.ndarray,
    *,
    subset_size: int = 1000,
    num_subsets: int = 100,
    seed: int = 0,
    device: Device = "cpu",
) -> KernelDistance:
    """KID as the field reports it: the mean over random subsets of both sides, of clean-fid's sizes, by `seed`."""
    sides = _checked(x, y, device)
    size = min(len(x), len(y), subset_size)
    rng = np.random.default_rng(seed)
    ones = sides[0].new_ones(1, size)
    drawn = [[rng.choice(len(side), size, replace=False) for side in sides] for _ in range(num_subsets)]
    # All places travel in one piece, and all values come back in one: nothing waits between the subsets.
    places = [torch.from_numpy(np.stack(numbers)).to(sides[0].device) for numbers in zip(*drawn, strict=True)]
    found = [_reweighted(sides[0][a], sides[1][b], [ones])[0] for a, b in zip(*places, strict=True)]
    values = torch.cat(found).cpu().numpy()
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def inception_score(probabilities: np.ndarray, weights: np.ndarray | None = None) -> float:
    """exp of the mean divergence of p(y|x) [N, classes] from their mean, over all images and not ten splits."""
    p = np.asarray(probabilities, dtype=np.float64)
    w = np.ones(len(p)) if weights is None else weights
    w = w / w.sum()
    return float(np.exp(w @ _negative_entropy(p) - _negative_entropy(w @ p)))


def split_inception_score(probabilities: np.ndarray, *, splits: int = SPLITS, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of the score over equal splits, as Salimans et al.'s code reports it.

    A split of fewer images has a lower score, so it is another figure than that of all images. Theirs cuts samples in
    the order that they were drawn in; here the order is shuffled by `seed`, for files are often sorted by class.
    UserError where there are fewer images than splits.
    """
    if len(probabilities) < splits:
        raise UserError(f"{splits} splits need as many images, but there are {len(probabilities)}.")
    order = np.random.default_rng(seed).permutation(len(probabilities))
    scores = [inception_score(probabilities[part]) for part in np.array_split(order, splits)]
    return float(np.mean(scores)), float(np.std(scores))


def _negative_entropy(p: np.ndarray) -> np.ndarray:
    return np.asarray(np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1))


def _off_diagonal_sum(y: Tensor) -> Tensor:
    """Sum of the kernel of all pairs of different images: those on one side of the diagonal, twice."""
    found, blocks = y.new_zeros(()), y.split(rows_at_once(y.device))
    for i, block in enumerate(blocks):
        found += kernel(block, block).fill_diagonal_(0).sum()
        for other in blocks[i + 1 :]:
            found += 2 * kernel(block, other).sum()
    return found


def _checked(x: np.ndarray, y: np.ndarray, device: Device) -> tuple[Tensor, Tensor]:
    if x.shape[1] != y.shape[1]:
        raise UserError(f"The two sides have features of different dimensions: {x.shape[1]} and {y.shape[1]}.")
    if min(len(x), len(y)) < 2:
        raise UserError("KID needs at least 2 different images on each side.")
    return float64(x, device), float64(y, device)
