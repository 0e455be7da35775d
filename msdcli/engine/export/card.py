"""The model card of an export: README.md as the Hub reads it, with what was measured and how."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from msdcli import records
from msdcli.engine.checkpoints.model import MODEL
from msdcli.engine.tracking.formatting import describe_kept, describe_selected, evaluations, plural, three_digits, word
from msdcli.foreign import visible
from msdcli.rundir import write_text

if TYPE_CHECKING:
    from msdcli.engine.export.format import ExportResult, ExportSource

TASK = {"type": "unconditional-image-generation", "name": "class-conditional image generation in {steps}"}
TEXT_TASK = {"type": "text-to-image", "name": "text-to-image generation in {steps}"}
CARD = """# {name}: {count} {kind}

Distilled with msd from one diffusion teacher by {stages}. Every {condition} belongs to one student; a sample costs
{evaluations}{size}. With this folder called `{folder}`:

```python
{usage}```

{checked}

## Students

{students}
"""


def write(source: ExportSource, exported: ExportResult, record: dict[str, Any], folder: Path) -> None:
    """Write README.md; `folder` is where the export will be."""
    recipe, measured = source.run.recipe(), _measured(source, record)
    text = CARD.format(
        name=record["name"],
        count=len(source.students.folders),
        kind=f"{word(source.steps)}-step {plural(len(source.students.folders), 'student')}",
        evaluations=evaluations(source.steps),
        stages=", ".join(stage.objective for stage in recipe.stages),
        condition="prompt" if recipe.has_prompts else "class",
        size=_size(source),
        folder=folder.name,
        usage=exported.usage.replace("{folder}", folder.name),
        checked=_checked(record),
        students=_base(record) + _students(source),
    )
    sections = [_results(measured), _distance(record), _speed(record)]
    header = yaml.safe_dump(_header(source, exported, record, measured), sort_keys=False, allow_unicode=True)
    write_text(source.folder / "README.md", f"---\n{header}---\n\n{text}" + "".join(s for s in sections if s))


def _size(source: ExportSource) -> str:
    """Say what a sample is; nothing of points."""
    shape = " x ".join(map(str, source.shape))
    if source.students.autoencoder is not None:
        return f"; students make latents of {shape}, which the teacher's autoencoder decodes"
    return f"; images are {shape} in [-1, 1]" if len(source.shape) == 3 else ""


def _header(
    source: ExportSource, exported: ExportResult, record: dict[str, Any], measured: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    data, kind = source.run.recipe().data.label, TEXT_TASK if source.run.recipe().has_prompts else TASK
    header: dict[str, Any] = {} if source.options.license is None else {"license": source.options.license}
    speed = "one-step" if source.steps == 1 else "few-step"
    header |= {
        "library_name": exported.library,
        "pipeline_tag": kind["type"],
        "tags": ["diffusion", "distillation", speed, "multi-student-distillation", record["kind"]],
    }
    if measured:
        results = [_result(line) for line in measured]
        steps = f"{word(source.steps)} {plural(source.steps, 'step')}"
        task = kind | {"name": kind["name"].format(steps=steps)}
        described = {"task": task, "dataset": {"name": data, "type": data}, "metrics": results}
        header["model-index"] = [{"name": record["name"], "results": [described]}]
    return header


def _result(line: dict[str, Any]) -> dict[str, Any]:
    how = {k: line[k] for k in ("protocol", "samples", "reference_samples", "weights_sha256", "students_sha256")}
    return {"type": line["metric"], "name": line["metric"], "value": line["value"], "args": how}


def _measured(source: ExportSource, record: dict[str, Any]) -> list[dict[str, Any]]:
    """The first figure of every measurement of these very weights."""
    lines = []
    for path in source.run.results():
        stored = records.measurement(path)
        if stored.get("students_sha256") != record["students_sha256"]:
            continue
        rows = {row["who"]: row for row in stored["rows"] if row["group"] == "whole"}
        if "students" not in rows:
            continue
        line = {
            "metric": stored["metric"],
            "value": round(rows["students"]["values"][stored["metric"]], 6),
            "teacher": rows["teacher"]["values"].get(stored["metric"]) if "teacher" in rows else None,
            "protocol": stored["protocol"],
            "samples": stored["samples"],
            "reference_samples": rows["students"]["reference"],
            "weights_sha256": stored.get("network", {}).get("weights_sha256"),
            "students_sha256": stored["students_sha256"],
        }
        lines.append(line)
    return lines


def _checked(record: dict[str, Any]) -> str:
    return (
        f"Compared with the run it comes from on {record['compared']} samples of all students: the largest difference "
        f"is {record['max_difference']:.3g} (allowed: {record['tolerance']:.3g})."
    )


def _base(record: dict[str, Any]) -> str:
    """Say what the students have in common, if they are adapters."""
    if "base" not in record:
        return ""
    each = max(student["bytes"] for student in record["students"])
    return (
        f"The students are adapters of one network, which they share in memory and on disk: `base` has "
        f"{record['base']['bytes']:,} bytes, a student {each:,}.\n\n"
    )


def _students(source: ExportSource) -> str:
    names, rows = source.students.class_names, []
    cards = [records.trained(folder / MODEL) for folder in source.students.folders]
    for k, (part, card) in enumerate(zip(source.students.partition.parts, cards, strict=True)):
        shown = ", ".join(_plain(names[c]) for c in part[:20])
        shown += f" and {len(part) - 20} more" if len(part) > 20 else ""
        rows.append([str(k), shown, f"{card['parameters']:,}", f"`{card['sha256'][:16]}`"])
    conditions = (
        "prompts, the first of those it was trained on" if source.students.prompt_router is not None else "classes"
    )
    table = _table(["student", conditions, "parameters", "sha256 of the trained weights"], rows)
    return "\n\n".join([table, *map(_escaped, describe_kept(dict(enumerate(cards)))), *describe_selected(cards)])


def _plain(name: str) -> str:
    """Return a class's name, which may come from anywhere, as text of one cell: neither Markdown nor HTML."""
    return _escaped(visible(name)[:100])


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(visible(text), quote=False))


def _results(measured: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            line["metric"],
            f"{line['value']:.4g}",
            "" if line["teacher"] is None else f"{line['teacher']:.4g}",
            f"{line['samples']:,} against {line['reference_samples'] or 0:,}",
            f"{line['protocol']}; weights `{(line['weights_sha256'] or 'none')[:16]}`",
        ]
        for line in measured
    ]
    said = "Measured on the trained weights, before the export. Other protocols or counts give other numbers.\n\n"
    columns = ["metric", "students", "teacher", "samples", "protocol"]
    return f"\n## Results\n\n{said}{_table(columns, rows)}\n" if rows else ""


def _distance(record: dict[str, Any]) -> str:
    distance = record.get("distance")
    if "precision" not in record or not distance:
        return ""
    precision = record["precision"]
    return (
        f"\n## What {precision} costs\n\n{distance['metric']} from {distance['samples']:,} samples: "
        f"{distance['float32']:.4g} in float32, {distance[precision]:.4g} in {precision}.\n"
    )


def _speed(record: dict[str, Any]) -> str:
    rows = [
        [str(r["batch"]), r["resident"], three_digits(r["milliseconds"]), three_digits(r["images_per_second"])]
        for r in record.get("speed", [])
    ]
    columns = ["images per request", "students in memory", "milliseconds (median)", "images/s"]
    said = "Routing included, on the machine that wrote this.\n\n"
    return f"\n## Speed\n\n{said}{_table(columns, rows)}\n" if rows else ""


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
