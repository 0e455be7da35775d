"""Run the cells of a sweep, and sum them up: a table with the spread over seeds, a CSV and a picture."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msdcli import records
from msdcli.engine import pipeline
from msdcli.engine.checkpoints.model import MODEL
from msdcli.engine.tracking.accounting import costs
from msdcli.engine.tracking.events import Report
from msdcli.engine.tracking.formatting import markdown_table
from msdcli.engine.train.student import is_finished
from msdcli.errors import UserError
from msdcli.outputs import MARK, check_drawn_table, check_table
from msdcli.recipe import Recipe
from msdcli.rundir import RunDir, write_text, writing
from msdcli.sweep import Cell, Sweep


@dataclass(frozen=True)
class TableRow:
    """One line of the table: every figure of every seed that is done, by name."""

    label: str
    seeds: list[int]
    samples: int
    figures: dict[str, list[float]]
    is_teacher: bool = False

    def mean(self, name: str) -> float:
        return statistics.fmean(self.figures[name])

    def spread(self, name: str) -> float:
        """The standard deviation over seeds; 0 for a single one."""
        values = self.figures[name]
        return statistics.stdev(values) if len(values) > 1 else 0.0


def run(sweep: Sweep, report: Report, *, worker: tuple[int, int] = (0, 1)) -> None:
    """Finish the cells of worker i of n (i, i + n, ...), waiting where another process is at one."""
    check(sweep)
    index, count = worker
    mine = sweep.cells[index::count]
    for cell in mine:
        for wanted in [*sweep.needed_by(cell), cell]:
            report(f"{wanted.label}, seed {wanted.seed} ({sweep.cells.index(wanted) + 1} of {len(sweep.cells)})")
            if result_of(wanted) is None:
                pipeline.distill(wanted.recipe, report)


def result_of(cell: Cell) -> dict[str, Any] | None:
    """Return the measurement that a cell's run ended with. UserError if its directory belongs to another recipe.

    None where there is none of the recipe as it is now: of students that took all of its steps, by its samples. Where
    a run does not measure itself, whatever a user measured it by is taken.
    """
    run_dir, recipe = RunDir(cell.recipe.run_dir), cell.recipe
    run_dir.check(recipe)
    if (students := _finished(run_dir, recipe)) is None:
        return None
    for found in map(records.measurement, run_dir.results()):
        drawn = found["samples"], found.get("seed")
        asked = recipe.evaluation.samples, recipe.evaluation.seed
        own = not recipe.has_measure or (found["metric"] in recipe.own_metrics and drawn == asked)
        if own and found.get("students_sha256") == students:
            return found
    return None


def _finished(run_dir: RunDir, recipe: Recipe) -> list[str] | None:
    """Return the hashes of a run's students; None while one is not finished."""
    last = recipe.stages[-1]
    students = range(recipe.partition.students)
    folders = [run_dir.stage(k, len(recipe.stages) - 1, last.objective) for k in students]
    if not all(is_finished(folder, last) for folder in folders):
        return None
    return [records.trained(folder / MODEL)["sha256"] for folder in folders]


def lines(sweep: Sweep) -> list[TableRow]:
    """Return what is done, line by line; the first are the teacher's."""
    table, metric = list[TableRow](), None
    for label in sweep.labels:
        done = [(cell, result) for cell in sweep.cells if cell.label == label and (result := result_of(cell))]
        if not done:
            continue
        metric = done[0][1]["metric"]
        figures = [whole(result, "students") | _cost(RunDir(cell.recipe.run_dir)) for cell, result in done]
        table.append(TableRow(label, [cell.seed for cell, _ in done], done[0][1]["samples"], common(figures)))
    if metric is None:
        raise UserError(f"{sweep.folder}: no run of this sweep is finished", hint=f"msd sweep {sweep.name}")
    return [*_teachers(sweep), *table]


def _teachers(sweep: Sweep) -> list[TableRow]:
    """A line for the teachers of the sweep, one value per distinct teacher; or, where they are sampled by several
    solvers, a line for each.
    """
    found = dict[str, dict[Any, tuple[int, dict[str, float], int]]]()
    for cell in sweep.cells:
        if result := result_of(cell):
            solver = cell.recipe.teacher.solver
            how = f"{solver.name} {solver.evaluations}" if len(_solvers(sweep)) > 1 else ""
            one = (cell.seed, whole(result, "teacher"), result["samples"])
            found.setdefault(how, {})[result.get("teacher_sha256"), str(solver.record())] = one
    lines = []
    for how, teachers in found.items():
        seeds, figures, samples = zip(*teachers.values(), strict=True)
        lines.append(TableRow(f"teacher{how and ', '}{how}", [*seeds], samples[0], common(figures), is_teacher=True))
    return lines


def _solvers(sweep: Sweep) -> set[str]:
    return {str(cell.recipe.teacher.solver.record()) for cell in sweep.cells}


def common(figures: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Return the figures that all of some runs have, by name: one that was measured with more has more of them."""
    return {name: [f[name] for f in figures] for name in figures[0] if all(name in f for f in figures)}


def whole(result: dict[str, Any], who: str) -> dict[str, float]:
    row = next(row for row in result["rows"] if (row["who"], row["group"]) == (who, "whole"))
    return dict(row["values"])


def _cost(run_dir: RunDir) -> dict[str, float]:
    total = next(row for row in costs(run_dir) if row["part"] == "all students")
    return {"student seconds": total["seconds"], "student FLOP": total["flops"]}


def summary(table: Sequence[TableRow]) -> tuple[list[str], list[list[str]]]:
    """Return column names and rows, mean ± standard deviation over seeds; the CSV has the figures left out here."""
    names = [n for n in dict.fromkeys(n for line in table for n in line.figures) if n not in ("kid", "density")]
    rows = [
        [line.label, str(len(line.seeds)), f"{line.samples:,}", *(_shown(line, n) for n in names)] for line in table
    ]
    return ["", "seeds", "samples", *names], rows


def _shown(line: TableRow, name: str) -> str:
    if name not in line.figures:
        return ""
    spread = f" ± {_short(line.spread(name))}" if len(line.seeds) > 1 else ""
    return _short(line.mean(name)) + spread


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) >= 1e4 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.4f}"


def write(sweep: Sweep, table: Sequence[TableRow]) -> list[Path]:
    """Write table.md, table.csv (one row per run) and table.png into the sweep's folder; return their paths."""
    paths = [sweep.folder / name for name in ("table.md", "table.csv", "table.png")]
    check(sweep)
    columns, rows = summary(table)
    write_text(paths[0], "\n".join(markdown_table(columns, rows)) + "\n")
    write_text(paths[1], _csv(table))
    _draw(paths[2], sweep.name, table)
    return paths


def check(sweep: Sweep) -> None:
    """Raise UserError where something else than an earlier table is in a table's place."""
    check_table(sweep.folder / "table.md", "|  | seeds | samples")
    check_table(sweep.folder / "table.csv", "line,seed,samples")
    check_drawn_table(sweep.folder / "table.png")


def _csv(table: Sequence[TableRow]) -> str:
    names = list(dict.fromkeys(name for line in table for name in line.figures))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["line", "seed", "samples", *names])
    for line in table:
        for i, seed in enumerate(line.seeds):
            writer.writerow([line.label, seed, line.samples, *(line.figures.get(n, [""] * (i + 1))[i] for n in names)])
    return text.getvalue()


def _draw(path: Path, title: str, table: Sequence[TableRow]) -> None:
    """Draw the first figure of every line: each seed a dot, the mean a bar, the teacher a broken line."""
    from matplotlib.figure import Figure

    metric = next(iter(table[-1].figures))
    students, teachers = [line for line in table if not line.is_teacher], [line for line in table if line.is_teacher]
    figure = Figure(figsize=(7, 0.8 + 0.34 * len(students)), layout="constrained")
    axes = figure.add_subplot(xlabel=f"{metric} ({students[0].samples:,} samples; a dot is a seed)", title=title)
    for y, line in enumerate(reversed(students)):
        values = line.figures[metric]
        axes.plot(values, [y] * len(values), "o", color="tab:blue", alpha=0.6, markersize=5)
        axes.plot([line.mean(metric)], [y], "|", color="black", markersize=14)
    for line in teachers if len(teachers) == 1 else []:
        if metric in line.figures:
            axes.axvline(line.mean(metric), linestyle="--", color="tab:gray", label="teacher")
            axes.legend(fontsize=8)
    axes.set_yticks(range(len(students)), [line.label for line in reversed(students)])
    spans = [v for line in students for v in line.figures[metric]]
    if min(spans) > 0 and max(spans) / min(spans) > 20:
        axes.set_xscale("log")
    axes.grid(axis="x", alpha=0.3)
    with writing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, metadata={"Software": MARK})
