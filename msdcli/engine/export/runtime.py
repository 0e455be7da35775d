"""Samples by ONNX Runtime on a CPU: a program per student, made when it is first asked, checked, and kept with the run.

A program is kept under a name that all that decides it goes into: the weights, the network, the noise levels, the steps
asked for, the versions of what wrote it. Those of other weights of the same student make room when one is written.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from msdcli import records
from msdcli.diffusion.generator import Generator
from msdcli.engine import sample
from msdcli.engine.checkpoints.model import MODEL, WEIGHTS, is_complete, predicts
from msdcli.engine.distributed.device import resolve
from msdcli.engine.export.format import EXPORT, TOLERANCES, compared
from msdcli.engine.tracking.events import Report, silent
from msdcli.errors import MismatchError, UserError, WrongValueError
from msdcli.foreign import versions
from msdcli.nets.adapters import merged
from msdcli.noise import image_noise, step_noise
from msdcli.outputs import PROGRAMS, check_folder, check_unchanged, files_in, listed, replacing, with_files
from msdcli.rundir import discard, file_hash, key, lock, write_json

if TYPE_CHECKING:
    from collections.abc import Mapping

Runtime = Literal["torch", "onnx"]
PROGRAM = "model.onnx"
FORMAT = 1  # goes up where the same student becomes another program
COMPARED = 16  # samples of a program and of its network

# unit noise [n, *shape], classes [n], unit noise between steps or None -> images
Program = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def device(wanted: str, runtime: str) -> torch.device:
    """Return the device of that name; `auto` is the CPU to ONNX Runtime."""
    return resolve("cpu" if (wanted, runtime) == ("auto", "onnx") else wanted)


def load(
    source: Path | str,
    device: torch.device | str = "cpu",
    *,
    steps: int | None = None,
    runtime: str = "torch",
    report: Report = silent,
) -> sample.Students:
    """Open the students of a run directory or of a bundle, evaluated by torch or, on a CPU, by ONNX Runtime.

    UserError as `sample.load`'s, and where ONNX Runtime cannot evaluate these students, or not there.
    """
    if runtime not in get_args(Runtime):
        raise WrongValueError(f"runtime {runtime!r} does not exist: there are {', '.join(get_args(Runtime))}")
    students = sample.load(source, device, steps=steps)
    if runtime == "torch":
        return students
    check(students)
    return OnnxStudents(students, Path(source) / PROGRAMS, report)


def check(students: sample.Students) -> None:
    """Raise UserError where ONNX Runtime cannot evaluate these students, or is not there."""
    if students.device.type != "cpu":
        raise UserError("runtime onnx is for the CPU; a GPU is torch's", hint="--device cpu, or --runtime torch")
    if students.prompt_router is not None:
        raise UserError("these students read prompts, and a program carries no text encoder", hint="--runtime torch")
    from msdcli.engine.export import onnx  # with torch's exporter, which takes a moment

    onnx.check(students)


class OnnxStudents(sample.Students):
    """Students whose networks run as ONNX programs, kept in `folder`; all else is theirs: noise, routes, pictures.

    Where its program is there, a student's weights are not loaded.
    """

    runtime = "onnx"

    def __init__(self, students: sample.Students, folder: Path, report: Report = silent) -> None:
        what = students.folders, students.partition, students.class_names, students.device, students.autoencoder
        super().__init__(*what, max_resident=students.max_resident, batch=students.batch, base=students.base)
        self.steps, self.folder, self.report = students.steps, folder, report
        self._programs: dict[int, Program] = {}

    def put(self, number: int, generator: Generator) -> None:
        """Use this generator as student `number`: the program of another one is forgotten."""
        super().put(number, generator)
        self._programs.pop(number, None)

    def generate(self, number: int, z: Tensor, c: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return what student `number`'s program makes, as `Students.generate` returns the network's."""
        if number not in self._programs:
            self._programs[number] = self._kept(number)
            self._loaded.pop(number, None)  # the network was needed to write and check it
        return self.resident(self._programs, number)(z, c, noise)

    def _kept(self, number: int) -> Program:
        """Open student `number`'s program; written, and compared with the network, where there is none yet."""
        decides = self._decides(number)
        place = self.folder / f"{number}-{key(decides)}"
        with lock(self.folder, "the students' programs", wait=self.report):
            if not (own := check_folder(place, "program of msd")):
                self.report(f"student {number}: its ONNX program is written and checked; it is kept in {self.folder}")
                with replacing(place, own) as made:
                    self._write(number, decides, made)
                self._make_room(number, place)
        return opened(place / PROGRAM, _record(place)["max_batch"])

    def _decides(self, number: int) -> dict[str, Any]:
        """Return all that a student's program depends on. UserError where its files are not here."""
        from msdcli.engine.export import onnx

        folder = self.folders[number]
        if not is_complete(folder):
            raise UserError(f"student {number} is not finished: {folder} holds no model")
        description = records.model(folder / MODEL)
        return {
            "format": FORMAT,
            "weights": file_hash(folder / WEIGHTS),
            "network": predicts(dict(description)),
            "adapter": description.get("adapter"),
            "anchor": description.get("anchor"),
            "sigmas": list(self.levels(number, description))[: self.steps],
            "opset": onnx.OPSET,
            "versions": versions("msdcli", "torch", "onnx", "onnxscript", "onnxruntime"),
        }

    def _write(self, number: int, decides: Mapping[str, Any], made: Path) -> None:
        generator = self.student(number)
        generator = replace(generator, net=merged(generator.net))
        largest = write(generator, made / PROGRAM, f"student {number}")
        found = self._check(number, generator, opened(made / PROGRAM, largest))
        record = {"student": number, "max_batch": largest, "decided_by": decides} | found
        write_json(made / EXPORT, with_files(record, made))

    def _check(self, number: int, generator: Generator, written: Program) -> dict[str, Any]:
        """Compare samples of a program with the network's. MismatchError where they differ by more than an export's
        may: far less than a grey level.
        """
        part, shape = self.partition.parts[number], generator.net.shape
        c = torch.tensor([part[i % len(part)] for i in range(COMPARED)])
        z, noise = image_noise(0, range(COMPARED), shape), step_noise(0, range(COMPARED), shape, generator.steps)
        with torch.no_grad():
            wanted = generator(z, c, noise)
        try:
            return compared(wanted, written(z, c, noise), TOLERANCES["float32"])
        except MismatchError as error:
            raise MismatchError(f"student {number}, runtime onnx: {error}") from None

    def _make_room(self, number: int, kept: Path) -> None:
        """Remove the student's programs of other weights, where nothing but what msd wrote is in their folders."""
        weights = _record(kept)["decided_by"]["weights"]
        for old in self.folder.glob(f"{number}-*"):
            own = listed(old)
            if old == kept or own is None or not set(files_in(old)) <= own.keys():
                continue
            with contextlib.suppress(UserError, KeyError, TypeError):
                check_unchanged(old, own)
                if _record(old)["decided_by"]["weights"] != weights:
                    discard(old)


def in_memory(students: sample.Students) -> OnnxStudents:
    """Return students of whom those in memory run as programs that are written nowhere to stay."""
    check(students)
    by_onnx = OnnxStudents(students, Path())
    for number, generator in students._loaded.items():
        by_onnx.put(number, generator)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / PROGRAM
            by_onnx._programs[number] = opened(path, write(generator, path, f"student {number}"))
    return by_onnx


def _record(folder: Path) -> dict[str, Any]:
    """Return what is said of a program, after `check_folder` has found it to be what msd wrote."""
    said: dict[str, Any] = json.loads((folder / EXPORT).read_text(encoding="utf-8"))
    return said


def write(generator: Generator, path: Path, who: str) -> int:
    """Write a student as an ONNX program; return the largest batch that it takes. UserError where its network does not
    become one.
    """
    from msdcli.engine.export import onnx
    from msdcli.engine.export.torch import max_batch, program

    try:
        onnx.write_graph(program(generator), path, "float32")
    except UserError:
        raise
    except Exception as error:  # torch's exporter and onnx raise almost anything
        said = str(error).strip().splitlines()
        raise UserError(
            f"{who}: the network does not become an ONNX program ({said[0] if said else type(error).__name__})",
            hint="--runtime torch",
        ) from error
    return max_batch(generator.net)


def opened(path: Path, largest: int) -> Program:
    """Open a program on the CPU, with as many threads as torch has; larger batches go in pieces."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def piece(z: Tensor, c: Tensor, noise: Tensor | None) -> Tensor:
        given = {"z": z.numpy(), "labels": c.numpy()} | ({} if noise is None else {"noise": noise.numpy()})
        return torch.from_numpy(session.run(["images"], given)[0])

    def run(z: Tensor, c: Tensor, noise: Tensor | None) -> Tensor:
        at = [slice(i, i + largest) for i in range(0, len(z), largest)]
        return torch.cat([piece(z[i], c[i], None if noise is None else noise[i]) for i in at])

    return run
