import numpy as np
import pytest

from msdcli.metrics.frechet import ReweightedFrechet
from msdcli.metrics.intervals import bootstrap, bootstrap_weights, mean_interval, narrowed
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


@pytest.mark.parametrize(
    ("count", "width", "scale", "most"),
    [(100, 8, 1.0, 1.35), (200, 16, 1.0, 1.35), (200, 16, 1.5, 1.25), (60, 64, 1.1, 1.7)],
)
def test_intervals_of_the_frechet_distance_are_as_wide_as_draws_vary(rng, count, width, scale, most):
    """Over draws: near the reference, where the plain bootstrap is up to five times too wide, and far from it."""
    reference = Gaussian(np.zeros(width), np.eye(width))
    sets = [ReweightedFrechet(rng.standard_normal((count, width)) * scale, reference) for _ in range(60)]
    values = np.array([frechet.distance(np.ones(count)) for frechet in sets])
    some = [(frechet.distance, frechet.influence()) for frechet in sets[:20]]
    intervals = [bootstrap(d, count, replicates=60, seed=0, influence=influence) for d, influence in some]
    half = np.mean([interval.high - interval.low for interval in intervals]) / 2
    assert 0.8 < half / (1.96 * values.std()) < most


def test_influence_is_the_derivative_by_an_images_weight(rng):
    for count, width in ((40, 5), (12, 20)):  # the second has fewer images than dimensions
        reference = Gaussian(rng.standard_normal(width), np.cov(rng.standard_normal((200, width)).T))
        frechet = ReweightedFrechet(rng.standard_normal((count, width)) * 1.3, reference)
        found, step = frechet.influence(), 1e-4
        assert found.mean() == pytest.approx(0, abs=1e-9)
        for i in (0, 7):
            # Of a weight alone the derivative has the estimator's own bias in it, so that of a shift of weights counts.
            up, down = np.ones(count), np.ones(count)
            up[i], up[i + 1], down[i], down[i + 1] = 1 + step, 1 - step, 1 - step, 1 + step
            slope = (frechet.distance(up) - frechet.distance(down)) / (2 * step)
            assert slope * count == pytest.approx(found[i] - found[i + 1], rel=0.12, abs=0.3)


def test_replicates_that_do_not_vary_stay():
    assert (narrowed(np.ones(5), np.zeros(9)) == 1).all()
