import numpy as np
import pytest

from msdcli.errors import UserError
from msdcli.metrics import kernel
from msdcli.metrics.kernel import (
    inception_score,
    kernel_distance,
    kernel_distances,
    reweighted_kernel_distance,
    split_inception_score,
    subset_kernel_distance,
)


def by_loops(x, y):
    """The unbiased estimator of arXiv 1801.01401 (section 3), one pair at a time."""
    k = lambda a, b: (a @ b / len(a) + 1) ** 3  # noqa: E731
    m, n = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    within_y = sum(k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (m * n)


@pytest.mark.parametrize("rows", [3, 7, 1000])
def test_equals_the_definition_for_any_block(rng, monkeypatch, rows):
    monkeypatch.setattr(kernel, "CPU_ROWS", rows)
    x, y = rng.standard_normal((14, 6)), rng.standard_normal((11, 6)) + 0.3
    assert kernel_distance(x, y).value == pytest.approx(by_loops(x, y), rel=1e-12)


def test_one_subset_of_everything_is_all_pairs(rng):
    x, y = rng.standard_normal((30, 6)), rng.standard_normal((30, 6)) + 0.3
    subsets = subset_kernel_distance(x, y, num_subsets=2)
    assert subsets.value == pytest.approx(kernel_distance(x, y).value, rel=1e-9)
    assert subsets.deviation == pytest.approx(0, abs=1e-12)


def test_subsets_follow_the_seed_and_estimate_all_pairs(rng):
    x, y = rng.standard_normal((300, 6)), rng.standard_normal((200, 6)) + 0.5
    options = {"subset_size": 50, "num_subsets": 60}
    first = subset_kernel_distance(x, y, seed=3, **options)
    assert first == subset_kernel_distance(x, y, seed=3, **options)
    assert first != subset_kernel_distance(x, y, seed=4, **options)
    assert abs(first.value - kernel_distance(x, y).value) < 4 * first.deviation / np.sqrt(60) + 0.05 * first.value


def test_equals_cleanfid_on_one_subset(rng):
    fid = pytest.importorskip("cleanfid.fid")
    x, y = rng.standard_normal((40, 8)), rng.standard_normal((40, 8)) + 0.3
    theirs = fid.kernel_distance(y, x, num_subsets=1)
    assert kernel_distance(x, y).value == pytest.approx(theirs, rel=1e-9)


def test_weights_leave_images_out(rng):
    x, y = rng.standard_normal((20, 6)), rng.standard_normal((15, 6))
    weights = np.stack([np.ones(20), np.r_[np.ones(12), np.zeros(8)]])
    wanted = [kernel_distance(x, y).value, kernel_distance(x[:12], y).value]
    assert reweighted_kernel_distance(x, y, weights) == pytest.approx(wanted, rel=1e-9)
    ones, both = kernel_distances(x, y, [weights[:1], weights])
    assert (
        (ones.tolist(), both.tolist())
        == (  # to the bit: one look at all pairs serves several sets of weights
            reweighted_kernel_distance(x, y, weights[:1]).tolist(),
            reweighted_kernel_distance(x, y, weights).tolist(),
        )
    )


def test_kid_refuses_what_it_cannot_estimate():
    with pytest.raises(UserError, match="at least 2"):
        kernel_distance(np.zeros((1, 3)), np.zeros((5, 3)))
    with pytest.raises(UserError, match="3 and 4"):
        kernel_distance(np.zeros((5, 3)), np.zeros((5, 4)))


def test_inception_score_of_certain_and_of_undecided_predictions():
    certain = np.eye(10)[np.arange(50) % 10]
    assert inception_score(certain) == pytest.approx(10)
    assert inception_score(np.full((50, 10), 0.1)) == pytest.approx(1)
    assert inception_score(certain, weights=(np.arange(50) % 10 < 4).astype(float)) == pytest.approx(4)


def test_split_inception_score_is_the_mean_over_shuffled_splits(rng):
    p = rng.dirichlet(np.ones(10), size=205)
    mean, deviation = split_inception_score(p, seed=3)
    parts = np.array_split(np.random.default_rng(3).permutation(205), 10)
    scores = [inception_score(p[part]) for part in parts]
    assert (mean, deviation) == (pytest.approx(np.mean(scores)), pytest.approx(np.std(scores)))
    assert mean < inception_score(p), "fewer images have a lower score"
    assert split_inception_score(p, splits=1)[0] == pytest.approx(inception_score(p))


def test_splits_of_files_that_are_sorted_by_class_are_of_all_classes():
    certain = np.eye(10)[np.arange(1000) // 100]
    mean, deviation = split_inception_score(certain)
    assert mean > 9 and deviation < 0.5
    with pytest.raises(UserError, match="10 splits"):
        split_inception_score(certain[:9])
