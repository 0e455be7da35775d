"""How long a run would take on this machine: its operations, at the speed that a moment of training shows here."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from msdcli.data.base import Dataset
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.float32 import fast_float32
from msdcli.diffusion.guidance import unguided
from msdcli.engine.distributed import device
from msdcli.engine.estimate import Estimate
from msdcli.engine.measure.classifier import TRAINING
from msdcli.engine.measure.rows import MAX_CLASSES
from msdcli.engine.tracking.formatting import roughly
from msdcli.engine.train.counting import FlopCounter, with_memory
from msdcli.engine.train.precision import synchronize, timed
from msdcli.errors import UserError
from msdcli.nets.adapters import AdaptedDenoiser
from msdcli.nets.classifier import Classifier
from msdcli.nets.meta import without_first_weights
from msdcli.recipe import Recipe

SECONDS = 0.5  # of measuring, after a pass that warms up
# Operations of a pass forth and back that a laptop's CPU does in about half a second; a network that needs more for one
# image is none for a CPU.
PASS = 1e10
ROW_SECONDS = 0.3  # of a line of the table: 100 resamples of 64 features


@dataclass(frozen=True)
class Timing:
    """The seconds that the parts of a run would take on a `device` of this machine, or why nobody can say."""

    device: str
    seconds: dict[str, float]
    why_not: str | None = None

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def line(self) -> str:
        if self.why_not is not None:
            return f"no minutes: {self.why_not}"
        parts = ", ".join(f"{part} {roughly(seconds)}" for part, seconds in self.seconds.items() if seconds >= 1)
        return f"about {roughly(self.total)} on this machine ({self.device}): {parts or 'next to nothing'}"

    def to_json(self) -> dict[str, Any]:
        if self.why_not is not None:
            return {"device": self.device, "minutes": None, "why_not": self.why_not}
        minutes = {part.replace(" ", "_"): seconds / 60 for part, seconds in self.seconds.items()}
        return {"device": self.device, "minutes": minutes | {"all": self.total / 60}, "why_not": None}


def timing(recipe: Recipe, data: Dataset, teacher: Denoiser, student: Denoiser, cost: Estimate) -> Timing:
    """Measure the networks, which are on the meta device, for a moment and say how long all of the run would take."""
    try:
        on = device.prepare(recipe)
    except UserError as error:
        return Timing(recipe.device, {}, error.message)
    network = unguided(teacher)
    of_teacher, of_student = cost.evaluation
    if (why_not := _too_large(network, of_teacher, on)) is not None:
        return Timing(str(on), {}, why_not)
    rate = measured_rate(with_memory(network), on, _batch(of_teacher, recipe.teacher.training.batch), SECONDS)
    of_students = rate
    if not isinstance(student, AdaptedDenoiser) and of_student != of_teacher:
        of_students = measured_rate(with_memory(student), on, _batch(of_student, recipe.stages[-1].batch), SECONDS)
    count, together = cost.students, device.num_workers(recipe, on)
    seconds = {"teacher": cost.teacher_flops / rate, "its samples": (cost.pairs_flops + cost.more_flops) / rate}
    seconds["students"] = math.ceil(count / together) * cost.student_flops / of_students
    if recipe.has_measure:
        seconds["measuring"] = _measuring(recipe, data, cost, of_students, on)
    return Timing(str(on), seconds)


def _too_large(network: Denoiser, evaluation: float, on: torch.device) -> str | None:
    """Why a network cannot be measured in a moment; None where it can."""
    if network.reads_text:
        return "networks that read prompts are not measured by a plan; msd bench measures them"
    if on.type == "cpu" and 3 * evaluation > PASS:
        return "the networks are for a GPU, and the run would have this machine's CPU"
    return None


def _batch(evaluation: float, wanted: int) -> int:
    """Return how many images fit into a moment."""
    return max(1, min(wanted, int(PASS / (3 * evaluation))))


def _measuring(recipe: Recipe, data: Dataset, cost: Estimate, rate: float, on: torch.device) -> float:
    """Seconds of the classifier, of drawing the students' samples and of the table."""
    classes, parts = len(data.class_names), recipe.partition.students
    lines = 1 + (parts if parts > 1 else 0) + (classes if classes <= MAX_CLASSES else 0)
    trained = classifier_seconds(tuple(data.shape), classes, on) if len(data.shape) == 3 else 0.0
    return trained + (cost.evaluation_flops - cost.more_flops) / rate + 2 * lines * ROW_SECONDS


def classifier_seconds(shape: tuple[int, ...], classes: int, on: torch.device) -> float:
    """How long the classifier trains by which a run is measured: one of its steps, taken here, times their number."""
    with without_first_weights(on):
        net = Classifier(shape, classes)
    for parameter in net.parameters():
        torch.nn.init.zeros_(parameter)

    def step(batch: int) -> None:
        net(torch.zeros(batch, *shape, device=on)).square().mean().backward()

    step(2)  # warms up
    return timed(lambda: step(TRAINING.batch), on) * TRAINING.steps


def measured_rate(net: Denoiser, device: torch.device, batch: int, seconds: float) -> float:
    """Return how many operations a second this device does while it trains such a network: measured for some `seconds`,
    with noise for images. All weights of the network get gradients, a given teacher's too, and stay as they are.
    """
    net = net.to(device).requires_grad_(True)
    x, sigma = torch.randn(batch, *net.shape, device=device), torch.ones(batch, device=device)
    condition = torch.zeros(batch, dtype=torch.int64, device=device)

    def step() -> None:
        with fast_float32():
            net(x, sigma, condition).square().mean().backward()

    with FlopCounter() as counter:
        step()  # warms up, too
    synchronize(device)
    begun, steps = time.perf_counter(), 0
    while not steps or time.perf_counter() - begun < seconds:
        step()
        synchronize(device)
        steps += 1
    return float(counter.total * steps) / (time.perf_counter() - begun)
