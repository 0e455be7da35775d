"""Lines of many classes: only where they are asked for, and then with progress."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from msdcli.engine.measure.feature_metric import FeatureMetric
from msdcli.engine.measure.rows import MAX_CLASSES, MeasurementRows
from msdcli.engine.tracking.events import Progress
from msdcli.metrics.evaluate import collect
from msdcli.metrics.inception import FeatureNetwork
from msdcli.partition import Partition


@pytest.mark.parametrize(("num_classes", "every"), [(MAX_CLASSES, False), (MAX_CLASSES + 1, False), (150, True)])
def test_more_than_a_hundred_classes_get_a_line_each_only_if_asked(num_classes: int, every: bool) -> None:
    network = FeatureNetwork("points", lambda x: x, floats=True)
    labels = np.arange(2 * num_classes) % num_classes
    mine = collect([(torch.randn(2 * num_classes, 3), labels)], network, batch_size=500)
    metric = FeatureMetric(network, "fd", "points", lambda *_: ({"fd": 0.0}, {}, []))
    told: list[Progress | str] = []
    partition = Partition([[*range(num_classes)]], num_classes, "explicit")
    lines = MeasurementRows(metric, partition, 0, every_class=every, report=told.append)
    groups = [row.group for row in lines.of("students", mine, mine)]
    if num_classes > MAX_CLASSES and not every:
        assert groups == ["whole"] and told == ["101 classes: no line for each of them (--per-class)"]
    else:
        assert groups == ["whole", *(f"class {c}" for c in range(num_classes))]
        assert isinstance(told[-1], Progress) and (told[-1].done, told[-1].total) == (num_classes, num_classes)
