"""Whether the disk can hold what a run will write."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from msdcli.engine.checkpoints import files as checkpoint_files
from msdcli.errors import UserError
from msdcli.objectives import Objective
from msdcli.recipe import Recipe
from msdcli.recipe.stages import StageSettings
from msdcli.rundir import RunDir

SMALL_FILES = 2**20  # metrics, records and a picture
NAME = 128  # what the name and place of a tensor take


def state_bytes(objective: Objective) -> int:
    """Return the size of a checkpoint: every network with Adam's two moments and step, and the product's average."""
    return sum(_bytes(net, 3) for net in objective.nets.values()) + model_bytes(objective)


def model_bytes(objective: Objective) -> int:
    """Return the size of the weights that a stage ends with."""
    return _bytes(objective.nets[objective.product], 1)


def _bytes(net: nn.Module, copies: int) -> int:
    tensors = [*net.parameters(), *net.buffers()]
    return copies * sum(t.numel() * t.element_size() + NAME for t in tensors)


def needed(run: RunDir, recipe: Recipe, objectives: Sequence[Sequence[Objective]], at_once: int) -> int:
    """Return the bytes that a run has yet to write: of every stage its model, the checkpoints that are kept and, where
    it selects, candidates; and for each of the students trained at once the checkpoint that is being written.

    `objectives` are the stages' objectives for every size of the recipe's students.
    """
    total = SMALL_FILES + at_once * max(state_bytes(objective) for own in objectives for objective in own)
    of_student = [(k, own) for numbers, own in zip(recipe.sizes, objectives, strict=True) for k in numbers]
    for k, own in of_student:
        for i, (stage, objective) in enumerate(zip(recipe.stages, own, strict=True)):
            folder = run.stage(k, i, stage.objective)
            there = sum(checkpoint_files.size(path) for _, path in checkpoint_files.stored(folder))
            models = [*folder.glob("model.safetensors"), *folder.glob("best-*.safetensors")]
            there += sum(file.stat().st_size for file in models)
            most = 1 + _candidates_kept(stage, recipe.keep)
            total += max(0, recipe.keep * state_bytes(objective) + most * model_bytes(objective) - there)
    return total


def _candidates_kept(stage: StageSettings, keep: int) -> int:
    """How many candidates for the best average may lie on the disk at once."""
    return 0 if (select := getattr(stage, "select", None)) is None else min(keep + 2, select.count(stage.steps))


def check(run: RunDir, bytes_needed: int) -> None:
    """Raise UserError where the run's disk has less than that left."""
    if (free := free_bytes(run.root)) < bytes_needed:
        raise UserError(
            f"{run.root}: the run's checkpoints and models need {bytes_needed:,} bytes, the disk has {free:,} left",
            hint="run=... puts the run on another disk; keep=1 keeps one checkpoint of each stage",
        )


def free_bytes(path: Path) -> int:
    """Return what is left on the disk that `path` is, or will be, on."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
