"""Steps that spend a budget: what a step of every stage costs, counted as plans count it, and how many there may be."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from msdcli.diffusion.denoiser import Denoiser
from msdcli.engine import estimate
from msdcli.engine.frontier.lines import Line, alone_line, own_students, size_of, together
from msdcli.engine.pipeline import check, networks_on_meta
from msdcli.engine.search import searched
from msdcli.engine.tracking.formatting import flop
from msdcli.engine.train.counting import num_parameters
from msdcli.engine.train.student import check_stages
from msdcli.errors import UserError
from msdcli.nets.meta import on_meta
from msdcli.recipe import Recipe
from msdcli.sweep import Cell, RowSettings, Sweep

GRADIENT_BYTES = 4  # of a number, in float32


@dataclass(frozen=True)
class Costs:
    """What training one student costs, stage by stage; of students of different sizes it is their mean."""

    pairs: float  # FLOPs, once for all students
    step: list[float]  # FLOPs of a step
    steps: list[int]  # of the recipe, whose proportion is kept
    gradient_bytes: list[int]  # that a step of one device hands to others, where several share its batch
    parameters: tuple[int, float]  # of the teacher and of a student


def costs(recipe: Recipe) -> Costs:
    """Count a recipe's costs. UserError for what a run would refuse."""
    data = check(recipe, planning=True)
    frozen, students = networks_on_meta(recipe, data, planning=True)
    counted = estimate.estimate(recipe, data, frozen, students)
    with on_meta():
        gradients = [_gradient_bytes(recipe, student, frozen) for student in students]

    def mean(of_size: Sequence[float]) -> float:
        each = zip(recipe.sizes, of_size, strict=True)
        return sum(len(numbers) * value for numbers, value in each) / recipe.partition.students

    return Costs(
        counted.pairs_flops,
        [mean([size.stages[i].flops for size in counted.sizes]) / s.steps for i, s in enumerate(recipe.stages)],
        [stage.steps for stage in recipe.stages],
        [round(mean(of_stage)) for of_stage in zip(*gradients, strict=True)],
        (num_parameters(frozen), mean([*map(num_parameters, students)])),
    )


def fitted(known: Costs, budget: float, students: int) -> list[int]:
    """Return the steps of every stage with which so many students spend a budget of FLOPs, pairs included.

    The stages keep their proportion but for rounding; the last one takes up what that leaves, so that the whole misses
    the budget by half a step of each student at most. UserError where a stage would have none.
    """
    each = (budget - known.pairs) / students
    share = each / sum(cost * steps for cost, steps in zip(known.step, known.steps, strict=True))
    first = [round(share * steps) for steps in known.steps[:-1]]
    spent = sum(cost * steps for cost, steps in zip(known.step, first, strict=False))
    steps = [*first, round((each - spent) / known.step[-1])]
    if min(steps) < 1:
        least = known.pairs + students * max(
            sum(c * s for c, s in zip(known.step, known.steps, strict=True)) / n for n in known.steps
        )
        raise UserError(
            f"frontier: {flop(budget)} buys {students} students no step of every stage ({flop(known.pairs)} of it are "
            "the pairs')",
            hint=f"a budget of {flop(2 * least)} at least, or fewer students",
        )
    return steps


def _gradient_bytes(recipe: Recipe, student: Denoiser, teacher: Denoiser) -> list[int]:
    """Return the bytes of the gradients of all networks' updates in one step of every stage, on average."""
    found = []
    for objective in check_stages(recipe.stages, student, teacher):
        turns = [names for step in range(objective.cycle) for names, _ in objective.turns(step)]
        learnt = sum(num_parameters(objective.nets[name]) for names in turns for name in names)
        found.append(GRADIENT_BYTES * learnt // objective.cycle)
    return found


class CellFactory:
    """Makes the runs of a frontier's lines: their recipes, with steps that are fitted to the line's budget."""

    def __init__(self, sweep: Sweep) -> None:
        assert sweep.settings.frontier is not None
        self.sweep, self.settings = sweep, sweep.settings.frontier
        self._known: dict[tuple[str, int], tuple[Costs, dict[str, int]]] = {}
        self._made: dict[Line, list[Cell]] = {}

    def check(self) -> None:
        """Raise UserError for what any line's run would refuse, before the first one is begun."""
        for size in self.settings.sizes:
            if searched(self.cells(alone_line(size, 0))[0].recipe):
                raise UserError(
                    f"frontier: {size.label} is a target, and every run would find a network of its own for it",
                    hint="name the network: student.width and student.depth, or student.network",
                )
        several = [together(self.settings, size, range(1)) for size in self.settings.sizes]
        for line in itertools.chain(*several):
            self.keys(line)  # does the first budget buy steps?
        for line in next(filter(None, several), []):  # the data can be divided so in every size, or in none
            check(self.cells(line)[0].recipe, planning=True)

    def cells(self, line: Line) -> list[Cell]:
        """Return a line's runs, one per seed."""
        if line not in self._made:
            keys = self.keys(line)
            self._made[line] = [self._cell(line, keys, seed) for seed in self.sweep.settings.seeds]
            steps = [keys[f"stages.{i}.steps"] for i in range(len(self.costs(line).step))]
            if [stage.steps for stage in self._made[line][0].recipe.stages] != steps:
                raise UserError("frontier: a stage that stands for several cannot be fitted to a budget")
        return self._made[line]

    def keys(self, line: Line) -> dict[str, int]:
        """Return the recipe keys that a line adds to its size's: students, batches, and the fitted steps."""
        known, batches = self._of_one(line)
        steps = fitted(known, self.budget(line), line.students)
        return {"partition.students": line.students, **batches} | {f"stages.{i}.steps": n for i, n in enumerate(steps)}

    def budget(self, line: Line) -> float:
        """Return a line's FLOPs."""
        return float(self.settings.budget * 2**line.doubling)

    def costs(self, line: Line) -> Costs:
        """Return what a student of a line's size and batch costs."""
        return self._of_one(line)[0]

    def _of_one(self, line: Line) -> tuple[Costs, dict[str, int]]:
        key = (line.size, line.batch_factor)
        if key not in self._known:
            count = own_students(size_of(self.settings, line)) or 1
            alone, batches = {"partition.students": count}, dict[str, int]()
            plain = self._cell(line, alone, self.sweep.settings.seeds[0]).recipe
            for i, stage in enumerate(plain.stages) if line.batch_factor > 1 else ():
                batches[f"stages.{i}.batch"] = stage.batch * line.batch_factor
                if (pairs := getattr(stage, "pair_batch", None)) is not None:
                    batches[f"stages.{i}.pair_batch"] = pairs * line.batch_factor
            self._known[key] = costs(self._cell(line, alone | batches, self.sweep.settings.seeds[0]).recipe), batches
        return self._known[key]

    def _cell(self, line: Line, keys: dict[str, int], seed: int) -> Cell:
        size = size_of(self.settings, line)
        return self.sweep.cell(RowSettings(label=line.label, recipe=size.recipe, set=size.set | keys), seed)
