"""The training loop: it knows optimizers, devices, seeds and checkpoints, and neither networks nor students."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msdcli.diffusion.draws import Draws, Source
from msdcli.diffusion.ema import EMA
from msdcli.diffusion.float32 import fast_float32
from msdcli.engine.checkpoints.manager import CheckpointManager
from msdcli.engine.checkpoints.train_state import TrainState
from msdcli.engine.distributed.device import seeded_apart
from msdcli.engine.distributed.group import SINGLE_PROCESS, ProcessGroup
from msdcli.engine.distributed.interrupt import interruptible
from msdcli.engine.distributed.sharded_tensors import norm_of, split
from msdcli.engine.distributed.sharding import shard
from msdcli.engine.tracking.events import Report, silent
from msdcli.engine.train import compiling
from msdcli.engine.train.counting import FlopCounter
from msdcli.engine.train.log import METRICS, TrainLog
from msdcli.engine.train.passes import Part, Passes
from msdcli.engine.train.selection import LAST_AVERAGE, AverageSelection
from msdcli.errors import WHOLE, resumable
from msdcli.objectives import Objective
from msdcli.recipe import Recipe
from msdcli.recipe.stages import StageSettings
from msdcli.seeds import derive

GO_ON, SAVE, STOP = 0, 1, 2  # what a process may wish for after a step


@dataclass(frozen=True)
class TrainOptions:
    """How training is carried out, and by whom; what is learnt does not depend on it."""

    checkpoint_seconds: float = 30.0
    keep: int = 2
    max_skipped: int = 10
    micro_batch: int | None = None
    fsdp: bool = False
    deterministic: bool = False
    group: ProcessGroup = SINGLE_PROCESS

    @classmethod
    def of(cls, recipe: Recipe, group: ProcessGroup) -> TrainOptions:
        fsdp = recipe.fsdp and group.size > 1
        pace = recipe.checkpoint_seconds, recipe.keep, recipe.max_skipped
        return cls(*pace, recipe.micro_batch, fsdp, recipe.deterministic, group)

    def passes(self, stage: StageSettings, report: Report) -> Passes:
        """Return how a stage's batch goes through the networks."""
        how: dict[str, Any] = {"group": self.group, "micro_batch": self.micro_batch, "retries": not self.fsdp}
        return Passes(stage, **how, report=report)


def train(
    objective: Objective,
    stage: StageSettings,
    source: Source,
    folder: Path,
    *,
    key: tuple[int | str, ...],
    what: str,
    options: TrainOptions,
    report: Report = silent,
    selection: AverageSelection = LAST_AVERAGE,
    passes: Passes | None = None,
) -> TrainState:
    """Run `objective` for `stage.steps` steps, from the checkpoint in `folder` if there is one; return the final state.

    `key` (seed, student, stage) and the step are all that the random draws depend on, so an interrupted run, resumed,
    ends with the same bits, and several processes see the images that one would. Raises Interrupted after a checkpoint,
    UserError when too many updates in a row are not finite. `passes` are the stage's, if it has tried some already.
    """
    group, passes = options.group, passes or options.passes(stage, report)
    ema = EMA(objective.nets[objective.product], stage.ema)
    for net in [*objective.nets.values(), ema.net] if options.fsdp else []:
        shard(net, group)
    state = TrainState(objective.nets, optimizers(objective.nets, stage), ema, objective.statistics)
    checkpoints = CheckpointManager(state, folder, options.keep, group)
    checkpoints.load(report)
    passes.resume(state.cut_to)
    first = state.step
    told: dict[str, Any] = {"group": group, "max_skipped": options.max_skipped, "cycle": objective.cycle}
    log = TrainLog(folder / METRICS, state, stage, what, report, **told)
    selection.begin(state.step)
    computing = fast_float32(deterministic=options.deterministic and source.device.type == "cuda")
    with resumable(WHOLE), interruptible() as stop, seeded_apart(source.device), checkpoints, computing:
        asked = False
        while state.step < stage.steps:
            torch.manual_seed(layers_seed(key, state.step, group))
            set_learning_rates(state, stage)
            with counting_flops(wanted=state.step < objective.cycle) as counter:
                for turn, (names, loss) in enumerate(objective.turns(state.step)):
                    for name, net in objective.nets.items():
                        net.requires_grad_(name in names)
                    draws = partial(Draws, source, stage.batch, (*key, state.step), turn)
                    mean = gradients(objective, names, loss, draws, passes, source.device, log, counter)
                    update(state, names, mean, stage.clip, log)
            state.cut_to = passes.cut_to
            state.ema.update(objective.nets[objective.product], state.step)
            state.step += 1
            passes.agreeing &= state.step <= first + objective.cycle  # by now optimizers have their memory too
            log.tick([] if counter is None else [counter.total], objective, selection.after_step(state))
            due = not asked and checkpoints.due(options.checkpoint_seconds)
            wish = STOP if stop.requested else SAVE if due else GO_ON
            agreed = group.vote(wish, last=state.step == stage.steps)
            asked = wish == SAVE != agreed and options.checkpoint_seconds > 0  # several processes agree a step later
            if (agreed == STOP or (agreed == SAVE and state.step < stage.steps)) and log.sound():
                checkpoints.save()
                selection.saved(state.step)
            if agreed == STOP:
                checkpoints.close()
                raise stop.error(f"at step {state.step} of {stage.steps}")
        checkpoints.save()
    return state


def gradients(
    objective: Objective,
    names: tuple[str, ...],
    loss: Callable[[Draws], Tensor],
    draws: Callable[[Part], Draws],
    passes: Passes,
    device: torch.device,
    log: TrainLog,
    counter: FlopCounter | None = None,
) -> Tensor:
    """Leave the gradient of the mean loss in the named networks, one pass per slice of the batch; return that mean.

    Both are of the whole batch, that of all processes. Where memory is too small for a pass the turn begins again with
    smaller ones; only the attempt that fits is logged and counted.
    """
    params, group = [p for name in names for p in objective.nets[name].parameters()], passes.group
    apart = passes.agreeing  # nothing travels before everyone knows that it fits everywhere
    before = 0 if counter is None else counter.total

    def attempt(parts: Sequence[Part]) -> tuple[Tensor, dict[str, Tensor], list[tuple[Tensor, Tensor | None]]]:
        for param in params:
            param.grad = None
        if counter is not None:
            counter.total = before
        means, tallies, seen = list[Tensor](), list[Mapping[str, Tensor]](), list[tuple[Tensor, Tensor | None]]()
        for part in parts:
            objective.tally = {}
            per_image = loss(draws(part))
            tallies.append(objective.tally)
            mean = per_image.mean() / len(parts)
            means.append(mean.detach())
            seen.append((per_image.detach(), objective.sigma))
            if apart or len(means) < len(parts):
                mean.backward()
        total = torch.stack(means).sum()
        sums = {name: torch.stack([tally[name] for tally in tallies]).sum(0) for name in tallies[0]}
        if not apart:
            with group.averaging_gradients(params, [total, *sums.values()]):
                mean.backward()
        return total, sums, seen

    total, sums, seen = passes.attempt(attempt, device)
    if apart:
        with group.averaging_gradients(params, [total, *sums.values()]):
            pass
    for per_image, sigma in seen:
        log.images(names[0], per_image, sigma)
    if sums:
        objective.settle({name: value * group.size for name, value in sums.items()})
    return total


def update(state: TrainState, names: tuple[str, ...], loss: Tensor, clip: float | None, log: TrainLog) -> None:
    """Let the named networks take a step, or none of them where a loss or a gradient is not finite.

    The optimizers' kernels skip the step themselves (`found_inf`), so the host never waits for the device.
    """
    norms = torch.stack([gradient_norm(state.nets[name], clip) for name in names])
    skipped = (norms.sum() + loss).isfinite().logical_not().float()
    for name in names:
        state.optimizers[name].found_inf = skipped  # type: ignore[attr-defined]  # fused kernels look for it
        state.optimizers[name].step()
        state.optimizers[name].zero_grad()
    log.turn(names, loss, norms, skipped)


def gradient_norm(net: nn.Module, clip: float | None) -> Tensor:
    """Return the norm of a network's gradient, cut to at most `clip` afterwards."""
    params = [p for p in net.parameters() if p.grad is not None]
    norm = norm_of([p.grad for p in params if p.grad is not None])
    if clip is not None:
        for some in split(params):
            nn.utils.clip_grads_with_norm_(some, clip, norm)
    return norm


def layers_seed(key: tuple[int | str, ...], step: int, group: ProcessGroup) -> int:
    """Return the seed of what layers draw from the global generator, dropout above all: each process its own."""
    return derive(*key, step, "layers", *([] if group.is_leader else [group.rank]))


def optimizers(networks: dict[str, nn.Module], stage: StageSettings) -> dict[str, torch.optim.Optimizer]:
    """One optimizer per network; what is sharded in it and what is not are groups of their own."""
    kind, own = OPTIMIZERS[stage.optimizer]
    options = own | {"betas": (stage.betas[0], stage.betas[1]), "weight_decay": stage.weight_decay}
    found: dict[str, torch.optim.Optimizer] = {
        name: kind([{"params": some} for some in split(net.parameters())], **options) for name, net in networks.items()
    }
    for optimizer in found.values():
        optimizer.register_step_post_hook(_count_as_change)
    return found


class SkippingRAdam(torch.optim.RAdam):
    """RAdam (Liu et al. 2020, arXiv 1908.03265) that takes no step where `found_inf` says so.

    torch has no fused kernel of it that would; so the host waits for the device here.
    """

    def step(self, closure: Any = None) -> Any:
        skipped: Tensor | None = getattr(self, "found_inf", None)
        return None if skipped is not None and bool(skipped) else super().step(closure)


OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {"fused": True}),
    "adamw": (torch.optim.AdamW, {"fused": True}),
    "radam": (SkippingRAdam, {"decoupled_weight_decay": True}),
}


def _count_as_change(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Let the weights know that they have changed, which fused kernels forget: EDM2 normalises what has."""
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version(group["params"])


def set_learning_rates(state: TrainState, stage: StageSettings) -> None:
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
def counting_flops(*, wanted: bool) -> Iterator[FlopCounter | None]:
    """Count the floating-point operations of a step: of the stage's first ones, for later ones cost the same."""
    if not wanted:
        yield None
        return
    with compiling.eagerly(), FlopCounter() as counter:
        yield counter
