"""Students of a finished run that another run keeps as they are: it gains a class, or a better student, and no other
student is trained again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msdcli import records
from msdcli.diffusion.denoiser import Denoiser
from msdcli.engine import sample
from msdcli.engine.checkpoints.model import MODEL, WEIGHTS
from msdcli.engine.inputs import autoencoder as autoencoders
from msdcli.engine.tracking.events import Report
from msdcli.engine.train.student import NO_COST, is_finished
from msdcli.errors import MissingFileError, UserError
from msdcli.partition import Partition, sizes
from msdcli.recipe import PartitionSettings, Recipe
from msdcli.rundir import RunDir, file_hash, lock, write_json, writing

KEPT = "kept"


def extended(settings: PartitionSettings, class_names: Sequence[str]) -> Partition:
    """Return the parts of the run that is extended, and behind them those of the classes that it does not have.

    UserError where that run is not finished, its classes have other numbers here, or nothing would be left to train.
    """
    run = RunDir(Path(str(settings.run)))
    if not run.recipe_file.is_file():
        raise MissingFileError(f"partition.run: no run at {settings.run}")
    before = sample.load(run.root)  # all of its students are finished
    if before.prompt_router is not None:
        raise UserError(f"partition.run: the students of {settings.run} read prompts, whose partition has a rule")
    names = before.class_names
    if list(class_names[: len(names)]) != names:
        raise UserError(
            f"partition.run: {settings.run} has {len(names):,} classes, {', '.join(names[:8])} ..., and here the first "
            f"{len(names):,} are {', '.join(class_names[: len(names)][:8])} ...: students know classes by their number",
            hint="new classes come behind the old ones: name their folders so, or give the labels in a file",
        )
    parts, new = before.partition.parts, [*range(len(names), len(class_names))]
    parts = [*parts, *_parts_of_new(settings, len(parts), new)]
    again = set(settings.retrain)
    if unknown := sorted(again - {*range(len(before.partition.parts))}):
        raise UserError(f"partition.retrain: {settings.run} has no student {unknown[0]}")
    old = ("retrained" if k in again else KEPT for k in range(len(before.partition.parts)))
    origins = [*old, *["new"] * (len(parts) - len(before.partition.parts))]
    if KEPT not in origins:
        raise UserError("partition.retrain names every student: nothing is kept", hint="a run without partition.run")
    return Partition(parts, len(class_names), "extend", evidence={"origins": origins})


def _parts_of_new(settings: PartitionSettings, before: int, new: list[int]) -> list[list[int]]:
    """The parts of the new classes, as numbered. UserError where students and classes do not go together."""
    more = settings.students - before
    if more < 0 or (new and more == 0):
        raise UserError(
            f"partition.students {settings.students}: {settings.run} has {before} students"
            + (f", and {len(new):,} new classes need one of their own" if new and more >= 0 else ""),
            hint=f"partition.students={before + bool(new)}",
        )
    if more and not new:
        raise UserError(
            f"partition.students {settings.students}: {settings.run} has {before} students, and there is no class that "
            "they do not have",
            hint=f"partition.students={before}, with partition.retrain=[...]",
        )
    if not new and not settings.retrain:
        raise UserError(
            f"{settings.run} has every class, and no student is to be trained again: nothing is left to do",
            hint="partition.retrain=[0] makes another student 0",
        )
    found, start = list[list[int]](), 0
    for size in sizes(len(new), more) if more else []:
        found.append(new[start : start + size])
        start += size
    return found


def check_steps(recipe: Recipe) -> None:
    """Raise UserError where kept students take another number of evaluations than the new ones will."""
    last, before = recipe.stages[-1], RunDir(Path(str(recipe.partition.run))).recipe().stages[-1]
    if last.evaluations != before.evaluations:
        raise UserError(
            f"the students of {recipe.partition.run} are evaluated {before.evaluations} times for an image, those of "
            f"the last stage here {last.evaluations} times",
            hint="the same number of sigmas in the last stage",
        )


def is_kept(partition: Partition, number: int) -> bool:
    """Whether a student comes from the run that is extended."""
    return KEPT in (partition.evidence or {}).get("origins", [])[number : number + 1]


def keep(run: RunDir, recipe: Recipe, partition: Partition, teacher: Denoiser, report: Report) -> None:
    """Put the students that are kept into the run, every stage of the recipe ended with their weights: hard links where
    the file system has them, else copies, whose hashes are compared. What is there stays.

    UserError where a student is missing, damaged, or none of this teacher's images.
    """
    for k in range(len(partition.parts)):
        folders = [run.stage(k, i, stage.objective) for i, stage in enumerate(recipe.stages)]
        if not is_kept(partition, k) or all(map(is_finished, folders, recipe.stages)):
            continue
        with lock(run.student(k), f"student {k}", wait=report):
            source = folders[-1] if (folders[-1] / MODEL).is_file() else _folder(recipe, k, run)
            found = _checked(source, teacher, run)
            for folder, stage in zip(folders, recipe.stages, strict=True):
                _put(source / WEIGHTS, folder / WEIGHTS, found["sha256"])
                origin = found.get(KEPT) or {"run": recipe.partition.run, "sha256": found["sha256"]}
                record = {"steps": max(stage.steps, found["steps"]), "cost": NO_COST, KEPT: origin}
                write_json(folder / MODEL, found | record)
        report(f"student {k}: kept as it is in {recipe.partition.run} ({found['sha256'][:16]})")


def _folder(recipe: Recipe, number: int, run: RunDir) -> Path:
    """Where a finished student of the run that is extended lies."""
    other = Path(str(recipe.partition.run))
    _check_autoencoders(run, other)
    return sample.load(other).folders[number]


def _checked(folder: Path, teacher: Denoiser, run: RunDir) -> dict[str, Any]:
    """Return a student's record. UserError where it does not fit, or its weights are others than it says."""
    found = records.trained(folder / MODEL)
    if file_hash(folder / WEIGHTS) != found["sha256"]:
        raise UserError(f"{folder / WEIGHTS} is not the file that {MODEL} describes: its hash differs")
    if tuple(found["shape"]) != teacher.shape:
        raise UserError(f"{folder} makes images of shape {found['shape']}, the teacher of {list(teacher.shape)}")
    base = found.get("adapter", {}).get("base_sha256")
    if base is not None and base != records.model(run.teacher / MODEL).get("sha256"):
        raise UserError(
            f"{folder} holds adapters of another teacher than this run's, and is no student without it",
            hint="the same teacher, by teacher.path",
        )
    return found


def _check_autoencoders(run: RunDir, other: Path) -> None:
    """Raise UserError where kept students make latents of another autoencoder than the run's."""
    mine, theirs = autoencoders.find(run.teacher), autoencoders.find(RunDir(other).teacher)
    said = [None if folder is None else autoencoders.identity(folder) for folder in (mine, theirs)]
    if said[0] != said[1]:
        raise UserError(f"the students of {other} make latents of another autoencoder than this run's teacher has")


def _put(weights: Path, target: Path, sha256: str) -> None:
    """Give `target` a student's weights, and never those of a file that changed meanwhile."""
    if target.is_file() and file_hash(target) == sha256:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with writing(target) as temporary:
        try:
            os.link(weights.resolve(), temporary)
        except OSError:
            shutil.copyfile(weights, temporary)
        if file_hash(temporary) != sha256:
            raise UserError(f"{weights} changed while it was taken over", hint="the same command again")
