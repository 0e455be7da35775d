"""The pictures of a report: every class beside teacher and data, and the same noise through every stage."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from msdcli.data.base import Dataset, has_images
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.generator import Generator
from msdcli.engine import pictures, sample
from msdcli.engine.checkpoints.model import is_complete, load_model
from msdcli.engine.distributed import device
from msdcli.engine.inputs import dataset, pairs, stitches
from msdcli.engine.inputs import teacher as teachers
from msdcli.engine.measure import watch
from msdcli.engine.report.facts import RunFacts
from msdcli.engine.tracking.events import silent
from msdcli.engine.tracking.formatting import counted
from msdcli.engine.train.student import new_network
from msdcli.errors import UserError
from msdcli.noise import image_noise
from msdcli.recipe.stages import GeneratorSettings

SIDE = 64  # pixels; larger images are shrunk to it
COLUMNS, FEWEST_COLUMNS = 8, 4  # images in a row
STAGES = 4  # rows of the same noise, about
POINTS = 400  # in a plot
SPAN = 1.25  # of a plot: from -SPAN to SPAN
MOST_CLASSES, MOST_STUDENTS = 60, 24
SEED = 0


@dataclass(frozen=True)
class ImageStrip:
    """Some samples drawn as one picture: `html` is an <img> or <svg> body made here, from numbers alone."""

    what: str
    image: str = ""  # data URI of a PNG
    path: str = ""  # of an SVG, for points in the plane
    columns: int = 1
    size: tuple[int, int] = (100, 100)


@dataclass(frozen=True)
class ClassRow:
    """One class: the data's, the teacher's and the student's samples, as far as there are any."""

    number: int
    strips: list[ImageStrip]


@dataclass(frozen=True)
class Gallery:
    """One student's pictures."""

    student: int
    rows: list[ClassRow]
    left_out: int  # classes
    stages: list[ImageStrip]  # the same noise, from before training to the teacher
    classes: list[int]  # of the images in each of `stages`


@dataclass
class ReportPictures:
    """All pictures of a run, and why some are missing."""

    galleries: list[Gallery] = field(default_factory=list)
    students_left_out: int = 0
    notes: list[str] = field(default_factory=list)
    seed: int = SEED


def draw(facts: RunFacts, *, budget: int) -> ReportPictures:
    """Draw what the run can show in about `budget` bytes. What cannot be drawn is a note, never an error."""
    if facts.partition is None or not facts.record:
        return ReportPictures(notes=["There is nothing to draw before the classes are divided."])
    found = ReportPictures()
    renderer = SampleRenderer(facts, found.notes)
    everyone = facts.partition.parts
    students, columns, per_student = layout([len(part) for part in everyone], renderer.image_bytes, budget)
    parts = everyone[:students]
    found.students_left_out = len(everyone) - students
    chosen = [spread(part, per_student) for part in parts]
    rows = renderer.rows([c for part in chosen for c in part], POINTS if facts.planar else columns)
    for k, (part, some) in enumerate(zip(parts, chosen, strict=True)):
        classes = [some[i % len(some)] for i in range(POINTS if facts.planar else columns)]
        mine, stages = [rows[c] for c in some if rows[c].strips], renderer.stages(k, classes)
        if mine or stages:
            found.galleries.append(Gallery(k, mine, len(part) - len(mine), stages, classes))
    if not found.galleries:
        found.notes.append("There are no samples to draw yet.")
    return found


def layout(parts: Sequence[int], image_bytes: int, budget: int) -> tuple[int, int, int]:
    """Return how many students, images in a row and classes per student fit the budget, in this order of importance.

    A class has three rows, of data, teacher and student; a student some four of the same noise.
    """
    for students in range(min(len(parts), MOST_STUDENTS), 0, -1):
        for columns in (COLUMNS, FEWEST_COLUMNS):
            for per_student in range(max(parts), 0, -1):
                classes = sum(min(per_student, size) for size in parts[:students])
                fits = (3 * classes + STAGES * students) * columns * image_bytes <= budget
                if fits and (classes <= MOST_CLASSES or per_student == 1):
                    return students, columns, per_student
    return 1, FEWEST_COLUMNS, 1


def spread(items: Sequence[int], count: int) -> list[int]:
    """Return `count` of the items, evenly spread, or all."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


class SampleRenderer:
    """A run opened for drawing, as far as its files are there."""

    def __init__(self, facts: RunFacts, notes: list[str]) -> None:
        self.facts, self.notes = facts, notes
        self.recipe, self.run = facts.recipe, facts.run
        self.device = torch.device("cpu")
        self.data: Dataset | None = None
        self.labels: Tensor | None = None  # of all data, asked for once
        self.teacher: Denoiser | None = None
        self.pairs: pairs.Pairs | None = None
        with self._noting("The run's device is not here, so the CPU draws"):
            self.device = device.prepare(self.recipe)
        with self._noting("No real images beside the samples"):
            self.data = dataset.provide(self.run, self.recipe, silent)
            if not dataset.is_as_begun(self.run, self.data):
                self._note("The data have changed since the run was begun: the real images are those of today.")
        if facts.teacher:
            with self._noting("No samples of the teacher"):
                net, sha256 = teachers.load(self.run, self.recipe)
                self.teacher = net.to(self.device)
                if self.data is not None:
                    self.pairs = pairs.Pairs(self.run, self.recipe, self.data, sha256)
        self.students = sample.of_run(self.run, self.device)
        self.newest = {k: self._newest(k) for k in range(len(self.students.folders))}

    @contextmanager
    def _noting(self, what: str) -> Iterator[None]:
        """Turn what is missing or unreadable into a note."""
        try:
            yield
        except UserError as error:
            self._note(f"{what}: {error.message.rstrip('.')}.")
        except OSError as error:
            self._note(f"{what}: {error.strerror or error}.")

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    @property
    def image_bytes(self) -> int:
        shape = self.facts.record["shape"]
        return 1 if len(shape) == 1 else shape[0] * min(SIDE, shape[1]) * min(SIDE, shape[2])

    def rows(self, classes: Sequence[int], count: int) -> dict[int, ClassRow]:
        """Return every class with `count` samples of each kind."""
        assert self.facts.partition is not None
        owner = self.facts.partition.owner
        theirs = self._of_teacher(list(classes), count)
        found = {}
        for i, c in enumerate(classes):
            strips = []
            if self.data is not None and has_images(self.data) and len(real := self._real(c, count)):
                strips.append(draw_strip("data", real))
            if theirs is not None and len(theirs[i]):
                with self._noting("No samples of the teacher"):
                    strips.append(draw_strip("teacher", self.students.decode(theirs[i])))
            if self.newest[owner[c]] is not None:
                drawn = self.students.sample([c] * count, seed=SEED, first=c * count)
                strips.append(draw_strip(f"student {owner[c]}", drawn))
            found[c] = ClassRow(c, strips)
        return found

    def stages(self, number: int, classes: list[int]) -> list[ImageStrip]:
        """Return the same noise through the student before training, after every stage, now, and the teacher."""
        found = []
        for label, generator in self._ages(number):
            self.students.put(number, generator)
            found.append(draw_strip(label, self.students.sample(classes, seed=SEED)))
        if (now := self.newest[number]) is not None:
            self.students.put(number, now)
        if found and self.teacher is not None and (theirs := self._same_noise(classes)) is not None:
            with self._noting("No samples of the teacher"):
                found.append(
                    draw_strip(
                        f"teacher, {counted(self.facts.evaluations, 'evaluation')}", self.students.decode(theirs)
                    )
                )
        return found

    def _newest(self, number: int) -> Generator | None:
        """The student as it is now: finished, or in training; put where samples are drawn from."""
        with self._noting(f"No samples of student {number}"):
            snapshot = watch.newest(self.run, self.recipe, number)
            if snapshot is None:
                return None
            generator, snapshot = watch.load_snapshot(self.run, self.recipe, number, snapshot)
            self.students.put(number, generator)
            if not snapshot.done:
                stage = self.recipe.stages[snapshot.stage].objective
                self.notes.append(f"Student {number} is drawn as it is now: {stage} at step {snapshot.step:,}.")
            return generator
        return None

    def _ages(self, number: int) -> Iterator[tuple[str, Generator]]:
        """Yield a student as it became, with the noise levels of its first stage that makes images or of its own."""
        last = next((tuple(s.sigmas) for s in self.recipe.stages if isinstance(s, GeneratorSettings)), None)
        newest = self.newest[number]
        if last is None or newest is None:
            return
        if (models := self.facts.students[number]) and "kept" in models[-1]:  # nothing of its training is here
            yield f"kept as in {Path(models[-1]['kept']['run']).name}", newest
            return
        with self._noting("The students before training are not drawn"):
            if self.teacher is not None and self.recipe.student.of(number).target is None:
                untrained = new_network(self.recipe, self.teacher, number).eval()
                yield "before training", Generator(untrained, last)
        for i, stage in enumerate(self.recipe.stages):
            folder = self.run.stage(number, i, stage.objective)
            if not is_complete(folder):
                break
            with self._noting(f"Student {number} after {stage.objective} is not drawn"):
                net, description = load_model(folder, base=lambda: load_model(self.run.teacher)[0])
                if "handed_on" in description:  # as it was before the stage
                    continue
                label = f"after {stage.objective}, {counted(description['steps'], 'step')}"
                if isinstance(stage, GeneratorSettings):
                    yield label, Generator(net, tuple(stage.sigmas))
                else:
                    yield f"{label} (no stage that makes images)", Generator(net, last)
        else:
            return
        snapshot = watch.newest(self.run, self.recipe, number)
        if snapshot is not None and not snapshot.done:
            yield f"now: {self.recipe.stages[snapshot.stage].objective}, step {snapshot.step:,}", newest

    def _real(self, c: int, count: int) -> Tensor:
        assert self.data is not None
        if self.labels is None:
            self.labels = self.data.labels(range(len(self.data)))
        return self.data.images((self.labels == c).nonzero().flatten()[:count].tolist())

    def _of_teacher(self, classes: list[int], count: int) -> list[Tensor] | None:
        """Samples that the run keeps as pairs, or new ones where that is cheap."""
        if self.teacher is None or self.pairs is None:
            return None
        with self._noting("No samples of the teacher"):
            kept = self.pairs.examples(self.teacher, classes, count)
            if kept is not None or not self._affordable(len(classes) * count):
                return kept
            z = image_noise(SEED, range(len(classes) * count), self.teacher.shape)
            asked = torch.tensor([c for c in classes for _ in range(count)])
            return list(self._teacher_samples(z, asked).split(count))
        return None

    def _same_noise(self, classes: list[int]) -> Tensor | None:
        assert self.teacher is not None
        if not self._affordable(len(classes) * len(self.students.folders)):
            return None
        z = image_noise(SEED, range(len(classes)), self.teacher.shape)
        return self._teacher_samples(z, torch.tensor(classes))

    def _teacher_samples(self, z: Tensor, classes: Tensor) -> Tensor:
        assert self.teacher is not None
        solver, batch = self.recipe.teacher.solver, self.recipe.evaluation.batch
        stitch = stitches.load(self.run, self.recipe, self.teacher)
        return pairs.sample_teacher(self.teacher, z, classes, solver, batch=batch, stitch=stitch)

    def _affordable(self, images: int) -> bool:
        assert self.teacher is not None
        if pairs.worth_a_look(self.teacher, self.facts.evaluations, images):
            return True
        self._note("Samples of the teacher that the run did not keep are left out: they take this CPU too long.")
        return False


# Samples as PNG or SVG.


def draw_strip(what: str, samples: Tensor) -> ImageStrip:
    """Draw samples [count, *shape]: images in a row, points as one plot."""
    return points(what, samples) if samples.ndim == 2 else images(what, samples)


def images(what: str, samples: Tensor) -> ImageStrip:
    """Draw images [count, channels, height, width] in a row, with a transparent gap between them."""
    if samples.shape[1] not in (1, 3):
        raise UserError(f"samples of {samples.shape[1]} channels are no pictures")
    if max(samples.shape[-2:]) > SIDE:
        scale = SIDE / max(samples.shape[-2:])
        size = [max(1, round(s * scale)) for s in samples.shape[-2:]]
        samples = torch.nn.functional.interpolate(samples, size=size, mode="area")
    pixels = pictures.to_pixels(samples.cpu())
    count, height, width, _ = pixels.shape
    gap = max(1, width // 16)
    canvas = np.zeros((height, count * (width + gap) - gap, 4), np.uint8)
    for i, image in enumerate(pixels):
        canvas[:, i * (width + gap) : i * (width + gap) + width] = np.dstack(
            [image, np.full((height, width), 255, np.uint8)]
        )
    picture = Image.fromarray(canvas)
    if samples.shape[1] == 1:
        picture = picture.convert("LA")
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return ImageStrip(what, image=uri, columns=count, size=picture.size)


def points(what: str, samples: Tensor) -> ImageStrip:
    """Draw points [count, 2] as dots of one SVG path over 0..1000 in both directions."""
    scaled = ((samples.cpu().clamp(-SPAN, SPAN) * torch.tensor([1, -1]) / SPAN + 1) * 500).round().int().tolist()
    return ImageStrip(what, path="".join(f"M{x} {y}h0" for x, y in scaled), size=(1000, 1000))
