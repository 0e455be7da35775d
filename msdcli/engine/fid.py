"""Measure a run: the teacher and the students against the data, whole, per student and per class."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from msdcli.data.base import Dataset
from msdcli.engine import checkpoint, classifier, dataset, device, pairs, sample
from msdcli.engine import teacher as teachers
from msdcli.engine.events import Progress, Report
from msdcli.metrics.frechet import frechet_distance
from msdcli.metrics.moments import Moments
from msdcli.metrics.planar import histogram_l1, sliced_wasserstein
from msdcli.partition import Partition
from msdcli.recipe import Recipe
from msdcli.rundir import RunDir, write_json
from msdcli.seeds import derive

MAX_REFERENCE = 50_000


@dataclass(frozen=True)
class Row:
    """One line of the result: whose samples (`who`), of which part (`group`), how many, and what was measured."""

    who: str
    group: str
    samples: int
    reference: int
    values: dict[str, float]


@dataclass(frozen=True)
class Measurement:
    """All rows, and everything that is needed to quote or to repeat them."""

    metric: str
    protocol: str
    rows: list[Row]
    record: dict[str, Any]

    def whole(self, who: str) -> dict[str, float]:
        """The values of one line's whole set."""
        return next(row.values for row in self.rows if (row.who, row.group) == (who, "whole"))

    def to_json(self) -> dict[str, Any]:
        rows = [asdict(row) for row in self.rows]
        return {"metric": self.metric, "protocol": self.protocol, "rows": rows} | self.record


class Judge(Protocol):
    """How one kind of data is measured."""

    metric: str
    protocol: str
    record: dict[str, Any]

    def features(self, images: Tensor) -> Tensor: ...

    def values(self, features: Tensor, classes: Tensor, reference: Tensor) -> dict[str, float]: ...


class ClassifierJudge:
    """Frechet distance on the features of the data's own classifier, and how often the classifier sees the asked
    class.
    """

    def __init__(self, run: RunDir, recipe: Recipe, data: Dataset, on: torch.device, report: Report) -> None:
        self.net, sha256 = classifier.provide(run, recipe, data, on, report)
        self.device = on
        self.metric = f"fd_{recipe.data.name}"
        self.protocol = (
            f"Frechet distance, {self.net.num_features} features of a classifier trained on {recipe.data.name}"
        )
        self.record = {"classifier_sha256": sha256}

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return torch.cat([self.net.features(chunk.to(self.device)).cpu() for chunk in images.split(500)])

    @torch.no_grad()
    def values(self, features: Tensor, classes: Tensor, reference: Tensor) -> dict[str, float]:
        predicted = self.net.head(features.to(self.device)).argmax(1).cpu()
        accuracy = (predicted == classes).double().mean().item()
        return {self.metric: frechet_distance(moments(features), moments(reference)), "accuracy": accuracy}


def moments(features: Tensor) -> Moments:
    """Return mean and covariance of features [images, dimensions]."""
    result = Moments(features.shape[1])
    result.add(features)
    return result


class PlanarJudge:
    """L1 distance of histograms and sliced Wasserstein distance of points."""

    def __init__(self, recipe: Recipe) -> None:
        self.metric = f"l1_{recipe.data.name}"
        self.protocol = (
            "L1 distance of 100 x 100 histograms over [-1.5, 1.5]^2, sliced 2-Wasserstein over 128 directions"
        )
        self.record: dict[str, Any] = {}

    def features(self, images: Tensor) -> Tensor:
        return images

    def values(self, features: Tensor, classes: Tensor, reference: Tensor) -> dict[str, float]:
        return {
            self.metric: histogram_l1(features, reference),
            "sliced_wasserstein": sliced_wasserstein(features, reference),
        }


def measure(run: RunDir, report: Report) -> Measurement:
    """Measure a finished run and write metrics/NAME.json.

    The students' samples use a seed of their own, never the noise of the pairs that they were trained on. Points are
    compared with the teacher's samples as the paper does, pictures with the data.
    """
    recipe = run.recipe()
    on = device.prepare(recipe)
    data = dataset.provide(run, recipe, report)
    students = sample.load(run.root, on)
    teacher, teacher_hash = teachers.load(run, recipe)
    planar = len(data.shape) == 1
    judge: Judge = PlanarJudge(recipe) if planar else ClassifierJudge(run, recipe, data, on, report)

    # Samples: number i has the class of image i, so classes are as frequent as in the data.
    count = recipe.evaluation.samples
    classes = pairs.labels_for(data, range(count))
    by_teacher = judge.features(
        teacher_samples(pairs.Pairs(run, recipe, data, teacher_hash), teacher.to(on), count, report)
    )
    y = students.sample(
        classes.tolist(), seed=derive("evaluation", recipe.evaluation.seed), batch=recipe.evaluation.batch
    )
    by_students = judge.features(y)
    numbers = range(min(len(data), max(count, MAX_REFERENCE) if planar else MAX_REFERENCE))
    real, real_classes = judge.features(data.images(numbers)), data.labels(numbers)

    against = (by_teacher, classes) if planar else (real, real_classes)
    rows = [
        halves(judge, real, real_classes),
        *rows_for("teacher", judge, (by_teacher, classes), (real, real_classes), students.partition),
        *rows_for("students", judge, (by_students, classes), against, students.partition),
    ]
    record = {
        "samples": count,
        "seed": recipe.evaluation.seed,
        "teacher_sha256": teacher_hash,
        "students_sha256": [checkpoint.read_json(f / checkpoint.MODEL)["sha256"] for f in students.folders],
        "students_against": "teacher" if planar else "data",
        "solver": recipe.teacher.solver.model_dump(),
        "versions": {name: importlib.metadata.version(name) for name in ("msdcli", "torch")},
    }
    result = Measurement(judge.metric, judge.protocol, rows, record | judge.record)
    write_json(run.metrics / f"{judge.metric}.json", result.to_json())
    return result


def teacher_samples(source: pairs.Pairs, teacher: checkpoint.Denoiser, count: int, report: Report) -> Tensor:
    """Return `count` samples of the teacher: its pairs, and more from the same rule where they are too few."""
    have = [checkpoint.load_tensors(path)[0]["y"] for path, _ in source.shards() if path.exists()]
    samples = torch.cat([*have, torch.empty(0, *teacher.shape)])[:count]
    step = 500
    for start in range(len(samples), count, step):
        numbers = range(start, min(start + step, count))
        classes = pairs.labels_for(source.data, numbers)
        y = pairs.sample_teacher(teacher, source.noise(numbers), classes, source.solver)
        samples = torch.cat([samples, y])
        report(Progress("teacher samples", len(samples), count, "images"))
    return samples


def rows_for(
    who: str, judge: Judge, sampled: tuple[Tensor, Tensor], against: tuple[Tensor, Tensor], partition: Partition
) -> Iterator[Row]:
    """Yield the rows of one set of samples: whole, per student's part, per class."""
    features, classes = sampled
    reference, reference_classes = against
    groups = (
        {"whole": range(partition.num_conditions)}
        if len(partition.parts) == 1
        else {
            "whole": range(partition.num_conditions),
            **{f"student {k}": part for k, part in enumerate(partition.parts)},
        }
    )
    for name, members in [*groups.items(), *((f"class {c}", [c]) for c in range(partition.num_conditions))]:
        mine, theirs = _among(classes, members), _among(reference_classes, members)
        if mine.sum() < 2 or theirs.sum() < 2:
            continue  # too few for a covariance: a small --samples leaves rare classes out
        values = judge.values(features[mine], classes[mine], reference[theirs])
        yield Row(who, name, int(mine.sum()), int(theirs.sum()), values)


def _among(classes: Tensor, members: Sequence[int]) -> Tensor:
    return torch.isin(classes, torch.tensor(list(members)))


def halves(judge: Judge, real: Tensor, classes: Tensor, *, splits: int = 10) -> Row:
    """The distance between two random halves of the real data, averaged: what a perfect model of this data could
    show.
    """
    generator = torch.Generator().manual_seed(0)
    values: list[dict[str, float]] = []
    for _ in range(splits):
        order = torch.randperm(len(real), generator=generator)
        a, b = order[: len(order) // 2], order[len(order) // 2 :]
        values.append(judge.values(real[a], classes[a], real[b]))
    mean = {key: sum(v[key] for v in values) / splits for key in values[0]}
    return Row("real halves", "whole", len(real) // 2, len(real) - len(real) // 2, mean)


def stored(run: RunDir) -> list[Path]:
    """Return the result files of a run."""
    return sorted(run.metrics.glob("*.json"))
