"""The order of work behind `msd distill`: teacher, partition, pairs, K students, samples, measurements.

Every step is skipped when its artifact is complete, so the same command resumes, and several processes or hosts can
run it on one directory at once: each takes the students that nobody else is at.
"""

from __future__ import annotations

import importlib.metadata
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from msdcli.data import open_data
from msdcli.data.base import Dataset
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.draws import Source
from msdcli.engine import dataset, device, estimate, fid, partition, sample, search, teacher, workers
from msdcli.engine.distill import Student, check_stage, distill_student, is_finished, new_network
from msdcli.engine.events import Report, silent
from msdcli.engine.pairs import Pairs
from msdcli.errors import UserError
from msdcli.partition import Partition
from msdcli.recipe import Recipe
from msdcli.rundir import RunDir, holder_of, lock, read_json, write_json


@dataclass(frozen=True)
class Outcome:
    """What `distill` did: the run, its measurement and picture (None where only some students were asked for), what
    is left.
    """

    run: RunDir
    measurement: fid.Measurement | None
    grid: Path | None
    unfinished: list[int]


def check(recipe: Recipe, *, planning: bool = False) -> Dataset:
    """Build everything once, small and without writing: UserError now is better than after an hour. Return the data.

    With `planning`, teacher and data that are not here yet are what the recipe says of them.
    """
    data = open_data(recipe.data, planning=planning)
    num_classes = len(data.class_names)
    partition.check(recipe.partition, num_classes)
    frozen, student = networks_on_meta(recipe, data, planning=planning)
    for stage in recipe.stages:
        check_stage(stage, student, frozen)
    device.resolve(recipe.device)
    if not hasattr(recipe.stages[-1], "sigma_init"):
        raise UserError(
            f"what stage {recipe.stages[-1].objective} makes is no one-step student", hint="add a stage: dm"
        )
    return data


def networks_on_meta(recipe: Recipe, data: Dataset, *, planning: bool = False) -> tuple[Denoiser, Denoiser]:
    """Build teacher and student without memory: shapes are checked and parameters can be counted."""
    frozen = teacher.on_meta(recipe, data, planning=planning)
    with torch.device("meta"):
        return frozen, new_network(recipe, frozen, 0)


def distill(recipe: Recipe, report: Report, *, student: int | None = None, worker: bool = False) -> Outcome:
    """Do all that is left of a run, or only one `student`; a `worker` trains free students and stops there.

    Raises UserError for what the user can fix, Interrupted (resumable) on Ctrl-C.
    """
    data = check(recipe)
    if student is not None and student >= recipe.partition.students:
        raise UserError(f"student {student} does not exist: there are 0 to {recipe.partition.students - 1}")
    run = RunDir(recipe.run_dir)
    if not worker:
        adopt(run, recipe, data, report)
    data = dataset.provide(run, recipe, silent if worker else report)
    on = device.prepare(recipe)
    frozen, teacher_hash = teacher.provide(run, recipe, data, on, silent if worker else report)
    bench = Bench(
        run,
        search.resolve(run, recipe, frozen, report),
        data,
        frozen,
        Pairs(run, recipe, data, teacher_hash),
        provide_partition(run, recipe, data, frozen),
        on,
    )

    everyone = range(recipe.partition.students)
    num_workers = 1 if worker or student is not None else device.num_workers(recipe, on)
    if num_workers > 1 and bench.unfinished(everyone):
        workers.run(run, num_workers, on, report)
    else:
        bench.train(everyone if student is None else [student], report, skip_held=student is None)
    left = bench.unfinished(everyone)
    if worker or student is not None:
        return Outcome(run, None, None, left)
    if left:
        names = ", ".join(f"student {k} ({holder_of(run.student(k)) or 'nobody is at it'})" for k in left)
        raise UserError(
            f"not all students are finished: {names}", hint=f"msd status {run.root}; the same command goes on"
        )
    return Outcome(run, fid.measure(run, report), preview(bench), [])


def adopt(run: RunDir, recipe: Recipe, data: Dataset, report: Report) -> None:
    """Claim the run directory for the recipe and note this command, its versions and the data in run.json."""
    run.check(recipe)  # before even a lock is written there
    with lock(run.root, "the run directory", wait=report):
        run.adopt(recipe)
        known: dict[str, Any] = read_json(run.record_file) if run.record_file.exists() else {"commands": []}
        known["commands"].append({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "line": sys.argv})
        known |= {
            "versions": {name: importlib.metadata.version(name) for name in ("msdcli", "torch")},
            "class_names": data.class_names,
            "shape": list(data.shape),
        }
        write_json(run.record_file, known)


def provide_partition(run: RunDir, recipe: Recipe, data: Dataset, frozen: Denoiser) -> Partition:
    """Return the run's partition, made once."""
    with lock(run.root, "the run directory", wait=lambda _: None):
        if not run.partition.exists():
            partition.make(recipe.partition, data, frozen).save(run.partition)
    return Partition.load(run.partition)


@dataclass(frozen=True)
class Bench:
    """Where students are trained: everything that they share."""

    run: RunDir
    recipe: Recipe
    data: Dataset
    teacher: Denoiser
    pairs: Pairs
    partition: Partition
    device: torch.device

    def folders(self, number: int) -> list[Path]:
        return [self.run.stage(number, i, stage.objective) for i, stage in enumerate(self.recipe.stages)]

    def unfinished(self, numbers: Sequence[int]) -> list[int]:
        stages = self.recipe.stages
        return [k for k in numbers if not all(map(is_finished, self.folders(k), stages))]

    def train(self, numbers: Sequence[int], report: Report, *, skip_held: bool) -> None:
        """Train the unfinished students among `numbers`, one after the other.

        A student that another process holds is left to it, or, without `skip_held`, refused with UserError.
        """
        for number in self.unfinished(numbers):
            if skip_held and holder_of(self.run.student(number)):
                continue
            with lock(self.run.student(number), f"student {number}"):
                if self.unfinished([number]):
                    distill_student(self._student(number, report), report)

    def _student(self, number: int, report: Report) -> Student:
        needs_pairs = any(getattr(stage, "pairs", "none") != "none" for stage in self.recipe.stages)
        pairs = self.pairs.provide(self.teacher, report) if needs_pairs else None
        source = Source(self.data, self.partition.parts[number], pairs=pairs, device=self.device)
        return Student(number, self.recipe, self.teacher, source, self.folders(number), self.device)


def preview(bench: Bench, *, rows: int = 32, columns: int = 16, points: int = 1000) -> Path:
    """Draw the teacher's and the students' samples of the first classes, one row a class, to samples/grid.png."""
    path, data = bench.run.samples / "grid.png", bench.data
    classes = list(range(len(data.class_names)))[:rows]
    planar = len(data.shape) == 1
    per_class = points if planar else columns
    asked = [c for c in classes for _ in range(per_class)]
    mine = sample.load(bench.run.root, bench.device).sample(asked).split(per_class)
    theirs = bench.pairs.examples(bench.teacher, classes, per_class if planar else columns // 2)
    sample.save_grid(path, mine, beside=theirs, class_names=[data.class_names[c] for c in classes])
    return path


def plan(recipe: Recipe) -> list[str]:
    """Return what `distill` would do and cost, line by line, after checking all of it; nothing is written.

    Neither weights nor data need to be here: the networks have no memory, and what is missing is listed.
    """
    data = check(recipe, planning=True)
    run = RunDir(recipe.run_dir)
    if run.recipe_file.exists():
        run.check(recipe)
    num = recipe.partition.students
    frozen, student = networks_on_meta(recipe, data, planning=True)
    sizes = estimate.count(frozen), estimate.count(student)
    steps = " -> ".join(f"{stage.objective} ({stage.steps} steps of {stage.batch})" for stage in recipe.stages)
    return [
        f"data:      {recipe.data.name}, {len(data):,} images of {list(data.shape)} in {len(data.class_names)} classes",
        f"teacher:   {recipe.teacher.path or 'trained or reused'}, {sizes[0]:,} parameters",
        f"partition: {recipe.partition.method}, {num} students",
        f"students:  {sizes[1]:,} parameters each; {steps}",
        *estimate.lines(estimate.estimate(recipe, data, frozen, student)),
        f"run:       {run.root}{' (exists: would resume)' if run.recipe_file.exists() else ''}",
        *missing(recipe),
    ]


def missing(recipe: Recipe) -> list[str]:
    """Return a line for everything that must be fetched before the run can start."""
    sections = [("teacher", recipe.teacher), ("data", recipe.data)]
    wanted = [(what, getattr(s, "path", None), getattr(s, "source", None)) for what, s in sections]
    return [
        f"missing:   {what} {path}: put it there, from {source or 'wherever it is (the recipe names no source)'}"
        for what, path, source in wanted
        if path is not None and not Path(path).exists()
    ]
