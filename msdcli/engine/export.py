"""Give the students away, in one of several formats, each checked against the run's own samples before it is there."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.draws import image_noise
from msdcli.engine import checkpoint, export_bench, export_card, sample
from msdcli.engine.events import Report, silent
from msdcli.engine.given import students as router
from msdcli.errors import MismatchError, UserError
from msdcli.rundir import RunDir, building, file_hash, read_json, write_json

FORMATS = ("bundle", "onnx", "torch", "diffusers", "triton")
EXPORT = "export.json"
# The largest difference from the run's samples, of images in [-1, 1]; where samples are larger, in proportion.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "int8": 0.25}


@dataclass(frozen=True)
class Options:
    """How students are exported: `memory` is in bytes, `samples` those of the distance at a lower precision."""

    precision: str = "float32"
    aot: bool = False
    max_resident: int | None = None
    memory: int | None = None
    bench: bool = True
    samples: int | None = None
    license: str | None = None


@dataclass(frozen=True)
class Given:
    """What a format is written from: the run's students, and the folder that is being built."""

    run: RunDir
    students: sample.Students
    folder: Path
    options: Options
    report: Report

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what a student makes."""
        return tuple(read_json(self.students.folders[0] / checkpoint.MODEL)["shape"])

    def each(self) -> Iterator[tuple[Denoiser, float]]:
        """Give every student and its noise level, one after the other."""
        for k in range(len(self.students.folders)):
            self.report(f"student {k} of {len(self.students.folders)}")
            yield self.students.student(k)


class Routed(Protocol):
    """An exported folder that has been opened: every class goes to its student."""

    def generate(self, z: Any, classes: Sequence[int]) -> Any: ...

    def sample(self, classes: Sequence[int]) -> Any: ...


@dataclass(frozen=True)
class Written:
    """What a format wrote: how to open it (with at most so many students, so many bytes), and what is said of it.

    `usage` is Python that samples from it, for the card. Where not `limited`, all students are always in memory.
    """

    open: Callable[[int | None, int | None], Routed]
    usage: str
    record: dict[str, Any] = field(default_factory=dict)
    tolerance: float = TOLERANCES["float32"]
    library: str = "msdcli"
    limited: bool = True


def export(
    run: RunDir, folder: Path, kind: str = "bundle", *, options: Options | None = None, report: Report = silent
) -> dict[str, Any]:
    """Write the students of a finished run to `folder`, which appears when it is complete and checked.

    Returns the record: `max_difference` from the run's samples, `speed`, and at a lower precision the `distance`.
    UserError if the run is not finished, `folder` holds something else or the format cannot take these students;
    MismatchError if the samples differ: then nothing is written.
    """
    options = options or Options()
    check(run, folder, kind, options)
    students = sample.load(run.root)
    with building(folder) as place:
        given = Given(run, students, place, options, report)
        students.partition.save(place / "partition.json")
        written = _module(kind).write(given)
        record = {
            "format": checkpoint.FORMAT,
            "kind": kind,
            "name": run.root.resolve().name,
            "class_names": students.class_names if students.desk is None else [],
            "shape": list(given.shape),
            "students_sha256": [read_json(f / checkpoint.MODEL)["sha256"] for f in students.folders],
        } | verify(given, written)
        record |= written.record
        if options.precision != "float32":
            record |= {"distance": _distance(given, written)}
        if options.bench and students.desk is None:  # what a prompt costs, msd sample says
            record["speed"] = export_bench.measure(given, written)
        write_json(place / (sample.BUNDLE if kind == "bundle" else EXPORT), record)
        export_card.write(given, written, record, folder)
    return record | {"folder": str(folder)}


def folder_name(kind: str, options: Options) -> str:
    """What an export is called inside a run."""
    return kind if options.precision == "float32" else f"{kind}-{options.precision}"


def check(run: RunDir, folder: Path, kind: str, options: Options) -> sample.Students:
    """Raise UserError for what can be known before anything is written."""
    if kind not in FORMATS:
        raise UserError(f"format {kind!r} does not exist: there are {', '.join(FORMATS)}")
    if options.precision not in TOLERANCES:
        raise UserError(f"precision {options.precision!r} does not exist: there are {', '.join(TOLERANCES)}")
    students = sample.load(run.root)
    if students.desk is not None and kind != "bundle":
        raise UserError(f"format {kind} carries no text encoder; these students read prompts", hint="--format bundle")
    if options.precision != "float32" and kind not in ("onnx", "triton"):
        raise UserError(f"format {kind} is float32; {options.precision} is for onnx and triton")
    if options.aot and kind != "torch":
        raise UserError(f"--aot is for format torch, not for {kind}")
    if folder.exists() and not _is_export(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is no export of msd: nothing was written", hint="--out another folder")
    if prepare := getattr(_module(kind), "check", None):
        prepare(students)
    return students


def _is_export(folder: Path) -> bool:
    return (folder / sample.BUNDLE).is_file() or (folder / EXPORT).is_file()


def _module(kind: str) -> Any:
    return importlib.import_module(f"msdcli.engine.export_{kind}")


# What students make, in the run and exported.


class OfRun:
    """The run's students (or a bundle's) for unit noise that is given."""

    def __init__(self, students: sample.Students) -> None:
        self.students = students

    def generate(self, z: Any, classes: Sequence[int]) -> Tensor:
        z = torch.as_tensor(z)
        images, c = torch.empty(z.shape), torch.tensor(classes)
        for number, at in self.students.route(classes).items():
            with torch.no_grad():
                images[at] = self.students.generate(number, z[at], c[at]).cpu()
        return images

    def sample(self, classes: Sequence[int]) -> Tensor:
        return self.students.sample(classes)


class Through(sample.Students):
    """The run's students as the exported ones are: their samples are the export's."""

    def __init__(self, students: sample.Students, routed: Routed) -> None:
        how = students.class_names, students.device, students.autoencoder
        super().__init__(students.folders, students.partition, *how)
        self.routed = routed

    def generate(self, number: int, z: Tensor, c: Tensor) -> Tensor:
        return torch.as_tensor(self.routed.generate(z.cpu().numpy(), c.tolist())).to(z.device)


def verify(given: Given, written: Written, *, most: int = 256) -> dict[str, Any]:
    """Compare samples of the run and of the export, from the same noise, of every student; MismatchError if they
    differ by more than the tolerance.
    """
    parts = given.students.partition.parts
    each = max(2, min(32, most // len(parts)))
    classes = [part[i * len(part) // each % len(part)] for i in range(each) for part in parts]  # neighbours mixed
    z = image_noise(0, range(len(classes)), given.shape)
    opened, asked = written.open(None, None), classes
    if given.students.desk is not None and isinstance(opened, OfRun):  # prompts, embedded anew on either side
        prompts = [given.students.class_names[c] for c in classes]
        classes, asked = given.students.numbers(prompts), opened.students.numbers(prompts)
    wanted = OfRun(given.students).generate(z, classes)
    got = torch.as_tensor(opened.generate(z.numpy(), asked))
    difference = (got - wanted).abs().max().item()
    allowed = written.tolerance * max(1.0, wanted.abs().max().item())
    if not difference <= allowed:  # not a number is no agreement
        raise MismatchError(
            f"the exported students differ from the run's by {difference:.3g}; allowed is {allowed:.3g}. "
            "Nothing was written"
        )
    return {"max_difference": difference, "tolerance": allowed, "compared": len(classes)}


def _distance(given: Given, written: Written) -> dict[str, Any] | None:
    """The run's own distance before and after, from as many samples; None where the run was not measured by it."""
    from msdcli.engine import fid

    stored = [read_json(path) for path in given.run.results()]
    own = next((s for s in stored if s["metric"].startswith(("fd_", "l1_"))), None)
    count = given.options.samples if given.options.samples is not None else (own or {}).get("samples", 0)
    if own is None or not count:
        return None
    scene = fid.Scene(given.run, fid.Options(samples=count, device="cpu"), given.report)
    reference = scene.teacher() if scene.planar else scene.real()
    values = [
        scene.judge.compare(scene.students(students), reference, 0, False)[0][scene.judge.metric]
        for students in (given.students, Through(given.students, written.open(None, None)))
    ]
    names = {"metric": scene.judge.metric, "protocol": scene.judge.protocol, "samples": count}
    return names | {"float32": values[0], given.options.precision: values[1], "change": values[1] - values[0]}


# The router that travels along.


def with_router(
    given: Given, kind: str, files: Sequence[Path], record: dict[str, Any], *, tolerance: float | None = None
) -> Written:
    """Put the router beside the models: a file of Python that reads export.json and partition.json."""
    shutil.copyfile(router.__file__, given.folder / "students.py")
    record = {"students": described(given, files)} | record
    needed = {"shape": list(given.shape), "class_names": given.students.class_names, "kind": kind} | record
    write_json(given.folder / EXPORT, needed)  # what the router needs; the whole record follows
    return Written(
        open=lambda most, memory: router.Students(given.folder, max_resident=most, memory=memory),
        usage=_usage(given),
        record=record,
        tolerance=TOLERANCES[given.options.precision] if tolerance is None else tolerance,
        library={"torch": "torch"}.get(kind, kind),
    )


def described(given: Given, files: Sequence[Path]) -> list[dict[str, Any]]:
    """What the record says of every student: its file, the bytes of its folder, its hash."""
    return [
        {"file": str(file.relative_to(given.folder)), "bytes": _size(file.parent), "sha256": file_hash(file)}
        for file in files
    ]


def _usage(given: Given) -> str:
    last = len(given.students.class_names) - 1
    return (
        'import sys\n\nsys.path.insert(0, "{folder}")\nfrom students import Students\n\n'
        f"students = Students()  # max_resident=2 bounds what is held at once\n"
        f"images = students.sample([0, {last}], seed=0)  # float32 [2, {', '.join(map(str, given.shape))}]\n"
        "print(images.shape, students.class_names)\n"
    )


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
