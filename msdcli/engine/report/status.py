"""What is done, what runs and what is missing in a run directory; imports no torch."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msdcli import records
from msdcli.engine.checkpoints import files as checkpoint_files
from msdcli.engine.tracking.history import METRICS, teacher_folder
from msdcli.engine.tracking.presence import who_attends
from msdcli.errors import UserError
from msdcli.recipe import Recipe
from msdcli.recipe.stages import StageSettings
from msdcli.rundir import RunDir, holder_of, last_lines

FRESH = 120.0  # seconds since its last line in which a part counts as running where another host may hold it
OVER = 60.0  # seconds without a change after which a run that nobody measures has ended
STATES = ("running", "stopped", "waiting", "done")


def runs_here(folder: Path = Path("runs")) -> list[RunDir]:
    """Return the runs in the folder where `msd distill` puts them."""
    return [RunDir(path.parent) for path in sorted(folder.glob("*/recipe.yaml"))]


def status(run: RunDir) -> dict[str, Any]:
    """Return the state of a run as plain data; `resumable`: `msd distill` would take it up now.

    Every part is `waiting`, `running`, `stopped` (begun, and nobody is at it) or `done`. UserError if it is no run
    directory.
    """
    recipe = run.recipe()
    students: list[dict[str, Any]] = []
    for k in range(recipe.partition.students):
        running, stages = holder_of(run.student(k)), list[dict[str, Any]]()
        for i, stage in enumerate(recipe.stages):
            turn = all(before["state"] == "done" for before in stages)
            stages.append(_stage(run.stage(k, i, stage.objective), run.student(k), stage, running if turn else None))
        finished = all(stage["state"] == "done" for stage in stages)
        resumable = running is None and not finished
        own = {"parameters": _parameters(run, recipe, k), "stages": stages}
        students.append({"student": k, "running": running, "resumable": resumable} | own)
    done = all(stage["state"] == "done" for student in students for stage in student["stages"])
    complete = done and (not recipe.has_measure or bool(run.results()))  # others are measured when somebody asks
    at_work = who_attends(run)
    shared = list(_shared(run, recipe, students_done=done, at_work=at_work))
    held = bool(at_work) or any(part["running"] for part in [*students, *shared])
    return {
        "run": str(run.root),
        "name": recipe.name,
        "state": _of_run([*shared, *(stage for s in students for stage in s["stages"])], at_work, complete=complete),
        "at_work": at_work,
        "teacher": shared[0]["state"],
        "partition": "done" if run.partition.is_file() else "waiting",
        "shared": shared,
        "students": students,
        "metrics": [str(path) for path in run.results()],
        "measured": {path.stem: _value(path) for path in run.results()},
        "done": complete,
        "resumable": not complete and not held,
    }


def _parameters(run: RunDir, recipe: Recipe, number: int) -> int | None:
    """How large a student's network is; None before its first stage is finished, or where that is damaged."""
    for i, stage in enumerate(recipe.stages):
        with contextlib.suppress(UserError):
            if (path := run.stage(number, i, stage.objective) / "model.json").is_file():
                found = records.model(path).get("parameters")
                return found if isinstance(found, int) else None
    return None


def _value(path: Path) -> float | None:
    """Return the students' figure of a measurement; None where the file is damaged, which is no matter of a state."""
    with contextlib.suppress(UserError):
        found = records.measurement(path)
        for row in found["rows"]:
            if (row["who"], row["group"]) == ("students", "whole"):
                return float(row["values"][found["metric"]])
    return None


def _of_run(parts: list[dict[str, Any]], at_work: list[str], *, complete: bool) -> str:
    states = [part["state"] for part in parts]
    if complete and not at_work:
        return "done"
    return "running" if at_work or "running" in states else "waiting" if set(states) == {"waiting"} else "stopped"


def _shared(run: RunDir, recipe: Recipe, *, students_done: bool, at_work: list[str]) -> Iterator[dict[str, Any]]:
    """Yield what is made beside the students: the teacher, the classifier that measures, and the measurement."""
    training = None if recipe.teacher.path else recipe.teacher.training
    yield _part("teacher", run.teacher, _being_made(run, "teacher", teacher_folder(run)), training)
    if recipe.has_measure and recipe.data.name != "toy2d":
        yield _part("classifier", run.classifier, _being_made(run, "classifier", run.classifier), None)
    measured = bool(run.results())
    if not recipe.has_measure and not measured:
        return
    who = at_work[0] if at_work else None
    # Of another host's processes nothing may be seen here but what they write.
    lately = time.time() - last_change(run) < OVER and any(_held_elsewhere(f) for f in run.students.glob("*/"))
    running = students_done and (who is not None or (lately and not measured))
    yield _as_part("measurement", "running" if running else "done" if measured else "waiting", who if running else None)


def _being_made(run: RunDir, what: str, known: Path) -> Path:
    """Return the folder beside the runs in which somebody is making a part, or what is known of it."""
    found = (f for f in run.shared.glob(f"{what}-*") if not (f / "model.json").is_file() and holder_of(f))
    return next(found, known)


def _part(name: str, own: Path, made_in: Path, stage: StageSettings | None) -> dict[str, Any]:
    holder = holder_of(made_in) if made_in != own else None
    last = _last_line(made_in)
    if (own / "model.json").is_file():
        steps = stage.steps if stage else 0
        return _as_part(name, "done", None, steps, steps, _losses(last))
    step = max(last.get("step", 0), checkpoint_files.step_of(made_in) or 0)
    state = "running" if holder or _runs_elsewhere(made_in, made_in) else "stopped" if step else "waiting"
    return _as_part(name, state, holder, step, stage.steps if stage else 0, _losses(last))


def _as_part(
    name: str,
    state: str,
    holder: str | None,
    step: int = 0,
    steps: int = 0,
    losses: dict[str, float] | None = None,
) -> dict[str, Any]:
    # What a network's loss is called in the file tells the networks of a stage apart; here there is one.
    named = {"loss" if loss == "student" else loss: value for loss, value in (losses or {}).items()}
    return {"part": name, "state": state, "running": holder, "step": step, "steps": steps, "losses": named}


def _stage(folder: Path, student: Path, stage: StageSettings, holder: str | None) -> dict[str, Any]:
    """The state of one stage; `holder` is who holds the student, where it is this stage's turn."""
    line, saved = _last_line(folder), checkpoint_files.step_of(folder)
    step = max(line.get("step", 0), saved or 0)  # a run that was stopped may have come further than its last line
    if (folder / "model.json").is_file():
        step = records.trained(folder / "model.json")["steps"]
    if step >= stage.steps and (folder / "model.json").is_file():
        state = "done"
    elif holder is not None or (line and _runs_elsewhere(student, folder)):
        state = "running"
    else:
        state = "stopped" if step else "waiting"
    return {
        "objective": stage.objective,
        "state": state,
        "step": step,
        "steps": stage.steps,
        "checkpoint": saved,
        "losses": _losses(line),
    }


def _last_line(folder: Path) -> dict[str, Any]:
    lines = reversed(last_lines(folder / METRICS))
    return next((line for line in lines if isinstance(line.get("step"), int)), {})


def _losses(line: dict[str, Any]) -> dict[str, float]:
    losses = line.get("losses")
    return {k: v for k, v in losses.items() if isinstance(v, int | float)} if isinstance(losses, dict) else {}


def _runs_elsewhere(held: Path, written: Path) -> bool:
    """Whether a lock was last taken on another host, whose locks may not be seen here, and lines are fresh."""
    with contextlib.suppress(OSError):
        return _held_elsewhere(held) and time.time() - (written / METRICS).stat().st_mtime < FRESH
    return False


def _held_elsewhere(folder: Path) -> bool:
    """Whether the last who held the lock of `folder` was on another host."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return bool(json.loads((folder / ".lock").read_text(encoding="utf-8"))["host"] != socket.gethostname())
    return False


def last_change(run: RunDir) -> float:
    """Return when a student was finished, or something was measured, for the last time; 0 if never."""
    times = [0.0]
    for file in [run.metrics, run.samples, *run.students.glob("*/*/model.json")]:
        with contextlib.suppress(OSError):
            times.append(file.stat().st_mtime)
    return max(times)
