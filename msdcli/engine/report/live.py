"""A run as it is at this moment, from its files alone, on whatever host it is trained; imports no torch."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msdcli import records
from msdcli.engine.report.status import OVER, last_change, status
from msdcli.engine.tracking.history import METRICS, TrainingHistory, figures, history, teacher_folder
from msdcli.rundir import RunDir, holder_of


@dataclass(frozen=True)
class StageProgress:
    """The teacher or a stage of a student: how far it is, and what it last wrote."""

    who: str
    student: int | None
    stage: str
    state: str  # waiting, running, stopped, done
    step: int
    steps: int
    losses: dict[str, float] = field(default_factory=dict)
    speed: float | None = None  # images per second
    health: dict[str, float] = field(default_factory=dict)
    seconds_left: float | None = None


@dataclass(frozen=True)
class RunProgress:
    """All parts, the newest distances and whether the run has ended."""

    name: str
    parts: list[StageProgress]
    distances: list[str]
    seconds_left: float | None
    done: bool
    shared: bool  # somebody is at the teacher, pairs or features beside the run
    at_work: list[str] = field(default_factory=list)  # who is at work on the run, whatever it is at
    beside: dict[str, dict[str, Any]] = field(default_factory=dict)  # the parts that are no students, by name

    @property
    def running(self) -> list[StageProgress]:
        return [part for part in self.parts if part.state == "running"]


class ProgressTracker:
    """Takes frames of a run; what it saw before tells how fast the steps are."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self._first: dict[tuple[str, str], tuple[float, int]] = {}  # when a part was first seen to move, and its step

    def progress(self) -> RunProgress:
        """Return the run's state. UserError if it is no run directory."""
        state = status(self.run)
        trainings = history(self.run)
        done = {(s["student"], i): stage for s in state["students"] for i, stage in enumerate(s["stages"])}
        beside = {part["part"]: part for part in state["shared"]}
        parts = []
        for training in trainings:
            if training.student is None:
                known, folder = beside["teacher"], teacher_folder(self.run)
            else:
                known = done[training.student, training.number]
                folder = self.run.stage(training.student, training.number, training.stage.objective)
            parts.append(self._part(training, known, folder))
        left = _left(parts, _weights(self.run, trainings))
        told = parts, distances(self.run), left, self._ended(state), self._shared(), state["at_work"], beside
        return RunProgress(self.run.root.resolve().name, *told)

    def _part(self, training: TrainingHistory, known: dict[str, Any], folder: Path) -> StageProgress:
        last = training.lines[-1] if training.lines else {}
        steps, step, state = training.stage.steps, int(last.get("step", 0)), known["state"]
        changed = _changed(folder / METRICS)
        step = max(step, int(known["step"]))
        found = figures(last) | _measured(training.lines)
        pace = self._pace(training, step, changed) if state == "running" else None
        return StageProgress(
            training.who,
            training.student,
            training.stage.objective,
            state,
            step,
            steps,
            {_loss(k, training): v for k, v in found.items() if k.startswith("losses.")},
            found.get("images_per_second"),
            {k: v for k, v in found.items() if not k.startswith("losses.") and k != "images_per_second"},
            None if pace is None else pace * (steps - step),
        )

    def _pace(self, training: TrainingHistory, step: int, changed: float | None) -> float | None:
        """Return seconds per step since this part was first seen here, or, at first, since its student was begun."""
        if changed is None or not step:
            return None
        seconds = training.lines[-1].get("seconds") if training.lines else None
        if isinstance(seconds, int | float) and seconds > 0:  # as training itself counts them
            return seconds / int(training.lines[-1]["step"])
        since, first = self._first.setdefault((training.who, training.stage.objective), (changed, step))
        if step > first:
            return (changed - since) / (step - first)
        if training.student is None:  # one turn a step
            speed = training.lines[-1].get("images_per_second") if training.lines else None
            return training.stage.batch / speed if isinstance(speed, int | float) and speed > 0 else None
        begun = self._begun(training)
        return (changed - begun) / step if begun is not None and changed > begun else None

    def _begun(self, training: TrainingHistory) -> float | None:
        if training.student is None:
            return None
        before = training.number - 1
        if before >= 0:
            objective = self.run.recipe().stages[before].objective
            return _changed(self.run.stage(training.student, before, objective) / "model.json")
        return _changed(self.run.student(training.student) / ".lock")

    def _shared(self) -> bool:
        return any(holder_of(path.parent) for path in self.run.shared.glob("*/.lock"))

    def _ended(self, state: dict[str, Any]) -> bool:
        """Whether all is done; a run of single students (an array job) is not measured by them."""
        if state["done"]:
            return True
        if not all(stage["state"] == "done" for student in state["students"] for stage in student["stages"]):
            return False
        return not state["at_work"] and time.time() - last_change(self.run) > OVER


def _loss(name: str, training: TrainingHistory) -> str:
    """Return what a loss is called for people: the teacher's is no student's."""
    name = name.removeprefix("losses.")
    return "loss" if training.student is None and name == "student" else name


def _measured(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Return the last distance that was measured while a stage trained; most lines are without one."""
    found = (line["measured"] for line in reversed(lines) if isinstance(line.get("measured"), dict))
    return next((figures(measured, "measured.") for measured in found), {})


def distances(run: RunDir) -> list[str]:
    """Return the newest distances as lines: those under way, then the results."""
    found = []
    if watched := records.watched(run.watched):
        last = watched[-1]
        values = [f"student {k} {s['value']:.4g}" for k, s in last["students"].items() if s.get("value") is not None]
        whole = [] if last.get("whole") is None else [f"whole {last['whole']:.4g}"]
        found.append(f"{last['metric']} under way: {', '.join([*whole, *values[:8]])}")
    for path in run.results():
        result = records.measurement(path)
        metric = result.get("metric")
        rows = [r for r in result.get("rows", []) if r["group"] == "whole" and metric in r["values"]]
        found.append(f"{metric}: " + ", ".join(f"{r['who']} {r['values'][metric]:.4g}" for r in rows))
    return found


def _weights(run: RunDir, trainings: list[TrainingHistory]) -> dict[tuple[str, str], float]:
    """Return the operations of a step of every part, by who and stage, as far as they were counted."""
    if not run.flops_file.is_file():
        return {}
    counted = records.read(run.flops_file, records.Counted, "count of operations")
    sizes = counted.get("sizes") or [{"stages": counted.get("stages", [])}]
    stages_of = {k: size["stages"] for size in sizes for k in size.get("students", ())}
    found = {}
    for training in trainings:
        stages = stages_of.get(training.student, sizes[0]["stages"])
        of = (
            counted["teacher"]
            if training.student is None
            else (stages[training.number] if training.number < len(stages) else 0)
        )
        found[training.who, training.stage.objective] = of / training.stage.steps
    return found


def _left(parts: list[StageProgress], weights: dict[tuple[str, str], float] | None = None) -> float | None:
    """Estimate the time to the last step: steps that are left at the mean pace of their stage, shared by who works.

    A stage that nobody has begun goes at the pace of those at work, by the operations of its steps where these are
    known.
    """
    weights = weights or {}
    running = [part for part in parts if part.seconds_left is not None]
    if not running:
        return None
    pace: dict[str, list[float]] = {}
    for part in running:
        if part.steps > part.step and part.seconds_left is not None:
            pace.setdefault(part.stage, []).append(part.seconds_left / (part.steps - part.step))
    total = 0.0
    per_flop = [
        part.seconds_left / (part.steps - part.step) / weight
        for part in running
        if part.seconds_left and part.steps > part.step and (weight := weights.get((part.who, part.stage)))
    ]
    for part in (p for p in parts if p.state != "done"):
        weight = weights.get((part.who, part.stage))
        if part.stage in pace:
            each = sum(pace[part.stage]) / len(pace[part.stage])
        elif weight and per_flop:
            each = weight * sum(per_flop) / len(per_flop)
        else:
            return None  # nobody has shown how fast that is
        total += (part.steps - part.step) * each
    return total / len(running)


def _changed(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
