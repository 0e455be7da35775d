"""The training loop, and the students that go through it stage by stage."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msdcli import nets
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.draws import Draws, Source, generator
from msdcli.diffusion.ema import EMA
from msdcli.engine import checkpoint
from msdcli.engine.events import Progress, Report, silent
from msdcli.engine.interrupt import Interrupted, interruptible
from msdcli.errors import UserError
from msdcli.nets.prune import prune
from msdcli.objectives import Objective, objective
from msdcli.recipe import Recipe, StageSettings
from msdcli.rundir import read_json
from msdcli.seeds import derive

METRICS = "metrics.jsonl"


def train(
    goal: Objective,
    stage: StageSettings,
    source: Source,
    folder: Path,
    *,
    key: tuple[int | str, ...],
    what: str,
    checkpoint_seconds: float,
    report: Report = silent,
) -> checkpoint.TrainState:
    """Run `goal` for `stage.steps` steps, from the checkpoint in `folder` if there is one; return the final state.

    `key` (seed, student, stage) and the step are all that the random draws depend on, so an interrupted run, resumed,
    ends with the same bits. Raises Interrupted after a checkpoint, UserError when a loss is not finite.
    """
    state = checkpoint.TrainState(goal.nets, optimizers(goal.nets, stage), EMA(goal.nets[goal.product], stage.ema))
    state.load(folder)
    log = Log(folder / METRICS, state, stage, what, report)
    saved = time.monotonic()
    with interruptible() as stop, torch.random.fork_rng():
        while state.step < stage.steps:
            torch.manual_seed(derive(*key, state.step, "layers"))  # dropout draws from the global generator
            set_learning_rates(state, stage)
            with counting_flops(state, first=state.cost["flops"] == 0) as count:
                for turn, (names, loss) in enumerate(goal.turns(state.step)):
                    for name, net in goal.nets.items():
                        net.requires_grad_(name in names)
                    per_image = loss(Draws(source, stage.batch, (*key, state.step), turn))
                    per_image.mean().backward()
                    for name in names:
                        if stage.clip is not None:
                            nn.utils.clip_grad_norm_(goal.nets[name].parameters(), stage.clip)
                        state.optimizers[name].step()
                        state.optimizers[name].zero_grad()
                    log.add(names[0], per_image.detach())
            state.ema.update(goal.nets[goal.product], state.step)
            state.step += 1
            log.tick(count)
            if stop.requested or (time.monotonic() - saved > checkpoint_seconds and state.step < stage.steps):
                state.save(folder)
                saved = time.monotonic()
            if stop.requested:
                raise Interrupted(f"stopped at step {state.step} of {stage.steps}; the same command continues")
    state.save(folder)
    return state


def optimizers(networks: dict[str, nn.Module], stage: StageSettings) -> dict[str, torch.optim.Optimizer]:
    """One optimizer per network."""
    kind = torch.optim.AdamW if stage.optimizer == "adamw" else torch.optim.Adam
    betas = (stage.betas[0], stage.betas[1])
    decay = {"weight_decay": stage.weight_decay}
    return {name: kind(net.parameters(), betas=betas, fused=True, **decay) for name, net in networks.items()}


def check_stage(stage: StageSettings, student: Denoiser, teacher: Denoiser) -> None:
    """Build a stage's objective, on the meta device say, and raise UserError if it cannot be trained."""
    goal = objective(stage.objective)(stage, student, teacher)
    if unknown := sorted(stage.lr_of.keys() - goal.nets.keys()):
        raise UserError(f"stage {stage.objective}: lr_of names {unknown[0]!r}; what learns is {', '.join(goal.nets)}")


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

    with FlopCounterMode(display=False) as counter:
        yield count
    count.append(counter.get_total_flops())


class Log:
    """metrics.jsonl and the cost: losses stay on the device and are read once per `log_every` steps."""

    def __init__(
        self,
        path: Path,
        state: checkpoint.TrainState,
        stage: StageSettings,
        what: str,
        report: Report,
    ) -> None:
        self.path, self.state, self.stage, self.what, self.report = path, state, stage, what, report
        self._sums: dict[str, list[Tensor]] = {}
        self._images = 0
        self._since = time.monotonic()
        self._flops_per_step = state.cost["flops"] / max(state.step, 1)
        self._drop_lines_after(state.step)

    def add(self, name: str, per_image: Tensor) -> None:
        self._sums.setdefault(name, []).append(per_image.mean())
        self._images += len(per_image)

    def tick(self, flops: list[int]) -> None:
        """End a step; at the interval write a line."""
        if flops:
            self._flops_per_step = flops[0]
        self.state.cost["flops"] += self._flops_per_step
        if self.state.step % self.stage.log_every and self.state.step != self.stage.steps:
            return
        losses = {name: torch.stack(values).mean().item() for name, values in self._sums.items()}
        now = time.monotonic()
        speed, seconds = self._images / (now - self._since), now - self._since
        self.state.cost["seconds"] += seconds
        self.state.cost["images"] += self._images
        self._refuse_non_finite(losses)
        line = {"step": self.state.step, "losses": losses, "images_per_second": round(speed, 1)}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        left = self.state.cost["seconds"] / self.state.step * (self.stage.steps - self.state.step)
        self.report(Progress(self.what, self.state.step, self.stage.steps, "steps", losses, speed, left))
        self._sums, self._images, self._since = {}, 0, now

    def _refuse_non_finite(self, losses: dict[str, float]) -> None:
        for name, value in losses.items():
            if not torch.isfinite(torch.tensor(value)):
                raise UserError(
                    f"{self.stage.objective}: the loss of {name} is {value} near step {self.state.step}; "
                    f"the last good checkpoint is kept in {self.path.parent}",
                    hint=f"a lower learning rate (now {self.stage.lr_of.get(name, self.stage.lr):g}) is the usual cure",
                )

    def _drop_lines_after(self, step: int) -> None:
        """Forget lines that were written after the checkpoint that this run takes up."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        lines = [line for line in self.path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


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
    if init == "pruned":
        prune(copy.deepcopy(teacher), student)  # a copy is plain, without guidance
    return student


def distill_student(student: Student, report: Report) -> None:
    """Take one student through the stages that it has not finished; each inherits the networks of the one before.

    Hold the student's lock.
    """
    recipe = student.recipe
    for number, (stage, folder) in enumerate(zip(recipe.stages, student.folders, strict=True)):
        if is_finished(folder, stage):
            continue
        network = new_network(recipe, student.teacher, student.number).to(student.device)
        goal = objective(stage.objective)(stage, network, student.teacher)
        for net in goal.nets.values():
            net.to(student.device).train()
        if number > 0:
            checkpoint.inherit(goal.nets, student.folders[number - 1])
        state = train(
            goal,
            stage,
            student.source,
            folder,
            key=(recipe.seed, student.number, number),
            what=f"student {student.number} {stage.objective}",
            checkpoint_seconds=recipe.checkpoint_seconds,
            report=report,
        )
        record = {
            "steps": stage.steps,
            "stage": stage.model_dump(mode="json"),
            "cost": state.cost | peak_memory(student.device),
        }
        checkpoint.save_model(folder, state.ema.net, record)


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
