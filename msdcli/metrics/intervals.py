"""Bootstrap intervals (Efron 1979) for every figure, by reweighting images instead of computing features again.

The samples are drawn anew, the reference stays as it is: the interval says how far another draw of as many samples from
the same student might move the figure. A resample repeats images, which biases distances upwards, so replicates are
centred on the estimate before their quantiles are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    low: float
    high: float
    level: float = 0.95


def bootstrap_weights(count: int, replicates: int, seed: int) -> np.ndarray:
    """How often each of `count` images is drawn in each replicate: [replicates, count], rows sum to `count`."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=replicates)


def centred_interval(estimate: float, replicates: np.ndarray, level: float = 0.95) -> Interval:
    """Quantiles of the replicates, moved so that their mean is the estimate."""
    ends = [(1 - level) / 2, (1 + level) / 2]
    tails = np.quantile(replicates - replicates.mean(), ends, method="weibull")  # of few replicates not too far inside
    return Interval(float(estimate + tails[0]), float(estimate + tails[1]), level)


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    count: int,
    *,
    replicates: int,
    seed: int,
    level: float = 0.95,
    influence: np.ndarray | None = None,
) -> Interval:
    """The interval of `statistic(weights)`, whose estimate is at weights of one; with every image's `influence` on it
    its width is corrected as `narrowed` says.
    """
    values = np.array([statistic(weights) for weights in bootstrap_weights(count, replicates, seed)])
    if influence is not None:
        values = narrowed(values, influence)
    return centred_interval(statistic(np.ones(count)), values, level)


def narrowed(values: np.ndarray, influence: np.ndarray) -> np.ndarray:
    """Replicates of a distance, brought to the spread that other draws of the samples have.

    Near its least value a distance is a square, like the squared length of a mean. Let V be the variance of its linear
    part and Q that of its quadratic one over draws: then draws vary by V + Q, but an image's influence, which is taken
    at the estimate and not at the truth, says V + 2 Q, and resampling adds Q once more, V + 3 Q (Efron and Stein 1981
    have the same excess in the jackknife). So twice the one less the other is what is wanted. It is kept between 2/3
    and all of the first: terms beyond the quadratic widen replicates where images are hardly more than dimensions.

    Measured over draws of N = 50 to 5,000 images of d = 2 to 64 dimensions, at the reference and off it: the Frechet
    distance's interval holds its mean in 93 to 100 of 100 draws and is 0.96 to 1.31 times as wide as the draws vary;
    without the correction that is 1.0 to 5.0 times (docs, "Reading the numbers").
    """
    linear, resampled = float(np.square(influence).mean() / len(influence)), float(values.var())
    if resampled == 0:
        return values
    wanted = min(max(2 * linear - resampled, linear * 2 / 3), linear)
    return np.asarray(values.mean() + (values - values.mean()) * np.sqrt(wanted / resampled))


def mean_interval(values: np.ndarray, *, replicates: int, seed: int, level: float = 0.95) -> Interval:
    """The interval of a mean over images (precision, recall, density, coverage: the manifolds are held fixed)."""
    weights = bootstrap_weights(len(values), replicates, seed)
    return centred_interval(float(values.mean()), weights @ values / len(values), level)
