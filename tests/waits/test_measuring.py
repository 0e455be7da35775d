"""Measuring asks its device a fixed number of things per batch, and per measurement as many for a thousand classes as
for three: features, moments, distances, FID with classes and what is beside it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from msdcli.engine.measure.classifier import as_network
from msdcli.engine.measure.features import FeatureExtractor, of_data, of_students
from msdcli.engine.tracking.events import silent
from msdcli.metrics.evaluate import FeatureSet, collect
from msdcli.metrics.inception import FeatureNetwork, _clip_features, _dinov2_features
from msdcli.metrics.kernel import kernel_distance, subset_kernel_distance
from msdcli.metrics.manifold import manifold
from msdcli.metrics.moments import ClassMoments
from msdcli.metrics.resize import resize_clean, resize_legacy_pytorch
from msdcli.nets.classifier import Classifier
from tests.device import DOWN, READ, UP, FakeDevice, HostWaitError, Remote
from tests.waits.cases import SIDE, Numbers, device

SHAPE = (3, SIDE, SIDE)
PER_BATCH = {UP: 1, READ: 1, DOWN: 2}  # rows in the order of classes; is it finite; features, probabilities


def counted(on: FakeDevice, since: int) -> Counter[str]:
    return Counter(what for what, _, _ in on.waits[since:])


def extractor(num_classes: int, batch: int) -> FeatureExtractor:
    """The data's own classifier, untrained, on the device."""
    net = Classifier(SHAPE, num_classes).to("meta").requires_grad_(False).eval()
    return FeatureExtractor(as_network(net, "0" * 64, torch.device("meta")), batch)


def students_features(on: FakeDevice, num_classes: int, count: int, batch: int) -> tuple[FeatureSet, Counter[str]]:
    """Features of what students drew on the device."""
    classes = [i % num_classes for i in range(count)]
    drawn = [
        (list(range(i, min(i + batch, count))), torch.randn(min(batch, count - i), *SHAPE, device="meta"))
        for i in range(0, count, batch)
    ]
    with torch.no_grad():
        of = extractor(num_classes, batch)
        since = len(on.waits)
        return of_students(iter(drawn), classes, of, silent, what="test"), counted(on, since)


@pytest.mark.parametrize("num_classes", [3, 40])
def test_features_cost_the_same_waits_per_batch_however_many_classes(num_classes: int) -> None:
    with device() as on:
        found, waits = students_features(on, num_classes, 50, 20)
    assert waits == {what: 3 * number for what, number in PER_BATCH.items()}
    assert found.count == 50 and len(found.moments.classes) == num_classes


def test_pictures_of_the_data_travel_once() -> None:
    with device() as on:
        of = extractor(3, 20)
        since = len(on.waits)
        of_data(Numbers(SHAPE), range(24), of)  # type: ignore[arg-type]
        waits = counted(on, since)
    # They are held 500 at a time, and shown to the network in two batches.
    assert waits == {UP: 2 + 1, READ: 1, DOWN: 2}


def test_a_measurement_reads_each_side_and_not_each_class() -> None:
    """FID, KID, precision, recall, density and coverage, and the distance of every class: the same number of waits."""
    found = {}
    for num_classes in (2, 12):
        with device() as on:
            mine, theirs = (students_features(on, num_classes, 60, 60)[0] for _ in range(2))
            since = len(on.waits)
            summary = mine.summary(theirs, device="meta")
            found[num_classes] = counted(on, since)
            groups = {f"class {c}": [c] for c in range(num_classes)}
            assert all(np.isfinite(summary[name]) for name in ("fid", "kid", "precision", "coverage"))
            before = len(on.waits)
            mine.summary(theirs, groups=groups, device="meta")
        # Moments lie where features were made: those of each class are read once, whatever is asked of them.
        assert len(on.waits) - before - found[num_classes].total() <= 4 * num_classes
    assert found[2][READ] == found[12][READ] and found[2][UP] == found[12][UP]


def test_distances_are_taken_on_the_device() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)), rng.normal(size=(50, 6))
    with device() as on:
        near = kernel_distance(x, y, device="meta"), manifold(x, y, device="meta", rows=16)
        waits = on.counted()
        assert waits == {UP: 3 + 2, DOWN: 1 + 4}, "both sides and weights; figures"
        since = len(on.waits)
        subset = subset_kernel_distance(x, y, subset_size=10, num_subsets=7, device="meta")
        assert counted(on, since) == {UP: 2 + 2, DOWN: 1}, "both sides, the places of all subsets; one figure"
    assert near[0].value == pytest.approx(kernel_distance(x, y).value)
    assert near[1].figures() == manifold(x, y, rows=16).figures()
    assert subset.value == pytest.approx(subset_kernel_distance(x, y, subset_size=10, num_subsets=7).value)


def test_moments_of_classes_ask_once_per_batch() -> None:
    with device() as on:
        moments = ClassMoments(5)
        since = len(on.waits)
        for _ in range(3):
            moments.add(torch.randn(30, 5, device="meta"), np.arange(30) % 10)
        assert counted(on, since) == {UP: 3, READ: 3}
        gaussian = moments.whole().gaussian()
    assert gaussian.sigma.shape == (5, 5)


@pytest.mark.parametrize("resize", [lambda x: resize_clean(x, 20), lambda x: resize_legacy_pytorch(x, 20)])
def test_pictures_are_resized_without_waiting(resize: Any) -> None:
    with device() as on:
        pictures = torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8, device="meta")
        resize(pictures)  # tables are made once
        with on.watched():
            assert isinstance(resize(pictures), Remote)


@pytest.mark.parametrize("features", [_clip_features, _dinov2_features])
def test_published_networks_see_pictures_without_waiting(features: Any) -> None:
    class Vit(torch.nn.Module):
        def forward(self, pixel_values: torch.Tensor) -> Any:
            self.image_embeds = self.pooler_output = pixel_values.mean(dim=(2, 3))
            return self

    with device() as on:
        network = features(Vit())
        pictures = torch.zeros(2, 3, 224, 224, dtype=torch.uint8, device="meta")
        network(pictures)
        with on.watched():
            assert isinstance(network(pictures), Remote)


def test_a_planted_wait_in_a_feature_network_is_found() -> None:
    with device() as on:
        net = Classifier(SHAPE, 3).to("meta").requires_grad_(False).eval()

        def waits(x: torch.Tensor) -> torch.Tensor:
            return net.features(x) * (1.0 if net.features(x).sum().item() else 2.0)

        network = FeatureNetwork("test", waits, device=torch.device("meta"), floats=True)
        since = len(on.waits)
        collect([torch.randn(4, *SHAPE, device="meta")], network)
        assert counted(on, since)[READ] == PER_BATCH[READ] + 1
        with pytest.raises(HostWaitError), on.watched():
            network.features(torch.randn(4, *SHAPE, device="meta"))
