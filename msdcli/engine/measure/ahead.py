"""What measuring a run needs, made ahead on cores that are idle; figures are what they would be without it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from msdcli.data.base import Dataset
from msdcli.engine.checkpoints.model import is_complete
from msdcli.engine.distributed import cores, workers
from msdcli.engine.distributed.group import ProcessGroup
from msdcli.engine.distributed.interrupt import preemptible
from msdcli.engine.measure import classifier
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


def beside_teacher(run: RunDir, recipe: Recipe, data: Dataset, on: torch.device, group: ProcessGroup) -> Meanwhile:
    """Return what goes on while the teacher trains: `of_data` in a process of its own, where a CPU has a core for it
    and nobody has trained the classifier.
    """
    alone = group.size == 1 and cores.spare(on) > 1
    measured = recipe.has_measure and len(data.shape) > 1  # points are measured without a network
    if alone and measured and not is_complete(classifier.place(run, data)):
        return partial(workers.beside, run, ("--ahead",), on)
    return nullcontext
