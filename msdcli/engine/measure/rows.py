"""The lines of a measurement: the samples of teacher and students, whole, by part and by class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from msdcli.engine.distributed.cores import side_by_side, spare
from msdcli.engine.measure import groups
from msdcli.engine.measure.feature_metric import FeatureMetric, Intervals, Reference, Values
from msdcli.engine.tracking.events import Progress, Report, silent
from msdcli.metrics.evaluate import FeatureSet
from msdcli.metrics.moments import Gaussian
from msdcli.partition import Partition

CHEAP = 256  # dimensions: at 2048 a replicate costs seconds
SMALL = 10_000  # samples of which the rows are made side by side, in some 100 MB each
MAX_CLASSES = 100  # classes that get a line each unless more are asked for
FEWEST = 10  # images that an interval needs: of fewer, a resample can be one image over and over


@dataclass(frozen=True)
class Row:
    """One line of the result: whose samples (`who`), of which part (`group`), how many, and what was measured."""

    who: str
    group: str
    samples: int
    reference: int | None
    values: Values
    intervals: Intervals = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """All rows, and everything that is needed to quote or to repeat them."""

    metric: str
    protocol: str
    rows: list[Row]
    record: dict[str, Any]

    @classmethod
    def of_json(cls, told: dict[str, Any]) -> Measurement:
        """Return the measurement that `to_json` told."""
        made = cls(told["metric"], told["protocol"], [Row(**row) for row in told["rows"]], {})
        return replace(made, record={name: value for name, value in told.items() if name not in made.to_json()})

    def __repr__(self) -> str:
        whole = [row for row in self.rows if row.group == "whole" and self.metric in row.values]
        found = ", ".join(f"{row.who} {row.values[self.metric]:.4g}" for row in whole)
        return f"Measurement({self.metric}: {found}; {len(self.rows)} rows)"

    def whole(self, who: str) -> Values:
        """The values of one line's whole set."""
        return self.row(who).values

    def row(self, who: str) -> Row:
        return next(row for row in self.rows if (row.who, row.group) == (who, "whole"))

    def headline(self) -> dict[str, Any]:
        """The figure that the measurement is about, for scripts: of students, of files, or of a teacher alone."""
        found = {row.who: row for row in self.rows if row.group == "whole"}
        mine = found.get("students") or found.get("images") or found.get("teacher")
        return {
            "value": None if mine is None else mine.values.get(self.metric),
            "metric": self.metric,
            "interval": None if mine is None else mine.intervals.get(self.metric),
            "teacher": found["teacher"].values.get(self.metric) if "teacher" in found else None,
            "halves": found["real halves"].values.get(self.metric) if "real halves" in found else None,
        }

    def to_json(self) -> dict[str, Any]:
        rows = [asdict(row) for row in self.rows]
        return self.headline() | {"protocol": self.protocol, "rows": rows} | self.record


def left_out(num_classes: int) -> str:
    """Say that classes have no line of their own, and how they get one."""
    return f"{num_classes:,} classes: no line for each of them (--per-class)"


def has_classes(reference: FeatureSet) -> bool:
    return set(reference.moments.classes) != {-1}


class MeasurementRows:
    """The rows of a set of samples: whole, per student's part, per `single` class; or `whole_only`.

    Of more than `MAX_CLASSES` classes each gets its row only if that is asked for (`every_class`).
    """

    def __init__(
        self,
        metric: FeatureMetric,
        partition: Partition,
        replicates: int,
        extrapolate: bool = False,
        asked: groups.Groups | None = None,
        *,
        single: bool = True,
        whole_only: bool = False,
        every_class: bool = False,
        report: Report = silent,
    ) -> None:
        self.metric, self.partition, self.asked = metric, partition, asked or {}
        self.single = single and (every_class or partition.num_conditions <= MAX_CLASSES)
        if single and not (self.single or whole_only):
            report(left_out(partition.num_conditions))
        self.whole_only, self.report = whole_only, report
        self.replicates, self.extrapolate = replicates, extrapolate
        self.warnings: list[str] = []

    def deciding(self) -> list[Any]:
        """Return what decides which rows there are, and how they are made."""
        return [self.partition.parts, self.asked, self.single, self.whole_only, self.replicates, self.extrapolate]

    def of(self, who: str, mine: FeatureSet, against: Reference) -> Iterator[Row]:
        """Yield the rows; a reference that does not know the classes is compared with as a whole only."""
        whole = self.whole_only or isinstance(against, Gaussian) or not has_classes(against)
        parts = [] if whole else self.partition.parts
        owned = {f"student {k}": part for k, part in enumerate(parts)} if len(parts) > 1 else {}
        classes = {f"class {c}": [c] for c in range(self.partition.num_conditions)} if self.single else {}
        lines = {} if whole else owned | self.asked | classes
        if lines:
            self.report(Progress(f"{who} by part and class", 0, len(lines), "lines"))

        def row(group: str | None) -> tuple[Row, list[str]] | None:
            if group is None or isinstance(against, Gaussian):
                return self._row(who, "whole", mine, against, extrapolate=self.extrapolate)
            part, same = mine.select(lines[group]), against.select(lines[group])
            # Fewer than two have no covariance: a small --samples leaves rare classes out.
            return self._row(who, group, part, same) if min(part.count, same.count) >= 2 else None

        for number, made in enumerate(side_by_side(row, [None, *lines], self._at_once(mine))):
            if made is not None:
                found, warnings = made
                if number == 0:
                    self.warnings += [f"{who}: {warning}" for warning in warnings]
                yield found
            if number > 0:
                self.report(Progress(f"{who} by part and class", number, len(lines), "lines"))

    def _at_once(self, mine: FeatureSet) -> int:
        """Return how many rows are made side by side: each holds blocks of all pairs of its images."""
        small = mine.count <= SMALL and mine.moments.dimension <= CHEAP
        return spare(self.metric.network.device) if small else 1

    def _row(
        self, who: str, group: str, mine: FeatureSet, against: Reference, *, extrapolate: bool = False
    ) -> tuple[Row, list[str]]:
        """Return a row, and what whoever reads it should be warned of."""
        replicates = self.replicates if mine.count >= FEWEST else 0
        values, intervals, warnings = self.metric.compare(mine, against, replicates, extrapolate)
        return Row(who, group, mine.count, against.count, values, intervals), warnings


def halves(metric: FeatureMetric, real: Reference, *, splits: int = 10) -> list[Row]:
    """The distance between two random halves of the real data, averaged: what a perfect model of this data could
    show. Nothing where the reference is no more than its moments.

    Accuracy is that on images which the classifier was not trained on, if any, for of the others it knows too much.
    """
    if isinstance(real, Gaussian) or real.features is None or real.count < 2 * FEWEST:
        return []
    if real.features.shape[1] > CHEAP:
        splits = 1
    generator = torch.Generator().manual_seed(0)
    values: list[Values] = []
    for _ in range(splits):
        order = torch.randperm(real.count, generator=generator).numpy()
        a, b = real.take(order[: real.count // 2]), real.take(order[real.count // 2 :])
        values.append(metric.compare(a, b, 0, False)[0])
    mean = {key: sum(v[key] for v in values) / splits for key in values[0]}
    mean = {k: metric.unseen.get(k, v) for k, v in mean.items() if k != "accuracy" or k in metric.unseen}
    return [Row("real halves", "whole", real.count // 2, real.count - real.count // 2, mean)]
