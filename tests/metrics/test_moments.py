import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msdcli.errors import UserError
from msdcli.metrics.moments import CHUNK, ClassMoments, Gaussian, Moments

DIMENSION = 5


def moments_of(features):
    moments = Moments(features.shape[1])
    moments.add(features)
    return moments


def exact(features):
    """Mean and covariance in extended precision."""
    x = np.asarray(features).astype(np.longdouble)
    centred = x - x.mean(axis=0)
    return x.mean(axis=0), centred.T @ centred / (len(x) - 1)


def error(found, wanted):
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_a_large_offset_costs_no_accuracy(rng):
    features = (rng.standard_normal((3 * CHUNK + 7, 20)) + 100).astype(np.float32)
    moments = moments_of(features)
    mean, covariance = exact(features)
    assert error(moments.mean, mean) < 1e-15
    assert error(moments.covariance(), covariance) < 1e-14


def test_float32_sums_would_fail_the_test_above(rng):
    features = (rng.standard_normal((3 * CHUNK + 7, 20)) + 100).astype(np.float32)
    naive = features.T @ features / len(features) - np.outer(features.mean(axis=0), features.mean(axis=0))
    assert error(naive, exact(features)[1]) > 1e-5


def test_the_covariance_is_symmetric_to_the_bit(rng):
    covariance = moments_of(rng.standard_normal((700, 64))).covariance()
    assert (covariance == covariance.T).all()


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 700), min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
    offset=st.sampled_from([0.0, 1.0, 1e3]),
)
def test_any_split_merged_in_any_order_is_the_whole(sizes, order, offset):
    features = np.random.default_rng(sum(sizes)).standard_normal((sum(sizes) + 1, DIMENSION)) + offset
    shards = [moments_of(part) for part in np.split(features, np.cumsum(sizes))]
    order.shuffle(shards)
    merged = Moments(DIMENSION)
    for shard in shards:
        merged.merge(shard)
    whole = moments_of(features)
    assert merged.count == whole.count == len(features)
    assert error(merged.mean, whole.mean) < 1e-13
    assert error(merged.covariance(), whole.covariance()) < 1e-12


def test_reading_does_not_change_what_is_kept(rng):
    moments = Moments(3)
    features = rng.standard_normal((CHUNK + 20, 3))
    moments.add(features[:10])
    first = moments.covariance()
    assert (first == moments.covariance()).all()
    moments.add(features[10:])
    assert error(moments.covariance(), exact(features)[1]) < 1e-14


def test_a_buffer_may_be_reused_by_the_caller():
    buffer = torch.zeros(2, 3)
    moments = Moments(3)
    moments.add(buffer)
    buffer += 1
    moments.add(buffer)
    assert moments.mean.tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("count", [4, CHUNK + 5])
def test_arrays_hold_the_whole_state(rng, tmp_path, count):
    features = rng.standard_normal((count, 3)).astype(np.float32)
    moments = moments_of(features)
    np.savez(tmp_path / "moments.npz", **moments.to_arrays())
    with np.load(tmp_path / "moments.npz", allow_pickle=False) as arrays:
        read = Moments.from_arrays(arrays)
    for each in (moments, read):
        each.add(features[:2])
    assert read.count == count + 2
    assert (read.covariance() == moments.covariance()).all()


def test_classes_group_and_merge(rng):
    features, labels = torch.from_numpy(rng.standard_normal((900, 4))), rng.integers(0, 5, 900)
    shards = [ClassMoments(4), ClassMoments(4)]
    shards[0].add(features[:400], labels[:400])
    shards[1].add(features[400:], labels[400:])
    shards[0].merge(shards[1])
    classes = ClassMoments.from_arrays(shards[0].to_arrays())
    assert classes.counts() == {label: int((labels == label).sum()) for label in range(5)}
    chosen = np.isin(labels, [1, 4])
    assert error(classes.group([1, 4, 99]).covariance(), exact(features[chosen])[1]) < 1e-14
    assert error(classes.whole().covariance(), exact(features)[1]) < 1e-14


def test_images_without_labels_are_one_class(rng):
    classes = ClassMoments(4)
    classes.add(torch.from_numpy(rng.standard_normal((9, 4))))
    assert classes.counts() == {-1: 9}


def test_few_images_stay_rows_and_many_become_a_matrix():
    few, many = moments_of(np.zeros((50, 600))), moments_of(np.zeros((601, 600)))
    assert "scatter" not in few.to_arrays()
    assert len(many.to_arrays()["rows"]) == 0


@pytest.mark.parametrize("features", [np.zeros((2, 4)), np.zeros(3), np.array([[1.0, np.nan, 0.0]])])
def test_wrong_features_are_refused(features):
    with pytest.raises(UserError):
        Moments(3).add(features)


def test_too_few_images_are_refused():
    with pytest.raises(UserError, match="at least 2"):
        moments_of(np.zeros((1, 3))).covariance()
    with pytest.raises(UserError, match="no image"):
        _ = Moments(3).mean
    with pytest.raises(UserError, match="cannot be merged"):
        Moments(3).merge(moments_of(np.zeros((1, 4))))


def test_statistics_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="do not fit"):
        Gaussian(np.zeros(3), np.zeros((4, 4)))
    with pytest.raises(UserError, match="NaN"):
        Gaussian(np.zeros(3), np.full((3, 3), np.nan))


def test_a_batch_of_many_classes_asks_the_device_once(rng):
    """A wait per class of a batch would be 48,000 of them for 50,000 images of 1,000 classes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    asked = []

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                asked.append(func)
            return func(*args, **kwargs or {})

    features, labels = torch.from_numpy(rng.standard_normal((64, 200))), rng.permutation(64) % 50
    classes = ClassMoments(200)
    with Asked():
        classes.add(features, labels)
    assert len(asked) == 1
    for label in range(50):  # every class has its rows, in the order they came
        rows = torch.cat(classes.classes[label]._rows)
        assert torch.equal(rows, features[torch.from_numpy(labels == label)])
