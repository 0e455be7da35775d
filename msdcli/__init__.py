"""Multi-student distillation: one conditional diffusion teacher, K one-step students.

The verbs of the command line as functions, which import torch when they are called:

    import msdcli

    run = msdcli.distill("digits", student={"width": 0.5}, report=True)
    images = msdcli.sample(run, [3, 7], seed=0)         # float32 [2, 1, 8, 8] in [-1, 1]
    print(msdcli.fid(run).whole("students"))
    msdcli.export(run, "onnx", out="given")

What a user can put right is raised as `UserError`, before anything is written: a value that means nothing is a
ValueError too, a file that is not there a FileNotFoundError.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from msdcli.errors import MissingFileError, UserError, WrongValueError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from msdcli.engine.measure.rows import Measurement
    from msdcli.engine.results import DistillResult
    from msdcli.engine.sample import Students
    from msdcli.engine.tracking.events import Report
    from msdcli.partition import Partition
    from msdcli.recipe import Recipe

__all__ = [
    "MissingFileError",
    "Students",
    "UserError",
    "WrongValueError",
    "distill",
    "export",
    "fid",
    "import_teacher",
    "load",
    "partition",
    "plot",
    "report",
    "sample",
    "status",
]

Source = str | os.PathLike[str]


def distill(
    recipe: Source | Mapping[str, Any] | Recipe,
    *,
    only: int | None = None,
    report: bool | Report = False,
    **overrides: Any,
) -> DistillResult:
    """Do all that is left of a run, as `msd distill` does; with `only`, one student.

    `recipe` is a file, a run directory, the name of a shipped recipe, its content as a dictionary, or a Recipe.
    Overrides are recipe keys: `seed=1`, `student={"width": 0.5}` (merged into the section), or dotted through
    `**{"stages.0.steps": 50}`. With `report=True` progress is printed as the command line prints it; a function gets
    the events instead. The result stands for the run wherever one is asked for.
    """
    from msdcli import recipe as recipes

    loaded = recipes.load_any(recipe, overrides)
    from msdcli.engine import pipeline

    with _reporting(report) as tell:
        outcome: DistillResult = pipeline.distill(loaded, tell, student=only)
    return outcome


def load(
    source: Source, device: str | torch.device = "cpu", *, steps: int | None = None, runtime: str = "torch"
) -> Students:
    """Open the students of a run or of an exported bundle: `load(run).sample(classes=[3, 7], seed=0)`.

    With `runtime="onnx"` ONNX Runtime evaluates them, on a CPU; their programs are kept in the run.
    """
    from msdcli.engine.export import runtime as engine

    return engine.load(Path(source), device, steps=steps, runtime=runtime)


@overload
def sample(
    run: Source,
    classes: Sequence[int | str],
    *,
    seed: int = ...,
    batch: int | None = ...,
    steps: int | None = ...,
    device: str = ...,
    runtime: str = ...,
    as_images: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def sample(
    run: Source,
    classes: Sequence[int | str],
    *,
    seed: int = ...,
    batch: int | None = ...,
    steps: int | None = ...,
    device: str = ...,
    runtime: str = ...,
    as_images: Literal[True],
) -> list[Image]: ...


def sample(
    run: Source,
    classes: Sequence[int | str],
    *,
    seed: int = 0,
    batch: int | None = None,
    steps: int | None = None,
    device: str = "auto",
    runtime: str = "torch",
    as_images: bool = False,
) -> torch.Tensor | list[Image]:
    """Return one sample per class number or name, float32 [len(classes), *shape]; `steps`: with fewer evaluations.

    With `runtime="onnx"` ONNX Runtime evaluates the students, on a CPU.
    With `as_images`, PIL images of the pixels that `msd sample --format png` writes.
    """
    from msdcli.engine.export.runtime import device as resolve

    samples = load(run, resolve(device, runtime), steps=steps, runtime=runtime).sample(classes, seed=seed, batch=batch)
    if not as_images:
        return samples
    from msdcli.engine.pictures import as_pil

    return as_pil(samples)


def fid(
    images: Source, reference: Source | None = None, *, report: bool | Report = False, **options: Any
) -> Measurement:
    """Measure a run, or pictures against a reference, as `msd fid` does; returns the figures with their record.

    `fid(run).whole("students")["fd_digits"]`; of pictures `fid(a, b).whole("images")["fid"]`. `options` are the
    command's: protocol, weights, samples, batch, workers, device, bootstrap, infinity, lean, save, groups.
    """
    from msdcli.engine.measure import fid as engine
    from msdcli.engine.measure.feature_metric import FidOptions
    from msdcli.rundir import RunDir

    _known(options, FidOptions.__dataclass_fields__, "fid")
    if options.get("weights") is not None:
        options["weights"] = Path(options["weights"])
    groups = options.get("groups", ())
    options["groups"] = (groups,) if isinstance(groups, str) else tuple(groups)
    chosen = FidOptions(reference=None if reference is None else str(reference), **options)
    path = Path(images)
    with _reporting(report) as tell:
        if (path / "recipe.yaml").is_file():
            return engine.measure(RunDir(path), tell, chosen)
        from msdcli.engine.measure import fid_files

        return fid_files.measurement(fid_files.check(path, chosen.reference, chosen), tell)


def export(
    run: Source,
    format: Literal["bundle", "onnx", "torch", "diffusers", "triton"] = "bundle",
    *,
    out: Source | None = None,
    report: bool | Report = False,
    **options: Any,
) -> dict[str, Any]:
    """Write a run's students in a format to give away, checked against the run, as `msd export` does.

    Returns the record: `folder`, `max_difference`, `speed`, and at a lower precision `distance`. `options` are
    precision, aot, max_resident, memory (bytes), bench, samples, license, device.
    """
    from msdcli.engine.export import export as engine
    from msdcli.engine.export.format import ExportOptions
    from msdcli.rundir import RunDir

    _known(options, ExportOptions.__dataclass_fields__, "export")
    chosen, directory = ExportOptions(**options), RunDir(Path(run))
    with _reporting(report) as tell:
        target = directory.export / engine.folder_name(format, chosen) if out is None else Path(out)
        return engine.export(directory, target, format, options=chosen, report=tell)


def status(run: Source) -> dict[str, Any]:
    """Return what is done, what runs and what is missing in a run, as `msd status --json` prints it."""
    from msdcli.engine.report.status import status as engine
    from msdcli.rundir import RunDir

    return engine(RunDir(Path(run)))


def report(*runs: Source, out: Source | None = None, pictures: bool = True) -> Path:
    """Write one HTML file about runs, as `msd report` does; return its path, report.html in the first run if absent."""
    from msdcli.engine.report import report as engine
    from msdcli.engine.tracking.events import silent

    roots = _roots(runs, "report")
    target = roots[0] / "report.html" if out is None else Path(out)
    engine.write(roots, target, silent, pictures=pictures)
    return target


def plot(
    kind: Literal["toy", "curves", "table", "frontier"],
    *runs: Source,
    out: Source | None = None,
    health: bool = False,
) -> Path:
    """Draw a figure of runs for a paper, as `msd plot` does; return its path, KIND.pdf in the first run if absent.

    The frontier is a sweep's: of its folder.
    """
    from msdcli.engine.report.plot import plot as engine

    roots = _roots(runs, "plot")
    target = roots[0] / f"{kind}.pdf" if out is None else Path(out)
    engine(kind, roots, target, health=health)
    return target


def _roots(runs: Sequence[Source], verb: str) -> list[Path]:
    if not runs:
        raise TypeError(f"{verb}() needs a run")
    return [Path(run) for run in runs]


def import_teacher(
    teacher: Source, out: Source, *, check: Source | None = None, autoencoder: Source | None = None
) -> dict[str, Any]:
    """Write another project's teacher in msd's format, as `msd import` does; return what it is.

    `check` is an .npz of the original's outputs; WrongValueError where the teacher differs from it.
    """
    from msdcli.engine.inputs import hub, importing

    source, target = hub.resolve(Path(teacher)), Path(out)
    importing.check_free(target, source)
    options = {"reference": None if check is None else Path(check)}
    imported = importing.read(source, **options, autoencoder=None if autoencoder is None else Path(autoencoder))
    if not imported.agrees:
        raise WrongValueError(
            f"{source} differs from the reference by {imported.difference:.3g}, more than {importing.TOLERANCE:g}: "
            "nothing was written",
            hint="is the reference of this very checkpoint?",
        )
    importing.write(imported, target)
    return imported.summary() | {"folder": str(target)}


def _known(options: Mapping[str, Any], fields: Mapping[str, Any], verb: str) -> None:
    if unknown := [name for name in options if name not in fields or name == "reference"]:
        raise TypeError(f"{verb}() has no option {unknown[0]!r}; there are {', '.join(fields)}")


@contextlib.contextmanager
def _reporting(report: bool | Report) -> Iterator[Report]:
    """Give what events are told to: the command line's printer, the caller's function, or nobody."""
    if callable(report):
        yield report
        return
    from msdcli.console import Monitor

    with Monitor(quiet=not report) as monitor:
        yield monitor


# `msdcli.partition` is a module and, for the verb of that name, can be called.


def _partition(recipe: Source | Mapping[str, Any] | Recipe, **overrides: Any) -> Partition:
    """Return who owns which classes or prompts: of a run as it was made, of a recipe as it would be; `.parts` lists the
    numbers of every student. Recipe and overrides are those of `distill`.
    """
    from msdcli import recipe as recipes
    from msdcli.engine.partitioning import making as engine
    from msdcli.engine.tracking.events import silent

    return engine.preview(recipes.load_any(recipe, overrides), silent)[0]


class _PartitionModule(types.ModuleType):
    """The module, which can be called."""

    def __call__(self, recipe: Source | Mapping[str, Any] | Recipe, **overrides: Any) -> Partition:
        return _partition(recipe, **overrides)


_PartitionModule.__call__.__doc__ = _partition.__doc__


class _Package(types.ModuleType):
    """This package: importing the module puts it here."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "partition" and isinstance(value, types.ModuleType):
            value.__class__ = _PartitionModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

if TYPE_CHECKING:
    partition = _partition
else:  # to a type checker every name would pass for one of this module

    def __getattr__(name: str) -> Any:
        """Import `Students` and `partition` when they are named: `import msdcli` alone loads no torch."""
        if name == "Students":
            from msdcli.engine.sample import Students

            return Students
        if name == "partition":
            return importlib.import_module("msdcli.partition")
        raise AttributeError(f"module 'msdcli' has no attribute {name!r}")
