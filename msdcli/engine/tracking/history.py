"""What training wrote down as it went: the metrics.jsonl of the teacher and of every stage, as curves; no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msdcli.recipe.stages import StageSettings
from msdcli.rundir import RunDir, read_lines

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class TrainingHistory:
    """One part of a run that was trained: the teacher (`student` is None), or a student in stage `number`."""

    student: int | None
    number: int
    stage: StageSettings
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def who(self) -> str:
        return "teacher" if self.student is None else f"student {self.student}"

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Return (step, value) of everything that was noted, by name: `losses.student`, `images_per_second`, ..."""
        found: dict[str, list[tuple[int, float]]] = {}
        for line in self.lines:
            for name, value in figures(line).items():
                found.setdefault(name, []).append((int(line["step"]), value))
        return found


def figures(line: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Return every number of a line of metrics.jsonl but step and time, nested ones by dotted name."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            found |= figures(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and prefix + name not in ("step", "seconds", "time"):
            found[prefix + name] = float(value)
    return found


def history(run: RunDir) -> list[TrainingHistory]:
    """Return the teacher and every student's stages with the lines that each has written so far."""
    recipe = run.recipe()
    found = (
        [] if recipe.teacher.path else [TrainingHistory(None, 0, recipe.teacher.training, _lines(teacher_folder(run)))]
    )
    return found + [
        TrainingHistory(k, i, stage, _lines(run.stage(k, i, stage.objective)))
        for k in range(recipe.partition.students)
        for i, stage in enumerate(recipe.stages)
    ]


def teacher_folder(run: RunDir) -> Path:
    """Return where the teacher's lines are: while it trains that is beside the run, and several runs may be there."""
    if (run.teacher / METRICS).is_file():
        return run.teacher
    begun = [f for f in run.shared.glob("teacher-*") if (f / METRICS).is_file() and not (f / "model.json").is_file()]
    return begun[0] if len(begun) == 1 else run.teacher


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(folder / METRICS) if isinstance(line.get("step"), int)]
