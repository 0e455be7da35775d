"""How long a run would take on this machine: a step of every stage, and an evaluation of each network, taken here."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from msdcli.data.base import Dataset
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.float32 import fast_float32
from msdcli.diffusion.guidance import unguided
from msdcli.engine.distributed import device
from msdcli.engine.estimate import Estimate, StageCost, StudentCost
from msdcli.engine.measure.classifier import TRAINING
from msdcli.engine.measure.rows import MAX_CLASSES
from msdcli.engine.tracking.formatting import plural, roughly
from msdcli.engine.train.counting import with_memory
from msdcli.engine.train.precision import timed
from msdcli.engine.train.student import with_teachers
from msdcli.engine.train.trial import Mode, RandomDraws, StageTrainer, resized
from msdcli.errors import UserError
from msdcli.nets.classifier import Classifier
from msdcli.nets.meta import without_first_weights
from msdcli.recipe import Recipe
from msdcli.recipe.stages import StageSettings

SECONDS = 0.2  # of measuring each kind of work, or one piece of it where that takes longer
# Operations that a laptop's CPU does in about half a second; a network that needs more for one image forth and back is
# none for a CPU.
PASS = 1e10
ROW_SECONDS = 0.3  # of a line of the table: 100 resamples of 64 features


@dataclass(frozen=True)
class Timing:
    """The seconds that the parts of a run would take on a `device` of this machine, or why nobody can say."""

    device: str
    seconds: dict[str, float]
    why_not: str | None = None
    students: int = 2

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def line(self) -> str:
        if self.why_not is not None:
            return f"no minutes: {self.why_not}"
        names = {"students": plural(self.students, "student")}
        told = {names.get(part, part): seconds for part, seconds in self.seconds.items() if seconds >= 1}
        parts = ", ".join(f"{part} {roughly(seconds)}" for part, seconds in told.items())
        return f"about {roughly(self.total)} on this machine ({self.device}): {parts or 'next to nothing'}"

    def to_json(self) -> dict[str, Any]:
        if self.why_not is not None:
            return {"device": self.device, "minutes": None, "why_not": self.why_not}
        minutes = {part.replace(" ", "_"): seconds / 60 for part, seconds in self.seconds.items()}
        return {"device": self.device, "minutes": minutes | {"all": self.total / 60}, "why_not": None}


def timing(recipe: Recipe, data: Dataset, teacher: Denoiser, students: Sequence[Denoiser], cost: Estimate) -> Timing:
    """Measure the networks, which are on the meta device, for a moment and say how long all of the run would take;
    `students` are one of each size.
    """
    try:
        on = device.prepare(recipe)
    except UserError as error:
        return Timing(recipe.device, {}, error.message)
    if (why_not := _too_large(unguided(teacher), cost.evaluation, on)) is not None:
        return Timing(str(on), {}, why_not)
    teacher = with_memory(teacher).to(on)
    rate = evaluation_rate(unguided(teacher), on, cost.evaluation, recipe.evaluation.batch)
    learning, drawing = dict[int, float](), 0.0
    for student, size in zip(students, cost.sizes, strict=True):
        each, of_image = _of_student(recipe, teacher, student, size, cost, rate, on)
        learning |= dict.fromkeys(size.trained, each)
        drawing += size.share * of_image
    seconds = {
        "teacher": _of_teacher(recipe, teacher, cost, rate, on),
        "its samples": (cost.pairs_flops + cost.more_flops) / rate,
        "students": _side_by_side([learning[k] for k in sorted(learning)], device.num_workers(recipe, on)),
    }
    if recipe.has_measure:
        seconds["measuring"] = _measuring(recipe, data, drawing, on)
    return Timing(str(on), seconds, students=cost.students)


def _of_student(
    recipe: Recipe,
    teacher: Denoiser,
    student: Denoiser,
    size: StudentCost,
    cost: Estimate,
    rate: float,
    on: torch.device,
) -> tuple[float, float]:
    """Seconds of training a student of one size, whose teacher does so many operations a second, and of one of its
    samples.
    """
    alike = student.settings == teacher.settings and cost.evaluation == size.evaluation
    student = with_memory(student).to(on)
    own = rate if alike else evaluation_rate(student, on, size.evaluation, recipe.evaluation.batch)
    stages = zip(with_teachers(recipe.stages, student, teacher), size.stages, strict=True)
    learning = sum(stage_seconds(stage, student, by, one, on, recipe) for (stage, by), one in stages)
    return learning + size.selection_flops / own, recipe.stages[-1].evaluations * size.evaluation / own


def _side_by_side(each: Sequence[float], together: int) -> float:
    """Seconds until the last student is finished, where so many train at once and the next free one is taken up as
    soon as one has ended.
    """
    ends = [0.0] * together
    for seconds in each:
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends)


def _of_teacher(recipe: Recipe, teacher: Denoiser, cost: Estimate, rate: float, on: torch.device) -> float:
    """Seconds of the teacher's training, of its stages and of their samples."""
    settings, plain = recipe.teacher, unguided(teacher)
    trained: list[tuple[StageSettings, Denoiser | None]] = [] if settings.path else [(settings.training, None)]
    stages = trained + [(stage, plain) for stage in settings.stages]
    sampled = cost.teacher_flops - sum(one.flops for one in cost.teacher)
    return sampled / rate + sum(
        stage_seconds(stage, plain, by, one, on, recipe) for (stage, by), one in zip(stages, cost.teacher, strict=True)
    )


def _too_large(network: Denoiser, evaluation: float, on: torch.device) -> str | None:
    """Why a network cannot be measured in a moment; None where it can."""
    if network.reads_text:
        return "networks that read prompts are not measured by a plan; msd bench measures them"
    if on.type == "cpu" and 3 * evaluation > PASS:
        return "the networks are for a GPU, and the run would have this machine's CPU"
    return None


def _measuring(recipe: Recipe, data: Dataset, drawing: float, on: torch.device) -> float:
    """Seconds of the classifier, of drawing the students' samples, each of so many, and of the table."""
    classes, parts = len(data.class_names), recipe.partition.students
    trained = classifier_seconds(tuple(data.shape), classes, on) if len(data.shape) == 3 else 0.0
    return trained + recipe.evaluation.samples * drawing + table_seconds(classes, parts)


def table_seconds(classes: int, students: int) -> float:
    """Seconds of the table's lines: of teacher and students, whole, by student and by class."""
    return 2 * ROW_SECONDS * (1 + (students if students > 1 else 0) + (classes if classes <= MAX_CLASSES else 0))


def classifier_seconds(shape: tuple[int, ...], classes: int, on: torch.device) -> float:
    """How long the classifier trains by which a run is measured: one of its steps, taken here, times their number."""
    with without_first_weights(on):
        net = Classifier(shape, classes)
    for parameter in net.parameters():
        torch.nn.init.zeros_(parameter)

    batch = TRAINING.batch // 4

    def step() -> None:
        net(torch.zeros(batch, *shape, device=on)).square().mean().backward()

    return _least(lambda: timed(step, on), on) * TRAINING.batch / batch * TRAINING.steps


def stage_seconds(
    stage: StageSettings,
    student: Denoiser,
    teacher: Denoiser | None,
    cost: StageCost,
    on: torch.device,
    recipe: Recipe | None = None,
) -> float:
    """Return the seconds of all of a stage's steps: of the gradients of one with random images, made here at the
    stage's batch or what of it fits into a moment. (Optimizers take little beside them, and seconds to import.)
    """
    limit = (None if recipe is None else recipe.micro_batch) or stage.batch
    size = _fitting(cost.flops / stage.steps / stage.batch, min(stage.batch, limit))
    trainer = StageTrainer(resized(stage, size), teacher, student, on)
    if recipe is not None and recipe.precision == "bf16":
        trainer.enter(Mode("bf16"))
    draws = RandomDraws(student, size, on)
    with fast_float32():
        return stage.steps * stage.batch / size * _least(lambda: trainer.update(draws, learns=False)["update"], on)


@torch.no_grad()
def evaluation_rate(net: Denoiser, on: torch.device, flops: float, batch: int) -> float:
    """Return how many operations a second this device does while it evaluates a network of so many an image."""
    size = _fitting(8 * flops, batch)
    x, sigma = torch.randn(size, *net.shape, device=on), torch.ones(size, device=on)
    condition = torch.zeros(size, dtype=torch.int64, device=on)
    with fast_float32():
        return size * flops / _least(lambda: timed(lambda: net(x, sigma, condition), on), on)


def _fitting(flops: float, batch: int) -> int:
    """Return the batch, or what is left of it after it was halved until its operations fit into a moment."""
    while batch > 1 and batch * flops > 2 * PASS:
        batch = (batch + 1) // 2
    return batch


def _least(clocked: Callable[[], float], on: torch.device) -> float:
    """Return the least seconds that a clock says in a moment, of one time at least: on a CPU counting warms up."""
    if on.type != "cpu":
        clocked()
    begun, found = time.perf_counter(), [clocked()]
    while time.perf_counter() - begun < SECONDS:
        found.append(clocked())
    return min(found)
