"""Divide the conditions among the students, as the recipe says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from msdcli import partition as p
from msdcli.data import open_data
from msdcli.data.base import Dataset
from msdcli.diffusion.denoiser import Denoiser
from msdcli.engine import checkpoint, sample
from msdcli.errors import UserError
from msdcli.nets.unet_taps import TappedUNet
from msdcli.partition import Partition
from msdcli.recipe import PartitionSettings, Recipe
from msdcli.rundir import RunDir


def check(settings: PartitionSettings, num_classes: int) -> None:
    """Raise UserError if the section cannot give a partition of `num_classes` classes; needs no teacher."""
    p.sizes(num_classes, settings.students)
    if settings.parts is not None:
        Partition(settings.parts, num_classes, "explicit")


def make(settings: PartitionSettings, data: Dataset, teacher: Denoiser | None) -> Partition:
    """Return the partition. `teacher` is needed for k-means on class embeddings."""
    num = len(data.class_names)
    if settings.parts is not None:
        return Partition([sorted(part) for part in settings.parts], num, "explicit")
    if settings.method == "consecutive":
        return p.consecutive(num, settings.students)
    if settings.method == "random":
        return p.shuffled(num, settings.students, seed=settings.seed)
    vectors = _embeddings(teacher) if settings.features == "embedding" else _mean_images(data)
    return p.kmeans(vectors, settings.students, seed=settings.seed)


def _embeddings(teacher: Denoiser | None) -> np.ndarray:
    """The teacher's learned vector of every class [classes, width]."""
    assert teacher is not None, "k-means on class embeddings needs the teacher"
    found = (m for m in teacher.modules() if isinstance(m, TappedUNet | nn.Embedding))
    table = next(found, None)
    vectors = table.class_vectors() if isinstance(table, TappedUNet) else getattr(table, "weight", None)
    if vectors is None:
        raise UserError("partition: this teacher has no class embeddings", hint="partition.features=images")
    return vectors.detach().double().cpu().numpy()


def _mean_images(data: Dataset) -> np.ndarray:
    """The mean image of every class [classes, numbers], over at most 10,000 images."""
    numbers = range(min(len(data), 10_000))
    images, labels = data.images(numbers).flatten(1).double(), data.labels(numbers)
    return torch.stack([images[labels == k].mean(0) for k in range(len(data.class_names))]).numpy()


def preview(recipe: Recipe) -> tuple[Partition, Dataset]:
    """Return the partition that a recipe's run has, or would get. UserError where that needs an untrained teacher."""
    data = open_data(recipe.data)
    run = RunDir(recipe.run_dir)
    check(recipe.partition, len(data.class_names))
    if run.partition.is_file() and run.recipe().partition == recipe.partition:
        return Partition.load(run.partition), data
    teacher = None
    if recipe.partition.method == "kmeans" and recipe.partition.features == "embedding":
        if not checkpoint.is_complete(run.teacher):
            raise UserError(
                "partition: k-means on class embeddings needs the teacher, which is not trained yet",
                hint="msd distill trains it first; partition.features=images needs none",
            )
        teacher, _ = checkpoint.load_model(run.teacher)
    return make(recipe.partition, data, teacher), data


def draw(path: Path, partition: Partition, data: Dataset, *, columns: int = 16) -> None:
    """Write a PNG with one row of data per student (points: one scatter plot per student)."""
    labels = data.labels(range(min(len(data), 10_000)))
    wanted = 4000 if len(data.shape) == 1 else columns
    rows = []
    for part in partition.parts:
        per_class = -(-wanted // len(part))
        numbers = [n for c in part for n in (labels == c).nonzero().flatten()[:per_class].tolist()]
        rows.append(data.images(numbers[:wanted]))
    sample.save_grid(path, rows, class_names=[f"student {k}" for k in range(len(rows))])
