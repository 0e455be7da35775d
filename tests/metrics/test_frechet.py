"""The distance against closed forms and against the nuclear norm of centred features, which needs no covariance."""

import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from msdcli.errors import UserError
from msdcli.metrics.frechet import ReweightedFrechet, frechet_distance, frechet_infinity
from msdcli.metrics.moments import Gaussian, Moments


def gaussian(features):
    moments = Moments(features.shape[1])
    moments.add(features)
    return moments.gaussian()


def by_nuclear_norm(x, y):
    """|m1 - m2|^2 + |X|^2 + |Y|^2 - 2 |X Y^T|_* with X, Y the centred features over sqrt(N - 1)."""
    X, Y = ((side - side.mean(axis=0)) / np.sqrt(len(side) - 1) for side in (x, y))
    trace = np.linalg.svd(X @ Y.T, compute_uv=False).sum()
    return np.square(x.mean(axis=0) - y.mean(axis=0)).sum() + np.square(X).sum() + np.square(Y).sum() - 2 * trace


def features(count, dimension, decay, seed):
    """Rectified and correlated like a network's last layer, with a spectrum that falls by exp(-2 decay)."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(1).standard_normal((dimension, dimension))
    mixing *= np.exp(-decay * np.arange(dimension) / dimension)[:, None] / np.sqrt(dimension)
    return np.maximum(rng.standard_normal((count, dimension)) * (1 + seed / 10) @ mixing + 0.1, 0)


@pytest.mark.parametrize(
    ("first", "second", "dimension", "decay"),
    [(100, 120, 256, 0), (100, 500, 256, 0), (500, 100, 256, 0), (255, 257, 256, 5), (2, 2, 64, 0)]
    + [(900, 1000, 256, decay) for decay in (0, 5, 10, 20)],
)
def test_equals_the_nuclear_norm_at_any_rank(first, second, dimension, decay):
    x, y = features(first, dimension, decay, 0), features(second, dimension, decay, 1)
    wanted = by_nuclear_norm(x, y)
    assert frechet_distance(gaussian(x), gaussian(y)) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("power", [1, 2, 4])
def test_equals_the_closed_form_of_commuting_covariances(rng, power):
    basis = np.linalg.qr(rng.standard_normal((300, 300)))[0]
    a, b = np.arange(1, 301.0) ** -power, np.arange(300, 0, -1.0) ** -power
    S1, S2 = (basis * a @ basis.T for a in (a, b))
    mean = rng.standard_normal(300)
    wanted = np.square(mean).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert frechet_distance(Gaussian(mean, S1), Gaussian(np.zeros(300), S2)) == pytest.approx(wanted, rel=1e-9)


def test_equals_cleanfid_at_full_rank(rng):
    fid = pytest.importorskip("cleanfid.fid")
    a, b = gaussian(features(500, 64, 2, 0)), gaussian(features(500, 64, 2, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of sqrtm's `disp`, which scipy 1.18 takes away
        try:
            theirs = fid.frechet_distance(a.mean, a.sigma, b.mean, b.sigma)
        except (TypeError, ValueError) as error:
            pytest.skip(f"the installed clean-fid and scipy do not work together: {error}")
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    counts=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    dimension=st.integers(1, 30),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
@example(seed=5, counts=(5, 15), dimension=5, scale=1e-6)  # a last pivot right at LAPACK's tolerance
def test_is_a_symmetric_squared_distance(seed, counts, dimension, scale):
    rng = np.random.default_rng(seed)
    a, b = (gaussian(rng.standard_normal((count, dimension)) * scale) for count in counts)
    distance = frechet_distance(a, b)
    size = np.trace(a.sigma) + np.trace(b.sigma)
    assert distance >= 0
    # Of a singular covariance the last pivot is rounding error, eps of the largest or nothing; its root is 1e-8.
    singular = min(counts) <= dimension
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-9, abs=(3e-8 if singular else 1e-12) * size)
    assert frechet_distance(a, a) <= 1e-12 * size
    moved = Gaussian(a.mean + 3 * scale, a.sigma)
    assert frechet_distance(a, moved) == pytest.approx(9 * scale**2 * dimension, rel=1e-9)


def test_a_constant_feature_and_a_constant_set_are_sound(rng):
    x, y = rng.standard_normal((50, 8)), rng.standard_normal((60, 8))
    x[:, 3] = y[:, 3] = 7.0
    assert frechet_distance(gaussian(x), gaussian(y)) == pytest.approx(by_nuclear_norm(x, y), rel=1e-9)
    still = Gaussian(np.zeros(8), np.zeros((8, 8)))
    other = gaussian(x)
    wanted = np.square(other.mean).sum() + np.trace(other.sigma)
    assert frechet_distance(still, other) == pytest.approx(wanted, rel=1e-12)


def test_features_of_another_network_are_refused():
    a, b = (Gaussian(np.zeros(d), np.eye(d)) for d in (3, 4))
    with pytest.raises(UserError, match="3 and 4"):
        frechet_distance(a, b)


@pytest.mark.parametrize("count", [40, 200])
def test_weights_stand_for_repeated_images(rng, count):
    x, reference = features(count, 64, 2, 0), gaussian(features(500, 64, 2, 1))
    weights = rng.integers(0, 3, count)
    repeated = np.repeat(x, weights, axis=0)
    found = ReweightedFrechet(x, reference).distance(weights)
    assert found == pytest.approx(frechet_distance(gaussian(repeated), reference), rel=1e-9)


def test_extrapolation_removes_most_of_the_bias(rng):
    reference = Gaussian(np.zeros(16), np.eye(16))
    x = rng.standard_normal((2000, 16)) * 1.2
    truth = 16 * 0.2**2
    biased = frechet_distance(gaussian(x[:250]), reference)
    found = frechet_infinity(x[:250], reference, seed=1)
    assert abs(found - truth) < abs(biased - truth) / 2
    assert found == frechet_infinity(x[:250], reference, seed=1)


def test_extrapolation_needs_more_images_than_its_smallest_subset():
    with pytest.raises(UserError, match="more than"):
        frechet_infinity(np.zeros((2, 3)), Gaussian(np.zeros(3), np.eye(3)))


@pytest.mark.parametrize("counts", [(2, 2), (7, 20), (20, 20)])
def test_of_few_images_no_covariance_is_made(rng, counts, monkeypatch):
    x, y = (rng.standard_normal((count, 40)) * np.arange(1, 41) ** -0.5 + i for i, count in enumerate(counts))
    sides = [Moments(40), Moments(40)]
    for side, rows in zip(sides, (x, y), strict=True):
        side.add(rows)
    wanted = frechet_distance(*(side.gaussian() for side in sides))
    monkeypatch.setattr(Moments, "gaussian", lambda self: pytest.fail("a covariance was made"))
    assert frechet_distance(*sides) == pytest.approx(wanted, rel=1e-7)  # by eigenvalues: half of the digits
    assert frechet_distance(*sides) == pytest.approx(by_nuclear_norm(x, y), rel=1e-13)
