import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msdcli.errors import UserError
from msdcli.metrics.manifold import manifold


def by_definition(x, y, k=3, k_density=5):
    """Both papers' formulas on full distance matrices."""
    distances = lambda a, b: np.linalg.norm(a[:, None] - b[None], axis=2)  # noqa: E731
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
