"""Give the students away, in one of several formats, each checked against the run's own samples before it is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msdcli import records
from msdcli.diffusion.float32 import exact_float32
from msdcli.engine import sample
from msdcli.engine.checkpoints.model import FORMAT, MODEL
from msdcli.engine.distributed.device import resolve
from msdcli.engine.export import card as export_card
from msdcli.engine.export import speed as export_bench
from msdcli.engine.export.format import (
    EXPORT,
    TOLERANCES,
    ExportOptions,
    ExportResult,
    ExportSource,
    RoutedModels,
    RunStudents,
    compared,
)
from msdcli.engine.measure.feature_metric import FidOptions
from msdcli.engine.tracking.events import Report, silent
from msdcli.errors import UserError, WrongValueError
from msdcli.noise import image_noise, step_noise
from msdcli.outputs import check_folder, replacing, with_files
from msdcli.rundir import RunDir, write_json

FORMATS = ("bundle", "onnx", "torch", "diffusers", "triton")


@exact_float32()  # it is compared with samples of the CPU
def export(
    run: RunDir, folder: Path, kind: str = "bundle", *, options: ExportOptions | None = None, report: Report = silent
) -> dict[str, Any]:
    """Write the students of a finished run to `folder`, which appears when it is complete and checked.

    Returns the record: `max_difference` from the run's samples, `speed`, and at a lower precision the `distance`.
    UserError if the run is not finished, `folder` holds something else or the format cannot take these students;
    MismatchError if the samples differ: then nothing is written.
    """
    options = options or ExportOptions()
    check(run, folder, kind, options)
    students = sample.load(run.root)
    with replacing(folder, check_folder(folder, "export of msd")) as place:
        source = ExportSource(run, students, place, options, report)
        students.partition.save(place / "partition.json")
        exported = _module(kind).write(source)
        record = {
            "format": FORMAT,
            "kind": kind,
            "name": run.root.resolve().name,
            "class_names": students.class_names if students.prompt_router is None else [],
            "shape": list(source.shape),
            "steps": source.steps,
            "students_sha256": [records.trained(f / MODEL)["sha256"] for f in students.folders],
        } | verify(source, exported)
        record |= exported.record
        if options.precision != "float32":
            record |= {"distance": _distance(source, exported)}
        if options.bench and students.prompt_router is None:  # what a prompt costs, msd sample says
            record["speed"] = export_bench.measure(source, exported)
        export_card.write(source, exported, record, folder)
        write_json(place / (sample.BUNDLE if kind == "bundle" else EXPORT), with_files(record, place))
    return record | {"folder": str(folder)}


def folder_name(kind: str, options: ExportOptions) -> str:
    """What an export is called inside a run."""
    apart = (options.precision, "float32"), (options.device.replace(":", "-"), "cpu")
    return "-".join([kind, *(value for value, usual in apart if value != usual)])


def check(run: RunDir, folder: Path, kind: str, options: ExportOptions) -> sample.Students:
    """Raise UserError for what can be known before anything is written."""
    if kind not in FORMATS:
        raise WrongValueError(f"format {kind!r} does not exist: there are {', '.join(FORMATS)}")
    if options.precision not in TOLERANCES:
        raise WrongValueError(f"precision {options.precision!r} does not exist: there are {', '.join(TOLERANCES)}")
    students = sample.load(run.root)
    if students.prompt_router is not None and kind != "bundle":
        raise UserError(f"format {kind} carries no text encoder; these students read prompts", hint="--format bundle")
    if options.precision != "float32" and kind not in ("onnx", "triton"):
        raise UserError(f"format {kind} is float32; {options.precision} is for onnx and triton")
    if options.aot and kind != "torch":
        raise UserError(f"aot is for format torch, not for {kind}")
    if options.device != "cpu":
        if not options.aot:
            raise UserError(
                f"--device {options.device}: only what is compiled ahead of time is for one device; all else is told "
                "where to run when it is opened",
                hint="--format torch --aot",
            )
        if not re.fullmatch(r"cuda(:\d+)?", options.device):
            raise WrongValueError(f"device {options.device!r} does not exist: there are cpu, cuda and cuda:1")
        resolve(options.device)
    check_folder(folder, "export of msd")
    if prepare := getattr(_module(kind), "check", None):
        prepare(students)
    return students


def _module(kind: str) -> Any:
    return importlib.import_module(f"msdcli.engine.export.{kind}")


# What students make, in the run and exported.


class ExportedStudents(sample.Students):
    """The run's students as the exported ones are: their samples are the export's."""

    def __init__(self, students: sample.Students, routed: RoutedModels) -> None:
        how = students.class_names, students.device, students.autoencoder
        super().__init__(students.folders, students.partition, *how)
        self.routed = routed

    def generate(self, number: int, z: Tensor, c: Tensor, noise: Tensor | None = None) -> Tensor:
        between = None if noise is None else noise.cpu().numpy()
        return torch.as_tensor(self.routed.generate(z.cpu().numpy(), c.tolist(), between)).to(z.device)


def verify(source: ExportSource, exported: ExportResult, *, most: int = 256) -> dict[str, Any]:
    """Compare samples of the run and of the export, from the same noise, of every student; MismatchError if they
    differ by more than the tolerance.
    """
    parts = source.students.partition.parts
    each = max(2, min(32, most // len(parts)))
    classes = [part[i * len(part) // each % len(part)] for i in range(each) for part in parts]  # neighbours mixed
    z = image_noise(0, range(len(classes)), source.shape)
    noise = step_noise(0, range(len(classes)), source.shape, source.steps)
    opened, asked = exported.open(None, None), classes
    if source.students.prompt_router is not None and isinstance(
        opened, RunStudents
    ):  # prompts, embedded anew on either side
        prompts = [source.students.class_names[c] for c in classes]
        classes, asked = source.students.numbers(prompts), opened.students.numbers(prompts)
    wanted = RunStudents(source.students).generate(z, classes, noise)
    got = torch.as_tensor(opened.generate(z.numpy(), asked, None if noise is None else noise.numpy()))
    return compared(wanted, got, exported.tolerance)


def _distance(source: ExportSource, exported: ExportResult) -> dict[str, Any] | None:
    """The run's own distance before and after, from as many samples; None where the run was not measured by it."""
    from msdcli.engine.measure import fid

    stored, metrics = [records.measurement(path) for path in source.run.results()], source.run.recipe().own_metrics
    own = next((s for s in stored if s["metric"] in metrics), None)
    count = source.options.samples if source.options.samples is not None else (own or {}).get("samples", 0)
    if own is None or not count:
        return None
    context = fid.EvaluationContext(source.run, FidOptions(samples=count, device="cpu"), source.report)
    reference = context.teacher() if context.planar else context.real()
    values = [
        context.metric.compare(context.students(students), reference, 0, False)[0][context.metric.name]
        for students in (source.students, ExportedStudents(source.students, exported.open(None, None)))
    ]
    names = {"metric": context.metric.name, "protocol": context.metric.protocol, "samples": count}
    return names | {"float32": values[0], source.options.precision: values[1], "change": values[1] - values[0]}
