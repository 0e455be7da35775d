"""Figures for papers: points in the plane, curves, and a table, as vectors, of one run or of several."""

from __future__ import annotations

import difflib
import io
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from msdcli.engine.report import charts, frontier
from msdcli.engine.report.facts import RunFacts, load_runs, lower_is_better, main_result, metrics, row
from msdcli.engine.tracking import formatting
from msdcli.errors import UserError, WrongValueError
from msdcli.outputs import MARK, check_file
from msdcli.rundir import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Kind = Literal["toy", "curves", "table", "frontier"]
FORMATS = (".pdf", ".svg", ".png")
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.1,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "pdf.fonttype": 42,  # letters stay letters, as publishers ask
    "svg.fonttype": "none",
    "svg.hashsalt": "msd",
}
WIDTH = 6.75  # inches: a page of two columns
POINTS = 1000  # of a class: more are vectors that no reader opens quickly


def plot(kind: str, roots: Sequence[Path], out: Path, *, health: bool = False) -> None:
    """Draw `kind` (toy, curves or table) of the runs, or the frontier of a sweep's folder, to `out`. UserError for what
    they do not have, WrongValueError for a kind or a format that does not exist.
    """
    if kind not in get_args(Kind):
        near = difflib.get_close_matches(kind, get_args(Kind), 1)
        hint = f"did you mean {near[0]}?" if near else None
        raise WrongValueError(f"figure {kind!r} does not exist: there are {', '.join(get_args(Kind))}", hint=hint)
    if out.suffix.lower() not in FORMATS:
        hint = f"--out {shlex.quote(str(out.with_suffix('.pdf')))}"
        raise WrongValueError(f"{out}: figures are {', '.join(FORMATS)}", hint=hint)
    check_file(out, out.suffix.lower())
    import matplotlib

    with matplotlib.rc_context(STYLE):
        if kind == "frontier":
            if len(roots) > 1:
                raise UserError("a figure shows one frontier: name one sweep's folder")
            figure = frontier.draw(frontier.load(roots[0]))
        elif kind == "toy":
            figure = toy(load_runs(roots))
        elif kind == "curves":
            figure = curves(load_runs(roots), health=health)
        else:
            figure = table(load_runs(roots))
        kind = out.suffix[1:].lower()
        told = {"Software": MARK} if kind == "png" else {"Creator": MARK}
        with writing(out) as temporary:
            figure.savefig(temporary, format=kind, dpi=300, bbox_inches="tight", metadata=told)


def svg_of_frontier(record: dict[str, Any]) -> bytes:
    """Return the picture of a frontier as SVG."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        file = io.BytesIO()
        told = {"Creator": MARK, "Date": None}
        frontier.draw(record).savefig(file, format="svg", bbox_inches="tight", metadata=told)
    return file.getvalue()


def _figure(width: float, height: float, *, layout: Literal["constrained"] | None = "constrained") -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


# Points in the plane.


def toy(runs: Sequence[RunFacts]) -> Figure:
    """A column per class; rows of the data, of every teacher and of every run's students."""
    for facts in runs:
        if not facts.planar or not facts.record:
            raise UserError(f"{facts.label} makes no points in the plane", hint="msd report draws its samples")
    names = runs[0].class_names
    if other := next((facts for facts in runs if facts.class_names != names), None):
        raise UserError(f"{other.label} has other classes than {runs[0].label}")
    rows = _rows_of_points(runs)
    figure = _figure(WIDTH, 0.25 + len(rows) * (WIDTH - 0.4) / max(4, len(names)))
    for r, (label, points, colour) in enumerate(rows):
        for c, samples in enumerate(points):
            axes = figure.add_subplot(len(rows), len(names), 1 + r * len(names) + c, aspect="equal")
            axes.scatter(samples[:, 0], samples[:, 1], s=0.6, linewidths=0, color=colour)
            axes.spines[:].set_visible(False)
            axes.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), xticks=[], yticks=[])
            if r == 0:
                axes.set_title(names[c])
            if c == 0:
                axes.set_ylabel(label, fontsize=7)
    return figure


def _rows_of_points(runs: Sequence[RunFacts]) -> list[tuple[str, list[Any], str]]:
    from msdcli.engine import sample
    from msdcli.engine.inputs import dataset, pairs
    from msdcli.engine.inputs import teacher as teachers
    from msdcli.engine.tracking.events import silent

    first = runs[0]
    data = dataset.provide(first.run, first.recipe, silent)
    classes = list(range(len(data.class_names)))
    labels = data.labels(range(len(data)))
    rows = [("data", [data.images((labels == c).nonzero().flatten()[:POINTS].tolist()) for c in classes], "#777777")]
    drawn: set[tuple[str, str]] = set()
    for facts in runs:
        net, sha256 = teachers.load(facts.run, facts.recipe)
        if (as_solved := (sha256, str(facts.recipe.teacher.solver.record()))) in drawn:
            continue
        source = pairs.Pairs(facts.run, facts.recipe, data, sha256)
        theirs = source.examples(net, classes, POINTS) or []
        rows.append((f"teacher, {facts.evaluations} NFE" + (f" {len(drawn) + 1}" if drawn else ""), theirs, "#222222"))
        drawn.add(as_solved)
    for i, facts in enumerate(runs):
        mine = sample.load(facts.run.root).sample([c for c in classes for _ in range(POINTS)]).split(POINTS)
        label = f"students, {facts.steps} NFE" if len(runs) == 1 else facts.label
        rows.append((label, list(mine), f"C{i}"))
    return rows


# Curves.


def curves(runs: Sequence[RunFacts], *, health: bool = False) -> Figure:
    """One small plot per loss and, where they were measured under way, per distance; with `health`, of health alone."""
    found = charts.curve_charts(runs)
    drawn = found["health"] if health else [*found["measured"], *charts.watched_chart(runs), *found["losses"]]
    drawn = [chart for chart in drawn if any(series["points"] for series in chart["series"])]
    if not drawn:
        raise UserError(f"{', '.join(facts.label for facts in runs)}: no curves were kept (metrics.jsonl)")
    columns = min(3, len(drawn))
    lines = math.ceil(len(drawn) / columns)
    figure = _figure(WIDTH, 1.9 * lines)
    groups = list(dict.fromkeys(s["group"] for chart in drawn for s in chart["series"]))
    named = [group for group in groups if group not in ("teacher", "whole")]
    for i, chart in enumerate(drawn):
        axes = figure.add_subplot(lines, columns, i + 1, title=chart["title"], xlabel=chart["x"])
        if chart["log"]:
            axes.set_yscale("log")
        for series in chart["series"]:
            _curve(axes, series, named)
    if len(groups) > 1:
        handles = {s.get_gid(): s for axes in figure.axes for s in axes.get_lines()}
        columns = min(6, len(handles))
        figure.legend(list(handles.values()), list(map(str, handles)), loc="outside lower center", ncols=columns)
    return figure


def _curve(axes: Axes, series: dict[str, Any], named: list[str]) -> None:
    group = series["group"]
    colour = f"C{named.index(group) % 10}" if group in named else "#222222"
    style = "-" if group not in named else ("-", "--", ":", "-.")[named.index(group) // 10 % 4]
    marker = "." if len(series["points"]) < 12 else ""
    axes.plot(*zip(*series["points"], strict=True), color=colour, linestyle=style, marker=marker, gid=group)


# The table.


def table(runs: Sequence[RunFacts]) -> Figure:
    """A row per run, and one per teacher, with every figure as a whole and its 95 % interval."""
    measured = [(facts, result) for facts in runs if (result := main_result(facts))]
    if not measured:
        raise UserError(f"{', '.join(facts.label for facts in runs)}: nothing is measured yet", hint="msd fid RUN")
    if len({result["metric"] for _, result in measured}) > 1:
        raise UserError("these runs were measured by different figures, which do not belong in one table")
    names = metrics(measured[0][1])
    header = ["", "K", *(f"{name} {'↓' if lower_is_better(name) else '↑'}" for name in names)]
    cells, teachers = list[list[str]](), set[str]()  # each with its solver and guidance
    for facts, result in measured:
        of = facts.recipe.teacher
        teacher = str([result.get("teacher_sha256"), of.solver.record(), of.guidance and of.guidance.record()])
        if teacher not in teachers and (line := row(result, "teacher")):
            cells.append([f"teacher, {facts.evaluations} NFE", "", *(_cell(line, name) for name in names)])
        teachers.add(teacher)
        if line := row(result, "students"):
            students = str(facts.recipe.partition.students)
            cells.append([facts.label, students, *(_cell(line, name) for name in names)])
    return _drawn(header, cells)


def _cell(line: dict[str, Any], name: str) -> str:
    if name not in line["values"]:
        return ""
    span = line["intervals"].get(name)
    text = formatting.figure(line["values"][name])
    return text if span is None else f"{text}\n{formatting.figure(span['low'])} to {formatting.figure(span['high'])}"


def _drawn(header: list[str], cells: list[list[str]]) -> Figure:
    """Set a table with rules above, below and under its header."""
    lines = [1.6, *(max(text.count("\n") + 1 for text in texts) + 0.5 for texts in cells)]
    widths = [
        max(len(part) for texts in [header, *cells] for part in texts[i].split("\n")) + 2 for i in range(len(header))
    ]
    height, width = sum(lines), sum(widths)
    figure = _figure(0.075 * width, 0.14 * height, layout=None)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    top = 0.0
    for number, (texts, line) in enumerate(zip([header, *cells], lines, strict=True)):
        left = 0
        for i, (text, space) in enumerate(zip(texts, widths, strict=True)):
            x = left if i == 0 else left + space - 1
            axes.text(
                x, top + line / 2, text, ha="left" if i == 0 else "right", va="center", fontsize=7, linespacing=1.3
            )
            left += space
        if number < 2:
            axes.axhline(top, color="black", linewidth=0.9 if number == 0 else 0.5, clip_on=False)
        top += line
    axes.axhline(height, color="black", linewidth=0.9, clip_on=False)
    return figure
