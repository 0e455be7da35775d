"""A student on its way through the stages, each of which inherits the networks of the one before."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from msdcli import nets, records
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.draws import Draws, Source
from msdcli.diffusion.float32 import fast_float32, fast_name
from msdcli.diffusion.guidance import copied, unguided
from msdcli.engine.checkpoints import files as checkpoint_files
from msdcli.engine.checkpoints import storage
from msdcli.engine.checkpoints.files import DamagedError
from msdcli.engine.checkpoints.model import MODEL, is_complete, load_model, save_model
from msdcli.engine.distributed.device import seeded_apart
from msdcli.engine.distributed.group import SINGLE_PROCESS, ProcessGroup
from msdcli.engine.distributed.sharding import shard
from msdcli.engine.tracking.events import Report
from msdcli.engine.train import compiling, precision
from msdcli.engine.train.loop import TrainOptions, train
from msdcli.engine.train.passes import Part, Passes
from msdcli.engine.train.selection import LAST_AVERAGE, AverageSelection, BestAverage, StudentEvaluator
from msdcli.errors import UserError
from msdcli.nets.adapters import AdaptedDenoiser, merged
from msdcli.nets.prune import keep_blocks, prune
from msdcli.objectives import Objective, objective_class
from msdcli.recipe import Recipe
from msdcli.recipe.networks import PrunedUNetSettings, UNetSettings
from msdcli.recipe.stages import GeneratorSettings, StageSettings, teacher_stage
from msdcli.recipe.student import AdapterSettings
from msdcli.rundir import building, read_json, write_json, writing
from msdcli.seeds import derive, generator

NO_COST = {"seconds": 0.0, "images": 0.0, "flops": 0.0, "peak_bytes": 0}  # of what was not trained here


@dataclass(frozen=True)
class Student:
    """What one student is trained from."""

    number: int
    recipe: Recipe
    teacher: Denoiser
    source: Source
    folders: list[Path]  # one per stage
    device: torch.device
    group: ProcessGroup = SINGLE_PROCESS
    evaluator: Callable[[GeneratorSettings], StudentEvaluator] | None = (
        None  # of what it makes; only where a stage selects
    )


def new_network(recipe: Recipe, teacher: Denoiser, number: int) -> Denoiser:
    """Return a student as its first stage finds it, with the weights that `student.init` asks for."""
    own = recipe.student.of(number)
    settings, init = own.network_for(teacher.settings), own.init
    if own.prune is not None and not isinstance(teacher.settings, UNetSettings):
        raise UserError(
            f"student.prune: layers is for U-Nets of kind unet, the teacher is of kind {teacher.settings.kind}",
            hint="leave student.prune out: a network of fewer channels and blocks is searched",
        )
    if own.adapter is not None:
        return _adapted(recipe, own.adapter, teacher, number)
    if init == "teacher" and settings != teacher.settings:
        raise UserError("student.init: teacher is for students with the teacher's network", hint="student.init=pruned")
    if settings == teacher.settings and init != "random":
        return copy.deepcopy(teacher).requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator("network", recipe.seed, number).initial_seed())
        student = nets.build_like(settings, teacher)
    student.to(next(teacher.parameters()).device)
    student.prompts = teacher.prompts
    if init == "auto" and isinstance(settings, PrunedUNetSettings):
        keep_blocks(unguided(teacher), student)
    if init == "pruned":
        prune(unguided(teacher), student)
    return student


def _adapted(recipe: Recipe, adapter: AdapterSettings, teacher: Denoiser, number: int) -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator("network", recipe.seed, number).initial_seed())
        return AdaptedDenoiser(unguided(teacher), adapter)


def with_teachers(
    stages: Sequence[StageSettings], student: Denoiser, teacher: Denoiser
) -> list[tuple[StageSettings, Denoiser]]:
    """Return every stage with a network like its teacher: the recipe's, or the student, where a stage made it."""
    made = [teacher_stage(stages, number) is not None for number in range(len(stages))]
    whole = merged(student) if any(made) else student
    return [(stage, whole if own else teacher) for stage, own in zip(stages, made, strict=True)]


def teacher_of(student: Student, number: int, *, own: bool) -> Denoiser:
    """Return the teacher of a stage: the recipe's (with `own` a copy), or what an earlier stage made to be one."""
    made = teacher_stage(student.recipe.stages, number)
    if made is None:
        return copied(student.teacher) if own else student.teacher
    teacher = merged(load_model(student.folders[made], lambda: unguided(student.teacher))[0])
    teacher.prompts = student.teacher.prompts
    return teacher if own else teacher.to(student.device)  # its owner shards it, which moves it


def check_stage(stage: StageSettings, student: Denoiser, teacher: Denoiser) -> Objective:
    """Build and return a stage's objective, on the meta device say. UserError if it cannot be trained."""
    objective = objective_class(stage.objective)(stage, student, teacher)
    if unknown := sorted(stage.lr_of.keys() - objective.nets.keys()):
        raise UserError(
            f"stage {stage.objective}: lr_of names {unknown[0]!r}; what learns is {', '.join(objective.nets)}"
        )
    return objective


def check_stages(stages: Sequence[StageSettings], student: Denoiser, teacher: Denoiser) -> list[Objective]:
    """Build the objectives of a student's stages, as `check_stage` does."""
    return [check_stage(stage, student, own) for stage, own in with_teachers(stages, student, teacher)]


def distill_student(student: Student, report: Report) -> None:
    """Take one student through the stages that it has not finished; each inherits the networks of the one before.

    Hold the student's lock.
    """
    for number, (stage, folder) in enumerate(zip(student.recipe.stages, student.folders, strict=True)):
        if not student.group.broadcast(is_finished(folder, stage)):
            (train_stage if concerns(stage, student) else hand_on)(student, number, report)


def concerns(stage: StageSettings, student: Student) -> bool:
    """Whether a stage is for this student: one of some classes, or that forgets some, is for their owners."""
    forget = getattr(stage, "forget", None)
    of = getattr(stage, "classes", None) if forget is None else forget.classes
    return of is None or bool(torch.isin(student.source.classes.cpu(), torch.tensor(of)).any())


def hand_on(student: Student, number: int, report: Report) -> None:
    """End a stage that does not concern a student as it began: with the model and the networks of the one before."""
    before, folder, stage = student.folders[number - 1], student.folders[number], student.recipe.stages[number]
    if student.group.is_leader:
        folder.mkdir(parents=True, exist_ok=True)
        newest = checkpoint_files.newest(before)
        for path in [*before.glob("*.safetensors"), *([newest] if newest else [])]:
            if path == newest or not path.name.startswith(("state", "best")):
                _copy(path, folder / path.name)
        record = {"steps": stage.steps, "stage": stage.model_dump(mode="json"), "cost": NO_COST, "handed_on": True}
        write_json(folder / MODEL, read_json(before / MODEL) | record)
        report(f"student {student.number} {stage.objective}: owns no class that this is about, and stays as it is")
    student.group.broadcast(None)


def _copy(path: Path, to: Path) -> None:
    """Copy a file, or a checkpoint in parts, so that nobody finds half of it."""
    if path.is_dir():
        with building(to) as place:
            shutil.copytree(path, place, dirs_exist_ok=True)
    else:
        with writing(to) as temporary:
            shutil.copyfile(path, temporary)


def train_stage(student: Student, number: int, report: Report) -> None:
    """Train a student's stage to its end and write its model."""
    recipe, options = student.recipe, TrainOptions.of(student.recipe, student.group)
    stage, folder = recipe.stages[number], student.folders[number]
    network = new_network(recipe, student.teacher, student.number)
    with torch.random.fork_rng(devices=[]):  # heads that the objective makes begin the same in every process
        torch.manual_seed(derive("networks", recipe.seed, student.number, number))
        teacher = teacher_of(student, number, own=options.fsdp)
        objective = objective_class(stage.objective)(stage, network, teacher)
    for net in objective.nets.values():
        net.train()
        if not options.fsdp:  # sharding moves them
            net.to(student.device)
    if objective.statistics is not None:
        objective.statistics.to(student.device)
    if number > 0:
        inherit(objective, student, number, report)
    frozen, classes = fill_frozen(objective, student, number), getattr(stage, "classes", None)
    source = student.source if classes is None else student.source.only(classes)
    passes = options.passes(stage, report)
    accelerate(objective, stage, source, recipe, options, passes, report)
    for net in [teacher, *frozen] if options.fsdp else []:
        shard(net, student.group)
    key, what = (recipe.seed, student.number, number), f"student {student.number} {stage.objective}"
    chosen = selection(student, stage, folder, what, report)
    how: dict[str, Any] = {"key": key, "what": what, "options": options, "report": report, "passes": passes}
    state = train(objective, stage, source, folder, **how, selection=chosen)
    product, choice = chosen.product(state, student.group)
    if student.group.is_leader:
        record = {
            "steps": stage.steps,
            "stage": stage.model_dump(mode="json"),
            "cost": state.cost | peak_memory(student.device),
            "computed_in": computed_in(recipe.precision, student.device),
            **choice,
        }
        save_model(folder, state.ema.denoiser, record, product)
    student.group.broadcast(None)  # the next stage reads what was written


def selection(student: Student, stage: StageSettings, folder: Path, what: str, report: Report) -> AverageSelection:
    """Return how a stage chooses what it ends with. The next stage goes on from its last networks either way."""
    if not isinstance(stage, GeneratorSettings) or stage.select is None:
        return LAST_AVERAGE
    assert student.evaluator is not None, "a stage that selects needs an evaluator"
    evaluator, keep = student.evaluator(stage), student.recipe.keep
    return BestAverage(evaluator, stage, folder, keep=keep, what=what, group=student.group, report=report)


def inherit(objective: Objective, student: Student, number: int, report: Report) -> None:
    """Give a stage the networks that the one before ended with; where they are damaged, that one ends once more."""
    before, statistics = student.folders[number - 1], objective.statistics
    nets = objective.nets | ({} if statistics is None else {"statistics": statistics})
    try:
        storage.inherit(nets, before, student.group)
    except DamagedError:
        train_stage(student, number - 1, report)  # goes on from an earlier checkpoint, and says so
        storage.inherit(nets, before, student.group)


def fill_frozen(objective: Objective, student: Student, number: int) -> list[Denoiser]:
    """Give the networks that an objective holds frozen the weights of what the stage before made; return them."""
    if not objective.frozen:
        return []
    assert number > 0, "the recipe's check lets no such stage come first"
    made, _ = load_model(student.folders[number - 1], lambda: unguided(student.teacher))
    nets: list[Denoiser] = [getattr(objective, name) for name in objective.frozen]
    for net in nets:
        net.load_state_dict(made.state_dict())
        net.requires_grad_(False).eval().to(student.device)
    return nets


def accelerate(
    objective: Objective,
    stage: StageSettings,
    source: Source,
    recipe: Recipe,
    options: TrainOptions,
    passes: Passes,
    report: Report,
) -> None:
    """Let the stage's networks compute as the recipe says: in its precision, compiled where that pays.

    What is sharded is not compiled, and keeps its frozen weights in float32.
    """
    precision.lower(objective, recipe.precision, hold=not options.fsdp)
    if options.fsdp:
        return

    def trial() -> None:
        def one_pass(parts: Sequence[Part]) -> None:
            draws = partial(Draws, source, stage.batch, ("trial", 0), part=parts[0])
            compiling.run_turns(objective, lambda turn: draws(turn))

        with seeded_apart(source.device), fast_float32():
            passes.attempt(one_pass, source.device)

    how: dict[str, Any] = {"wanted": recipe.compile, "steps": stage.steps, "passes": passes, "device": source.device}
    compiling.prepare(objective, trial, **how, report=report)


def computed_in(settled: str, device: torch.device) -> str:
    """Return what a network multiplied in while it trained, for its record: bf16, tf32 or float32."""
    return settled if settled == "bf16" else fast_name(device)


def is_finished(folder: Path, stage: StageSettings) -> bool:
    """Whether the stage in `folder` has run for all of its steps."""
    if not is_complete(folder):
        return False
    steps: int = records.trained(folder / MODEL)["steps"]
    return steps >= stage.steps


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Return the peak memory of this process so far: of the device, or of the host on a CPU."""
    if device.type == "cuda":
        return {"peak_bytes": torch.cuda.max_memory_allocated(device)}
    import resource

    scale = 1024 if os.uname().sysname == "Linux" else 1  # kilobytes on Linux, bytes on macOS
    return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale}
