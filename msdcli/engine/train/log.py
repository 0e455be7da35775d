"""What training writes down: losses, health and cost, and whether it still makes sense."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msdcli.engine.checkpoints.train_state import TrainState
from msdcli.engine.distributed.group import ProcessGroup
from msdcli.engine.tracking.events import Progress, Report
from msdcli.engine.train.selection import Evaluation
from msdcli.errors import UserError
from msdcli.objectives import Objective
from msdcli.recipe.stages import StageSettings
from msdcli.rundir import append_line, parsed_lines, write_text

METRICS = "metrics.jsonl"
BETWEEN = 5.0  # seconds without a line after which a step is told all the same
REMEMBERED = 1000  # turns whose single losses are at hand when one was not finite


@dataclass(frozen=True)
class TurnRecord:
    """What one turn left behind, on the device: nothing here is read before the interval ends."""

    step: int
    names: tuple[str, ...]
    loss: Tensor  # the batch's mean
    norms: Tensor  # of the gradient, one per name
    skipped: Tensor  # 1 where the update was skipped, else 0


class TrainLog:
    """metrics.jsonl and the cost; everything stays on the device and is read once per `steps_per_line` steps."""

    def __init__(
        self,
        path: Path,
        state: TrainState,
        stage: StageSettings,
        what: str,
        report: Report,
        *,
        group: ProcessGroup,
        max_skipped: int,
        cycle: int = 1,
    ) -> None:
        self.path, self.state, self.stage, self.what, self.report = path, state, stage, what, report
        self.group, self.max_skipped = group, max_skipped
        self._turns: list[TurnRecord] = []
        self._single: deque[tuple[int, str, Tensor, Tensor | None]] = deque(maxlen=REMEMBERED)
        self._last: dict[str, Tensor] = {}
        self._streak: dict[str, int] = {}
        self._first: dict[str, str] = {}
        self._then = self._told = time.monotonic()
        self._seconds = 0.0  # of the interval so far
        self._turns_before = 0
        # Of a cycle of steps, after which the same operations come again: a whole number, so that a run that was
        # interrupted comes to the same cost.
        self._cycle = cycle
        self._flops_of_cycle = round(state.cost["flops"] * cycle / max(state.step, 1))
        if group.is_leader:
            self._drop_lines_after(state.step)

    def images(self, name: str, per_image: Tensor, sigma: Tensor | None) -> None:
        """Remember the losses and noise levels of single images, to say where one stopped being finite."""
        self._single.append((self.state.step, name, per_image, sigma))

    def turn(self, names: tuple[str, ...], loss: Tensor, norms: Tensor, skipped: Tensor) -> None:
        self._turns.append(TurnRecord(self.state.step, names, loss, norms, skipped))
        self._last[names[0]] = skipped

    def sound(self) -> bool:
        """Whether the last update of every network was made: reads the device, so ask seldom."""
        return not any(skipped.item() for skipped in self._last.values())

    def tick(self, flops: list[int], objective: Objective, evaluation: Evaluation | None = None) -> None:
        """End a step; at the interval, and with what a look found, write a line. UserError where too many updates were
        skipped.
        """
        self._count(flops, 0.0 if evaluation is None else evaluation.seconds)
        if self.state.step % self.stage.steps_per_line and self.state.step != self.stage.steps and evaluation is None:
            self._tell_between()
            return
        turns = self._read()
        losses = {name: _finite_mean([t["loss"] for t in mine]) for name, mine in turns.items()}
        speed = self.stage.batch * len(self._turns) / max(self._seconds, 1e-9)
        line = {"step": self.state.step, "losses": losses, "images_per_second": round(speed, 1)}
        line["seconds"] = round(self.state.cost["seconds"], 2)  # of the stage so far
        line |= self._health(turns, objective) | ({"measured": evaluation.figures} if evaluation else {})
        if self.group.is_leader:
            append_line(self.path, line)
        self._guard(turns)
        shown = {k: v for k, v in losses.items() if v is not None}
        self.report(Progress(self.what, self.state.step, self.stage.steps, "steps", shown, speed, self._left()))
        self._told = time.monotonic()
        self._turns, self._turns_before, self._seconds = [], 0, 0.0
        self._single.clear()

    def _tell_between(self) -> None:
        """Say how far a slow stage is before its next line; this reads nothing from the device."""
        now = time.monotonic()
        if now - self._told >= BETWEEN and (left := self._left()) is not None:
            self._told = now
            self.report(Progress(self.what, self.state.step, self.stage.steps, "steps", {}, 0.0, left))

    def _left(self) -> float | None:
        """Estimate the seconds to the stage's end; after the first step, which warms up, nobody knows."""
        if self.state.step < 2:
            return None
        return float(self.state.cost["seconds"] / self.state.step * (self.stage.steps - self.state.step))

    def _count(self, flops: list[int], elsewhere: float) -> None:
        """Add a step to the cost, so that every checkpoint has that of its own step; `elsewhere` are the seconds of it
        that were no training.
        """
        now, cost = time.monotonic(), self.state.cost
        seconds, self._then = now - self._then - elsewhere, now
        cost["seconds"] += seconds
        self._seconds += seconds
        cost["images"] += self.stage.batch * (len(self._turns) - self._turns_before)
        if flops:
            cost["flops"] += flops[0] * self.group.size
            self._flops_of_cycle = round(cost["flops"] * self._cycle / self.state.step)
        else:
            cost["flops"] = self._flops_of_cycle * self.state.step / self._cycle
        self._turns_before = len(self._turns)

    def _read(self) -> dict[str, list[dict[str, Any]]]:
        """Fetch the interval's numbers from the device in one piece, by the name of the network whose turn it was."""
        numbers = torch.cat([torch.cat([t.loss.reshape(1), t.skipped.reshape(1), t.norms]) for t in self._turns])
        values = iter(numbers.tolist())
        found: dict[str, list[dict[str, Any]]] = {}
        for turn in self._turns:
            loss, skipped = next(values), bool(next(values))
            norms = {name: next(values) for name in turn.names}
            found.setdefault(turn.names[0], []).append(
                {"step": turn.step, "loss": loss, "skipped": skipped, "norms": norms}
            )
        return found

    def _health(self, turns: dict[str, list[dict[str, Any]]], objective: Objective) -> dict[str, Any]:
        """Figures that say whether training is well: those of the loop, and those the objective offers.

        `lag` is how much higher a network's loss is at its first turn of a step than at its last: how far a network
        that follows another (the fake one) is behind when the other has moved.
        """
        norms: dict[str, list[float]] = {}
        for turn in (t for mine in turns.values() for t in mine):
            for name, norm in turn["norms"].items():
                norms.setdefault(name, []).append(norm)
        figures: dict[str, Any] = {
            "gradient_norms": {name: _finite_mean(found) for name, found in norms.items()},
            "skipped": {name: sum(t["skipped"] for t in mine) for name, mine in turns.items()},
        }
        if lags := {name: lag for name, mine in turns.items() if (lag := _lag(mine)) is not None}:
            figures["lag"] = lags
        if objective.health:
            offered = self.group.all_reduce_mean(torch.stack([figure() for figure in objective.health.values()]))
            figures |= {name: _finite(value) for name, value in zip(objective.health, offered.tolist(), strict=True)}
        return figures

    def _guard(self, turns: dict[str, list[dict[str, Any]]]) -> None:
        """Say that updates were skipped; UserError with a diagnosis when there were too many in a row."""
        for name, mine in turns.items():
            longest = streak = self._streak.get(name, 0)
            for turn in mine:
                streak = streak + 1 if turn["skipped"] else 0
                longest = max(longest, streak)
            self._streak[name] = streak
            if not (number := sum(t["skipped"] for t in mine)):
                self._first.pop(name, None)
                continue
            where = self._first.setdefault(name, self._where(name, mine))
            if longest >= self.max_skipped:
                raise UserError(
                    f"{self.what}: {longest} updates of {name} in a row were not finite, first {where}; none of them "
                    f"was made, and the last good checkpoint is kept in {self.path.parent}",
                    hint=f"a lower learning rate (now {self.stage.lr_of.get(name, self.stage.lr):g}) is the usual cure"
                    " (in a run of another name)",
                )
            self.report(f"{self.what}: {number} of {len(mine)} updates of {name} were not finite and skipped: {where}")

    def _where(self, name: str, turns: list[dict[str, Any]]) -> str:
        """Say at which step and noise level the loss of a network first was not finite, or that its gradient was."""
        first = next(t["step"] for t in turns if t["skipped"])
        mine = None
        for step, who, per_image, sigma in self._single:
            bad = ~per_image.isfinite()
            if step == first and who == name and bad.any():
                mine = sigma[bad][0].item() if sigma is not None and sigma.shape == bad.shape else math.nan
                break
        found = [sigma for sigma in self.group.gather(mine) if sigma is not None]
        if not found:
            return f"its gradient at step {first + 1}"
        known = "" if math.isnan(found[0]) else f" at noise level sigma = {found[0]:.4g}"
        return f"its loss at step {first + 1}{known}"

    def _drop_lines_after(self, step: int) -> None:
        """Forget lines that were written after the checkpoint that this run takes up, and those that are damaged."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = parsed_lines(self.path)
        whole = [line for line in lines if line is not None and isinstance(line.get("step"), int)]
        kept = [line for line in whole if line["step"] <= step]
        cut = bool(lines) and lines[-1] is None  # the last one was being written when its process was killed
        if damaged := len(lines) - len(whole) - cut:
            self.report(f"{self.path}: {damaged} damaged {'line was' if damaged == 1 else 'lines were'} left out")
        if len(kept) < len(lines):
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))


def _lag(turns: list[dict[str, Any]]) -> float | None:
    """Compare the losses of the first and the last turn of a step; None where a step has one turn."""
    steps: dict[int, list[float]] = {}
    for turn in turns:
        steps.setdefault(turn["step"], []).append(turn["loss"])
    ends = [(losses[0], losses[-1]) for losses in steps.values() if len(losses) > 1]
    first, last = _finite_mean([a for a, _ in ends]), _finite_mean([b for _, b in ends])
    return None if first is None or not last else _finite(first / last - 1)


def _finite_mean(values: list[float]) -> float | None:
    """Average what is finite; None where nothing is. In float32, as the device would."""
    finite = [v for v in values if math.isfinite(v)]
    return torch.tensor(finite).mean().item() if finite else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
