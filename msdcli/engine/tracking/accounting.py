"""What a run has cost, part by part, from the records that each part leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msdcli import records
from msdcli.rundir import RunDir


def costs(run: RunDir) -> list[dict[str, Any]]:
    """Return the cost of the teacher, of every student's stages, and of the students in all."""
    recipe = run.recipe()
    found = [("teacher", run.teacher)]
    for k in range(recipe.partition.students):
        found += [(f"student {k} {s.objective}", run.stage(k, i, s.objective)) for i, s in enumerate(recipe.stages)]
    rows = [{"part": part} | cost for part, folder in found if (cost := _cost(folder))]
    students = [row for row in rows if row["part"] != "teacher"]
    total = {key: sum(row[key] for row in students) for key in ("seconds", "images", "flops")}
    return [*rows, {"part": "all students", **total, "peak_bytes": max((r["peak_bytes"] for r in students), default=0)}]


def _cost(folder: Path) -> dict[str, Any] | None:
    model = folder / "model.json"
    if not model.is_file():
        return None
    cost: dict[str, Any] | None = records.model(model).get("cost")  # a teacher from elsewhere has none
    return cost
