"""Multi-student distillation: one conditional diffusion teacher, K one-step students.

The verbs of the command line as functions, which import torch when they are called:

    import msdcli

    run = msdcli.distill("digits", student={"width": 0.5}, report=True)
    images = msdcli.sample(run, [3, 7], seed=0)         # float32 [2, 1, 8, 8] in [-1, 1]
    print(msdcli.fid(run).whole("students"))
    msdcli.export(run, "onnx", out="given")

What a user can put right is raised as `UserError`, before anything is written.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from msdcli.errors import UserError

if TYPE_CHECKING:
    import torch

    from msdcli.engine.measure.rows import Measurement
    from msdcli.engine.pipeline import DistillResult
    from msdcli.engine.sample import Students
    from msdcli.engine.tracking.events import Report
    from msdcli.recipe import Recipe

__all__ = ["Students", "UserError", "distill", "export", "fid", "load", "sample"]

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


def load(source: Source, device: str | torch.device = "cpu", *, steps: int | None = None) -> Students:
    """Open the students of a run or of an exported bundle: `load(run).sample(classes=[3, 7], seed=0)`."""
    from msdcli.engine import sample as engine

    return engine.load(Path(source), device, steps=steps)


def sample(
    run: Source,
    classes: Sequence[int | str],
    *,
    seed: int = 0,
    batch: int | None = None,
    steps: int | None = None,
    device: str = "auto",
) -> torch.Tensor:
    """Return one sample per class number or name, float32 [len(classes), *shape]; `steps`: with fewer evaluations."""
    from msdcli.engine.distributed.device import resolve

    return load(run, resolve(device), steps=steps).sample(classes, seed=seed, batch=batch)


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
    options["groups"] = tuple(options.get("groups", ()))
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
    precision, aot, max_resident, memory (bytes), bench, samples, license.
    """
    from msdcli.engine.export import export as engine
    from msdcli.engine.export.format import ExportOptions
    from msdcli.rundir import RunDir

    _known(options, ExportOptions.__dataclass_fields__, "export")
    chosen, directory = ExportOptions(**options), RunDir(Path(run))
    with _reporting(report) as tell:
        target = directory.export / engine.folder_name(format, chosen) if out is None else Path(out)
        return engine.export(directory, target, format, options=chosen, report=tell)


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


def __getattr__(name: str) -> Any:
    """Import `Students` when it is named: `import msdcli` alone loads no torch."""
    if name == "Students":
        from msdcli.engine.sample import Students

        return Students
    raise AttributeError(f"module 'msdcli' has no attribute {name!r}")
