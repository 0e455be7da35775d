"""Measure a run: the teacher and the students against the data, whole, per student and per class."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msdcli import records
from msdcli.data.base import Dataset, fingerprint, has_images, in_turn
from msdcli.data.opening import content_hash
from msdcli.diffusion.device_batch import DeviceBatch
from msdcli.engine import sample
from msdcli.engine.checkpoints.model import MODEL
from msdcli.engine.distributed import device
from msdcli.engine.inputs import autoencoder as autoencoders
from msdcli.engine.inputs import dataset, pairs
from msdcli.engine.inputs import teacher as teachers
from msdcli.engine.measure import classifier, features, groups
from msdcli.engine.pictures import Drawn
from msdcli.engine.tracking.events import Report
from msdcli.errors import UserError
from msdcli.metrics import reference
from msdcli.metrics.evaluate import FeatureSet
from msdcli.metrics.inception import VIT_MODELS, FeatureNetwork, open_network
from msdcli.metrics.intervals import bootstrap, mean_interval
from msdcli.metrics.moments import Gaussian
from msdcli.metrics.planar import histogram_l1, sliced_wasserstein
from msdcli.nets.classifier import Classifier
from msdcli.partition import Partition
from msdcli.recipe import Recipe
from msdcli.rundir import RunDir, write_json
from msdcli.seeds import derive

MAX_REFERENCE = 50_000
REPLICATES = 100  # of the bootstrap where no number is asked for and features have at most
CHEAP = 256  # dimensions: at 2048 a replicate costs seconds
CHANGED = "The data have changed since the run was begun: the students were made from others."
FEWEST = 10  # images that an interval needs: of fewer, a resample can be one image over and over

Reference = FeatureSet | Gaussian
Values = dict[str, float]
Intervals = dict[str, dict[str, float]]


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

    def whole(self, who: str) -> Values:
        """The values of one line's whole set."""
        return self.row(who).values

    def row(self, who: str) -> Row:
        return next(row for row in self.rows if (row.who, row.group) == (who, "whole"))

    def to_json(self) -> dict[str, Any]:
        rows = [asdict(row) for row in self.rows]
        return {"metric": self.metric, "protocol": self.protocol, "rows": rows} | self.record


@dataclass(frozen=True)
class FidOptions:
    """How a run is measured; what is None is for the recipe or the protocol to say."""

    protocol: str | None = None
    weights: Path | None = None
    reference: str | None = None
    samples: int | None = None
    batch: int | None = None
    workers: int = 1
    device: str | None = None
    bootstrap: int | None = None
    infinity: bool = False
    lean: bool = False
    save: int = 0
    groups: tuple[str, ...] = ()  # as groups.parse reads them
    seed: int | None = None  # of which pictures of a file `samples` takes; a run's recipe has its own


# How two sets of features are compared.


@dataclass(frozen=True)
class FeatureMetric:
    """The network that measures, the name of its first figure, and what is said about it."""

    network: FeatureNetwork
    name: str
    protocol: str
    compare: Callable[[FeatureSet, Reference, int, bool], tuple[Values, Intervals, list[str]]]
    record: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    unseen: Values = field(default_factory=dict)  # of real images that the network was not trained on


def metric_of(
    run: RunDir, recipe: Recipe, data: Dataset, options: FidOptions, on: torch.device, report: Report
) -> FeatureMetric:
    """Open what measures this run: the data's own classifier, or the network of a published protocol."""
    name, protocol = recipe.data.name, options.protocol or "data"
    if protocol == "data" and recipe.has_prompts:
        raise UserError(
            "prompts have no classifier to measure by", hint="--protocol clean (or clip), --reference PICTURES"
        )
    if len(data.shape) == 1:
        if protocol != "data" or options.reference:
            raise UserError(f"{name} holds points, which have no {protocol} features", hint="leave the protocol out")
        what = "L1 distance of 100 x 100 histograms over [-1.5, 1.5]^2, sliced 2-Wasserstein over 128 directions"
        return FeatureMetric(
            FeatureNetwork("points", lambda x: x, floats=True), f"l1_{name}", what, _points(f"l1_{name}")
        )
    if protocol == "data":
        if options.reference or options.weights:
            raise UserError(
                f"the classifier of {name} is the run's own, and compares with the run's own data",
                hint="--protocol clean (or another) for a reference or weights of yours",
            )
        return _own_metric(name, len(data.class_names), classifier.provide(run, recipe, data, on, report), on)
    network = open_network(protocol, weights=options.weights, device=on)
    metric = ("fd_" if protocol in VIT_MODELS else "fid_") + protocol.replace("-", "_")
    return FeatureMetric(network, metric, protocol, _pictures(metric, knows=False))


def _own_metric(name: str, num_classes: int, own: classifier.TrainedClassifier, on: torch.device) -> FeatureMetric:
    """Measure by the data's own classifier, and say how much it knows of images that it was not trained on."""
    network, metric, held_out = classifier.as_network(own.network, own.sha256, on), f"fd_{name}", own.held_out
    dimension = Classifier.num_features
    return FeatureMetric(
        network,
        metric,
        f"Frechet distance, {dimension} features of a classifier trained on {name} ({held_out.told()})",
        _pictures(metric, knows=True),
        {"classifier_sha256": own.sha256, "held_out": vars(held_out) | {"accuracy": held_out.accuracy}},
        held_out.warnings(metric, num_classes),
        {} if held_out.accuracy is None else {"accuracy": held_out.accuracy},
    )


def _pictures(metric: str, *, knows: bool) -> Callable[..., tuple[Values, Intervals, list[str]]]:
    """Compare by the Frechet distance and its companions; `knows`: the network's classes are the data's own."""

    def compare(mine: FeatureSet, theirs: Reference, replicates: int, extrapolate: bool) -> Any:
        found = mine.summary(theirs, replicates=replicates, extrapolate=extrapolate)
        intervals = found.pop("intervals")
        warnings: list[str] = found.pop("warnings")
        figures = {k: v for k, v in found.items() if isinstance(v, float)}
        values, own = {metric: figures.pop("fid")}, intervals.pop("fid", None)
        spans = {} if own is None else {metric: own}
        if "fid_infinity" in figures:
            values[f"{metric}_infinity"] = figures.pop("fid_infinity")
        if knows and mine.probabilities is not None and mine.labels is not None:
            right = (mine.probabilities.argmax(axis=1) == mine.labels).astype(float)
            values["accuracy"] = float(right.mean())
            if replicates:
                spans["accuracy"] = asdict(mean_interval(right, replicates=replicates, seed=0))
            # Of a network that is not Inception:
            figures, intervals = ({k: v for k, v in d.items() if "inception" not in k} for d in (figures, intervals))
        return values | figures, spans | intervals, warnings

    return compare


def _points(metric: str) -> Callable[..., tuple[Values, Intervals, list[str]]]:
    """Compare points in the plane."""

    def compare(mine: FeatureSet, theirs: FeatureSet, replicates: int, extrapolate: bool) -> Any:
        x, y = _tensor(mine), _tensor(theirs)
        values = {metric: histogram_l1(x, y), "sliced_wasserstein": sliced_wasserstein(x, y)}

        def reweighted(weights: np.ndarray) -> float:
            return histogram_l1(x.repeat_interleave(torch.from_numpy(weights).long(), dim=0), y)

        if not replicates:
            return values, {}, []
        return values, {metric: asdict(bootstrap(reweighted, len(x), replicates=replicates, seed=0))}, []

    return compare


def _tensor(points: FeatureSet) -> Tensor:
    assert points.features is not None, "points are always kept"
    return torch.from_numpy(points.features)


# A run, its networks and its samples.


class EvaluationContext:
    """A run under one network: what measuring it once and watching it have in common."""

    def __init__(self, run: RunDir, options: FidOptions, report: Report) -> None:
        refuse_seed(options)
        self.run, self.options, self.report = run, options, report
        self.recipe = run.recipe()
        self.device = device.prepare(self.recipe) if options.device is None else device.resolve(options.device)
        self.data = dataset.provide(run, self.recipe, report)
        self.warnings = [] if dataset.is_as_begun(run, self.data) else [CHANGED]
        self.planar = len(self.data.shape) == 1
        names = self.data.class_names
        self.groups = groups.parse(options.groups, range(len(names)), names)
        self.count = options.samples or self.recipe.evaluation.samples
        self.batch = options.batch or self.recipe.evaluation.batch
        if self.planar and (options.lean or options.save):
            raise UserError("points are no pictures: they cannot be saved, and are measured one by one")
        self.metric = metric_of(run, self.recipe, self.data, options, self.device, report)
        self.warnings += self.metric.warnings
        self.extractor = features.FeatureExtractor(
            self.metric.network, self.batch, keep=not options.lean, memory=DeviceBatch(report)
        )
        # Number i has the class of image i, so classes are as frequent as in the data.
        self.classes: list[int] = pairs.labels_for(self.data, range(self.count)).tolist()
        # A seed of its own, never the noise of the pairs that the students were trained on.
        self.seed = derive("evaluation", self.recipe.evaluation.seed)

    def replicates(self, dimension: int) -> int:
        if self.options.bootstrap is not None:
            return self.options.bootstrap
        return REPLICATES if dimension <= CHEAP and not self.options.lean else 0

    def real(self) -> Reference:
        """The reference: the data, or what the user names."""
        if self.options.reference:
            options: dict[str, Any] = {"batch": self.batch, "workers": self.options.workers, "report": self.report}
            return features.of_reference(self.options.reference, self.metric.network, **options)
        largest = max(self.count, MAX_REFERENCE) if self.planar else MAX_REFERENCE
        numbers = in_turn(self.data, range(min(len(self.data), largest)))
        if not has_images(self.data):
            raise UserError("these prompts have no pictures to compare with", hint="--reference a folder of pictures")
        depends = fingerprint(self.data), len(numbers)  # which images these are follows from how many
        return self._cached(lambda: features.of_data(self.data, numbers, self.extractor), "data", *depends)

    def teacher(self) -> FeatureSet:
        """The teacher's samples; they depend on the teacher, its solver, the pairs' seed, how many they are and, for
        their classes, on the data.
        """
        net, sha256 = teachers.load(self.run, self.recipe)
        seen = autoencoders.view(self.data, autoencoders.find(self.run.teacher))
        source = pairs.Pairs(self.run, self.recipe, seen, sha256)
        decode = autoencoders.decoder(self.run.teacher, self.device)
        depends = (
            *(sha256, self.recipe.teacher.solver.model_dump(), self.recipe.pairs.seed),
            *(fingerprint(self.data), self.count),
        )
        return self._cached(
            lambda: features.of_teacher(source, net.to(self.device), self.count, self.extractor, self.report, decode),
            *("teacher", *depends),
        )

    def students(self, students: sample.Students, only: Sequence[int] | None = None) -> FeatureSet:
        """The students' samples, of all classes or of those in `only`; number i is the same sample either way."""
        at = [i for i, c in enumerate(self.classes) if only is None or c in only]
        classes = [self.classes[i] for i in at]
        students.memory.say = self.report
        drawn: Drawn = students.stream(classes, seed=self.seed, batch=self.batch, numbers=at)
        if self.options.save:
            drawn = features.saving(
                drawn, classes, self.options.save, self.run.samples / f"measured-{self.metric.name}"
            )
        return features.of_students(drawn, classes, self.extractor, self.report, what="students' samples")

    def _cached(self, make: Callable[[], FeatureSet], *depends: Any) -> FeatureSet:
        folder = self.run.shared / f"features-{self.extractor.key(*depends)}"
        return features.cached(folder, make, self.report)


def measure(run: RunDir, report: Report, options: FidOptions | None = None) -> Measurement:
    """Measure a finished run and write metrics/NAME.json.

    Points are compared with the teacher's samples as the paper does, pictures with the data.
    """
    students = sample.load(run.root)  # are they all finished?
    context = EvaluationContext(run, options or FidOptions(), report)
    students.device = context.device
    real = context.real()  # what can be wrong comes first
    if context.groups and (isinstance(real, Gaussian) or not _has_classes(real)):
        raise UserError("--group: the reference does not tell classes apart", hint="leave it out: the data do")
    by_teacher = context.teacher()
    by_students = context.students(students)
    replicates = context.replicates(by_students.moments.dimension)
    against = by_teacher if context.planar else real
    prompts = (
        context.recipe.has_prompts
    )  # a prompt has too few pictures, and those of a user's reference are no prompts
    lines = MeasurementRows(
        *(context.metric, students.partition, replicates, context.options.infinity, context.groups),
        single=not prompts,
        whole_only=prompts and context.options.reference is not None,
    )
    rows = [
        *halves(context.metric, real),
        *lines.of("teacher", by_teacher, real),
        *lines.of("students", by_students, against),
    ]
    notes = {"replicates": replicates, "warnings": context.warnings + lines.warnings + _notes(context)[1]}
    record = _record(context, students, by_students) | notes
    result = Measurement(context.metric.name, context.metric.protocol, rows, record)
    write_json(run.metrics / f"{context.metric.name}.json", result.to_json())
    return result


def _record(context: EvaluationContext, students: sample.Students, measured: FeatureSet) -> dict[str, Any]:
    recipe, options = context.recipe, context.options
    return {
        "samples": context.count,
        "seed": recipe.evaluation.seed,
        # Of prompts, thousands as a rule, only how many they are.
        "prompts" if recipe.has_prompts else "labels": len(measured.moments.counts())
        if recipe.has_prompts
        else {str(label): count for label, count in measured.moments.counts().items()},
        "network": context.metric.network.record() | {"dimension": measured.moments.dimension},
        "teacher_sha256": records.model(context.run.teacher / MODEL).get("sha256"),
        "students_sha256": [records.trained(f / MODEL)["sha256"] for f in students.folders],
        "students_against": "teacher" if context.planar else options.reference or "data",
        "reference_sha256": _reference_hash(context),
        **_notes(context)[0],
        "solver": recipe.teacher.solver.model_dump(),
        "versions": {name: importlib.metadata.version(name) for name in ("msdcli", "torch")},
    } | context.metric.record


def _notes(context: EvaluationContext) -> tuple[dict[str, Any], list[str]]:
    """What is said of the statistics that a user named as the reference."""
    if context.options.reference is None:
        return {}, []
    return reference.notes(features.find_reference(context.options.reference), context.metric.network.protocol)


def _reference_hash(context: EvaluationContext) -> str:
    if context.options.reference is None:
        return fingerprint(context.data)
    return content_hash(features.find_reference(context.options.reference))


def check(run: RunDir, options: FidOptions) -> tuple[int, str]:
    """Check what can be checked without writing; return the number of samples and the protocol."""
    recipe = run.recipe()
    refuse_seed(options)
    sample.load(run.root)
    if options.protocol not in (None, "data"):
        open_network(str(options.protocol), weights=options.weights)
    if options.reference:
        path, protocol = features.find_reference(options.reference), options.protocol or "data"
        if reference.takes_statistics(path, protocol):
            reference.check_protocol(path, protocol)
    return options.samples or recipe.evaluation.samples, options.protocol or "data"


def refuse_seed(options: FidOptions) -> None:
    """Raise UserError where a seed is given for a run, whose recipe has one."""
    if options.seed is not None:
        raise UserError("--seed draws from the pictures of a file; a run's samples have the seed of its recipe")


def _has_classes(reference: FeatureSet) -> bool:
    return set(reference.moments.classes) != {-1}


class MeasurementRows:
    """The rows of a set of samples: whole, per student's part, per `single` class; or `whole_only`."""

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
    ) -> None:
        self.metric, self.partition, self.asked = metric, partition, asked or {}
        self.single, self.whole_only = single, whole_only
        self.replicates, self.extrapolate = replicates, extrapolate
        self.warnings: list[str] = []

    def of(self, who: str, mine: FeatureSet, against: Reference) -> Iterator[Row]:
        """Yield the rows; a reference that does not know the classes is compared with as a whole only."""
        yield self._row(who, "whole", mine, against, extrapolate=self.extrapolate)
        if self.whole_only or isinstance(against, Gaussian) or not _has_classes(against):
            return
        parts = self.partition.parts
        owned = {f"student {k}": part for k, part in enumerate(parts)} if len(parts) > 1 else {}
        classes = {f"class {c}": [c] for c in range(self.partition.num_conditions)} if self.single else {}
        for name, members in (owned | self.asked | classes).items():
            part, same = mine.select(members), against.select(members)
            if min(part.count, same.count) >= 2:  # fewer have no covariance: a small --samples leaves rare classes out
                yield self._row(who, name, part, same)

    def _row(self, who: str, group: str, mine: FeatureSet, against: Reference, *, extrapolate: bool = False) -> Row:
        replicates = self.replicates if mine.count >= FEWEST else 0
        values, intervals, warnings = self.metric.compare(mine, against, replicates, extrapolate)
        if group == "whole":
            self.warnings += [f"{who}: {warning}" for warning in warnings]
        return Row(who, group, mine.count, against.count, values, intervals)


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
