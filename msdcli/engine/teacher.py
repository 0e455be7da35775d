"""The teacher: trained once per recipe section and shared by every later run, or loaded from a folder."""

from __future__ import annotations

from pathlib import Path

import torch

from msdcli import nets
from msdcli.data.base import Dataset
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.draws import Source, generator
from msdcli.engine import checkpoint
from msdcli.engine.distill import is_finished, peak_memory, train
from msdcli.engine.events import Report
from msdcli.errors import UserError
from msdcli.objectives.edm import DenoisingScoreMatching
from msdcli.recipe import Recipe, TeacherSettings
from msdcli.rundir import RunDir, key, link, lock


def provide(run: RunDir, recipe: Recipe, data: Dataset, device: torch.device, report: Report) -> tuple[Denoiser, str]:
    """Return the frozen teacher and its weights' hash, after loading, reusing or training it; link it into the run."""
    settings = recipe.teacher
    folder = Path(settings.path) if settings.path else run.shared / f"teacher-{teacher_key(recipe)}"
    if settings.path is None:
        with lock(folder, "the teacher", wait=report):
            if is_finished(folder, settings.training):
                report(f"teacher: reused from {folder}")
            else:
                _train(folder, recipe, data, device, report)
    teacher, description = checkpoint.load_model(folder)
    _check_fit(teacher, data, folder)
    link(folder, run.teacher)
    return teacher.to(device), description["sha256"]


def teacher_key(recipe: Recipe) -> str:
    """Name the teacher by everything that its weights depend on."""
    section = recipe.teacher.model_dump(mode="json", exclude={"path", "solver"})
    return key("teacher", recipe.data.model_dump(mode="json"), section, recipe.threads)


def new_network(settings: TeacherSettings, data: Dataset) -> Denoiser:
    """Build the teacher's network with the random weights of its seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator("network", "teacher", settings.seed).initial_seed())
        num_classes = len(data.class_names)
        return nets.build(settings.network, shape=data.shape, num_classes=num_classes, sigma_data=settings.sigma_data)


def _train(folder: Path, recipe: Recipe, data: Dataset, device: torch.device, report: Report) -> None:
    settings = recipe.teacher
    network = new_network(settings, data).to(device).train()
    source = Source(data, range(len(data.class_names)), device=device)
    goal = DenoisingScoreMatching(settings.training, network, None)
    key_ = ("teacher", settings.seed)
    seconds = recipe.checkpoint_seconds
    state = train(
        goal, settings.training, source, folder, key=key_, what="teacher", checkpoint_seconds=seconds, report=report
    )
    record = {"steps": settings.training.steps, "cost": state.cost | peak_memory(device)}
    checkpoint.save_model(folder, state.ema.net, settings.network, record)


def _check_fit(teacher: Denoiser, data: Dataset, folder: Path) -> None:
    if teacher.shape != tuple(data.shape) or teacher.num_classes != len(data.class_names):
        raise UserError(
            f"the teacher at {folder} makes images of shape {list(teacher.shape)} in {teacher.num_classes} classes; "
            f"the data have shape {list(data.shape)} and {len(data.class_names)} classes"
        )
