"""The charts of a report as plain data, which the page's script draws, and as tables, which say the same; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from msdcli.engine.report.facts import RunFacts, group_name, lower_is_better, metrics, row
from msdcli.engine.tracking.formatting import hue, numbered

POINTS, TABLE_ROWS = 240, 24  # a curve, and its table: means over the lines between
INK = None  # the colour of what belongs to nobody: teacher, whole
Curve = list[tuple[float, float]]


# Curves over steps.


def curve_charts(runs: Sequence[RunFacts]) -> dict[str, list[dict[str, Any]]]:
    """Return charts under `measured`, `losses` and `health`: one per objective and figure, a line per student of every
    run; of health under `nothing` those that are zero from end to end, which are said and not drawn.
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r, facts in enumerate(runs):
        for training in facts.trainings:
            for name, points in training.curves().items():
                objective = "teacher" if training.student is None else training.stage.objective
                line = _series(runs, r, training.who, training.student, thinned(points))
                found.setdefault((objective, name), []).append(line)
    charts: dict[str, list[dict[str, Any]]] = {"measured": [], "losses": [], "health": [], "nothing": []}
    for (objective, name), series in found.items():
        kind = name.split(".")[0] if name.startswith(("losses.", "measured.")) else "health"
        if kind == "health" and not any(value for one in series for _, value in one["points"]):
            kind = "nothing"
        charts[kind].append(_chart(f"{objective}-{name}", _titled(objective, name), "step", series))
    return charts


def watched_chart(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """Return charts of the distances that `msd fid RUN --watch` has left, one per metric."""
    found: dict[str, dict[tuple[int, str], Curve]] = {}
    for r, facts in enumerate(runs):
        starts = [sum(s.steps for s in facts.recipe.stages[:i]) for i in range(len(facts.recipe.stages))]
        for line in facts.watched:
            curves = found.setdefault(line["metric"], {})
            steps = {k: starts[s["number"]] + s["step"] for k, s in line["students"].items()}
            for k, student in line["students"].items():
                if student["value"] is not None:
                    _append(curves.setdefault((r, f"student {k}"), []), steps[k], student["value"])
            if line["whole"] is not None:
                _append(curves.setdefault((r, "whole"), []), min(steps.values()), line["whole"])
    charts = []
    for metric, curves in found.items():
        series = [
            _series(runs, r, who, int(who.split()[1]) if who != "whole" else None, thinned(points))
            for (r, who), points in curves.items()
        ]
        charts.append(_chart(f"watched-{metric}", f"{metric} under way", "step, all stages", series))
    return charts


def _append(curve: Curve, step: int, value: float) -> None:
    if not curve or curve[-1][0] != step:
        curve.append((step, value))


def _series(runs: Sequence[RunFacts], r: int, who: str, student: int | None, points: Curve) -> dict[str, Any]:
    """Give a line its colour and the group it is switched with: the student, or, among several runs, the run."""
    label = runs[r].label
    if len(runs) > 1:
        return {"label": f"{label}, {who}", "group": label, "hue": hue(r), "points": points}
    return {"label": who, "group": who, "hue": INK if student is None else hue(student), "points": points}


def _chart(name: str, title: str, x: str, series: list[dict[str, Any]]) -> dict[str, Any]:
    values = [v for s in series for _, v in s["points"]]
    # Curves that span much are read on a logarithmic scale; the reader can change it.
    wide = bool(values) and min(values) > 0 and max(values) > 20 * min(values)
    return {
        "id": _id(name),
        "title": title,
        "x": x,
        "log": wide,
        "series": series,
    }


def _titled(objective: str, name: str) -> str:
    """Name a chart; what learns with the objective of a teacher is the teacher, whatever its network is called."""
    return f"{objective}: {_named(name)}".replace("teacher: loss of student", "teacher: loss")


def _named(name: str) -> str:
    if name == "images_per_second":
        return "speed, images per second"
    if name.startswith("losses."):
        return f"loss of {name.removeprefix('losses.')}"
    if name.startswith("measured."):
        return f"{name.removeprefix('measured.')} while it trains"
    return name.replace("_", " ").replace(".", ", ")


def thinned(points: Sequence[tuple[float, float]], most: int = POINTS) -> Curve:
    """Return at most `most` points: the last step and the mean value of neighbours. What is not finite is left out."""
    whole = [(x, y) for x, y in points if abs(y) < float("inf")]
    if len(whole) <= most:
        return [(x, _rounded(y)) for x, y in whole]
    cuts = [i * len(whole) // most for i in range(most + 1)]
    return [(whole[b - 1][0], _rounded(sum(y for _, y in whole[a:b]) / (b - a))) for a, b in pairwise(cuts)]


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def curve_table(chart: dict[str, Any]) -> tuple[list[str], list[list[float | None]]]:
    """Return a chart's columns and rows: the step, then a value per line."""
    columns = [dict(thinned(s["points"], TABLE_ROWS)) for s in chart["series"]]
    steps = sorted({x for column in columns for x in column})
    return [chart["x"], *(s["label"] for s in chart["series"])], [[x, *(c.get(x) for c in columns)] for x in steps]


def _id(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


# Distances with their intervals.


def distance_chart(facts: RunFacts, result: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return the rows of one measurement whose group is `parts` (whole, students) or `classes`."""
    owner = facts.partition.owner if facts.partition else []
    rows = []
    for group in dict.fromkeys(r["group"] for r in result["rows"]):
        of, member = numbered(group)
        if (of == "class") != (kind == "classes"):
            continue
        student = owner[member] if kind == "classes" and member is not None and member < len(owner) else member
        marks = [
            _mark(facts.label, who, line, student)
            for who in ("teacher", "students")
            if (line := row(result, who, group))
        ]
        rows.append({"label": _short_name(group, facts), "marks": marks})
    title = "By class" if kind == "classes" else "Whole, and by student"
    return _distances(f"{kind}-{result['metric']}-{facts.label}", title, result, rows)


def _short_name(group: str, facts: RunFacts) -> str:
    """Return a class's own name, or `class 3` where it is but a number."""
    name = group_name(group, facts.class_names)
    return name.split(" (", 1)[1][:-1] if name.startswith("class ") and " (" in name else name


def comparison_chart(runs: Sequence[tuple[RunFacts, dict[str, Any]]]) -> dict[str, Any]:
    """Return one row per run: its students and its teacher as a whole."""
    rows = []
    for r, (facts, result) in enumerate(runs):
        marks = [_mark(facts.label, who, line, r) for who in ("teacher", "students") if (line := row(result, who))]
        rows.append({"label": facts.label, "marks": marks})
    return _distances("compared", "Runs side by side", runs[0][1], rows)


def _distances(name: str, title: str, result: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    halves = row(result, "real halves")
    return {
        "id": _id(name),
        "title": title,
        "metrics": [{"name": m, "lower": lower_is_better(m)} for m in metrics(result)],
        "rows": rows,
        "halves": halves["values"] if halves and not name.startswith("classes") else {},
    }


def _mark(label: str, who: str, line: dict[str, Any], colour: int | None) -> dict[str, Any]:
    values = {}
    for name, value in line["values"].items():
        span = line["intervals"].get(name)
        values[name] = [_rounded(value), *((_rounded(span["low"]), _rounded(span["high"])) if span else ())]
    own = who == "students"
    return {"who": who, "run": label, "hue": hue(colour) if own and colour is not None else INK, "values": values}


# Who owns which class or prompt.

MOST_CELLS = 10_000  # of a map: more are thinner than can be seen, and their names a large file


def partition_map(facts: RunFacts) -> dict[str, Any] | None:
    """Return the owner of every class or prompt, for a map of them and students; None where they are too many."""
    if facts.partition is None or len(facts.class_names) > MOST_CELLS:
        return None
    return {
        "id": _id(f"map-{facts.label}"),
        "owner": facts.partition.owner,
        "students": len(facts.partition.parts),
        "hues": [hue(k) for k in range(len(facts.partition.parts))],
        "names": facts.class_names,
        "condition": facts.condition,
        "conditions": facts.conditions,
    }
