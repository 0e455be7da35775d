import numpy as np
import pytest

from msdcli.metrics.frechet import ReweightedFrechet
from msdcli.metrics.intervals import bootstrap, bootstrap_weights, mean_interval
from msdcli.metrics.moments import Gaussian


def test_weights_are_resamples_and_follow_the_seed():
    weights = bootstrap_weights(50, 20, seed=1)
    assert (weights.sum(axis=1) == 50).all()
    assert (weights == bootstrap_weights(50, 20, seed=1)).all()
    assert (weights != bootstrap_weights(50, 20, seed=2)).any()


def test_the_interval_of_a_mean_is_the_normal_one(rng):
    values = rng.standard_normal(2000)
    interval = mean_interval(values, replicates=2000, seed=0)
    half = 1.96 * values.std() / np.sqrt(2000)
    assert (interval.low, interval.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_intervals_of_the_frechet_distance_hold_what_new_samples_give(rng):
    """The biased estimate of other draws of the same size falls inside nine times of ten or more."""
    reference = Gaussian(np.zeros(8), np.eye(8))
    draw = lambda: rng.standard_normal((300, 8)) * 1.1 + 0.1  # noqa: E731
    distance = ReweightedFrechet(draw(), reference).distance
    interval = bootstrap(distance, 300, replicates=200, seed=0)
    assert interval.low < distance(np.ones(300)) < interval.high
    others = np.array([ReweightedFrechet(draw(), reference).distance(np.ones(300)) for _ in range(200)])
    width = np.quantile(others, 0.975) - np.quantile(others, 0.025)
    assert interval.high - interval.low == pytest.approx(width, rel=0.35)
    assert interval == bootstrap(distance, 300, replicates=200, seed=0)
