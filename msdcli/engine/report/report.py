"""One HTML file that shows runs: figures, curves, pictures, partition, cost and recipe; it needs nothing else."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from msdcli import records
from msdcli.engine.report import charts, frontier, plot, words
from msdcli.engine.report.facts import RunFacts, group_name, load_runs, lower_is_better, main_result, metrics, row
from msdcli.engine.tracking import formatting
from msdcli.engine.tracking.events import Report
from msdcli.engine.tracking.formatting import counted, numbered
from msdcli.foreign import versions
from msdcli.outputs import check_file
from msdcli.rundir import write_text

PAGE = Path(__file__).with_name("page")
MOST_NAMES = 300  # of a student's classes or prompts
PICTURE_BYTES = 2_600_000  # of all runs' pictures before base64: the file stays below 5 MB


def write(roots: Sequence[Path], out: Path, report: Report, *, pictures: bool = True) -> list[RunFacts]:
    """Write one report of all runs to `out` and return what was read; or of the frontier in a sweep's folder, which is
    of no single run. UserError for what is no run directory.
    """
    check_file(out, ".html")
    if (record := frontier.of_sweep(roots)) is not None:
        write_text(out, _frontier_page(record))
        return []
    runs = load_runs(roots)
    drawn: list[Any] = [None] * len(runs)
    if pictures:
        from msdcli.engine.report.pictures import draw

        for i, facts in enumerate(runs):
            report(f"{facts.label}: drawing samples")
            drawn[i] = draw(facts, budget=PICTURE_BYTES // len(runs))
    write_text(out, render(runs, drawn))
    return runs


def render(runs: Sequence[RunFacts], pictures: Sequence[Any]) -> str:
    """Return the page."""
    sections = [_section(facts, drawn) for facts, drawn in zip(runs, pictures, strict=True)]
    curves = charts.curve_charts(runs)
    curves["measured"] += charts.watched_chart(runs)
    nothing = [chart["title"] for chart in curves.pop("nothing")]
    comparison = compare(runs) if len(runs) > 1 else None
    data = {
        "curves": [chart for group in curves.values() for chart in group],
        "distances": [c for s in sections for r in s["results"] for c in r["charts"]]
        + (comparison or {}).get("charts", []),
        "maps": [s["map"] for s in sections if s["map"]],
    }
    return _template("page.html").render(
        title=", ".join(facts.label for facts in runs),
        runs=sections,
        curves=curves,
        nothing=nothing,
        comparison=comparison,
        data=data,
        curve_table=charts.curve_table,
        most=charts.POINTS,
        script=Markup((PAGE / "page.js").read_text(encoding="utf-8")),
    )


def _frontier_page(record: dict[str, Any]) -> str:
    """Return the page of a sweep's frontier: its picture and tables."""
    return _template("frontier.html").render(
        title=record["sweep"],
        record=record,
        sizes=frontier.sizes(record),
        lines=frontier.table(record),
        notes=frontier.notes(record),
        picture="data:image/svg+xml;base64," + base64.b64encode(plot.svg_of_frontier(record)).decode("ascii"),
    )


def _template(name: str) -> jinja2.Template:
    """Return a page to be filled, with what all of them show."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": formatting.figure,
        "short": formatting.short,
        "duration": formatting.duration,
        "size": formatting.size,
        "hue": formatting.hue,
    }
    environment.globals |= {
        "style": Markup((PAGE / "page.css").read_text(encoding="utf-8")),
        "made": time.strftime("%Y-%m-%d %H:%M %Z"),
        "version": versions("msdcli")["msdcli"],
    }
    return environment.get_template(name)


def _section(facts: RunFacts, drawn: Any) -> dict[str, Any]:
    """Everything that the page shows of one run."""
    return {
        "facts": facts,
        "summary": words.summary(facts),
        "remarks": words.remarks(facts),
        "tiles": _tiles(facts),
        "results": [_result(facts, result) for result in facts.results],
        "map": charts.partition_map(facts),
        "parts": _parts(facts),
        "pictures": drawn,
        "recipe": facts.recipe.to_yaml(),
    }


def _tiles(facts: RunFacts) -> list[tuple[str, str, str]]:
    """Return the few figures at the top: what, value, remark."""
    found, result = [], main_result(facts)
    if result is not None:
        against = result.get("students_against") or "data"
        whose = (
            ("students", against, f"{counted(facts.steps, 'evaluation')} an image"),
            ("teacher", "data" if against == "teacher" else against, counted(facts.evaluations, "evaluation")),
        )
        for who, other, said in whose:
            if line := row(result, who):
                span = line["intervals"].get(result["metric"])
                note = (
                    f"95 %: {formatting.figure(span['low'])} to {formatting.figure(span['high'])}"
                    if span
                    else "no interval"
                )
                value = formatting.figure(line["values"][result["metric"]])
                found.append((f"{who} to {other}, {result['metric']}", value, f"{note}; {said}"))
    total = next((c for c in facts.costs if c["part"] == "all students"), None)
    if total is not None and total["seconds"]:
        note = f"{formatting.flop(total['flops'])}, {formatting.short(total['images'])} images"
        found.append(("training of the students", formatting.duration(total["seconds"]), note))
    done = sum(all(s["state"] == "done" for s in student["stages"]) for student in facts.state["students"])
    number = facts.recipe.partition.students
    count = len(facts.class_names)
    between = f"{counted(count, facts.condition, facts.conditions)} between them" if count else ""
    found.append(("students finished", f"{done} of {number}", between))
    return found


def _result(facts: RunFacts, result: dict[str, Any]) -> dict[str, Any]:
    """One measurement as a table, with what it depends on."""
    names = metrics(result)
    rows = [
        {
            "who": r["who"],
            "group": group_name(r["group"], facts.class_names),
            "single": numbered(r["group"])[0] == "class",
            "samples": r["samples"],
            "reference": r["reference"],
            "cells": [(r["values"].get(name), r["intervals"].get(name)) for name in names],
        }
        for r in result["rows"]
    ]
    shown = [charts.distance_chart(facts, result, kind) for kind in ("parts", "classes")]
    kept = {k: v for k, v in result.items() if k not in ("rows", "labels", "warnings", *records.HEADLINE)}
    return {
        "metric": result["metric"],
        "protocol": result["protocol"],
        "names": [(name, lower_is_better(name)) for name in names],
        "charts": [chart for chart in shown if chart["rows"]],
        "rows": rows,
        "provenance": _flat(kept),
    }


def _parts(facts: RunFacts) -> list[dict[str, Any]]:
    """Return every student's classes or prompts by name, the first of very many, and the size of its network."""
    if facts.partition is None:
        return []
    found = []
    for k, part in enumerate(facts.partition.parts):
        models = facts.students[k] if k < len(facts.students) else []
        names = [group_name(f"class {c}", facts.class_names).removeprefix("class ") for c in part[:MOST_NAMES]]
        found.append(
            {
                "student": k,
                "names": names,
                "count": len(part),
                "parameters": models[-1]["parameters"] if models else None,
                "sha256": models[-1]["sha256"] if models else "",
            }
        )
    return found


# Several runs.


def compare(runs: Sequence[RunFacts]) -> dict[str, Any]:
    """Return the runs' figures side by side, and the keys in which their recipes differ."""
    measured = [(facts, result) for facts in runs if (result := main_result(facts))]
    names = list(dict.fromkeys(name for _, result in measured for name in metrics(result)))
    lines = {facts.label: row(result, "students") for facts, result in measured}
    columns = [{"name": name, "lower": lower_is_better(name), "best": _best(lines, name)} for name in names]
    rows = []
    for facts in runs:
        line = lines.get(facts.label)
        total = next((c for c in facts.costs if c["part"] == "all students"), None)
        rows.append(
            {
                "facts": facts,
                "stages": " → ".join(f"{s.objective} {s.steps:,}" for s in facts.recipe.stages),
                "cells": [(line["values"].get(n), line["intervals"].get(n)) if line else (None, None) for n in names],
                "cost": total if total and total["seconds"] else None,
            }
        )
    return {
        "columns": columns,
        "rows": rows,
        "note": _comparable([result for _, result in measured]),
        "differences": differences([facts.recipe.dump() for facts in runs]),
        "charts": [charts.comparison_chart(measured)] if _same_metric(measured) else [],
    }


def _best(lines: dict[str, Any], name: str) -> float | None:
    values = [line["values"][name] for line in lines.values() if line and name in line["values"]]
    return None if len(values) < 2 else min(values) if lower_is_better(name) else max(values)


def _same_metric(measured: Sequence[tuple[RunFacts, dict[str, Any]]]) -> bool:
    return len(measured) > 1 and len({result["metric"] for _, result in measured}) == 1


def _comparable(results: Sequence[dict[str, Any]]) -> str:
    """Say in what the measurements differ that makes their figures incomparable."""
    keys = {
        "metric": "metric",
        "protocol": "protocol",
        "samples": "number of samples",
        "reference_sha256": "reference",
        "students_against": "reference",
    }
    differ = dict.fromkeys(what for key, what in keys.items() if len({str(r.get(key)) for r in results}) > 1)
    weights = len({str(r.get("network", {}).get("weights_sha256")) for r in results}) > 1
    named = [*differ, *(["weights that measured"] if weights else [])]
    return f"These figures cannot be compared: the runs differ in {', '.join(named)}." if named else ""


def differences(dumps: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the recipe keys, but for the runs' names, whose values are not the same everywhere."""
    return [row for row in _differing(list(dumps), "") if row[0] not in ("name", "run")]


def _differing(values: list[Any], prefix: str) -> list[tuple[str, list[str]]]:
    """Walk through plain data side by side; what one of them does not have at all is one row."""
    if all(value == values[0] for value in values):
        return []
    if all(isinstance(value, dict) for value in values):
        keys = dict.fromkeys(key for value in values for key in value)
        return [r for k in keys for r in _differing([v.get(k) for v in values], f"{prefix}{k}.")]
    if all(isinstance(value, list) for value in values) and any(isinstance(v, dict) for value in values for v in value):
        rows = [[v[i] if i < len(v) else None for v in values] for i in range(max(map(len, values)))]
        return [r for i, items in enumerate(rows) for r in _differing(items, f"{prefix}{i}.")]
    return [(prefix.rstrip("."), [_brief(value) for value in values])]


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        known = [f"{k} {v}" for k, v in value.items() if isinstance(v, (str, int, float))]
        return ", ".join(known[:4]) + (", ..." if len(known) > 4 else "")
    return "" if value is None else str(value)


def _flat(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Return the leaves of plain data by dotted key, as text."""
    if isinstance(tree, dict) and tree:
        return [leaf for key, value in tree.items() for leaf in _flat(value, f"{prefix}{key}.")]
    if isinstance(tree, list) and any(isinstance(value, (dict, list, str)) for value in tree):
        return [leaf for i, value in enumerate(tree) for leaf in _flat(value, f"{prefix}{i}.")]
    return [(prefix.rstrip("."), "" if tree is None else str(tree))]
