"""Divide the conditions among the students, as the recipe says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from msdcli import routing
from msdcli.data.base import Dataset, PromptDataset, has_images, in_turn
from msdcli.data.files.labels import empty_classes
from msdcli.data.folder import ExpectedPictures
from msdcli.data.prompts import ExpectedPrompts
from msdcli.diffusion.denoiser import Denoiser
from msdcli.engine import pictures
from msdcli.engine.checkpoints.model import is_complete, load_model
from msdcli.engine.distributed import device
from msdcli.engine.inputs import dataset, prompts
from msdcli.engine.partitioning import evidence, keeping
from msdcli.engine.tracking.events import Report, silent
from msdcli.errors import UserError
from msdcli.nets.edm.unet_taps import TappedUNet
from msdcli.partition import (
    Partition,
    by_confusion,
    by_difficulty,
    consecutive,
    kmeans,
    named_parts,
    of_rule,
    shuffled,
    sizes,
    sorted_by_difficulty,
)
from msdcli.recipe import PartitionSettings, Recipe
from msdcli.recipe.stages import GeneratorSettings, StageSettings, teacher_stage
from msdcli.rundir import RunDir, lock

LISTED = 12  # classes, in a message
TEXT_METHODS = ("quadrants", "kmeans", "random")
Mixed = tuple[np.ndarray, dict[str, Any]]  # how much each class is taken for each, and the record of it


def check(settings: PartitionSettings, class_names: Sequence[str], *, prompts: bool = False) -> None:
    """Raise UserError if the section cannot give a partition of these classes or `prompts`; needs no teacher."""
    num_conditions = len(class_names)
    sizes(num_conditions, settings.students)
    if prompts and settings.students > 1 and settings.method not in TEXT_METHODS:
        raise UserError(
            f"partition.method {settings.method} could not place a new prompt; for prompts there are "
            f"{', '.join(TEXT_METHODS)}",
            hint="partition.method=quadrants",
        )
    if settings.method == "quadrants":
        if not prompts:
            raise UserError(
                "partition.method quadrants divides prompts, and the data have classes", hint="partition.method=kmeans"
            )
        routing.check_quadrants(settings.students)
    if settings.parts is not None:
        Partition(named_parts(settings.parts, class_names), num_conditions, "explicit")


def check_parts(recipe: Recipe, data: Dataset, parts: Partition | None = None) -> None:
    """Raise UserError for a student whose stages look at pictures, or pairs, of its classes, where there are none.

    Without `parts` it looks at those that the run has or will have, as far as they do not depend on the teacher.
    """
    if isinstance(data, PromptDataset | ExpectedPictures | ExpectedPrompts):
        return  # every prompt has a row
    settings, names = recipe.partition, data.class_names
    labels = data.labels(range(len(data)))
    empty = empty_classes(labels.numpy(), len(names))
    if settings.method == "kmeans" and settings.features == "images":
        if not has_images(data):
            raise UserError(
                "partition: k-means by images needs real ones, and the recipe names no data",
                hint="partition.features=embedding looks at no pictures",
            )
        if empty:
            raise _no_mean(empty, names)
    if parts is None and _goes_on(recipe, names):
        parts = Partition.load(RunDir(recipe.run_dir).partition)
    elif parts is None and settings.method == "confusion":
        evidence.check_confusion(data)
    elif parts is None and settings.method != "kmeans":
        parts = make(settings, data, None)
        if settings.method == "extend":
            keeping.check_steps(recipe)
    for number, stage in enumerate(recipe.stages):
        of = getattr(stage, "classes", None)
        if of is not None:
            _check_left_out(recipe, number, parts, of)
        for what, found in _needed(stage, recipe, data, labels):
            _check_filled(parts, settings.students, found, f"stage {stage.objective} needs {what}", names, of)


def _goes_on(recipe: Recipe, class_names: Sequence[str]) -> bool:
    """Whether the run has divided these classes for this recipe: what another one, which made nothing yet, left there
    is removed when the run begins.
    """
    run = RunDir(recipe.run_dir)
    made = run.is_of(recipe) and run.partition.is_file()
    return made and Partition.load(run.partition).num_conditions == len(class_names)


def check_classes(recipe: Recipe, data: Dataset) -> None:
    """Raise UserError where a stage names classes that are not there."""
    for stage in recipe.stages:
        if (of := getattr(stage, "classes", None)) is None:
            continue
        if recipe.has_prompts:
            raise UserError(f"stage {stage.objective}: classes names classes, and the data are prompts")
        if max(of) >= len(data.class_names):
            raise UserError(f"stage {stage.objective}: classes names {max(of)}, there are {len(data.class_names)}")


def _check_left_out(recipe: Recipe, number: int, parts: Partition | None, of: Sequence[int]) -> None:
    """Raise UserError where a student that owns none of a stage's classes could not stay as it is."""
    if parts is None:
        return
    idle = (k for k, part in enumerate(parts.parts) if not {*part} & {*of})
    left = [k for k in idle if not keeping.is_kept(parts, k)]
    stage, before = recipe.stages[number], recipe.stages[number - 1] if number else None
    same = isinstance(before, GeneratorSettings) and before.sigmas == getattr(stage, "sigmas", None)
    if left and not same:
        raise UserError(
            f"stage {stage.objective}: classes leaves student {left[0]} out, which can stay only what a stage before "
            "made of it, of the same `sigmas`",
            hint="classes of every student, or a stage of all classes before this one",
        )


def _needed(stage: StageSettings, recipe: Recipe, data: Dataset, labels: Tensor) -> Iterator[tuple[str, set[int]]]:
    """Yield what a stage needs of every student's part, and the classes that have it."""
    if stage.needs_images:
        yield "pictures", set(labels.unique().tolist())
    if getattr(stage, "labels", None) == "data":
        yield "pictures (labels: data)", set(labels.unique().tolist())
    if stage.pairs_used == "none":
        return
    drawn = set(data.labels(in_turn(data, range(recipe.pairs.count))).tolist())
    if stage.pairs_used == "filtered":
        yield f"pairs of its own (pairs: filtered; pairs.count {recipe.pairs.count:,})", drawn
    elif (of := getattr(stage, "classes", None)) is not None and not drawn & {*of}:
        raise UserError(
            f"stage {stage.objective} needs pairs of its classes, and none of {recipe.pairs.count:,} is of one",
            hint="a larger pairs.count",
        )


def check_forgetting(recipe: Recipe, data: Dataset) -> None:
    """Raise UserError where a stage is to forget what is not there."""
    for number, stage in enumerate(recipe.stages):
        if (forget := getattr(stage, "forget", None)) is None:
            continue
        if teacher_stage(recipe.stages, number) is not None:
            raise UserError(
                f"stage {stage.objective}: forget asks the teacher for classes of other students, and the teacher is "
                "what a stage before made of this one's alone",
                hint="leave becomes: teacher out",
            )
        if recipe.has_prompts:
            raise UserError(f"stage {stage.objective}: forget names classes, and the data are prompts")
        named = [*forget.classes, *([] if forget.instead == "random" else [forget.instead])]
        if (most := max(named)) >= len(data.class_names):
            raise UserError(f"stage {stage.objective}: forget names class {most}, there are {len(data.class_names)}")
        if len(set(forget.classes)) == len(data.class_names):
            raise UserError(f"stage {stage.objective}: forget names every class")


def _check_filled(
    parts: Partition | None,
    students: int,
    found: set[int],
    needs: str,
    names: Sequence[str],
    of: Sequence[int] | None = None,
) -> None:
    """Raise UserError unless every student has a class among those found, or can have where parts are not known yet;
    where the stage is `of` some classes alone, every owner of one.
    """
    found = found if of is None else found & {*of}
    empty = [c for c in range(len(names)) if c not in found]
    if parts is None and of is None and students > len(found):
        raise UserError(
            f"{needs}, and {students} students are more than the {len(found)} classes that have any: "
            f"{_without_pictures(empty, names)}",
            hint="fewer partition.students, or labels that begin at 0 and have no gaps",
        )
    for number, part in enumerate(parts.parts if parts else []):
        idle = of is not None and not {*of} & {*part}
        if not found.intersection(part) and not idle and not (parts and keeping.is_kept(parts, number)):
            raise UserError(
                f"{needs}, and student {number} has none: {_without_pictures(part, names)}",
                hint="labels that begin at 0 and have no gaps, fewer partition.students, or partition.method=explicit",
            )


def _no_mean(empty: Sequence[int], names: Sequence[str]) -> UserError:
    return UserError(
        f"partition: k-means looks at the pictures of every class, and {_without_pictures(empty, names)}",
        hint="partition.features=embedding looks at no pictures",
    )


def _without_pictures(classes: Sequence[int], names: Sequence[str]) -> str:
    """Say which classes are empty, by name."""
    more = f" and {len(classes) - LISTED:,} more" if len(classes) > LISTED else ""
    named = ", ".join(names[c] for c in classes[:LISTED])
    return f"{'class' if len(classes) == 1 else 'classes'} {named}{more} {'has' if len(classes) == 1 else 'have'} none"


def make(settings: PartitionSettings, data: Dataset, teacher: Denoiser | None, mixed: Mixed | None = None) -> Partition:
    """Return the partition. `teacher` is needed for k-means on class embeddings, and has the prompts' embeddings;
    `mixed` is what `mixed_up` gives.
    """
    if isinstance(data, PromptDataset):
        pooled = None if teacher is None or teacher.prompts is None else teacher.prompts.pooled
        return of_prompts(settings, data.prompts, pooled)
    num = len(data.class_names)
    if settings.parts is not None:
        return Partition(named_parts(settings.parts, data.class_names), num, "explicit")
    if settings.method == "consecutive":
        return consecutive(num, settings.students)
    if settings.method == "random":
        return shuffled(num, settings.students, seed=settings.seed)
    if settings.method == "extend":
        return keeping.extended(settings, data.class_names)
    if settings.run is not None:
        each, found = evidence.distances(settings.run, data.class_names)
        divide = sorted_by_difficulty if settings.order == "sorted" else by_difficulty
        return replace(divide(each, settings.students), evidence=found)
    if settings.method == "confusion":
        assert mixed is not None, "these parts follow from what the classifier says"
        return replace(by_confusion(mixed[0], settings.students, seed=settings.seed), evidence=mixed[1])
    return kmeans(class_vectors(settings, data, teacher), settings.students, seed=settings.seed)


def mixed_up(run: RunDir, recipe: Recipe, data: Dataset, on: torch.device, report: Report) -> Mixed | None:
    """What the data's classifier mixes up, where the partition asks for it and the run has none yet; trained here
    if nobody has.
    """
    if recipe.partition.method != "confusion" or run.partition.is_file():
        return None
    return evidence.confusion(run, recipe, data, on, report)


def provide(
    run: RunDir, recipe: Recipe, data: Dataset, frozen: Denoiser, on: torch.device, report: Report
) -> Partition:
    """Return the run's partition, made once."""
    mixed = mixed_up(run, recipe, data, on, report)
    with lock(run.root, "the run directory", wait=lambda _: None):
        if not run.partition.exists():
            made = make(recipe.partition, data, frozen, mixed)
            check_parts(recipe, data, made)
            made.save(run.partition)
    return Partition.load(run.partition)


def of_prompts(settings: PartitionSettings, prompts: Sequence[str], pooled: np.ndarray | None) -> Partition:
    """Return the partition of prompts, with the rule for new ones; `random` and one student need no embeddings."""
    num, method = settings.students, settings.method
    if num == 1 or method == "random":
        return of_rule(routing.Hash(num, settings.seed), num, prompts, None, method if num > 1 else "random")
    assert pooled is not None, "this partition looks at embeddings"
    if method == "kmeans":
        return kmeans(pooled, num, seed=settings.seed)
    return of_rule(routing.Quadrants.fit(pooled, num), num, prompts, pooled, method)


def class_vectors(settings: PartitionSettings, data: Dataset, teacher: Denoiser | None) -> np.ndarray:
    """The vector of every class that k-means looks at."""
    return _embeddings(teacher) if settings.features == "embedding" else _mean_images(data)


def _embeddings(teacher: Denoiser | None) -> np.ndarray:
    """The teacher's learned vector of every class [classes, width]."""
    assert teacher is not None, "k-means on class embeddings needs the teacher"
    found = (m for m in teacher.modules() if isinstance(m, TappedUNet | nn.Embedding))
    table = next(found, None)
    vectors = table.class_vectors() if isinstance(table, TappedUNet) else getattr(table, "weight", None)
    if vectors is None or len(vectors) < teacher.num_classes:
        raise UserError("partition: this teacher has no class embeddings", hint="partition.features=images")
    return vectors[: teacher.num_classes].detach().double().cpu().numpy()  # a last one may stand for no class


def _mean_images(data: Dataset) -> np.ndarray:
    """The mean image of every class [classes, numbers], over about 10,000 images."""
    each = _of_classes(data, max(1, 10_000 // len(data.class_names)))
    if empty := [k for k, numbers in enumerate(each) if not numbers]:
        raise _no_mean(empty, data.class_names)
    return torch.stack([data.images(numbers).flatten(1).double().mean(0) for numbers in each]).numpy()


def _of_classes(data: Dataset, count: int, *, most: int = 200_000) -> list[list[int]]:
    """Return the numbers of up to `count` images of every class, among the first `most` in turn."""
    numbers = torch.tensor(in_turn(data, range(min(len(data), most))))
    labels = data.labels(numbers.tolist())
    return [numbers[labels == k][:count].tolist() for k in range(len(data.class_names))]


def preview(recipe: Recipe, report: Report = silent) -> tuple[Partition, Dataset]:
    """Return the partition that a recipe's run has, or would get.

    Prompts are embedded for it, once. UserError where it needs a teacher that is not trained yet.
    """
    data, run = dataset.look(recipe), RunDir(recipe.run_dir)
    check(recipe.partition, data.class_names, prompts=recipe.has_prompts)
    if _has_made(run, recipe):
        return Partition.load(run.partition), data
    if isinstance(data, PromptDataset):
        store = prompts.for_recipe(run, recipe, data, report) if _looks(recipe.partition) else None
        return of_prompts(recipe.partition, data.prompts, None if store is None else store.pooled), data
    if recipe.partition.method == "confusion":
        evidence.check_confusion(data)
        data = dataset.provide(run, recipe, report)
        mixed = evidence.confusion(run, recipe, data, device.prepare(recipe), report)
        return make(recipe.partition, data, None, mixed), data
    return make(recipe.partition, data, teacher_looked_at(run, recipe)), data


def _has_made(run: RunDir, recipe: Recipe) -> bool:
    """Whether the run's partition is what this recipe would get, by all that decides it."""
    if not (run.partition.is_file() and run.recipe_file.is_file()):
        return False
    own = run.recipe()
    return (own.partition, own.data, own.teacher) == (recipe.partition, recipe.data, recipe.teacher)


def _looks(settings: PartitionSettings) -> bool:
    """Whether a partition of prompts looks at their embeddings."""
    return settings.students > 1 and settings.method != "random"


def classifier_first(recipe: Recipe) -> bool:
    """Whether showing the partition asks the data's classifier, which may have to be trained."""
    return recipe.partition.method == "confusion" and not _has_made(RunDir(recipe.run_dir), recipe)


def to_embed(recipe: Recipe, *, explaining: bool) -> int:
    """Return how many prompts showing (or explaining) the partition would have to embed first."""
    data, run = dataset.look(recipe), RunDir(recipe.run_dir)
    looks = isinstance(data, PromptDataset) and (explaining or _looks(recipe.partition))
    if not looks:
        return 0
    assert isinstance(data, PromptDataset)
    if prompts.is_here(run, recipe, data):
        return 0
    return 0 if (prompts.folder_for(run, recipe, data) / prompts.RECORD).is_file() else len(data.prompts)


def teacher_looked_at(run: RunDir, recipe: Recipe) -> Denoiser | None:
    """The teacher, where the partition looks at it."""
    if recipe.partition.method != "kmeans" or recipe.partition.features != "embedding":
        return None
    if not is_complete(run.teacher):
        raise UserError(
            "partition: k-means on class embeddings needs the teacher, which is not trained yet",
            hint="msd distill trains it first; partition.features=images needs none",
        )
    return load_model(run.teacher)[0]


def draw(path: Path, partition: Partition, data: Dataset, *, columns: int = 16) -> None:
    """Write a PNG with one row of data per student (points: one scatter plot per student)."""
    if not has_images(data):
        raise UserError("there are no pictures to draw", hint="data.images names those of prompts")
    wanted = 4000 if len(data.shape) == 1 else columns
    each = _of_classes(data, wanted)
    rows = []
    for part in partition.parts:
        per_class = -(-wanted // len(part))
        numbers = [n for c in part for n in each[c][:per_class]]
        rows.append(data.images(numbers[:wanted]))
    pictures.save_grid(path, rows, class_names=[f"student {k}" for k in range(len(rows))])
