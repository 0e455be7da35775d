"""The small networks of `teacher.stitch`: a model's folder, or the `tsm` checkpoints of a run's students."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.stitch import TEACHER, Stitch, small_under_guidance
from msdcli.engine.checkpoints.model import MODEL, load_model, predicts
from msdcli.engine.inputs import hub, importing
from msdcli.errors import MissingFileError, UserError
from msdcli.partition import Partition
from msdcli.recipe import Recipe
from msdcli.recipe.teacher import StitchSettings
from msdcli.rundir import RunDir

EARLIER = "tsm"  # the stage whose product is a denoiser of all noise levels, as the teacher is


@dataclass(frozen=True)
class _Small:
    """Folders of small networks, and which condition is whose (None: all are the first one's)."""

    folders: list[Path]
    owners: list[int] | None


def load(run: RunDir, recipe: Recipe, teacher: Denoiser) -> Stitch | None:
    """Return what is stitched to a run's teacher; None: nothing. UserError for what does not fit it.

    A smaller teacher is guided as the teacher is; students are asked as they are, since they learnt from what their own
    teacher's guidance made.
    """
    settings = recipe.teacher.stitch
    if settings is None:
        return None
    small = _small(settings, run)
    networks = [load_model(folder)[0] for folder in small.folders]
    return _checked(settings, networks, small.owners, teacher)


def on_meta(recipe: Recipe, teacher: Denoiser) -> Stitch | None:
    """Return the same without memory, from files that are not imported yet; for checks and plans."""
    settings = recipe.teacher.stitch
    if settings is None:
        return None
    path = hub.resolve(settings.path)
    if importing.is_foreign(path):
        return _checked(settings, [importing.inspect(path)], None, teacher)
    small = _small(settings, None)
    networks = [load_model(folder)[0].to("meta") for folder in small.folders]
    return _checked(settings, networks, small.owners, teacher)


def identity(run: RunDir, recipe: Recipe) -> list[Any]:
    """Return all that a stitched teacher's samples depend on, beside the teacher's own."""
    settings = recipe.teacher.stitch
    assert settings is not None
    small = _small(settings, run)
    return [settings.above, [predicts(load_model(folder)[1]) for folder in small.folders], small.owners]


def _small(settings: StitchSettings, run: RunDir | None) -> _Small:
    path = hub.resolve(settings.path)
    if (path / "recipe.yaml").is_file():
        return _students(settings, RunDir(path))
    if settings.part is not None:
        raise UserError(f"teacher.stitch.part: {path} is no run directory: it has no students", hint="leave it out")
    if run is not None:
        return _Small([importing.located(run, path)], None)
    return _Small([path], None)


def _students(settings: StitchSettings, other: RunDir) -> _Small:
    """The checkpoints of a run's students before they became generators of one step."""
    stages = [stage.objective for stage in other.recipe().stages]
    if EARLIER not in stages:
        raise UserError(
            f"teacher.stitch.path: the students of {other.root} began with {stages[0]}, and only those that began with "
            f"{EARLIER} are denoisers of all noise levels",
            hint="a smaller teacher's folder, or a run such as digits-small",
        )
    if not other.partition.is_file():
        raise MissingFileError(f"teacher.stitch.path: {other.root} has no partition yet: its run is at its beginning")
    partition = Partition.load(other.partition)
    if partition.rule is not None:
        raise UserError("teacher.stitch.path: students of prompts are not stitched", hint="a smaller teacher's folder")
    numbers = range(len(partition.parts)) if settings.part is None else [settings.part]
    if settings.part is not None and settings.part >= len(partition.parts):
        raise UserError(f"teacher.stitch.part: {other.root} has no student {settings.part}")
    folders = [other.stage(k, stages.index(EARLIER), EARLIER) for k in numbers]
    for folder in folders:
        if not (folder / MODEL).is_file():
            raise MissingFileError(
                f"teacher.stitch.path: no model at {folder}: that stage is not finished",
                hint=f"msd status {other.root}",
            )
    at = {number: i for i, number in enumerate(numbers)}
    return _Small(folders, [at.get(owner, TEACHER) for owner in partition.owner])


def _checked(settings: StitchSettings, networks: list[Denoiser], owners: list[int] | None, teacher: Denoiser) -> Stitch:
    for network in networks:
        if network.reads_text or teacher.reads_text:
            raise UserError("teacher.stitch: teachers of prompts are not stitched")
        if (network.shape, network.num_classes) != (teacher.shape, teacher.num_classes):
            raise UserError(f"teacher.stitch.path: {settings.path} makes other images or classes than the teacher")
    if owners is None:
        networks = [small_under_guidance(network, teacher) for network in networks]
    return Stitch(networks, settings.above, owners)
