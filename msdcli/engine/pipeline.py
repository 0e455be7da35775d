"""The order of work behind `msd distill`: teacher, partition, pairs, K students, samples, measurements.

Every step is skipped when its artifact is complete, so the same command resumes, and several processes or hosts can
run it on one directory at once: each takes the students that nobody else is at.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from msdcli.data.base import FINGERPRINT, Dataset, has_images
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.device_batch import release
from msdcli.diffusion.draws import Source
from msdcli.engine import pictures, sample, search
from msdcli.engine.checkpoints import disk
from msdcli.engine.claim import Claim
from msdcli.engine.distributed import device, workers
from msdcli.engine.distributed import group as distributed
from msdcli.engine.distributed.group import SINGLE_PROCESS, ProcessGroup
from msdcli.engine.distributed.interrupt import preemptible
from msdcli.engine.inputs import autoencoder, dataset, latents, stitches, teacher, teacher_stages
from msdcli.engine.inputs.pairs import Pairs, worth_a_look
from msdcli.engine.measure import ahead, fid
from msdcli.engine.measure import part_evaluator as examine
from msdcli.engine.measure import teacher as teacher_alone
from msdcli.engine.measure.rows import Measurement
from msdcli.engine.measure.teacher import Verdict
from msdcli.engine.partitioning import keeping
from msdcli.engine.partitioning import making as partition
from msdcli.engine.results import DistillResult, TeachResult
from msdcli.engine.tracking.events import Report, silent
from msdcli.engine.tracking.formatting import evaluations
from msdcli.engine.tracking.loggers import logged
from msdcli.engine.train import compiling, precision
from msdcli.engine.train.student import Student, check_stages, distill_student, is_finished, new_network
from msdcli.errors import CONTINUES, WHOLE, ElsewhereUnfinishedError, LockedError, UserError, WrongValueError, resumable
from msdcli.nets.meta import on_meta
from msdcli.partition import Partition
from msdcli.recipe import Recipe
from msdcli.recipe.stages import GeneratorSettings, StageSettings
from msdcli.rundir import RunDir, begun_otherwise, holder_of, lock


def check(recipe: Recipe, *, planning: bool = False, group: ProcessGroup = SINGLE_PROCESS) -> Dataset:
    """Build everything once, small and without writing: UserError now is better than after an hour. Return the data.

    With `planning`, teacher and data that are not here yet are what the recipe says of them.
    """
    data = dataset.look(recipe, planning=planning)
    partition.check(recipe.partition, data.class_names, prompts=recipe.has_prompts)
    partition.check_classes(recipe, data)
    partition.check_parts(recipe, data)
    none = not has_images(data) and not (planning and recipe.has_prompts)
    if needing := [s.objective for s in recipe.stages if s.needs_images and none]:
        alone = "these prompts are alone" if recipe.has_prompts else "the recipe names no data"
        raise UserError(
            f"stage {needing[0]} needs real images, and {alone}",
            hint="data.images names a folder of pictures, data.image_column where the rows name theirs"
            if recipe.has_prompts
            else "data: {name: folder, path: ...}",
        )
    if none and any(recipe.student.of(numbers[0]).prune for numbers in recipe.sizes):
        raise UserError("student.prune weighs every block by real images, and there are none", hint="leave it out")
    of_teacher = [*([] if recipe.teacher.path else [recipe.teacher.training]), *recipe.teacher.stages]
    every = [*of_teacher, *recipe.stages]
    if not RunDir(recipe.run_dir).begun():
        _check_anew([of_teacher, recipe.stages])
    examine.check(recipe, data, group, planning=planning)
    frozen, students = networks_on_meta(recipe, data, planning=planning)
    stitches.on_meta(recipe, frozen)
    teacher.check_fake_guidance(recipe, frozen)
    if recipe.data.mirrors and frozen.shape != tuple(data.shape):
        raise UserError(
            "data.mirror: the teacher works on latents, and a mirrored picture's are not the picture's mirrored",
            hint="data.mirror=false; or mirror the files",
        )
    partition.check_forgetting(recipe, data)
    teacher_stages.check(recipe, data, frozen.shape)
    with on_meta():
        objectives = [check_stages(recipe.stages, net, frozen) for net in students]
    for stage in every:
        distributed.slices(stage.batch, getattr(stage, "pair_batch", None), group, recipe.micro_batch)
    if not isinstance(recipe.stages[-1], GeneratorSettings):
        raise UserError(
            f"stage {recipe.stages[-1].objective}, the last, makes no student that gives images", hint="add a stage: dm"
        )
    if not planning:
        run, on = RunDir(recipe.run_dir), device.resolve(recipe.device)
        disk.check(run, disk.needed(run, recipe, objectives, device.num_workers(recipe, on)))
    return data


def _check_anew(trainings: Sequence[Sequence[StageSettings]]) -> None:
    """Raise UserError for what no run is to begin with, though some were."""
    for stages in trainings:
        for before, stage in zip([None, *stages], stages, strict=False):
            try:
                stage.check_anew(before)
            except ValueError as error:
                raise UserError(f"stage {stage.objective}: {error}") from None


def networks_on_meta(recipe: Recipe, data: Dataset, *, planning: bool = False) -> tuple[Denoiser, list[Denoiser]]:
    """Build the teacher, and a student of each of the recipe's `sizes`, without memory: shapes are checked."""
    frozen = teacher.on_meta(recipe, data, planning=planning)
    with on_meta():
        return frozen, [new_network(recipe, frozen, numbers[0]) for numbers in recipe.sizes]


@logged
def distill(
    recipe: Recipe,
    report: Report,
    *,
    student: int | None = None,
    worker: bool = False,
    group: ProcessGroup = SINGLE_PROCESS,
) -> DistillResult:
    """Do all that is left of a run, or only one `student`; a `worker` trains free students and stops there.

    The processes of a `group` train every network together; what is not training its leader does. Raises UserError for
    what the user can fix, Interrupted (resumable) on Ctrl-C, Preempted (likewise) on SIGTERM and SIGUSR1.
    """
    if not group.is_leader:
        report = silent
    with preemptible(), resumable(CONTINUES), contextlib.ExitStack() as stack:
        training = prepare(recipe, report, stack, student=student, worker=worker, group=group)
        everyone = range(recipe.partition.students)
        if group.is_leader and not worker:
            judge(training, report)
        group.broadcast(None)
        told = silent if worker else report  # once the teacher is fit: a run that has students has begun
        group.leader_first(lambda: keeping.keep(training.run, recipe, training.partition, training.teacher, told))
        alone = worker or student is not None or group.size > 1
        num_workers = 1 if alone else device.num_workers(recipe, training.device)
        if num_workers > 1 and training.unfinished(everyone):
            threads = device.share_of_threads(recipe, training.device, num_workers)
            training.leave_device()
            with resumable(WHOLE):
                workers.run(training.run, num_workers, training.device, report, threads=threads)
        else:
            training.train(everyone if student is None else [student], report, skip_held=student is None)
            if worker:
                ahead.of_teacher(training.run, recipe, len(training.unfinished(everyone)), report)
        done = DistillResult(training.run, None, None, group.broadcast(training.unfinished(everyone)))
        if worker or student is not None:
            return done
        return group.broadcast(finish(training, done.unfinished, report) if group.is_leader else done)


def teach(recipe: Recipe, report: Report) -> TeachResult:
    """Train the teacher alone, or take the one that is there; draw samples of it and measure it."""
    if not recipe.has_measure:
        raise UserError(
            "the teacher of this recipe cannot be measured alone: there are no real images",
            hint="msd sample draws what students make, msd fid RUN PICTURES --protocol clean measures it",
        )
    with preemptible(), resumable(CONTINUES), contextlib.ExitStack() as stack:
        training = prepare(recipe, report, stack, student=None, worker=False, group=SINGLE_PROCESS, students=False)
        measured, found = _teacher_measured(training, report, brief=False)
        return TeachResult(training.run, measured, found, preview_of_teacher(training))


def judge(training: TrainingRun, report: Report) -> None:
    """Measure the teacher, trained or given, before the first student starts: its samples are compared with when the
    run ends anyway. UserError where it is plainly unfit and the recipe does not go on with it. Of several processes one
    measures, and the others read what it found.
    """
    recipe, run = training.recipe, training.run
    wanted = recipe.evaluation.judge != "off" and recipe.has_measure
    if not wanted or run.begun():
        return
    with lock(run.metrics / teacher_alone.FOLDER, "the teacher's measurement", wait=report):
        found = teacher_alone.judged(run)
        if found is None:
            _, found = _teacher_measured(training, report, brief=True)
            if found.state != "fit":
                preview_of_teacher(training)
    if found.state == "unfit" and recipe.evaluation.judge == "stop":
        raise teacher_alone.refusal(found, recipe.teacher, run)
    report(found.said)


def _teacher_measured(training: TrainingRun, report: Report, *, brief: bool) -> tuple[Measurement, Verdict]:
    """Measure the teacher; pairs that students need are made first, and measured."""
    recipe = training.recipe
    samples = teacher_alone.enough(recipe) if brief else recipe.evaluation.samples
    if recipe.needs_pairs:
        training.pairs.prepare(training.teacher, samples, report)
    return teacher_alone.measure(training.run, report, samples=samples, brief=brief)


def prepare(
    recipe: Recipe,
    report: Report,
    stack: contextlib.ExitStack,
    *,
    student: int | None,
    worker: bool,
    group: ProcessGroup,
    students: bool = True,
) -> TrainingRun:
    """Check everything, claim the run directory and provide what `students` are trained with.

    This process counts as at work on the run until the `stack` is closed. What fails before the directory is claimed
    leaves it free.
    """
    check(recipe, group=group)
    if student is not None and not 0 <= student < recipe.partition.students:
        raise WrongValueError(f"student {student} does not exist: there are 0 to {recipe.partition.students - 1}")
    run, claim = RunDir(recipe.run_dir), None
    run.check(recipe)
    told = silent if worker else report
    data = group.leader_first(lambda: dataset.provide(run, recipe, told))
    partition.check_parts(recipe, data)  # again: pictures may have been left out
    if not worker and group.is_leader:
        same = dataset.is_as_begun(run, data)
        claim = Claim.begin(run, recipe, data, report, stack, student=student, same_data=same)
    group.broadcast(None)
    if not dataset.is_as_begun(run, data):  # before an hour of training with them
        raise begun_otherwise(run, "data")
    on = device.prepare(recipe, shared=group.size > 1)
    meanwhile = ahead.beside_teacher(run, recipe, data, on, group)
    alone = (lambda: False) if claim is None else claim.presence.alone
    frozen, teacher_hash = teacher.provide(run, recipe, data, on, told, group=group, meanwhile=meanwhile, alone=alone)
    seen = latents.provide(run, recipe, data, run.teacher, on, told, always=False)
    if claim is not None:
        version = dataset.version_of(run)
        theirs = teacher_hash if version == FINGERPRINT else teacher.hash_of_version_1(run, recipe)
        claim.settle({"data": dataset.fingerprint_for(run, data), "teacher": theirs}, version)
    resolved = recipe
    if students:
        resolved = group.leader_first(lambda: search.resolve(run, recipe, frozen, report, seen))
        resolved = group.leader_first(lambda: precision.resolve(run, resolved, frozen, on, report))
    parts = group.leader_first(lambda: partition.provide(run, recipe, data, frozen, on, told))
    return TrainingRun(run, resolved, seen, frozen, Pairs(run, recipe, seen, teacher_hash), parts, on, group)


def finish(training: TrainingRun, left: list[int], report: Report) -> DistillResult:
    """Measure a run whose students are all finished, unless nothing has changed since it was. UserError naming those
    that are not, which is no fault where others are at work on all of them.
    """
    holders = {k: holder_of(training.run.student(k)) for k in left}
    if left := training.unfinished(left):
        names = ", ".join(f"student {k} ({holders[k] or 'nobody is at it'})" for k in left)
        if all(holders[k] for k in left):
            raise ElsewhereUnfinishedError(
                f"nothing is left to do here: others go on with {names}, and the last `msd distill` without --student "
                "measures the run",
                hint=f"msd status {training.run.root}; where none of them is one, the same command measures it then",
            )
        raise UserError(
            f"not all students are finished: {names}", hint=f"msd status {training.run.root}; the same command goes on"
        )
    measured = None if not training.recipe.has_measure else fid.measure(training.run, report, anew=False)
    return DistillResult(training.run, measured, preview(training), [])


@dataclass(frozen=True)
class TrainingRun:
    """Where students are trained: everything that they share; the data are as the teacher sees them."""

    run: RunDir
    recipe: Recipe
    data: Dataset
    teacher: Denoiser
    pairs: Pairs
    partition: Partition
    device: torch.device
    group: ProcessGroup

    def folders(self, number: int) -> list[Path]:
        return [self.run.stage(number, i, stage.objective) for i, stage in enumerate(self.recipe.stages)]

    def unfinished(self, numbers: Sequence[int]) -> list[int]:
        stages = self.recipe.stages
        return [k for k in numbers if not all(map(is_finished, self.folders(k), stages))]

    def train(self, numbers: Sequence[int], report: Report, *, skip_held: bool) -> None:
        """Train the unfinished students among `numbers`, one after the other.

        A student that another process holds is left to it, or, without `skip_held`, refused with UserError.
        """
        for number in self.group.broadcast(self.unfinished(numbers)):
            with contextlib.ExitStack() as held:
                mine = self._hold(number, held, skip_held=skip_held) if self.group.is_leader else None
                if self.group.broadcast(mine) and self.group.broadcast(self.unfinished([number])):
                    distill_student(self._student(number, report), report)

    def _hold(self, number: int, held: contextlib.ExitStack, *, skip_held: bool) -> bool:
        """Hold a student until the stack is closed; False where another process does and that is fine."""
        folder = self.run.student(number)
        if skip_held and holder_of(folder) is not None:
            return False
        try:
            held.enter_context(lock(folder, f"student {number}"))
        except LockedError:  # both have found it free, and the other was there first
            if not skip_held:
                raise
            return False
        return True

    def leave_device(self) -> None:
        """Hold no network on the device, for others are about to train there."""
        self.teacher.to("cpu")
        if self.teacher.prompts is not None:
            self.teacher.prompts.leave_devices()
        self.pairs.forget_networks()
        compiling.forget()
        gc.collect()  # what trained the teacher refers to itself
        release()

    def _student(self, number: int, report: Report) -> Student:
        pairs = self.pairs.provide(self.teacher.to(self.device), report) if self.recipe.needs_pairs else None
        if self.recipe.fsdp and self.group.size > 1:
            self.teacher.to("cpu")  # the stages share out copies of it
        part = self.partition.parts[number]
        source = Source(self.data, part, pairs=pairs, mirror=self.recipe.data.mirrors, device=self.device)

        def evaluator(stage: GeneratorSettings) -> examine.PartEvaluator:
            return examine.PartEvaluator(self.run, self.recipe, stage, part, self.device, self.group, report)

        folders = self.folders(number)
        return Student(number, self.recipe, self.teacher, source, folders, self.device, self.group, evaluator)


def preview(training: TrainingRun, *, rows: int = 32, columns: int = 16, points: int = 1000) -> Path:
    """Draw the teacher's and the students' samples of the first classes, one row a class, to samples/grid.png."""
    path, data = training.run.samples / "grid.png", training.data
    classes = list(range(len(data.class_names)))[:rows]
    if training.recipe.has_prompts:  # a few of every student
        rows, columns = 16, 8
        each = max(1, rows // len(training.partition.parts))
        classes = [c for part in training.partition.parts for c in part[:each]][:rows]
    planar = len(data.shape) == 1
    per_class = points if planar else columns
    asked = [c for c in classes for _ in range(per_class)]
    mine = sample.load(training.run.root, training.device).sample(asked).split(per_class)
    theirs = _of_teacher(training, classes, per_class if planar else columns // 2)
    if theirs is not None:
        decode = autoencoder.decoder(training.run.teacher, training.device)
        theirs = [decode(y).cpu() for y in theirs]
    owners = [training.partition.owner[c] for c in classes]
    pictures.save_grid(
        path,
        mine,
        beside=theirs,
        class_names=[data.class_names[c] for c in classes],
        captions=pictures.captions(training.recipe),
        owners=owners if len(training.partition.parts) > 1 else None,
    )
    return path


def _of_teacher(training: TrainingRun, classes: list[int], count: int) -> list[torch.Tensor] | None:
    """Return samples of the teacher to stand beside the students': pairs, or fewer new ones. None: they take long."""
    teacher, solver = training.teacher.to(training.device), training.recipe.teacher.solver
    kept = training.pairs.examples(teacher, classes, count)
    fewer = max(1, count // 2)
    if kept is None and worth_a_look(teacher, solver.evaluations, len(classes) * fewer):
        return training.pairs.draw(teacher, classes, fewer)
    return kept


def preview_of_teacher(training: TrainingRun, *, rows: int = 32, columns: int = 16, points: int = 1000) -> Path:
    """Draw samples of the teacher alone, of the first classes, one row a class, to samples/teacher.png."""
    path, data = training.run.samples / "teacher.png", training.data
    classes = list(range(len(data.class_names)))[:rows]
    per_class = points if len(data.shape) == 1 else columns
    drawn = training.pairs.examples(training.teacher, classes, per_class)
    if drawn is None:  # no pairs, which are pictures of it too
        drawn = training.pairs.draw(training.teacher, classes, per_class // 2)
    decode = autoencoder.decoder(training.run.teacher, training.device)
    pictures.save_grid(
        path,
        [decode(y).cpu() for y in drawn],
        class_names=[data.class_names[c] for c in classes],
        captions=("", f"teacher, {evaluations(training.recipe.teacher.solver.evaluations)} each"),
    )
    return path
