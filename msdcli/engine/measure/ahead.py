"""What measuring a run needs, made ahead on cores that are idle; figures are what they would be without it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from msdcli.data.base import Dataset
from msdcli.diffusion.device_batch import PROCESSES
from msdcli.engine.checkpoints.model import is_complete
from msdcli.engine.distributed import cores, device, workers
from msdcli.engine.distributed.group import ProcessGroup
from msdcli.engine.distributed.interrupt import preemptible
from msdcli.engine.measure import classifier, fid
from msdcli.engine.measure.feature_metric import FidOptions
from msdcli.engine.measure.fid import EvaluationContext
from msdcli.engine.tracking.events import Report
from msdcli.errors import CONTINUES, resumable
from msdcli.recipe import Recipe
from msdcli.rundir import RunDir

Meanwhile = Callable[[Report], AbstractContextManager[Report]]


def of_data(run: RunDir, report: Report) -> None:
    """Train the data's classifier and measure the data by it, as `measure` would."""
    with preemptible(), resumable(CONTINUES):
        EvaluationContext(run, FidOptions(), report).real()


def of_teacher(run: RunDir, recipe: Recipe, left: int, report: Report) -> None:
    """Draw the teacher's samples for the table and measure them, in a worker on a CPU that no student is free for
    while others train the last `left`; those that finish the run find them.

    Only where the students are no multiple of the workers: else the others are done soon, too, and the samples are
    drawn sooner on all cores than here on one.
    """
    count = int(os.environ.get(PROCESSES, "1"))
    idle = 0 < left < count and recipe.partition.students % count > 0
    if idle and recipe.has_measure and device.resolve(recipe.device).type == "cpu":
        fid.prepare_teacher(run, report)


def beside_teacher(run: RunDir, recipe: Recipe, data: Dataset, on: torch.device, group: ProcessGroup) -> Meanwhile:
    """Return what goes on while the teacher trains: `of_data` in a process of its own, where a CPU has a core for it
    and nobody has trained the classifier.
    """
    alone = group.size == 1 and cores.spare(on) > 1
    measured = recipe.has_measure and len(data.shape) > 1  # points are measured without a network
    if alone and measured and not is_complete(classifier.place(run, data)):
        return partial(workers.beside, run, ("--ahead",), on)
    return nullcontext
