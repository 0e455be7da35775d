"""The seam between an export and its formats: what one is written from, what it answers with, what several share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from msdcli import records
from msdcli.diffusion.generator import Generator
from msdcli.engine import sample
from msdcli.engine.checkpoints.model import MODEL
from msdcli.engine.export.given import students as router
from msdcli.engine.tracking.events import Report
from msdcli.errors import MismatchError
from msdcli.nets.adapters import merged
from msdcli.rundir import RunDir, file_hash, write_json

EXPORT = "export.json"
# The largest difference from the run's samples, of images in [-1, 1]; where samples are larger, in proportion.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "int8": 0.25, "int8-static": 0.5}


@dataclass(frozen=True)
class ExportOptions:
    """How students are exported: `memory` is in bytes, `samples` those of the distance at a lower precision."""

    precision: str = "float32"
    aot: bool = False
    max_resident: int | None = None
    memory: int | None = None
    bench: bool = True
    samples: int | None = None
    license: str | None = None
    device: str = "cpu"  # what is compiled ahead of time for


@dataclass(frozen=True)
class ExportSource:
    """What a format is written from: the run's students, and the folder that is being built."""

    run: RunDir
    students: sample.Students
    folder: Path
    options: ExportOptions
    report: Report

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what a student makes."""
        return tuple(records.model(self.students.folders[0] / MODEL)["shape"])

    @property
    def steps(self) -> int:
        """Network evaluations per image; all students of a run have as many."""
        return self.students.student(0).steps

    def each(self) -> Iterator[Generator]:
        """Give every student, one after the other: of adapters and their base the network that they make together."""
        for k in range(len(self.students.folders)):
            self.report(f"student {k} of {len(self.students.folders)}")
            generator = self.students.student(k)
            yield replace(generator, net=merged(generator.net))


class RoutedModels(Protocol):
    """An exported folder that has been opened: every class goes to its student."""

    def generate(self, z: Any, classes: Sequence[int], noise: Any = None) -> Any: ...

    def sample(self, classes: Sequence[int]) -> Any: ...


@dataclass(frozen=True)
class ExportResult:
    """What a format wrote: how to open it (with at most so many students, so many bytes), and what is said of it.

    `usage` is Python that samples from it, for the card. Where not `limited`, all students are always in memory.
    """

    open: Callable[[int | None, int | None], RoutedModels]
    usage: str
    record: dict[str, Any] = field(default_factory=dict)
    tolerance: float = TOLERANCES["float32"]
    library: str = "msdcli"
    limited: bool = True


class RunStudents:
    """The run's students (or a bundle's) for unit noise that is given."""

    def __init__(self, students: sample.Students) -> None:
        self.students = students

    def generate(self, z: Any, classes: Sequence[int], noise: Any = None) -> Tensor:
        z = torch.as_tensor(z)
        images, c = torch.empty(z.shape), torch.tensor(classes)
        between = None if noise is None else torch.as_tensor(noise)
        for number, at in self.students.route(classes).items():
            with torch.no_grad():
                own = None if between is None else between[at]
                images[at] = self.students.generate(number, z[at], c[at], own).cpu()
        return images

    def sample(self, classes: Sequence[int]) -> Tensor:
        return self.students.sample(classes)


def compared(wanted: Tensor, got: Tensor, tolerance: float) -> dict[str, Any]:
    """Return how far samples of an export are from the run's; MismatchError where it is more than the tolerance."""
    difference = (got - wanted).abs().max().item()
    allowed = tolerance * max(1.0, wanted.abs().max().item())
    if not difference <= allowed:  # not a number is no agreement
        raise MismatchError(
            f"the exported students differ from the run's by {difference:.3g}; allowed is {allowed:.3g}. "
            "Nothing was written"
        )
    return {"max_difference": difference, "tolerance": allowed, "compared": len(wanted)}


# The router that travels along.


def with_router(
    source: ExportSource, kind: str, files: Sequence[Path], record: dict[str, Any], *, tolerance: float | None = None
) -> ExportResult:
    """Put the router beside the models: a file of Python that reads export.json and partition.json."""
    shutil.copyfile(router.__file__, source.folder / "students.py")
    record = {"students": described(source, files)} | record
    needed = {"shape": list(source.shape), "class_names": source.students.class_names, "kind": kind}
    needed |= {"steps": source.steps} | record
    write_json(source.folder / EXPORT, needed)  # what the router needs; the whole record follows
    return ExportResult(
        open=lambda most, memory: router.Students(source.folder, max_resident=most, memory=memory),
        usage=_usage(source),
        record=record,
        tolerance=TOLERANCES[source.options.precision] if tolerance is None else tolerance,
        library={"torch": "torch"}.get(kind, kind),
    )


def described(source: ExportSource, files: Sequence[Path]) -> list[dict[str, Any]]:
    """What the record says of every student: its file, the bytes of its folder, its hash."""
    return [
        {"file": str(file.relative_to(source.folder)), "bytes": _size(file.parent), "sha256": file_hash(file)}
        for file in files
    ]


def _usage(source: ExportSource) -> str:
    last = len(source.students.class_names) - 1
    return (
        'import sys\n\nsys.path.insert(0, "{folder}")\nfrom students import Students\n\n'
        f"students = Students()  # max_resident=2 bounds what is held at once\n"
        f"images = students.sample([0, {last}], seed=0)  # float32 [2, {', '.join(map(str, source.shape))}]\n"
        "print(images.shape, students.class_names)\n"
    )


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
