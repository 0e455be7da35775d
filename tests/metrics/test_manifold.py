import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msdcli.errors import UserError
from msdcli.metrics.manifold import manifold


def euclidean(a, b):
    return np.linalg.norm(a[:, None] - b[None], axis=2)


def squared(a, b):
    """Of integers, which know no rounding."""
    return np.square(a[:, None].astype(object) - b[None]).sum(axis=2).astype(np.int64)


def by_definition(x, y, k=3, k_density=5, distances=euclidean):
    """Both papers' formulas on full distance matrices."""
    radius = lambda a, k: np.sort(distances(a, a), axis=1)[:, k]  # noqa: E731
    between = distances(x, y)
    return {
        "precision": (between <= radius(y, k)).any(axis=1).mean(),
        "recall": (between <= radius(x, k)[:, None]).any(axis=0).mean(),
        "density": (between <= radius(y, k_density)).sum(axis=1).mean() / k_density,
        "coverage": (between.min(axis=0) <= radius(y, k_density)).mean(),
    }


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    counts=st.tuples(st.integers(6, 40), st.integers(6, 40)),
    shift=st.sampled_from([0.0, 0.5, 100.0]),
    rows=st.sampled_from([1, 7, 1000]),
)
def test_equals_the_papers_for_any_block(seed, counts, shift, rows):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((counts[0], 4)) + shift, rng.standard_normal((counts[1], 4))
    assert manifold(x, y, rows=rows).figures() == pytest.approx(by_definition(x, y))


def test_a_set_covers_itself(rng):
    x = rng.standard_normal((50, 4))
    figures = manifold(x, x).figures()
    assert (figures["precision"], figures["recall"], figures["coverage"]) == (1, 1, 1)


def test_copies_of_one_image_have_no_reach(rng):
    x = np.repeat(rng.standard_normal((1, 4)), 20, axis=0)
    assert manifold(x, rng.standard_normal((30, 4)) + 5).figures()["recall"] == 0


def test_too_few_images_and_other_features_are_refused():
    with pytest.raises(UserError, match="more than 5"):
        manifold(np.zeros((5, 3)), np.zeros((9, 3)))
    with pytest.raises(UserError, match="3 and 4"):
        manifold(np.zeros((9, 3)), np.zeros((9, 4)))


@pytest.mark.parametrize("levels", [2, 3, 17, 256])
@pytest.mark.parametrize("dimensions", [3, 64])
@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (1 / 8, -1), (2**-20, 0.5), (2.0**40, 0)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ties_of_features_with_few_levels_are_exact(rng, levels, dimensions, scale, offset, dtype):
    x, y = (rng.integers(0, levels, (count, dimensions)) for count in (70, 90))
    found = manifold(*((side * scale + offset).astype(dtype) for side in (x, y)), rows=32).figures()
    assert found == pytest.approx(by_definition(x, y, distances=squared), abs=1e-12)


def test_copies_of_real_images_are_on_their_balls(rng):
    """Samples that are the reference's own images reach exactly as far as these do, whatever the features are."""
    y = rng.standard_normal((120, 48)).astype(np.float32) * 3 + 1
    x = y[rng.permutation(120)[:60]]
    squared = np.square(y[:, None].astype(np.float64) - y[None]).sum(axis=2)
    within = squared <= np.sort(squared, axis=1)[:, 5]
    copied = (y[:, None] == x[None]).all(axis=2).any(axis=1)
    figures = manifold(x, y, rows=32).figures()
    assert figures["density"] == pytest.approx(within[copied].sum(axis=1).mean() / 5, abs=1e-12)
    assert figures["precision"] == 1


def test_order_and_blocks_change_nothing(rng):
    x, y = (rng.standard_normal((count, 40)).round(1) for count in (64, 80))
    plain = manifold(x, y, rows=1000).figures()
    assert manifold(x[::-1], y[rng.permutation(80)], rows=7).figures() == pytest.approx(plain, abs=1e-12)


def test_an_outlier_does_not_coarsen_the_grid(rng):
    x, y = rng.standard_normal((40, 4)), rng.standard_normal((200, 4))
    x[0], y[0] = 1e12, -1e9
    assert manifold(x, y).figures() == pytest.approx(by_definition(x, y))


def test_references_that_are_all_one_image():
    x, y = np.ones((9, 3)), np.full((9, 3), 0.1)
    assert set(manifold(x, y).figures().values()) == {0}
    assert manifold(y, y).figures()["coverage"] == 1
