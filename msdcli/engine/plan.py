"""What `msd distill` would do and cost, after checking all of it; nothing is written.

Neither weights nor data need to be here: the networks have no memory, and what is missing is listed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from msdcli.data import survey
from msdcli.data.base import Dataset, has_images
from msdcli.data.folder import PictureFiles
from msdcli.data.opening import is_there
from msdcli.data.survey import Survey
from msdcli.diffusion.denoiser import Denoiser
from msdcli.engine import estimate, search
from msdcli.engine.inputs import hub, stitches
from msdcli.engine.pipeline import check, networks_on_meta
from msdcli.engine.timing import Timing, timing
from msdcli.engine.tracking.formatting import counted, named_students, size
from msdcli.engine.train.counting import DEVICE, num_parameters
from msdcli.engine.train.student import new_network
from msdcli.nets.meta import on_meta
from msdcli.recipe import Recipe
from msdcli.recipe.data import FolderSettings, PromptsSettings
from msdcli.recipe.pair_stages import PairedSettings
from msdcli.rundir import RunDir, write_json

AN_ESTIMATE = "an estimate, from one step of each kind; busy machines and tiny networks can take twice as long"
OWN_PAIRS = 500  # of a student, with which it was measured to be closer than with those of all: each of five had 820


@dataclass(frozen=True)
class Plan:
    """A run that is not begun: what it is made from, what it would cost, and what must be fetched first."""

    recipe: Recipe
    images: int
    has_images: bool
    shape: tuple[int, ...]
    conditions: int
    latent_shape: tuple[int, ...] | None
    parameters: tuple[int, list[int]]  # of the teacher, and of a student of each size
    solver: str
    embedding_bytes: int
    cost: estimate.Estimate
    resumes: bool
    missing: list[str]
    timing: Timing
    pictures: Survey | None = None
    searched: bool = False  # the student's network, which the recipe names by a target, is known

    def lines(self) -> list[str]:
        """Return the plan for people."""
        recipe = self.recipe
        steps = " -> ".join(f"{s.objective} ({counted(s.steps, 'step')} of {s.batch:,})" for s in recipe.stages)
        conditions = counted(self.conditions, *(("prompt",) if recipe.has_prompts else ("class", "classes")))
        made = f"{recipe.data.label}, {counted(self.images, 'image' if self.has_images else 'row')} of "
        made += f"{list(self.shape)} in {conditions}"
        made += " to train on" if self.pictures is not None and self.pictures.held_out else ""
        if recipe.data.name == "none":
            made = f"none: {conditions} of {list(self.shape)}, which are the teacher's"
        embeddings = f"prompts:   {size(self.embedding_bytes)} of embeddings"
        return [
            f"data:      {made}",
            *(f"           {line}" for line in ([] if self.pictures is None else self.pictures.lines())),
            *([] if self.latent_shape is None else [f"latents:   {list(self.latent_shape)} of every picture"]),
            f"teacher:   {recipe.teacher.path or 'trained or reused'}, {self.parameters[0]:,} parameters",
            f"solver:    {self.solver}",
            f"partition: {recipe.partition.method}, {counted(recipe.partition.students, 'student')}",
            *self._students(steps),
            *([embeddings] if recipe.has_prompts else []),
            f"time:      {self.timing.line()}",
            *([] if self.timing.why_not else [f"           {AN_ESTIMATE}"]),
            *estimate.lines(self.cost),
            f"run:       {RunDir(recipe.run_dir).root}{' (exists: would resume)' if self.resumes else ''}",
            *(f"missing:   {line}" for line in self.missing),
            *(f"look:      {line}" for line in remarks(recipe, self.pictures)),
        ]

    def _students(self, steps: str) -> list[str]:
        """Say what the students that are trained are, a line for each size, and how; and which ones are kept."""
        known = zip(self.cost.sizes, self.parameters[1], strict=True)
        sizes = [(size.trained, own) for size, own in known if size.trained]
        kept = {*range(self.recipe.partition.students)}.difference(*(numbers for numbers, _ in sizes))
        more = [f"{named_students([*kept])}: as in {self.recipe.partition.run}"] if kept else []
        if len(sizes) == 1:
            first = f"{self._size(*sizes[0])}{self._adapted()}; {steps}"
        else:
            first, more = steps, [*(f"{named_students(n)}: {self._size(n, own)}" for n, own in sizes), *more]
        return [f"students:  {first}", *(f"           {line}" for line in more)]

    def _size(self, numbers: Sequence[int], own: int) -> str:
        """Say how large a student is, or may be where its network is searched when the run starts."""
        settings, of_teacher = self.recipe.student.of(numbers[0]), self.parameters[0]
        each = " each" if len(numbers) > 1 else ""
        if settings.target is None or self.searched:
            return f"{counted(own, 'parameter')}{each}"
        share = f"at most {settings.target:.0%} of the teacher's"
        size = f"parameters ({settings.target * of_teacher:,.0f})" if settings.parameters else "latency"
        return f"{share} {size}{each}, searched when the run starts and counted here as one of {own:,} parameters"

    def _sizes_json(self) -> list[dict[str, Any]]:
        """The sizes for scripts; `flops` are of training a student of each."""
        known = zip(self.recipe.sizes, self.parameters[1], self.cost.sizes, strict=True)
        return [
            {
                "students": [*numbers],
                "parameters": own,
                "exact": self.searched or self.recipe.student.of(numbers[0]).target is None,
                "stages": [asdict(stage) for stage in cost.stages],
                "flops": cost.flops,
            }
            for numbers, own, cost in known
        ]

    def _adapted(self) -> str:
        adapter = self.recipe.student.adapter
        return "" if adapter is None else f", adapters of rank {adapter.rank} on the teacher's own weights"

    def to_json(self) -> dict[str, Any]:
        """Return the plan for scripts; hours are of the device that `hours_of` names."""
        recipe, cost = self.recipe, self.cost
        sizes = self._sizes_json()
        parts = {name: getattr(cost, f"{name}_flops") for name in ("teacher", "pairs", "students", "evaluation")}
        flops = parts | {"student": cost.students_flops / cost.students, "all": cost.flops}
        return {
            "run": str(RunDir(recipe.run_dir).root),
            "resumes": self.resumes,
            "data": {"name": recipe.data.name, "images": self.images, "shape": self.shape, "classes": self.conditions},
            "teacher": {
                "path": recipe.teacher.path,
                "parameters": self.parameters[0],
                "evaluations": recipe.teacher.solver.evaluations,
            },
            "partition": {"method": recipe.partition.method, "students": recipe.partition.students},
            "student": {name: sizes[0][name] for name in ("parameters", "exact", "stages")},
            "sizes": sizes,
            "flops": flops,
            "device_hours": {name: estimate.device_hours(value) for name, value in flops.items()},
            "hours_of": DEVICE,
            "here": self.timing.to_json(),
            "embedding_bytes": self.embedding_bytes,
            "missing": self.missing,
            "pictures": None if self.pictures is None else self.pictures.to_json(),
            "recipe": recipe.dump(),
        }


def plan(recipe: Recipe) -> Plan:
    """Check everything and count what it costs. UserError for what the user can fix."""
    data, seen = look(recipe)
    run = RunDir(recipe.run_dir)
    if run.recipe_file.exists():
        run.check(recipe)
    frozen, students = _networks(recipe, data)
    stitch = stitches.on_meta(recipe, frozen)
    cost = estimate.estimate(recipe, data, frozen, students, stitch)
    return Plan(
        recipe=recipe,
        images=len(data),
        has_images=has_images(data),
        shape=tuple(data.shape),
        conditions=len(data.class_names),
        latent_shape=None if frozen.shape == tuple(data.shape) else frozen.shape,
        parameters=(num_parameters(frozen), [*map(num_parameters, students)]),
        solver=estimate.solver_line(recipe.teacher.solver, frozen, stitch),
        embedding_bytes=_embedding_bytes(recipe, frozen, data) if recipe.has_prompts else 0,
        cost=cost,
        resumes=run.is_of(recipe),
        missing=missing(recipe),
        timing=timing(recipe, data, frozen, students, cost),
        pictures=seen,
        searched=_found(recipe) is not None,
    )


def note_flops(recipe: Recipe) -> None:
    """Count what the parts of a run cost and leave it in the run, where watch and status weigh what is left by it."""
    data = check(recipe, planning=True)
    cost = estimate.estimate(recipe, data, *_networks(recipe, data))
    counted_sizes = [
        {"students": [*numbers], "stages": [stage.flops for stage in size.stages]}
        for numbers, size in zip(recipe.sizes, cost.sizes, strict=True)
    ]
    write_json(RunDir(recipe.run_dir).flops_file, {"teacher": cost.teacher_flops, "sizes": counted_sizes})


def _networks(recipe: Recipe, data: Dataset) -> tuple[Denoiser, list[Denoiser]]:
    """The teacher and a student of each size without memory; where a student's network is searched, the one that was
    found, or one that stands for it.
    """
    frozen, students = networks_on_meta(recipe, data, planning=True)
    if not search.searched(recipe):
        return frozen, students
    known = _found(recipe) or search.stand_in(recipe, frozen)
    with on_meta():
        return frozen, [new_network(known, frozen, numbers[0]) for numbers in recipe.sizes]


def _found(recipe: Recipe) -> Recipe | None:
    """The recipe with the networks that its run has searched; None where it has not yet."""
    run = RunDir(recipe.run_dir)
    return search.settled(run, recipe) if run.is_of(recipe) else None


def look(recipe: Recipe) -> tuple[Dataset, Survey | None]:
    """Check a recipe as far as data and teacher are here, and look at its pictures. UserError for what a run would
    refuse.
    """
    settings = recipe.data.pictures if isinstance(recipe.data, PromptsSettings) else recipe.data
    seen = None
    if isinstance(settings, FolderSettings) and is_there(settings.path):
        seen = survey.check(PictureFiles(settings))
    return check(recipe, planning=True), seen


def is_here(path: str) -> bool:
    """Whether the data at a path are here to be looked at."""
    return is_there(path)


def remarks(recipe: Recipe, seen: Survey | None) -> list[str]:
    """Return what deserves a look in a recipe and its pictures."""
    trained = recipe.teacher.path is None
    of_pictures = [] if seen is None else seen.remarks(recipe.teacher.sigma_data if trained else None)
    return [*of_pictures, *_of_pairs(recipe)]


def _of_pairs(recipe: Recipe) -> list[str]:
    """What K students that are only taught by pairs should have: those of their own classes, where they are many."""
    each = recipe.pairs.count // recipe.partition.students
    if recipe.partition.students == 1 or each < OWN_PAIRS:
        return []
    taught = [s.objective for s in recipe.stages if isinstance(s, PairedSettings) and s.pairs == "shared"]
    return [
        f"stage {objective} teaches every student the pairs of all classes; `pairs: filtered` those of its own, some "
        f"{each:,} each, which brought five students of digits closer (msd docs objective)"
        for objective in taught
    ]


def _embedding_bytes(recipe: Recipe, frozen: Denoiser, data: Dataset) -> int:
    """What the prompts' vectors take on the disk (the pooled ones are a hundredth of them)."""
    assert isinstance(recipe.data, PromptsSettings)
    numbers = len(data.class_names) * int(math.prod(frozen.settings.prompt_shape))
    return numbers * (2 if recipe.data.embeddings == "float16" else 4)


def missing(recipe: Recipe) -> list[str]:
    """Return a line for everything that must be fetched before the run can start."""
    sections = [("teacher", recipe.teacher, "path"), ("data", recipe.data, "path"), ("pictures", recipe.data, "images")]
    wanted = [(what, getattr(s, name, None), getattr(s, "source", None)) for what, s, name in sections]
    here = {path for _, path, _ in wanted if path is not None and (hub.cached(path) or is_there(path))}
    return [
        f"{what} {path}: the run downloads it; {hub.by_hand(path)}"
        if hub.is_hub(path)
        else f"{what} {path}: put it there, from {source or 'wherever it is (the recipe names no source)'}"
        for what, path, source in wanted
        if path is not None and path not in here
    ]
