"""A stage's updates with random images, to be timed: neither data nor weights need to be here."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.ema import EMA
from msdcli.engine.distributed.group import SINGLE_PROCESS, slices
from msdcli.engine.tracking.events import Report, silent
from msdcli.engine.train import compiling, precision
from msdcli.engine.train.clock import NetworkTimer
from msdcli.engine.train.counting import MetaDraws
from msdcli.engine.train.loop import optimizers
from msdcli.engine.train.passes import Passes
from msdcli.objectives import objective_class
from msdcli.recipe.stages import StageSettings


class RandomDraws(MetaDraws):
    """Draws of the right shapes, random and on the device, with nothing behind them."""

    def __init__(self, net: Denoiser, batch: int, on: torch.device) -> None:
        super().__init__(net.shape, batch)
        self.num_classes, self.on = max(net.num_classes, 1), on

    def passes(self, micro_batch: int | None) -> list[RandomDraws]:
        """Return the draws of the passes through the networks that a device of `micro_batch` images makes of these."""
        parts = slices(self.batch, None, SINGLE_PROCESS, micro_batch)
        if len(parts) == 1:
            return [self]
        cut = [copy.copy(self) for _ in parts]
        for draws, part in zip(cut, parts, strict=True):
            draws.batch, draws.part = self.batch // len(parts), part
        return cut

    def uniform(self, purpose: str) -> torch.Tensor:
        return torch.rand(self.batch, device=self.on)

    def one_of(self, purpose: str, count: int) -> int:
        self.step += 1
        return self.step % count

    def labels(self, how: str, count: int | None = None) -> torch.Tensor:
        return torch.randint(self.num_classes, (count or self.batch,), device=self.on)

    def numbers(self, count: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(count, *shape, device=self.on)


@dataclass(frozen=True)
class Mode:
    """One way to run the same networks."""

    precision: str
    compiled: bool = False
    graphs: bool | None = None  # None: where they pay

    @property
    def name(self) -> str:
        how = {None: "", True: ", graphs", False: ", no graphs"}[self.graphs]
        return f"{self.precision} compiled{how}" if self.compiled else self.precision


class StageTrainer:
    """A stage's objective with its optimizers and average, run in one mode or another, `micro_batch` images at once."""

    def __init__(
        self,
        stage: StageSettings,
        teacher: Denoiser | None,
        student: Denoiser,
        on: torch.device,
        micro_batch: int | None = None,
        report: Report = silent,
    ) -> None:
        self.stage, self.on, self.passes = stage, on, Passes(stage, micro_batch=micro_batch, report=report)
        self.objective = objective_class(stage.objective)(stage, copy.deepcopy(student).requires_grad_(True), teacher)
        for net in self.objective.nets.values():
            net.to(on).train()
        self.ema = EMA(self.objective.nets[self.objective.product], stage.ema)
        self.timer = NetworkTimer(on)
        self._held: dict[str, dict[str, Denoiser]] = {}

    @functools.cached_property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Made when one is first needed: they make torch import its compiler, a second of every process."""
        return optimizers(self.objective.nets, self.stage)

    def enter(self, mode: Mode) -> None:
        """Let the networks run in a mode from now on."""
        if mode.precision not in self._held:
            precision.lower(self.objective, mode.precision)
            self._held[mode.precision] = precision.denoisers(self.objective)
        for name, net in self._held[mode.precision].items():
            setattr(self.objective, name, net)
        for learning in precision.learning(self.objective).values():
            learning.compute_in(precision.dtype(mode.precision))
        if mode.compiled:
            compiling.compile_networks(self.objective, images=self.passes.images, graphs=mode.graphs)
        else:
            compiling.undo(self.objective)

    def update(self, draws: RandomDraws, *, learns: bool = True) -> dict[str, float]:
        """Return the seconds of one update of the student by turn; without `learns`, of gradients alone. CPU time is
        what other processes on a shared machine disturb less.
        """
        took, cpu = dict[str, float](), 0.0
        for names, loss, times in self._turns():
            begun, name = time.process_time(), "+".join(names)
            took[name] = took.get(name, 0.0) + times * precision.timed(
                partial(self.turn, names, loss, draws, learns=learns), self.on
            )
            cpu += times * (time.process_time() - begun)
        took["EMA"] = precision.timed(self.average, self.on)
        return took | {"update": sum(took.values())} | ({"CPU time": cpu} if self.on.type == "cpu" else {})

    def parts(self, draws: RandomDraws) -> dict[str, float]:
        """Return the seconds of one update by network and by what is done, each waited for."""
        took: dict[str, float] = {}
        with self.timer.watching(self.objective):
            for names, loss, times in self._turns():
                self.timer.seconds.clear()
                self.turn(names, loss, draws)
                for part, seconds in self.timer.seconds.items():
                    took[part] = took.get(part, 0.0) + times * seconds
        return took | {"EMA": precision.timed(self.average, self.on)}

    def _kinds(self) -> dict[tuple[str, ...], list[Any]]:
        kinds: dict[tuple[str, ...], list[Any]] = {}
        for names, loss in self.objective.turns(0):
            kinds.setdefault(names, []).append(loss)
        return kinds

    def _turns(self) -> Iterator[tuple[tuple[str, ...], Any, int]]:
        """Yield an update's turns, and how often to count each: the first of a kind once, for it may make what later
        ones share (`fake_batch: shared`); the second, like which all others are, for them too.
        """
        for names, losses in self._kinds().items():
            yield names, losses[0], 1
            if len(losses) > 1:
                yield names, losses[1], len(losses) - 1

    def turn(self, names: tuple[str, ...], loss: Any, draws: RandomDraws, *, learns: bool = True) -> torch.Tensor:
        """Let the named networks learn from a loss, or only have its gradients; return its mean."""
        compiling.learn(self.objective, names)

        def attempt(_: Any) -> torch.Tensor:
            for name in names:
                self.objective.nets[name].zero_grad()
            passes, mean = draws.passes(self.passes.images), torch.zeros((), device=self.on)
            for own in passes:
                value = loss(own).mean() / len(passes)
                with self.timer.part("backward"):
                    value.backward()
                mean += value.detach()
            return mean

        mean = self.passes.attempt(attempt, self.on)
        with self.timer.part("clip, optimizer"):
            for name in names:
                if self.stage.clip is not None:
                    nn.utils.clip_grad_norm_(self.objective.nets[name].parameters(), self.stage.clip)
                if learns:
                    self.optimizers[name].step()
                self.objective.nets[name].zero_grad()
        return mean

    def average(self) -> None:
        """Let the moving average follow."""
        self.ema.update(self.objective.nets[self.objective.product], 0)


def resized(stage: StageSettings, batch: int) -> StageSettings:
    """Return the stage with another batch (of pairs too) and one step."""
    pairs = {"pair_batch": None} if hasattr(stage, "pair_batch") else {}
    return stage.model_copy(update={"batch": batch, "steps": 1} | pairs)
