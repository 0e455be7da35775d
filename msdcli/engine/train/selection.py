"""What a stage ends with: its last average, or, where the recipe says `select`, the best of those measured on the way.

A candidate's weights stay for as long as a checkpoint is kept from which training could go on and make it the best; so
a run that resumes, from whatever checkpoint, chooses as one that nobody disturbed.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from msdcli import records
from msdcli.diffusion.denoiser import Denoiser
from msdcli.engine.checkpoints.tensors import load_tensors, save_tensors
from msdcli.engine.checkpoints.train_state import TrainState
from msdcli.engine.distributed.group import ProcessGroup
from msdcli.engine.distributed.sharding import whole_state
from msdcli.engine.tracking.events import Report
from msdcli.errors import UserError
from msdcli.recipe.stages import GeneratorSettings
from msdcli.rundir import write_json

CANDIDATES = "candidates.json"


class StudentEvaluator(Protocol):
    """What measures a student: less is better. All processes ask it, and all get one answer."""

    metric: str
    samples: int

    def record(self) -> dict[str, Any]:
        """Return all that its figures depend on beside the student."""

    def value(self, net: Denoiser) -> float | None:
        """Return the distance of a student's samples, None where they are not finite."""


@dataclass(frozen=True)
class Candidate:
    """The average of one step, measured."""

    step: int
    value: float | None  # None: not finite, or its weights are lost
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """What measuring found, by the name of the metric, and the time that it took from training."""

    figures: dict[str, float | None]
    seconds: float


class AverageSelection:
    """What the loop tells of its steps. This one leaves them alone: the last average is what the stage ends with."""

    def begin(self, step: int) -> None:
        """Training goes on from this step, 0 if from the start."""

    def after_step(self, state: TrainState) -> Evaluation | None:
        """A step is done: measure its average, if it is its turn."""

    def saved(self, step: int) -> None:
        """A checkpoint of this step is being written."""

    def product(self, state: TrainState, group: ProcessGroup) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the weights that the stage ends with (whole, to the leader) and what model.json says of the choice."""
        return whole_state(state.ema.net, group), {}


LAST_AVERAGE = AverageSelection()


class BestAverage(AverageSelection):
    """Measures the average every so many steps and at the end, and keeps the best."""

    def __init__(
        self,
        evaluator: StudentEvaluator,
        stage: GeneratorSettings,
        folder: Path,
        *,
        keep: int,
        what: str,
        group: ProcessGroup,
        report: Report,
    ) -> None:
        assert stage.select is not None, "a stage that does not select has no best"
        self.evaluator, self.every, self.steps, self.folder = evaluator, stage.select.every, stage.steps, folder
        self.what, self.group, self.report = what, group, report
        self.candidates: list[Candidate] = []
        # Where training could go on from: the checkpoints that are kept, and the one that is being written.
        self._saves: deque[int] = deque(maxlen=keep + 1)
        self._begun = 0

    def best(self, upto: float = math.inf) -> Candidate | None:
        """Return the best candidate up to a step; of equal ones the first."""
        return lowest([c for c in self.candidates if c.step <= upto])

    def begin(self, step: int) -> None:
        """Take up the candidates up to this step; later ones will be found again."""
        self._begun = step
        self._saves.append(step)
        self.candidates = self.group.broadcast(self._read(step) if self.group.is_leader else [])

    def after_step(self, state: TrainState) -> Evaluation | None:
        if state.step % self.every and state.step != self.steps:
            return None
        return self._measure(state)

    def saved(self, step: int) -> None:
        self._saves.append(step)

    def product(self, state: TrainState, group: ProcessGroup) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if self.best() is None or self.candidates[-1].step < state.step:
            self._measure(state)  # weights or records of candidates are lost: there is this one at least
        best, last = self.best(), self.candidates[-1]
        chosen = best or last
        selected = {
            "step": chosen.step,
            "metric": self.evaluator.metric,
            "protocol": self.evaluator.record()["protocol"],
            "value": chosen.value,
            "samples": self.evaluator.samples,
            "of": len(self.candidates),
            "last": last.value,
            "seconds": round(sum(c.seconds for c in self.candidates), 3),
        }
        self.report(f"{self.what}: {_said(selected, last.step)}")
        if best is None:
            return super().product(state, group)[0], {"selected": selected}
        whole = load_tensors(self._path(best.step))[0] if group.is_leader else {}
        return whole, {"selected": selected}

    def _measure(self, state: TrainState) -> Evaluation:
        begun = time.monotonic()
        value = self.evaluator.value(state.ema.denoiser)
        self.candidates = [c for c in self.candidates if c.step < state.step]
        before, candidate = self.best(), Candidate(state.step, value, time.monotonic() - begun)
        self.candidates.append(candidate)
        if self.best() is not before:
            whole = whole_state(state.ema.net, self.group)
            if self.group.is_leader:
                self._keep(candidate, whole)
        if self.group.is_leader:
            known = {"measured": self.evaluator.record(), "candidates": [asdict(c) for c in self.candidates]}
            write_json(self.folder / CANDIDATES, known)
        return Evaluation({self.evaluator.metric: value}, time.monotonic() - begun)

    def _keep(self, candidate: Candidate, tensors: dict[str, Tensor]) -> None:
        """Write a candidate's weights, and remove those that nothing can make the best any more."""
        told = {"metric": self.evaluator.metric, "value": candidate.value, "samples": self.evaluator.samples}
        numbers = {name: str(value) for name, value in ({"step": candidate.step} | told).items()}
        save_tensors(self._path(candidate.step), tensors, numbers, hashed=True)
        needed = {best.step for step in (*self._saves, math.inf) if (best := self.best(step)) is not None}
        for step in _steps(self.folder):
            # Until as many checkpoints are written as are kept, there are some from before this process.
            if step not in needed and (step > self._begun or len(self._saves) == self._saves.maxlen):
                self._path(step).unlink()

    def _read(self, step: int) -> list[Candidate]:
        """Return the candidates up to a step as they were measured; those whose weights are lost are none any more."""
        for later in (s for s in _steps(self.folder) if s > step):
            self._path(later).unlink()
        if not (self.folder / CANDIDATES).is_file():
            return []
        known = records.read(self.folder / CANDIDATES, records.Candidates, "list of averages")
        if known["measured"] != self.evaluator.record():
            self.report(f"{self.what}: what measures has changed; averages up to step {step} are left out")
            return []
        found = [Candidate(c["step"], c["value"], c["seconds"]) for c in known["candidates"] if c["step"] <= step]
        told = False
        while (best := lowest(found)) is not None and (problem := self._problem(best)) is not None:
            if not told:
                self.report(f"{self.what}: the best average so far is lost ({problem}); going on without it")
            told, found[found.index(best)] = True, replace(best, value=None)
        return found

    def _problem(self, candidate: Candidate) -> str | None:
        try:
            load_tensors(self._path(candidate.step))
        except UserError as error:
            return error.message
        return None

    def _path(self, step: int) -> Path:
        return self.folder / f"best-{step}.safetensors"


def _steps(folder: Path) -> list[int]:
    """Return the steps whose weights are there."""
    names = [path.stem.removeprefix("best-") for path in folder.glob("best-*.safetensors")]
    return [int(name) for name in names if name.isdecimal()]


def lowest(candidates: list[Candidate]) -> Candidate | None:
    """Return the candidate of the least value; of equal ones the first."""
    measured = [(c.value, c) for c in candidates if c.value is not None]
    return min(measured, key=lambda pair: pair[0])[1] if measured else None


def _said(selected: dict[str, Any], last_step: int) -> str:
    metric, value, last = selected["metric"], selected["value"], selected["last"]
    if value is None:
        return f"no average could be measured by {metric}: the last one is kept"
    others = "the last one" if selected["step"] == last_step else f"the last has {_figure(last)}"
    return (
        f"the average of step {selected['step']} is kept, {metric} {_figure(value)}, the least of {selected['of']} "
        f"({others}); measuring took {selected['seconds']:.0f} s"
    )


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
