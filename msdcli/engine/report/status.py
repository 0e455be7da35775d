"""What is done, what runs and what is missing in a run directory; imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msdcli import records
from msdcli.engine.checkpoints import files as checkpoint_files
from msdcli.engine.tracking.history import METRICS
from msdcli.recipe.stages import StageSettings
from msdcli.rundir import RunDir, holder_of, read_lines


def status(run: RunDir) -> dict[str, Any]:
    """Return the state of a run as plain data; `resumable`: `msd distill` would take it up now.

    UserError if it is no run directory.
    """
    recipe = run.recipe()
    students: list[dict[str, Any]] = []
    for k in range(recipe.partition.students):
        stages = [_stage(run.stage(k, i, stage.objective), stage) for i, stage in enumerate(recipe.stages)]
        running, finished = holder_of(run.student(k)), all(stage["state"] == "done" for stage in stages)
        resumable = running is None and not finished
        students.append({"student": k, "running": running, "resumable": resumable, "stages": stages})
    done = all(stage["state"] == "done" for student in students for stage in student["stages"])
    complete = done and (recipe.has_prompts or bool(run.results()))  # prompts are measured when somebody asks
    return {
        "run": str(run.root),
        "name": recipe.name,
        "teacher": "done" if (run.teacher / "model.json").is_file() else "waiting",
        "partition": "done" if run.partition.is_file() else "waiting",
        "students": students,
        "metrics": [str(path) for path in run.results()],
        "done": complete,
        "resumable": not complete and not any(student["running"] for student in students),
    }


def _stage(folder: Path, stage: StageSettings) -> dict[str, Any]:
    line: dict[str, Any] = next(
        (line for line in reversed(read_lines(folder / METRICS)) if isinstance(line.get("step"), int)), {}
    )
    step = line.get("step", 0)
    if (folder / "model.json").is_file():
        step = records.trained(folder / "model.json")["steps"]
    losses = line.get("losses")
    state = "done" if step >= stage.steps and (folder / "model.json").is_file() else "begun" if line else "waiting"
    return {
        "objective": stage.objective,
        "state": state,
        "step": step,
        "steps": stage.steps,
        "checkpoint": checkpoint_files.step_of(folder),
        "losses": {k: v for k, v in losses.items() if isinstance(v, int | float)} if isinstance(losses, dict) else {},
    }
