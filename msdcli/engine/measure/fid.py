"""Measure a run: the teacher and the students against the data, whole, per student and per class."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from msdcli import records
from msdcli.data.base import fingerprint, has_images, in_turn
from msdcli.data.opening import content_hash
from msdcli.diffusion import float32
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.device_batch import DeviceBatch
from msdcli.engine import sample
from msdcli.engine.checkpoints.model import MODEL
from msdcli.engine.distributed import device
from msdcli.engine.inputs import autoencoder as autoencoders
from msdcli.engine.inputs import dataset, pairs
from msdcli.engine.inputs import teacher as teachers
from msdcli.engine.measure import features, groups
from msdcli.engine.measure.feature_metric import FidOptions, Reference, metric_of
from msdcli.engine.measure.rows import CHEAP, Measurement, MeasurementRows, Row, halves, has_classes
from msdcli.engine.measure.solver_error import solver_error
from msdcli.engine.pictures import Drawn
from msdcli.engine.tracking.events import Report
from msdcli.errors import UserError
from msdcli.foreign import versions
from msdcli.metrics import reference
from msdcli.metrics.evaluate import FeatureSet
from msdcli.metrics.inception import open_network
from msdcli.metrics.moments import Gaussian
from msdcli.partition import Partition
from msdcli.rundir import RunDir, file_hash, key, write_json
from msdcli.seeds import derive

FORMAT = 1  # of measurements: another number where the code finds other figures for the same features
MAX_REFERENCE = 50_000
REPLICATES = 100  # of the bootstrap where no number is asked for and features have at most
HELD_OUT = "held-out data"
RowsAndWarnings = tuple[list[Row], list[str]]
CHANGED = "The data have changed since the run was begun: the students were made from others."


# A run, its networks and its samples.


class EvaluationContext:
    """A run under one network: what measuring it once and watching it have in common."""

    def __init__(self, run: RunDir, options: FidOptions, report: Report, *, choosing: bool = False) -> None:
        """`choosing`: what is measured decides something of the students, which held-out images must not."""
        refuse_seed(options)
        self.run, self.options, self.report = run, options, report
        self.recipe = run.recipe()
        self.device = device.prepare(self.recipe) if options.device is None else device.resolve(options.device)
        self.data, held_out = dataset.provide_parts(run, self.recipe, report)
        self.reference = self.data if choosing else held_out
        self.warnings = [] if dataset.is_as_begun(run, self.data) else [CHANGED]
        self.planar = len(self.data.shape) == 1
        names = self.data.class_names
        self.groups = groups.parse(options.groups, range(len(names)), names)
        self.count = options.samples or self.recipe.evaluation.samples
        self.batch = options.batch or self.recipe.evaluation.batch
        if self.planar and (options.lean or options.save):
            raise UserError("points are no pictures: they cannot be saved, and are measured one by one")
        self.metric = metric_of(run, self.recipe, self.data, options, self.device, report)
        if self.against_held_out:
            said = f"{self.metric.protocol}, against {len(self.reference):,} images held out of training"
            self.metric = replace(self.metric, protocol=said)
        self.warnings += self.metric.warnings
        memory = DeviceBatch(report)
        self.extractor = features.FeatureExtractor(
            self.metric.network, self.batch, keep=not options.lean, memory=memory
        )
        # Number i has the class of image i, so classes are as frequent as in the data.
        self.classes: list[int] = pairs.labels_for(self.data, range(self.count)).tolist()
        # A seed of its own, never the noise of the pairs that the students were trained on.
        self.seed = derive("evaluation", self.recipe.evaluation.seed)

    @property
    def against_held_out(self) -> bool:
        """Whether samples are compared with images that nothing was trained on."""
        return self.reference is not self.data and self.options.reference is None

    def replicates(self, dimension: int) -> int:
        if self.options.bootstrap is not None:
            return self.options.bootstrap
        return REPLICATES if dimension <= CHEAP and not self.options.lean else 0

    def real(self) -> Reference:
        """The reference: the data, or what of them is held out of training, or what the user names."""
        if self.options.reference:
            options: dict[str, Any] = {"batch": self.batch, "workers": self.options.workers, "report": self.report}
            return features.of_reference(self.options.reference, self.metric.network, **options)
        largest = max(self.count, MAX_REFERENCE) if self.planar else MAX_REFERENCE
        numbers = in_turn(self.reference, range(min(len(self.reference), largest)))
        if not has_images(self.data):
            raise UserError("there are no pictures to compare with", hint=f"msd fid {self.run.root} PICTURES")
        depends = fingerprint(self.reference), len(numbers)  # which images these are follows from how many
        return self._cached(lambda: features.of_data(self.reference, numbers, self.extractor), "data", *depends)

    def halves(self, real: Reference) -> list[Row]:
        """The row of two halves of the real data: the same for every run with these data, so it is kept for others."""
        return self._kept("halves", lambda: (halves(self.metric, real), []), real)[0]

    def lines(self, partition: Partition, dimension: int) -> MeasurementRows:
        """What makes the lines of teacher and students, whose features have so many numbers."""
        prompts = self.recipe.has_prompts  # one has too few pictures, and those of a user's reference are no prompts
        return MeasurementRows(
            *(self.metric, partition, self.replicates(dimension), self.options.infinity, self.groups),
            single=not prompts,
            whole_only=prompts and self.options.reference is not None,
            every_class=self.options.per_class,
            report=self.report,
        )

    def of_teacher(self, lines: MeasurementRows, mine: FeatureSet, real: Reference) -> list[Row]:
        """The teacher's rows, kept for other runs with this teacher, these data and this partition."""

        def made() -> tuple[list[Row], list[str]]:
            whole, *others = lines.of("teacher", mine, real)
            values = whole.values | self._solver_error()
            return [replace(whole, values=values), *others], lines.warnings

        depends = *lines.deciding(), self.recipe.evaluation.solver_error
        rows, warnings = self._kept("rows_of_teacher", made, real, *self._of_teacher, *depends)
        lines.warnings = list(warnings)
        return rows

    def _kept(self, name: str, make: Callable[[], RowsAndWarnings], real: Reference, *depends: Any) -> RowsAndWarnings:
        """Read rows that were measured against these real images, or make them and keep them."""
        if self.options.reference or self.options.lean:
            return make()
        by = [FORMAT, self.metric.name, self.metric.record, fingerprint(self.reference), real.count, *depends]
        decided_by = self.extractor.key(*by, versions("msdcli", "torch", "numpy"))
        path = self.run.shared / f"{name}-{decided_by}.json"
        if (known := _known(path, decided_by)) is not None:
            return known.rows, known.record.get("warnings", [])
        rows, warnings = make()
        record = {"samples": real.count, "warnings": warnings, "decided_by": decided_by}
        write_json(path, Measurement(self.metric.name, self.metric.protocol, rows, record).to_json())
        return rows, warnings

    def teacher(self) -> FeatureSet:
        """The teacher's samples; they depend on the teacher, its solver, the pairs' seed, how many they are and, for
        their classes, on the data.
        """
        source, net = self._source()
        decode = autoencoders.decoder(self.run.teacher, self.device)
        return self._cached(
            lambda: features.of_teacher(source, net, self.count, self.extractor, self.report, decode),
            *("teacher", *self._of_teacher),
        )

    def _solver_error(self) -> dict[str, float]:
        """The error of the teacher's solver, where the recipe asks for it."""
        count = self.recipe.evaluation.solver_error
        return {} if count is None else {"solver_rms": solver_error(*self._source(), count)}

    def _source(self) -> tuple[pairs.Pairs, Denoiser]:
        """What makes the teacher's samples, and the teacher."""
        net, self._teacher_sha256 = teachers.load(self.run, self.recipe)
        seen = autoencoders.view(self.data, autoencoders.find(self.run.teacher))
        return pairs.Pairs(self.run, self.recipe, seen, self._teacher_sha256), net.to(self.device)

    @functools.cached_property
    def _teacher_sha256(self) -> str:
        """The teacher's hash, which whoever has loaded it knows."""
        return teachers.load(self.run, self.recipe)[1]

    @property
    def _of_teacher(self) -> tuple[object, ...]:
        """All that the teacher's samples depend on."""
        recipe = self.recipe
        by = recipe.teacher.solver.record(), recipe.pairs.seed, fingerprint(self.data), self.count
        return self._teacher_sha256, *by

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
        return features.cached(folder, make, self.report, of=str(depends[0]))


def measure(run: RunDir, report: Report, options: FidOptions | None = None, *, anew: bool = True) -> Measurement:
    """Measure a finished run and write metrics/NAME.json; unless `anew`, take what is there if nothing has changed.

    Points are compared with the teacher's samples as the paper does, pictures with the data.
    """
    students = sample.load(run.root)  # are they all finished?
    context = EvaluationContext(run, options or FidOptions(), report)
    students.device = context.device
    path, decided_by = run.metrics / f"{context.metric.name}.json", _decided_by(context, students)
    if not anew and (known := _known(path, decided_by)) is not None:
        report(f"nothing has changed since it was measured ({path}); msd fid {run.root} measures it again")
        return known
    real = context.real()  # what can be wrong comes first
    if context.groups and (isinstance(real, Gaussian) or not has_classes(real)):
        raise UserError("groups: the reference does not tell classes apart", hint="leave it out: the data do")
    by_teacher = context.teacher()
    by_students = context.students(students)
    against = by_teacher if context.planar else real
    lines = context.lines(students.partition, by_students.moments.dimension)
    rows = [
        *context.halves(real),
        *context.of_teacher(lines, by_teacher, real),
        *lines.of("students", by_students, against),
    ]
    said, more = _notes(context)
    warnings = context.warnings + lines.warnings + more
    record = _record(context, students, by_students, said)
    record |= {"replicates": lines.replicates, "warnings": warnings, "decided_by": decided_by}
    result = Measurement(context.metric.name, context.metric.protocol, rows, record)
    write_json(path, result.to_json())
    return result


def prepare_teacher(run: RunDir, report: Report) -> None:
    """Draw and measure the teacher as `measure` would, before the students are finished: what it finds is kept."""
    context = EvaluationContext(run, FidOptions(), report)
    real, mine = context.real(), context.teacher()
    context.of_teacher(context.lines(Partition.load(run.partition), mine.moments.dimension), mine, real)


def _decided_by(context: EvaluationContext, students: sample.Students) -> str:
    """Name all that a run's figures depend on, but for last bits (how many images are drawn at once)."""
    run, recipe = context.run, context.recipe
    by = [context.metric.name, context.metric.network.record(), context.metric.record, _reference_hash(context)]
    teacher = [records.run(run.record_file).get("teacher"), recipe.teacher.solver.record(), recipe.pairs.seed]
    drawn = [fingerprint(context.data), context.count, recipe.evaluation.seed, recipe.evaluation.solver_error]
    made = [file_hash(run.partition), *(file_hash(folder / MODEL) for folder in students.folders)]
    with_ = [FORMAT, features.FORMAT, float32.record(context.device), versions("msdcli", "torch", "numpy")]
    return key("measured", context.options.deciding(), by, teacher, drawn, made, with_)


def _known(path: Path, decided_by: str) -> Measurement | None:
    """Return the measurement in a file, unless it is of something else, or damaged."""
    with contextlib.suppress(UserError):
        if path.is_file() and (told := records.measurement(path)).get("decided_by") == decided_by:
            return Measurement.of_json(told)
    return None


def _record(
    context: EvaluationContext, students: sample.Students, measured: FeatureSet, notes: dict[str, Any]
) -> dict[str, Any]:
    recipe = context.recipe
    return {
        "samples": context.count,
        "seed": recipe.evaluation.seed,
        "class_names": [] if recipe.has_prompts else list(context.data.class_names),
        # Of prompts, thousands as a rule, only how many they are.
        "prompts" if recipe.has_prompts else "labels": len(measured.moments.counts())
        if recipe.has_prompts
        else {str(label): count for label, count in measured.moments.counts().items()},
        "network": context.metric.network.record() | {"dimension": measured.moments.dimension},
        "teacher_sha256": records.model(context.run.teacher / MODEL).get("sha256"),
        "students_sha256": [records.trained(f / MODEL)["sha256"] for f in students.folders],
        "students_against": _against(context),
        "reference_sha256": _reference_hash(context),
        **notes,
        "solver": recipe.teacher.solver.record() | {"evaluations": recipe.teacher.solver.evaluations},
        "computed_in": float32.record(context.device),
        "versions": versions("msdcli", "torch"),
    } | context.metric.record


def _against(context: EvaluationContext) -> str:
    if context.planar:
        return "teacher"
    return context.options.reference or (HELD_OUT if context.against_held_out else "data")


def _notes(context: EvaluationContext) -> tuple[dict[str, Any], list[str]]:
    """What is said of the statistics that a user named as the reference."""
    if context.options.reference is None:
        return {}, []
    return reference.notes(features.find_reference(context.options.reference), context.metric.network.protocol)


def _reference_hash(context: EvaluationContext) -> str:
    if context.options.reference is None:
        return fingerprint(context.reference)
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
