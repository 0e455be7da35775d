"""Lines of many classes: only where they are asked for, and then with progress."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from msdcli.engine.measure import rows
from msdcli.engine.measure.feature_metric import FeatureMetric, by_frechet
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


def test_rows_of_other_groups_are_others() -> None:
    """What is kept of a teacher is found by the classes of a group, not by what the group is called."""
    partition, metric = Partition([[0, 1, 2]], 3, "explicit"), FeatureMetric(FeatureNetwork("p", abs), "fd", "", None)  # type: ignore[arg-type]
    of = [MeasurementRows(metric, partition, 0, False, {"group": part}).deciding() for part in ([0, 1], [0, 1], [0, 2])]
    assert of[0] == of[1] != of[2]
    assert (
        MeasurementRows(metric, partition, 0, single=False).deciding()
        != MeasurementRows(metric, partition, 0).deciding()
    )


def test_rows_side_by_side_are_those_of_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All figures and intervals to the bit, in order, the warnings too; large sets are measured one by one."""
    network = FeatureNetwork("points", lambda x: x, floats=True)
    labels = np.arange(48) % 3
    noise = torch.Generator().manual_seed(3)
    mine, real = (collect([(torch.randn(48, 24, generator=noise), labels)], network) for _ in range(2))
    threads = set[int]()
    compare = by_frechet("fd", torch.device("cpu"), knows=False)

    def watched(*given: object) -> object:
        threads.add(threading.get_ident())
        return compare(*given)

    metric = FeatureMetric(network, "fd", "points", watched)  # type: ignore[arg-type]
    partition, found = Partition([[0, 2], [1]], 3, "explicit"), list[object]()
    for at_once in (1, 3):
        monkeypatch.setattr(rows, "spare", lambda _, at_once=at_once: at_once)
        lines = MeasurementRows(metric, partition, 5)
        found.append(([*lines.of("students", mine, real)], lines.warnings))
    assert found[0] == found[1] and len(threads) > 1
    whole, *_ = found[0][0]  # type: ignore[index]
    assert whole.group == "whole" and whole.intervals["fd"]["low"] < whole.values["fd"]
    monkeypatch.setattr(rows, "SMALL", 47)
    assert lines._at_once(mine) == 1
