"""The Frechet distance between Gaussians fitted to features (FID: Heusel et al. 2017, arXiv 1706.08500).

`|m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)`. With S1 = X X^T and S2 = Y Y^T the last trace is the nuclear norm of
X^T Y, so no square root of a matrix is taken: X and Y come from a Cholesky factorisation with pivoting, which stops at
the rank and so is sound for fewer images than dimensions; the singular values come from symmetric eigenvalues. The
pivoting grades the factors from large to small, which is why squaring X^T Y costs no accuracy (measured: 4e-12 where
eigenvalues fall as the sixth power of their rank).

Of few images, such as those of one class, X and Y are their centred features themselves, and X^T Y is as small as they
are few: no covariance is made.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from msdcli.errors import UserError
from msdcli.metrics.moments import Gaussian, Moments

Statistics = Gaussian | Moments


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Squared Frechet distance, as every FID tool reports it."""
    few = _of_few(a, b)
    if few is not None:
        return few
    a, b = a.gaussian(), b.gaussian()
    _same_features(len(a.mean), len(b.mean))
    delta = a.mean - b.mean
    distance = delta @ delta + np.trace(a.sigma) + np.trace(b.sigma) - 2 * nuclear_norm(_crossed(a.sigma, b.sigma))
    return max(float(distance), 0.0)  # of two equal Gaussians it is zero up to rounding


def _of_few(a: Statistics, b: Statistics) -> float | None:
    """The distance of two sets of few images, from their features; None where one is of many, or of one image."""
    if not (isinstance(a, Moments) and isinstance(b, Moments)) or min(a.count, b.count) < 2:
        return None
    x, y = a.few_rows(), b.few_rows()
    if x is None or y is None:
        return None
    _same_features(x.shape[1], y.shape[1])
    X, Y = ((rows - rows.mean(dim=0)) / math.sqrt(len(rows) - 1) for rows in (x, y))
    delta = x.mean(dim=0) - y.mean(dim=0)
    crossed = torch.linalg.svdvals(X @ Y.T).sum()  # not by eigenvalues: centred features are not graded
    return max(float(delta @ delta + X.square().sum() + Y.square().sum() - 2 * crossed), 0.0)


def factor(sigma: np.ndarray) -> np.ndarray:
    """X [d, rank] with X X^T = sigma."""
    lower, pivots = _cholesky(sigma)
    transposed = np.empty(lower.shape[::-1])
    transposed[:, pivots] = np.triu(lower.T)
    return transposed.T


def _crossed(S1: np.ndarray, S2: np.ndarray) -> np.ndarray:
    """X^T Y [rank, rank]; X stays in its pivots' order, so that its triangle saves half of the product."""
    from scipy.linalg import blas  # slow to import

    lower, pivots = _cholesky(S1)
    rank = lower.shape[1]
    Y = np.ascontiguousarray(factor(S2).T[:, pivots]).T
    upper = blas.dtrmm(1.0, lower[:rank], Y[:rank], lower=1, trans_a=1)
    return np.asarray(upper if rank == len(Y) else upper + lower[rank:].T @ Y[rank:])


def _cholesky(sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """L [d, rank], of whose first rows only the lower triangle counts, and pivots with L L^T = sigma[pivots, pivots].

    LAPACK's dpstrf pivots completely and stops at its own tolerance, d eps times the largest variance.
    """
    from scipy.linalg import lapack  # slow to import

    lower, pivots, rank, info = lapack.dpstrf(sigma.T, lower=1)  # symmetric, and .T is what Fortran reads uncopied
    assert info >= 0, "dpstrf takes any symmetric matrix"
    pivots = pivots - 1
    rank = rank if sigma[pivots[0], pivots[0]] > 0 else 0  # of a matrix of zeros
    return lower[:, :rank], pivots


def nuclear_norm(A: np.ndarray) -> float:
    """Sum of singular values, from the eigenvalues of the smaller Gram matrix."""
    if min(A.shape) == 0:
        return 0.0
    gram = A @ A.T if A.shape[0] <= A.shape[1] else A.T @ A
    # torch brings MKL, whose solver is a fifth faster than the one numpy wheels bring.
    return float(torch.linalg.eigvalsh(torch.from_numpy(gram)).clamp_(min=0).sqrt_().sum())


class ReweightedFrechet:
    """The distance of a weighted set of features to a fixed reference, for many weightings of one set.

    The reference is factored once and the features are projected on its factor once; a weighting then costs one Gram
    matrix of the smaller side and its eigenvalues. Weights are counts: 0 leaves an image out, 2 counts it twice.
    """

    def __init__(self, features: np.ndarray, reference: Statistics) -> None:
        reference = reference.gaussian()
        _same_features(features.shape[1], len(reference.mean))
        self.features = np.asarray(features, dtype=np.float64) - reference.mean  # centred: the weighted means are small
        self.projected = self.features @ factor(reference.sigma)  # [N, rank]
        self.squares = np.square(self.features).sum(axis=1)
        self.reference_trace = float(np.trace(reference.sigma))

    def distance(self, weights: np.ndarray) -> float:
        used = np.flatnonzero(weights)
        w = weights[used].astype(np.float64)
        count = w.sum()
        if count < 2:
            raise UserError(f"A covariance needs at least 2 images, but there are {count:g}.")
        delta = w @ self.features[used] / count
        trace = (w @ self.squares[used] - count * delta @ delta) / (count - 1)
        z = self.projected[used]
        z = (z - w @ z / count) * np.sqrt(w / (count - 1))[:, None]
        return max(float(delta @ delta + trace + self.reference_trace - 2 * nuclear_norm(z)), 0.0)

    def influence(self) -> np.ndarray:
        """How much each image moves the distance, to first order: the change with its weight, times their number [N].

        With m, S of the set and Y Y^T = S_ref, A = Y^T S Y: 2 (m - m_ref) (x - m) + |x - m|^2 - |Y^T (x - m)|^2 under
        A^(-1/2), without its mean. Their mean square over N is the variance of the distance where it is linear.
        """
        mean = self.features.mean(axis=0)
        x, z = self.features - mean, self.projected - self.projected.mean(axis=0)
        variances, directions = np.linalg.eigh(z.T @ z / (len(z) - 1))
        kept = variances > variances.max(initial=0) * 1e-12
        crossed = (np.square(z @ directions[:, kept]) / np.sqrt(variances[kept])).sum(axis=1)
        change = 2 * x @ mean + np.square(x).sum(axis=1) - crossed
        return np.asarray(change - change.mean())


def frechet_infinity(
    features: np.ndarray, reference: Statistics, *, seed: int = 0, num_points: int = 15, smallest: int | None = None
) -> float:
    """Extrapolate to infinitely many images (Chong and Forsyth 2020, arXiv 1911.07023).

    The bias of FID is linear in 1/N: distances of random subsets at evenly spaced sizes N, from `smallest` (the paper's
    5,000, or a tenth of a set under 10,000) to all, are fitted by a line, whose value at 1/N = 0 is the answer.
    """
    count = len(features)
    smallest = smallest or (5_000 if count >= 10_000 else max(count // 10, 2))
    if not 2 <= smallest < count:
        raise UserError(f"Extrapolation needs more than {max(smallest, 2)} images, but there are {count}.")
    sizes = np.unique(np.linspace(smallest, count, num_points).astype(int))
    rng = np.random.default_rng(seed)
    resampled = ReweightedFrechet(features, reference)
    distances = []
    for size in sizes:
        weights = np.zeros(count)
        weights[rng.choice(count, size, replace=False)] = 1
        distances.append(resampled.distance(weights))
    return float(np.polynomial.Polynomial.fit(1 / sizes, distances, 1)(0.0))


def _same_features(a: int, b: int) -> None:
    if a != b:
        raise UserError(
            f"The two sides have features of different dimensions: {a} and {b}.",
            hint="Use the protocol and weights that the reference was made with.",
        )
