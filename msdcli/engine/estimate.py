"""What a run will cost before it starts: the stages' own losses, run once without weights, and counted."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from msdcli.data.base import Dataset
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.guidance import Guided, unguided
from msdcli.diffusion.sampler import evaluated_levels
from msdcli.diffusion.stitch import Stitch
from msdcli.engine.distributed.group import SINGLE_PROCESS, slices
from msdcli.engine.tracking.formatting import counted, named_students
from msdcli.engine.tracking.formatting import size as in_bytes
from msdcli.engine.train.counting import (
    DEVICE,
    PEAK_FLOPS,
    UTILISATION,
    FlopCounter,
    MetaDraws,
    for_counting,
    forward_flops,
    num_parameters,
    turn_bytes,
)
from msdcli.engine.train.student import with_teachers
from msdcli.nets.meta import without_first_weights
from msdcli.objectives import Objective, objective_class
from msdcli.recipe import Recipe
from msdcli.recipe.solver import SolverSettings
from msdcli.recipe.stages import GeneratorSettings, StageSettings
from msdcli.rundir import RunDir

# Of every number that learns: weight and Adam's two moments. Gradients are there while a network's turn lasts.
LEARNING_BYTES, FROZEN_BYTES = 12, 4


@dataclass(frozen=True)
class StageCost:
    """What one student's stage needs: floating-point operations in all, bytes on the device."""

    objective: str
    flops: float
    state_bytes: int  # weights, optimizers and the average, all the time
    turn_bytes: int  # at most, gradients, activations and samples in one pass of a turn

    @property
    def peak_bytes(self) -> int:
        """The most that tensors take at once."""
        return self.state_bytes + self.turn_bytes


@dataclass(frozen=True)
class StudentCost:
    """What each student of one size needs: its stages, and what it is measured with while it trains."""

    stages: list[StageCost]
    trained: Sequence[int]  # the students of this size that the run trains
    selection_flops: float = 0.0
    evaluation: float = 0.0  # operations of one evaluation of one image
    share: float = 1.0  # of the images that a run is measured by

    @property
    def flops(self) -> float:
        return sum(stage.flops for stage in self.stages) + self.selection_flops


@dataclass(frozen=True)
class Estimate:
    """The cost of a run, part by part; `sizes` are the recipe's, in its order."""

    teacher_flops: float
    pairs_flops: float
    sizes: list[StudentCost]
    evaluation_flops: float
    more_flops: float = 0.0  # of evaluation_flops, those of the teacher's samples that are no pairs
    evaluation: float = 0.0  # operations of one evaluation of one image by the teacher without guidance
    teacher: Sequence[StageCost] = ()  # of teacher_flops: its training, where it is trained, and its stages

    @property
    def flops(self) -> float:
        """Operations of the whole run."""
        return self.teacher_flops + self.pairs_flops + self.students_flops + self.evaluation_flops

    @property
    def students_flops(self) -> float:
        """Operations of training all students."""
        return sum(size.flops * len(size.trained) for size in self.sizes)

    @property
    def students(self) -> int:
        """How many students the run trains."""
        return sum(len(size.trained) for size in self.sizes)


def estimate(
    recipe: Recipe, data: Dataset, teacher: Denoiser, students: Sequence[Denoiser], stitch: Stitch | None = None
) -> Estimate:
    """Count what a run will cost; `students` are one of each size. All networks are on the meta device."""
    training = recipe.teacher.training
    largest = max(stage.batch for stage in (training, *recipe.stages))
    small = [for_counting(net, largest) for net in (teacher, *students)]
    if all(net is not meta for net, meta in zip(small, (teacher, *students), strict=True)):
        teacher, *students = small
    sampling, teaching = sampling_flops(recipe.teacher.solver, teacher, stitch), _teacher_costs(recipe, teacher)
    sizes = _student_costs(recipe, teacher, students)
    # Where a run measures nothing, nothing is drawn to be measured.
    samples = recipe.evaluation.samples if recipe.has_measure else 0
    more = max(0, samples - (recipe.pairs.count if recipe.needs_pairs else 0))
    return Estimate(
        teacher_flops=sum(stage.flops for stage in teaching)
        + len(recipe.teacher.stages) * recipe.pairs.count * sampling,  # each with the samples of its reference
        pairs_flops=float(recipe.pairs.count * sampling) if recipe.needs_pairs else 0.0,
        sizes=sizes,
        evaluation_flops=samples * recipe.stages[-1].evaluations * sum(size.share * size.evaluation for size in sizes)
        + float(more * sampling),
        more_flops=float(more * sampling),
        evaluation=float(forward_flops(unguided(teacher))),
        teacher=teaching,
    )


def _student_costs(recipe: Recipe, teacher: Denoiser, students: Sequence[Denoiser]) -> list[StudentCost]:
    """What students of every size need each."""
    found, trained = [], set(trained_students(recipe))
    for numbers, student in zip(recipe.sizes, students, strict=True):
        forward = forward_flops(student)
        stages = [
            stage_cost(stage, student, own, recipe.micro_batch)
            for stage, own in with_teachers(recipe.stages, student, teacher)
        ]
        selection = float(sum(map(_measured, recipe.stages)) * forward)
        own = [k for k in numbers if k in trained]
        found.append(StudentCost(stages, own, selection, float(forward), share_of(recipe, numbers)))
    return found


def share_of(recipe: Recipe, numbers: Sequence[int]) -> float:
    """The share of the classes that some students have, as far as a recipe tells: parts are of one size but for one
    class, unless it lists them.
    """
    parts = recipe.partition.parts
    each = [1] * recipe.partition.students if parts is None else [len(part) for part in parts]
    return sum(each[k] for k in numbers) / sum(each)


def trained_students(recipe: Recipe) -> list[int]:
    """Return the students that a run trains: those that it keeps from another are not."""
    parts = recipe.partition
    if parts.method != "extend":
        return [*range(parts.students)]
    before = RunDir(Path(str(parts.run))).recipe().partition.students
    return sorted({*parts.retrain, *range(before, parts.students)})


def _teacher_costs(recipe: Recipe, teacher: Denoiser) -> list[StageCost]:
    """What the teacher's training needs, where it is trained, and each of its stages."""
    settings, plain = recipe.teacher, unguided(teacher)
    trained = [] if settings.path else [stage_cost(settings.training, plain, None, recipe.micro_batch)]
    return trained + [stage_cost(stage, copy.deepcopy(plain), plain, recipe.micro_batch) for stage in settings.stages]


def sampling_flops(solver: SolverSettings, teacher: Denoiser, stitch: Stitch | None = None) -> float:
    """Operations of one of the teacher's samples: of both branches at guided noise levels, of one at others; of small
    networks where they are stitched to it, on average over the conditions.
    """
    high, low = _split(solver, stitch)
    above = [] if stitch is None else stitch.shares(teacher)
    return _flops_at(teacher, low) + sum(share * _flops_at(net, high) for net, share in above)


def _split(solver: SolverSettings, stitch: Stitch | None) -> tuple[list[float], list[float]]:
    """Return the noise levels of a solver's evaluations that are the small networks', and the teacher's."""
    levels = evaluated_levels(**solver.record())
    above = math.inf if stitch is None else stitch.above
    return [s for s in levels if s > above], [s for s in levels if not s > above]


def _flops_at(net: Denoiser, levels: list[float]) -> float:
    if not isinstance(net, Guided):
        return float(len(levels) * forward_flops(net)) if levels else 0.0
    guided = int(net.inside(torch.tensor(levels)).sum())
    return float(guided * forward_flops(net) + (len(levels) - guided) * forward_flops(net.plain))


def solver_line(solver: SolverSettings, teacher: Denoiser, stitch: Stitch | None = None) -> str:
    """Return what a plan says of the solver."""
    order = solver.record().get("order")
    text = f"{solver.name}{f' of order {order}' if order else ''}, {counted(solver.steps, 'noise level')} from "
    text += f"{solver.sigma_max:g} to {solver.sigma_min:g}, {counted(solver.evaluations, 'evaluation')}"
    high, low = _split(solver, stitch)
    if stitch is not None:
        text += f", {len(high)} of them (above {stitch.above:g}) by small networks"
    if not isinstance(teacher, Guided):
        return text
    guided = int(teacher.inside(torch.tensor(low)).sum())
    return f"{text}, {guided} of {'them' if stitch is None else 'the rest'} guided: of both branches"


def _measured(stage: StageSettings) -> int:
    """Return how often a stage evaluates the student to select the best of its averages."""
    if not isinstance(stage, GeneratorSettings) or stage.select is None:
        return 0
    return stage.select.samples * stage.select.count(stage.steps) * stage.evaluations


def stage_cost(
    stage: StageSettings, student: Denoiser, teacher: Denoiser | None, micro_batch: int | None = None
) -> StageCost:
    """Run a stage's turns where the networks are, in passes of at most `micro_batch` images, and count them.

    That is one step, or the few after which the same operations come again.
    """
    passes = len(slices(stage.batch, getattr(stage, "pair_batch", None), SINGLE_PROCESS, micro_batch))
    device = next(student.parameters()).device.type
    draws, peak = MetaDraws(student.shape, stage.batch, passes, device), 0
    with without_first_weights(device):
        objective = objective_class(stage.objective)(stage, student, teacher)
    counted: dict[tuple[Any, ...], list[int]] = {}
    for step in range(objective.cycle):
        draws.step = step
        for names, loss in objective.turns(step):
            known = counted.setdefault((names, loss.__name__, step), [])
            if len(known) > 1:  # the first may make what later ones share; from the second on they are alike
                known.append(known[-1])
                continue
            with torch.device(device), FlopCounter() as counter:
                peak = max(peak, turn_bytes(objective, names, loss, draws, passes=passes))
            known.append(counter.total)
    return StageCost(
        objective=stage.objective,
        flops=float(sum(map(sum, counted.values())) * passes * stage.steps) / objective.cycle,
        state_bytes=_state_bytes(objective, teacher),
        turn_bytes=peak,
    )


def _state_bytes(objective: Objective, teacher: Denoiser | None) -> int:
    """Learning networks with their optimizers, the moving average, the frozen teacher and what else is held frozen."""
    nets, held = objective.nets, [getattr(objective, name) for name in objective.frozen]
    frozen = [nets[objective.product], *held, *([] if teacher is None else [teacher])]
    return LEARNING_BYTES * sum(map(num_parameters, nets.values())) + FROZEN_BYTES * sum(map(num_parameters, frozen))


def device_hours(flops: float) -> float:
    """Hours of the device that the estimate is stated at."""
    return flops / (PEAK_FLOPS * UTILISATION) / 3600


def _hours(flops: float) -> str:
    """Say the hours of a GPU, where they are any."""
    hours = device_hours(flops)
    return f"{hours:11,.2f} device-hours" if hours >= 0.005 else ""


def _each(numbers: Sequence[int]) -> str:
    return named_students(numbers) if len(numbers) == 1 else f"each of {named_students(numbers)}"


def _named_stages(sizes: Sequence[StudentCost]) -> list[tuple[str, StageCost]]:
    """The stages of every size, each with what it is called."""
    return [
        (stage.objective if len(sizes) == 1 else f"{_each(size.trained)}, {stage.objective}", stage)
        for size in sizes
        for stage in size.stages
    ]


def lines(cost: Estimate) -> Sequence[str]:
    """Return the estimate as lines to print."""
    rows = [("teacher", cost.teacher_flops), ("pairs", cost.pairs_flops)]
    trained = [size for size in cost.sizes if size.trained]
    for size in trained:
        whose = "one student" if len(trained) == 1 else _each(size.trained)
        rows += [(f"{whose}, {stage.objective}", stage.flops) for stage in size.stages]
        rows += [(f"{whose}, select", size.selection_flops)]
    rows += [("evaluation", cost.evaluation_flops), (f"all, {counted(cost.students, 'student')}", cost.flops)]
    wide = max(len(what) for what, flops in rows if flops)
    told = [f"{what:<{wide}} {flops:9.3g} FLOP{_hours(flops)}" for what, flops in rows if flops]
    memory = [
        f"{what:<{wide}} {in_bytes(stage.peak_bytes):>13} ({in_bytes(stage.state_bytes)} networks and optimizers, "
        f"{in_bytes(stage.turn_bytes)} gradients and activations)"
        for what, stage in _named_stages(trained)
    ]
    hours = f"; hours at {UTILISATION:.0%} of {PEAK_FLOPS / 1e12:g} TFLOP/s ({DEVICE})" if _hours(cost.flops) else ""
    return [
        f"cost:      counted from one step of every stage{hours}",
        *(f"           {line}" for line in told),
        "memory:    of one student's training in float32, without libraries' workspaces; micro_batch cuts activations",
        *(f"           {line}" for line in memory),
    ]
