"""The training loop, and the students that go through it stage by stage."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msdcli import nets
from msdcli.diffusion import guidance
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.draws import Draws, Source, generator
from msdcli.diffusion.ema import EMA
from msdcli.engine import checkpoint, compiling, precision, storage
from msdcli.engine.distributed import ALONE, Group, slices
from msdcli.engine.events import Report, silent
from msdcli.engine.interrupt import interruptible
from msdcli.engine.keeper import Keeper
from msdcli.engine.log import METRICS, Log
from msdcli.engine.select import LAST, Best, Examiner, Selection
from msdcli.engine.sharding import norm_of, shard, split
from msdcli.engine.states import DamagedError
from msdcli.errors import UserError
from msdcli.nets.prune import prune
from msdcli.objectives import Objective, objective
from msdcli.recipe import Recipe
from msdcli.recipe.stages import OneStepSettings, StageSettings
from msdcli.rundir import read_json
from msdcli.seeds import derive

GO_ON, SAVE, STOP = 0, 1, 2  # what a process may wish for after a step


@dataclass(frozen=True)
class Manner:
    """How training is carried out, and by whom; what is learnt does not depend on it."""

    checkpoint_seconds: float = 30.0
    keep: int = 2
    max_skipped: int = 10
    micro_batch: int | None = None
    fsdp: bool = False
    group: Group = ALONE

    @classmethod
    def of(cls, recipe: Recipe, group: Group) -> Manner:
        fsdp = recipe.fsdp and group.size > 1
        return cls(recipe.checkpoint_seconds, recipe.keep, recipe.max_skipped, recipe.micro_batch, fsdp, group)


def train(
    goal: Objective,
    stage: StageSettings,
    source: Source,
    folder: Path,
    *,
    key: tuple[int | str, ...],
    what: str,
    manner: Manner,
    report: Report = silent,
    selection: Selection = LAST,
) -> checkpoint.TrainState:
    """Run `goal` for `stage.steps` steps, from the checkpoint in `folder` if there is one; return the final state.

    `key` (seed, student, stage) and the step are all that the random draws depend on, so an interrupted run, resumed,
    ends with the same bits, and several processes see the images that one would. Raises Interrupted after a checkpoint,
    UserError when too many updates in a row are not finite.
    """
    group = manner.group
    parts = slices(stage.batch, getattr(stage, "pair_batch", None), group, manner.micro_batch)
    ema = EMA(goal.nets[goal.product], stage.ema)
    for net in [*goal.nets.values(), ema.net] if manner.fsdp else []:
        shard(net, group)
    state = checkpoint.TrainState(goal.nets, optimizers(goal.nets, stage), ema)
    keeper = Keeper(state, folder, manner.keep, group)
    keeper.load(report)
    log = Log(folder / METRICS, state, stage, what, report, group=group, max_skipped=manner.max_skipped)
    selection.begin(state.step)
    with interruptible() as stop, seeded_apart(source.device), keeper:
        while state.step < stage.steps:
            torch.manual_seed(layers_seed(key, state.step, group))
            set_learning_rates(state, stage)
            with counting_flops(state, first=state.cost["flops"] == 0) as count:
                for turn, (names, loss) in enumerate(goal.turns(state.step)):
                    for name, net in goal.nets.items():
                        net.requires_grad_(name in names)
                    draws = [Draws(source, stage.batch, (*key, state.step), turn, part) for part in parts]
                    update(state, names, gradients(goal, names, loss, draws, group, log), stage.clip, log)
            state.ema.update(goal.nets[goal.product], state.step)
            state.step += 1
            log.tick(count, goal, selection.look(state))
            wish = STOP if stop.requested else SAVE if keeper.seconds() > manner.checkpoint_seconds else GO_ON
            agreed = group.agree(wish, last=state.step == stage.steps)
            if (agreed == STOP or (agreed == SAVE and state.step < stage.steps)) and log.sound():
                keeper.save()
                selection.saved(state.step)
            if agreed == STOP:
                keeper.close()
                raise stop.error(f"at step {state.step} of {stage.steps}")
        keeper.save()
    return state


def gradients(
    goal: Objective,
    names: tuple[str, ...],
    loss: Callable[[Draws], Tensor],
    draws: Sequence[Draws],
    group: Group,
    log: Log,
) -> Tensor:
    """Leave the gradient of the mean loss in the named networks, one pass per slice of the batch; return that mean.

    Both are of the whole batch, that of all processes.
    """
    params = [p for name in names for p in goal.nets[name].parameters()]
    means: list[Tensor] = []
    for own in draws:
        per_image = loss(own)
        mean = per_image.mean() / len(draws)
        means.append(mean.detach())
        log.images(names[0], per_image.detach(), goal.sigma)
        if len(means) < len(draws):
            mean.backward()
    total = torch.stack(means).sum()
    with group.averaging(params, total):
        mean.backward()
    return total


def update(state: checkpoint.TrainState, names: tuple[str, ...], loss: Tensor, clip: float | None, log: Log) -> None:
    """Let the named networks take a step, or none of them where a loss or a gradient is not finite.

    The optimizers' kernels skip the step themselves (`found_inf`), so the host never waits for the device.
    """
    norms = torch.stack([gradient_norm(state.nets[name], clip) for name in names])
    skipped = (norms.sum() + loss).isfinite().logical_not().float()
    for name in names:
        state.optimizers[name].found_inf = skipped
        state.optimizers[name].step()
        state.optimizers[name].zero_grad()
    log.turn(names, loss, norms, skipped)


def gradient_norm(net: nn.Module, clip: float | None) -> Tensor:
    """Return the norm of a network's gradient, cut to at most `clip` afterwards."""
    params = [p for p in net.parameters() if p.grad is not None]
    norm = norm_of([p.grad for p in params])
    for some in split(params) if clip is not None else []:
        nn.utils.clip_grads_with_norm_(some, clip, norm)
    return norm


def layers_seed(key: tuple[int | str, ...], step: int, group: Group) -> int:
    """Return the seed of what layers draw from the global generator, dropout above all: each process its own."""
    return derive(*key, step, "layers", *([] if group.leads else [group.rank]))


@contextmanager
def seeded_apart(device: torch.device) -> Iterator[None]:
    """Give the global generators back as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def optimizers(networks: dict[str, nn.Module], stage: StageSettings) -> dict[str, torch.optim.Optimizer]:
    """One optimizer per network; what is sharded in it and what is not are groups of their own."""
    kind = torch.optim.AdamW if stage.optimizer == "adamw" else torch.optim.Adam
    options = {"betas": (stage.betas[0], stage.betas[1]), "weight_decay": stage.weight_decay, "fused": True}
    found = {
        name: kind([{"params": some} for some in split(net.parameters())], **options) for name, net in networks.items()
    }
    for optimizer in found.values():
        optimizer.register_step_post_hook(_count_as_change)
    return found


def _count_as_change(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Let the weights know that they have changed, which fused kernels forget: EDM2 normalises what has."""
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version(group["params"])


def check_stage(stage: StageSettings, student: Denoiser, teacher: Denoiser) -> Objective:
    """Build and return a stage's objective, on the meta device say. UserError if it cannot be trained."""
    goal = objective(stage.objective)(stage, student, teacher)
    if unknown := sorted(stage.lr_of.keys() - goal.nets.keys()):
        raise UserError(f"stage {stage.objective}: lr_of names {unknown[0]!r}; what learns is {', '.join(goal.nets)}")
    return goal


def set_learning_rates(state: checkpoint.TrainState, stage: StageSettings) -> None:
    """Constant for `lr_hold` of the stage, then linear to `lr_end`; a linear rise over `warmup` steps before."""
    left = (stage.steps - state.step) / stage.steps
    fall = min(1.0, left / (1 - stage.lr_hold)) if stage.lr_hold < 1 else 1.0
    factor = stage.lr_end + (1 - stage.lr_end) * fall
    if state.step < stage.warmup:
        factor *= (state.step + 1) / stage.warmup
    for name, optimizer in state.optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = stage.lr_of.get(name, stage.lr) * factor


@contextmanager
def counting_flops(state: checkpoint.TrainState, *, first: bool) -> Iterator[list[int]]:
    """Count the floating-point operations of the stage's first step; later steps cost the same."""
    count: list[int] = []
    if not first:
        yield count
        return
    from torch.utils.flop_counter import FlopCounterMode  # slow to import, and needed once per stage

    with compiling.eagerly(), FlopCounterMode(display=False) as counter:
        yield count
    count.append(counter.get_total_flops())


# The students.


@dataclass(frozen=True)
class Student:
    """What one student is trained from."""

    number: int
    recipe: Recipe
    teacher: Denoiser
    source: Source
    folders: list[Path]  # one per stage
    device: torch.device
    group: Group = ALONE
    examiner: Callable[[OneStepSettings], Examiner] | None = None  # of what it makes; only where a stage selects


def new_network(recipe: Recipe, teacher: Denoiser, number: int) -> Denoiser:
    """Return a student as its first stage finds it, with the weights that `student.init` asks for."""
    settings, init = recipe.student.network_for(teacher.settings), recipe.student.init
    if init == "teacher" and settings != teacher.settings:
        raise UserError("student.init: teacher is for students with the teacher's network", hint="student.init=pruned")
    if settings == teacher.settings and init != "random":
        return copy.deepcopy(teacher).requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator("network", recipe.seed, number).initial_seed())
        shape, classes = teacher.shape, teacher.num_classes
        student = nets.build(settings, shape=shape, num_classes=classes, sigma_data=teacher.sigma_data)
    student.to(next(teacher.parameters()).device)
    student.prompts = teacher.prompts
    if init == "pruned":
        prune(copy.deepcopy(teacher), student)  # a copy is plain, without guidance
    return student


def distill_student(student: Student, report: Report) -> None:
    """Take one student through the stages that it has not finished; each inherits the networks of the one before.

    Hold the student's lock.
    """
    for number, (stage, folder) in enumerate(zip(student.recipe.stages, student.folders, strict=True)):
        if not student.group.say(is_finished(folder, stage)):
            train_stage(student, number, report)


def train_stage(student: Student, number: int, report: Report) -> None:
    """Train a student's stage to its end and write its model."""
    recipe, manner = student.recipe, Manner.of(student.recipe, student.group)
    stage, folder = recipe.stages[number], student.folders[number]
    network = new_network(recipe, student.teacher, student.number)
    with torch.random.fork_rng(devices=[]):  # heads that the objective makes begin the same in every process
        torch.manual_seed(derive("networks", recipe.seed, student.number, number))
        teacher = guidance.copied(student.teacher) if manner.fsdp else student.teacher
        goal = objective(stage.objective)(stage, network, teacher)
    for net in goal.nets.values():
        net.train()
        if not manner.fsdp:  # sharding moves them
            net.to(student.device)
    if number > 0:
        inherit(goal, student, number, report)
    accelerate(goal, stage, student, manner, report)
    if manner.fsdp:
        shard(teacher, student.group)
    key, what = (recipe.seed, student.number, number), f"student {student.number} {stage.objective}"
    chosen = selection(student, stage, folder, what, report)
    state = train(
        goal, stage, student.source, folder, key=key, what=what, manner=manner, report=report, selection=chosen
    )
    product, choice = chosen.product(state, student.group)
    if student.group.leads:
        record = {
            "steps": stage.steps,
            "stage": stage.model_dump(mode="json"),
            "cost": state.cost | peak_memory(student.device),
            **choice,
        }
        checkpoint.save_model(folder, state.ema.net, record, product)
    student.group.say(None)  # the next stage reads what was written


def selection(student: Student, stage: StageSettings, folder: Path, what: str, report: Report) -> Selection:
    """Return how a stage chooses what it ends with. The next stage goes on from its last networks either way."""
    if not isinstance(stage, OneStepSettings) or stage.select is None:
        return LAST
    assert student.examiner is not None, "a stage that selects needs an examiner"
    examiner, keep = student.examiner(stage), student.recipe.keep
    return Best(examiner, stage, folder, keep=keep, what=what, group=student.group, report=report)


def inherit(goal: Objective, student: Student, number: int, report: Report) -> None:
    """Give a stage the networks that the one before ended with; where they are damaged, that one ends once more."""
    before = student.folders[number - 1]
    try:
        storage.inherit(goal.nets, before, student.group)
    except DamagedError:
        train_stage(student, number - 1, report)  # goes on from an earlier checkpoint, and says so
        storage.inherit(goal.nets, before, student.group)


def accelerate(goal: Objective, stage: StageSettings, student: Student, manner: Manner, report: Report) -> None:
    """Let the stage's networks compute as the recipe says: in its precision, compiled where that pays.

    What is sharded is not compiled, and keeps its frozen weights in float32.
    """
    recipe = student.recipe
    precision.lower(goal, recipe.precision, hold=not manner.fsdp)
    part = slices(stage.batch, getattr(stage, "pair_batch", None), student.group, manner.micro_batch)[0]

    def trial() -> None:
        with seeded_apart(student.device):
            compiling.run_turns(goal, lambda turn: Draws(student.source, stage.batch, ("trial",), turn, part))

    if not manner.fsdp:
        wanted, device = recipe.compile, student.device
        compiling.prepare(goal, trial, wanted=wanted, steps=stage.steps, device=device, report=report)


def is_finished(folder: Path, stage: StageSettings) -> bool:
    """Whether the stage in `folder` has run for all of its steps."""
    if not checkpoint.is_complete(folder):
        return False
    steps: int = read_json(folder / checkpoint.MODEL)["steps"]
    return steps >= stage.steps


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Return the peak memory of this process so far: of the device, or of the host on a CPU."""
    if device.type == "cuda":
        return {"peak_bytes": torch.cuda.max_memory_allocated(device)}
    import resource

    scale = 1024 if os.uname().sysname == "Linux" else 1  # kilobytes on Linux, bytes on macOS
    return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale}
