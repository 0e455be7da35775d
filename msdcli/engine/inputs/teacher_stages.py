"""What makes a teacher better before it teaches: the stages `teacher.stages`, each from the teacher before it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from msdcli import records
from msdcli.data.base import Dataset, fingerprint
from msdcli.diffusion.draws import Source
from msdcli.engine.checkpoints.model import MODEL, is_complete, load_model, predicts, save_model
from msdcli.engine.checkpoints.train_state import TrainState
from msdcli.engine.distributed.group import ProcessGroup
from msdcli.engine.distributed.sharding import whole_state
from msdcli.engine.inputs.pairs import Pairs
from msdcli.engine.tracking.events import Report
from msdcli.engine.train.loop import TrainOptions, train
from msdcli.engine.train.student import is_finished, peak_memory
from msdcli.errors import UserError
from msdcli.objectives import objective_class
from msdcli.recipe import Recipe
from msdcli.recipe.stages import DdoSettings
from msdcli.rundir import RunDir, key, lock

FORMAT = 2  # another number where the code makes another teacher from the same recipe
DONE = "stages"  # in model.json: the stages that the teacher has been through, as they were asked for


def check(recipe: Recipe, data: Dataset, shape: tuple[int, ...]) -> None:
    """Raise UserError where the teacher cannot be made better in this way."""
    if not recipe.teacher.stages:
        return
    if recipe.has_prompts or shape != tuple(data.shape):
        what = "prompts" if recipe.has_prompts else "latents"
        raise UserError(f"teacher.stages: {recipe.teacher.stages[0].objective} is for teachers of pictures, not {what}")
    if recipe.fsdp:
        raise UserError("teacher.stages: the frozen reference is whole on every device, which `fsdp` is not for")


def refine(
    folder: Path,
    run: RunDir,
    recipe: Recipe,
    data: Dataset,
    device: torch.device,
    report: Report,
    group: ProcessGroup,
) -> Path:
    """Return the folder of the teacher in `folder` after the recipe's stages; runs share what each of them made.

    A stage's product is named by everything that it depends on: the teacher before it, the data and whether they are
    mirrored, its own keys, how the reference is sampled, and seed and threads.
    """
    stages = recipe.teacher.stages
    if not stages:
        return folder
    # The run's own is done. A given one may have been through such stages before: it goes through them again.
    own = folder == run.teacher or run.begun()
    if group.broadcast(own and has_been_through(run.teacher, stages)):
        return run.teacher
    for number in range(len(stages)):
        folder = _after(folder, number, run, recipe, data, device, report, group)
    return folder


def has_been_through(folder: Path, stages: Sequence[DdoSettings]) -> bool:
    """Whether the teacher in a folder has been through these stages."""
    done = records.model(folder / MODEL).get(DONE, []) if is_complete(folder) else []
    return bool(done == [stage.keyed() for stage in stages])


def _after(
    before: Path,
    number: int,
    run: RunDir,
    recipe: Recipe,
    data: Dataset,
    device: torch.device,
    report: Report,
    group: ProcessGroup,
) -> Path:
    settings, stage = recipe.teacher, recipe.teacher.stages[number]
    reference, description = load_model(before)
    said = predicts(description)
    sampled = [settings.solver.record(), recipe.pairs.count, recipe.pairs.seed, recipe.pairs.shard]
    asked = [stage.keyed(), settings.seed, recipe.threads, number, recipe.data.mirrors]
    folder = run.shared / f"teacher-{key(stage.objective, FORMAT, said, fingerprint(data), sampled, asked)}"
    what = f"teacher {stage.objective}"
    with group.while_leader_holds(lambda: lock(folder, "the teacher", wait=report)):
        if group.broadcast(is_finished(folder, stage)):
            report(f"{what}: reused from {folder}")
            return folder
        reference = reference.to(device)
        alone = recipe.model_copy(update={"teacher": settings.model_copy(update={"stitch": None})})
        samples = Pairs(run, alone, data, key("alone", said)).provide(reference, report)
        everyone, mirror = range(len(data.class_names)), recipe.data.mirrors
        source = Source(data, everyone, pairs=samples, mirror=mirror, device=device)
        network = copy.deepcopy(reference).requires_grad_(True).train()
        objective = objective_class(stage.objective)(stage, network, reference)
        options, seeds = TrainOptions.of(recipe, group), ("teacher", settings.seed, number)
        state = train(objective, stage, source, folder, key=seeds, what=what, options=options, report=report)
        done = [s.keyed() for s in settings.stages[: number + 1]]
        save(folder, state, {"steps": stage.steps, DONE: done}, device, group)
    return folder


def save(folder: Path, state: TrainState, record: dict[str, Any], device: torch.device, group: ProcessGroup) -> None:
    """Write the average that a teacher's training ended with, and its cost; all processes of the group wait for it."""
    product = whole_state(state.ema.denoiser, group)
    if group.is_leader:
        save_model(folder, state.ema.denoiser, record | {"cost": state.cost | peak_memory(device)}, product)
    group.broadcast(None)
