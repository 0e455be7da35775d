"""A frontier as a table and as pictures: distance against latency, memory and budget, a line per number of students."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msdcli import records
from msdcli.engine.tracking import formatting
from msdcli.errors import MissingFileError
from msdcli.rundir import RunDir

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RECORD = "frontier.json"
FLOORS = {"teacher": "the teacher beside itself with other noise", "halves": "two halves of the data"}
PANEL, COLUMNS = (2.25, 2.1), 3  # inches of a picture, and pictures beside each other
MARKS = 6  # on an axis: more would overlap


def load(root: Path) -> dict[str, Any]:
    """Read the frontier of a sweep's folder, or a file of one. UserError where there is none."""
    path = root if root.is_file() else root / RECORD
    if not path.is_file():
        raise MissingFileError(f"{root} holds no frontier ({RECORD})", hint="msd sweep NAME --table writes it")
    return records.frontier(path)


def of_sweep(roots: Sequence[Path]) -> dict[str, Any] | None:
    """Return the frontier in a sweep's folder, where that is all that is named; None of runs."""
    alone = len(roots) == 1 and (roots[0] / RECORD).is_file() and not RunDir(roots[0]).recipe_file.is_file()
    return load(roots[0]) if alone else None


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation over seeds; 0 for a single one."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def kind(line: dict[str, Any]) -> str:
    """Say how a line was trained: by K students, or by one whose batch several devices share."""
    factor = line["devices"] // line["students"]
    return f"K = {line['students']}" + (f", batch x {factor}" if factor > 1 else "")


# The table.


def sizes(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return column names and rows: every size's parameters and latency, and the budget that saturates one student."""
    teacher, rows = record["teacher"], []
    for size in record["sizes"]:
        request, worst = size["latency"]["request"], size["latency"].get("worst", 0.0)
        budgets = {line["doubling"]: line["budget"] for line in record["lines"] if line["size"] == size["label"]}
        open_ = size["label"] in record["open"]
        none = "not decided" if open_ else "none measured"
        rows.append(
            [
                size["label"],
                f"{size['parameters']:,}",
                f"{size['share']:.1%}",
                f"{1e3 * request:.2f}" + (f" (worst {1e3 * worst:.2f})" if worst > request else ""),
                f"{request / teacher['latency']['request']:.0%}",
                f"{1e6 * size['latency']['image']:.0f}",
                none if size["saturated"] is None else formatting.short(budgets[size["saturated"]]),
            ]
        )
    columns = ["size", "parameters", "share", "request ms", "of the teacher's", "image us", "one student saturates at"]
    return columns, rows


def table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return column names and rows; the last column is the distance, mean ± standard deviation over seeds."""
    rows = []
    for line in record["lines"]:
        wall = statistics.fmean(line["seconds"])
        rows.append(
            [
                line["size"],
                kind(line),
                formatting.short(line["budget"]),
                f"{line['memory'] / 1e6:.3g}",
                str(line["devices"]),
                f"{wall:.0f}" if wall >= 10 else f"{wall:.1f}",
                f"{line['reduced_bytes'] / 1e6:,.0f}",
                str(len(line["seeds"])),
                _distance(line["distances"]),
            ]
        )
    columns = ["size", "students", "FLOP", "MB", "devices", "wall s", "sent MB", "seeds", record["metric"]]
    return columns, rows


def _distance(values: Sequence[float]) -> str:
    mean, spread = mean_and_spread(values)
    return f"{mean:.4f}" + (f" ± {spread:.4f}" if len(values) > 1 else "")


def notes(record: dict[str, Any]) -> list[str]:
    """Return what must be known to read the tables."""
    teacher, floor, machine = record["teacher"], record["floor"], record["machine"]
    floors = [f"{what} {formatting.figure(floor[name])}" for name, what in FLOORS.items() if name in floor]
    open_ = f"not finished, runs are left of: {'; '.join(record['open'])}"
    return [
        f"{record['metric']} of {record['samples']:,} samples; the teacher, {teacher['evaluations']} evaluations of "
        f"{1e3 * teacher['latency']['request']:.2f} ms: {formatting.figure(teacher['distance'])}; {'; '.join(floors)}",
        f"request: one image; image: of each of a batch of 64; {machine['name']}, {machine['threads']} "
        f"{formatting.plural(machine['threads'], 'thread')}, torch {machine['torch']}",
        "FLOP: of training all students, with the pairs and without the teacher; wall: of devices that train students "
        "side by side, communication left out; sent: gradients that each device sends to share a batch",
        *([open_] if record["open"] else []),
    ]


def markdown(record: dict[str, Any]) -> str:
    """Return both tables."""
    tables = (formatting.markdown_table(*made(record)) for made in (sizes, table))
    return "\n".join(line for lines in tables for line in lines) + "\n"


def as_csv(record: dict[str, Any]) -> str:
    """Return one row per run."""
    names = list(record["lines"][0]["figures"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["size", "students", "devices", "doubling", "budget", "flops", "seed", "wall_seconds", *names])
    for line in record["lines"]:
        for i, seed in enumerate(line["seeds"]):
            own = [line[name] for name in ("size", "students", "devices", "doubling", "budget", "flops")]
            writer.writerow([*own, seed, line["seconds"][i], *(line["figures"][name][i] for name in names)])
    return text.getvalue()


# Pictures.


def draw(record: dict[str, Any]) -> Figure:
    """Distance with its spread against latency and memory, and for every size against the budget, where lines of
    different K may cross.
    """
    from matplotlib.figure import Figure

    begun = {line["size"] for line in record["lines"]}
    described = [size for size in record["sizes"] if size["label"] in begun]
    compared, title = _compared(record)
    rows = 1 + math.ceil(len(described) / COLUMNS)
    figure = Figure(figsize=(PANEL[0] * COLUMNS, PANEL[1] * rows + 0.4), layout="constrained")
    ordered = sorted(record["lines"], key=lambda line: (line["devices"] > line["students"], line["devices"]))
    kinds = list(dict.fromkeys(map(kind, ordered)))  # K by number, then larger batches
    latency = {size["label"]: 1e3 * size["latency"]["request"] for size in described}
    panels: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("ms of a request (batch 1)", lambda line: latency[line["size"]]),
        ("MB of weights, all students", lambda line: float(line["memory"] / 1e6)),
    ]
    for i, (what, x) in enumerate(panels):
        axes = figure.add_subplot(rows, COLUMNS, 1 + i, xlabel=what, title=title)
        for name in kinds:
            mine = [line for line in compared if kind(line) == name]
            _curve(axes, kinds.index(name), name, [(x(line), line["distances"]) for line in mine])
        if i:
            _logarithmic(axes)
        _finish(axes, record, first=i == 0)
    for i, size in enumerate(described):
        parameters = formatting.short(size["parameters"])
        title = f"{size['label']}: {parameters} parameters, {latency[size['label']]:.2f} ms"
        axes = figure.add_subplot(rows, COLUMNS, 1 + COLUMNS + i, xlabel="TFLOP of training", title=title)
        for name in kinds:
            mine = [line for line in record["lines"] if (line["size"], kind(line)) == (size["label"], name)]
            _curve(axes, kinds.index(name), name, [(line["budget"] / 1e12, line["distances"]) for line in mine])
        _logarithmic(axes)
        _finish(axes, record, first=i % COLUMNS == 0)
    handles = {line.get_label(): line for axes in figure.axes for line in axes.get_lines() if line.get_gid() == "curve"}
    named = [name for name in kinds if name in handles]
    figure.legend([handles[name] for name in named], named, loc="outside lower center", ncols=min(6, len(named)))
    return figure


def _compared(record: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """Return the lines by which sizes are compared, small sizes first, and what to call them: those of the largest
    budget that all kinds have in all sizes, as far as every size has them; where there is none, those of the largest
    that all have in each size.
    """
    of_size = [
        mine for s in record["sizes"] if (mine := [line for line in record["lines"] if line["size"] == s["label"]])
    ]
    usual = set.intersection(*({kind(line) for line in mine} for mine in of_size))
    shared = [set.intersection(*_doublings([x for x in mine if not usual or kind(x) in usual])) for mine in of_size]
    everywhere = set.intersection(*shared) if shared else set()
    chosen = [max(everywhere or common, default=None) for common in shared]
    found = [
        line for mine, doubling in zip(of_size, chosen, strict=True) for line in mine if line["doubling"] == doubling
    ]
    return found, f"sizes, {found[0]['budget'] / 1e12:g} TFLOP" if everywhere else "sizes, largest budget"


def _doublings(lines: Sequence[dict[str, Any]]) -> list[set[int]]:
    """Return how often the budget was doubled in the lines of each kind."""
    found: dict[str, set[int]] = {}
    for line in lines:
        found.setdefault(kind(line), set()).add(line["doubling"])
    return list(found.values())


def _curve(axes: Axes, number: int, name: str, points: Sequence[tuple[float, Sequence[float]]]) -> None:
    if not points:
        return
    ordered = sorted(points, key=lambda point: point[0])
    means, spreads = zip(*(mean_and_spread(values) for _, values in ordered), strict=True)
    style = "--" if "batch" in name else "-"
    xs = [x for x, _ in ordered]
    axes.errorbar(xs, means, yerr=spreads, fmt="none", ecolor=f"C{number}", elinewidth=0.8, capsize=2)
    axes.plot(xs, means, style, marker="o", markersize=3, color=f"C{number}", label=name, gid="curve")


def _logarithmic(axes: Axes) -> None:
    """Give an axis of numbers below a few powers of ten few marks, as they are said."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    for of_ten in ((1, 2, 5), (1, 3), (1,)):
        marks = _ticks(low, high, of_ten)
        if len(marks) <= MARKS:
            break
    if marks:
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(marks, [f"{mark:g}" for mark in marks])
        axes.set_xlim(low, high)


def _finish(axes: Axes, record: dict[str, Any], *, first: bool) -> None:
    """Draw the floor and the teacher, and name the axis."""
    from matplotlib.ticker import NullLocator

    if "teacher" in record["floor"]:
        axes.axhline(record["floor"]["teacher"], color="#999999", linestyle=":", linewidth=0.8)
    if record.get("students_against") != "teacher":
        axes.axhline(record["teacher"]["distance"], color="#222222", linestyle="--", linewidth=0.8)
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.set_yticks(_ticks(low, high), [f"{tick:g}" for tick in _ticks(low, high)])
    axes.set_ylim(low, high)
    axes.grid(axis="y", alpha=0.3, linewidth=0.5)
    if first:
        axes.set_ylabel(record["metric"])


def _ticks(low: float, high: float, of_ten: Sequence[float] = (1, 1.5, 2, 3, 5, 7)) -> list[float]:
    """Return numbers that are easy to read between two."""
    steps = [m * 10.0**e for e in range(-6, 7) for m in of_ten]
    return [float(f"{step:.3g}") for step in steps if low <= step <= high]
