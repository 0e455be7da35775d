"""The teacher: trained once per recipe section and shared by every later run, or loaded from a folder."""

from __future__ import annotations

from pathlib import Path

import torch

from msdcli import nets
from msdcli.data.base import Dataset
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.draws import Source, generator
from msdcli.engine import checkpoint, importing
from msdcli.engine.distill import is_finished, peak_memory, train
from msdcli.engine.events import Report
from msdcli.errors import UserError
from msdcli.objectives.edm import DenoisingScoreMatching
from msdcli.recipe import EdmNetworkSettings, Recipe, TeacherSettings
from msdcli.rundir import RunDir, file_hash, key, link, lock


def provide(run: RunDir, recipe: Recipe, data: Dataset, device: torch.device, report: Report) -> tuple[Denoiser, str]:
    """Return the frozen teacher and its weights' hash, after loading, importing, reusing or training it; link it into
    the run.
    """
    if recipe.teacher.path is not None:
        folder = _located(run, Path(recipe.teacher.path), report)
    else:
        folder = run.shared / f"teacher-{teacher_key(recipe)}"
        with lock(folder, "the teacher", wait=report):
            if is_finished(folder, recipe.teacher.training):
                report(f"teacher: reused from {folder}")
            else:
                _train(folder, recipe, data, device, report)
    teacher, description = checkpoint.load_model(folder)
    _check_fit(teacher, recipe, data)
    link(folder, run.teacher)
    return teacher.to(device), description["sha256"]


def on_meta(recipe: Recipe, data: Dataset, *, planning: bool = False) -> Denoiser:
    """Return the teacher without memory: it is checked as far as it exists, and its parameters can be counted.

    UserError where it cannot be had or does not fit; with `planning`, a file that is missing is taken on trust.
    """
    settings = recipe.teacher
    path = None if settings.path is None else Path(settings.path)
    if path is None or (planning and not path.exists()):
        options = {"shape": data.shape, "num_classes": len(data.class_names), "sigma_data": settings.sigma_data}
        with torch.device("meta"):
            return nets.build(settings.network, **options)
    if not path.exists():
        raise UserError(f"no model at {path}", hint=f"get it from {settings.source}" if settings.source else None)
    teacher = importing.inspect(path) if importing.is_pickle(path) else checkpoint.load_model(path)[0].to("meta")
    _check_fit(teacher, recipe, data)
    return teacher


def _located(run: RunDir, path: Path, report: Report) -> Path:
    """Return the folder of a given teacher; a pickle is imported once, next to the runs that share it."""
    if not importing.is_pickle(path):
        return path
    folder = run.shared / f"teacher-{key('imported', file_hash(path))}"
    with lock(folder, "the teacher", wait=report):
        if not checkpoint.is_complete(folder):
            report(f"teacher: importing {path}")
            importing.write(importing.read(path), folder)
    return folder


def teacher_key(recipe: Recipe) -> str:
    """Name the teacher by everything that its weights depend on."""
    section = recipe.teacher.model_dump(mode="json", exclude={"path", "source", "solver"})
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
    checkpoint.save_model(folder, state.ema.net, record)


def _check_fit(teacher: Denoiser, recipe: Recipe, data: Dataset) -> None:
    """Raise UserError unless a teacher from elsewhere makes what the data hold, and is what the recipe expects."""
    where, num_classes = recipe.teacher.path, len(data.class_names)
    if teacher.num_classes == 0 and num_classes > 1:
        raise UserError(
            f"the teacher at {where} knows no classes, the data have {num_classes}",
            hint="data.labels=false (data folder) makes them one class, for one student",
        )
    if teacher.shape != tuple(data.shape) or max(teacher.num_classes, 1) != num_classes:
        raise UserError(
            f"the teacher at {where} makes images of shape {list(teacher.shape)} in {teacher.num_classes} classes; "
            f"the data have shape {list(data.shape)} and {num_classes} classes"
        )
    expected = recipe.teacher.network
    if where is not None and isinstance(expected, EdmNetworkSettings):
        _check_expected(teacher, expected, where)


def _check_expected(teacher: Denoiser, expected: EdmNetworkSettings, where: str) -> None:
    found = teacher.settings
    if not isinstance(found, EdmNetworkSettings) or found.preconditioning != expected.preconditioning:
        raise UserError(f"the teacher at {where} is no {expected.preconditioning} network of kind edm")
    for name, value in expected.arguments.items():
        if name != "dropout" and found.arguments.get(name) != value:
            raise UserError(
                f"the teacher at {where} has {name} {found.arguments.get(name)}, the recipe expects {value}",
                hint="teacher.network must describe that file, or be left out",
            )
