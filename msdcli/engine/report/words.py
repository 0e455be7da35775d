"""A run told in sentences: what was distilled, how good it is, what it cost, and what deserves a look."""

from __future__ import annotations

import math
from typing import Any

from msdcli.engine.report.facts import RunFacts, group_name, load_runs, lower_is_better, main_result, row
from msdcli.engine.tracking.formatting import (
    counted,
    describe_kept,
    describe_selected,
    duration,
    evaluations,
    figure,
    flop,
    numbered,
    plural,
    short,
    size,
    word,
)
from msdcli.rundir import RunDir

# Of the teacher's: below it, what students make has lost most of its variety.
COLLAPSED = 0.5
CURE = (
    "keep the teacher's pairs, make more of them, train the fake network more often, lower the learning rate "
    "(msd docs troubleshooting: mode collapse)"
)
AGAINST = {"data": "the data", "held-out data": "the held-out data", "teacher": "the teacher's samples"}
COMPANIONS = {
    "recall": "are less varied than the teacher's",
    "coverage": "reach fewer of the real images than the teacher's",
    "precision": "less often look like real ones than the teacher's",
    "accuracy": "are less often recognised as their class than the teacher's",
}


def summary(facts: RunFacts) -> list[str]:
    """Return the sentences that open a report."""
    stages = len(facts.recipe.stages)
    finished = {number: models[-1] for number, models in enumerate(facts.students) if len(models) == stages}
    said = [*describe_kept(finished), *describe_selected([*finished.values()])]
    return [_what(facts), *_how_good(facts), *said, *_cost(facts)]


def closing(run: RunDir) -> list[str]:
    """Return what the end of a run is told with: how good the students are, and what deserves a look beside the
    warnings of the measurement itself.
    """
    (facts,) = load_runs([run.root])
    result = main_result(facts)
    return [
        *_how_good(facts),
        *([] if result is None else [*collapse(result), *_companions(result)]),
        *_health(facts),
    ]


def _what(facts: RunFacts) -> str:
    recipe, count = facts.recipe, len(facts.class_names)
    number = recipe.partition.students
    stages = " then ".join(f"{s.objective} ({counted(s.steps, 'step')} of {s.batch:,})" for s in recipe.stages)
    done = sum(all(s["state"] == "done" for s in student["stages"]) for student in facts.state["students"])
    verb = "was" if number == 1 else "were"
    if done < number:
        verb = "is being" if number == 1 else "are being"
    divided = f"{word(count)} {plural(count, facts.condition, facts.conditions)}" if count else ""
    kind = f"{word(facts.steps)}-step {plural(number, 'student')}"
    head = f"{word(number).capitalize()} {kind} {verb} distilled from one diffusion teacher"
    if recipe.has_prompts:
        text = f"{head} on {divided or 'prompts'}, by {stages}."
    else:
        of = "" if recipe.data.name == "none" else f" of {recipe.data.label}"
        text = f"{head}{of}{', ' if divided else ''}{divided}, by {stages}."
    if done < number:
        text += f" {word(done).capitalize()} of them {plural(done, 'is', 'are')} finished."
    return text + _sizes(facts)


def _sizes(facts: RunFacts) -> str:
    sizes = sorted({models[-1]["parameters"] for models in facts.students if models})
    teacher = facts.teacher.get("parameters")
    if not sizes or not teacher:
        return ""
    if (adapter := facts.recipe.student.adapter) is not None:
        share = f"{short(sizes[-1])} parameters, {sizes[-1] / teacher:.0%} of what the network has"
        return f" All share the teacher's own weights; each has adapters of rank {adapter.rank} on them: {share}."
    if sizes == [teacher]:
        return f" Each has the teacher's own network, {short(teacher)} parameters."
    largest = sizes[-1]
    if len(sizes) == 1:
        return f" Each has {short(largest)} parameters, {largest / teacher:.0%} of the teacher's {short(teacher)}."
    span = f"{short(sizes[0])} to {short(largest)} parameters, {sizes[0] / teacher:.0%} to {largest / teacher:.0%}"
    return f" They are of {word(len(sizes))} sizes, {span} of the teacher's {short(teacher)}."


def _how_good(facts: RunFacts) -> list[str]:
    """Say how far the samples are from the data; what the metric is stands over the table of figures."""
    result = main_result(facts)
    if result is None:
        return []
    metric = result["metric"]
    students, teacher = row(result, "students"), row(result, "teacher")
    if students is None:
        return []
    against = AGAINST.get(result.get("students_against") or "data", "the reference")
    text = (
        f"By {metric}, {students['samples']:,} samples of the students are {measured(students, metric)} from "
        f"{against}, at {evaluations(facts.steps)} each."
    )
    comparable = teacher is not None and result.get("students_against") != "teacher"
    if comparable:
        assert teacher is not None
        text += (
            f" The teacher, with {counted(facts.evaluations, 'evaluation')} each, is {measured(teacher, metric)} away: "
        )
        text += verdict(students, teacher, metric)
    halves = row(result, "real halves")
    if halves is not None:
        text += (
            f" For scale, two random halves of the real data ({halves['samples']:,} each) are "
            f"{figure(halves['values'][metric])} apart."
        )
    return [text]


def verdict(students: dict[str, Any], teacher: dict[str, Any], metric: str) -> str:
    """Compare two rows by their 95 % intervals, or by their values where there are none."""
    mine, theirs = students["values"][metric], teacher["values"][metric]
    closer = mine < theirs
    a, b = students["intervals"].get(metric), teacher["intervals"].get(metric)
    if a and b and a["low"] <= b["high"] and b["low"] <= a["high"]:
        return "their 95 % intervals overlap, so the samples do not tell the two apart."
    by = f", by a factor of {max(mine, theirs) / min(mine, theirs):.2g}" if min(mine, theirs) > 0 else ""
    sure = "" if a and b else " (no intervals were computed)"
    return f"the students are {'closer' if closer else 'farther'}{by}{sure}."


def _cost(facts: RunFacts) -> list[str]:
    total = next((c for c in facts.costs if c["part"] == "all students"), None)
    if total is None or not total["seconds"]:
        return []
    teacher = next((c for c in facts.costs if c["part"] == "teacher"), None)
    text = (
        f"The students took {duration(total['seconds'])} of one device's time in all, {flop(total['flops'])} on "
        f"{short(total['images'])} images, and at most {size(total['peak_bytes'])} of memory."
    )
    if teacher is not None:
        text += f" Training the teacher took {duration(teacher['seconds'])} and {flop(teacher['flops'])}."
    return [text]


# What deserves a look.


def remarks(facts: RunFacts) -> list[str]:
    """Return what a careful reader would look at first; empty where nothing stands out."""
    result = main_result(facts)
    found = (
        [] if result is None else [*collapse(result), *_companions(result), *_worst(facts, result), *_cautions(result)]
    )
    return [*found, *_health(facts)]


def collapse(result: dict[str, Any]) -> list[str]:
    """Say whether the students have collapsed, and what cures it: where their samples have lost half of the variety
    that the teacher's have. Recall is the part of the real images that lie among the samples, coverage that of those
    with a sample near by.
    """
    students, teacher = row(result, "students"), row(result, "teacher")
    if students is None or teacher is None or result.get("students_against") == "teacher":
        return []
    lost = []
    for name in ("recall", "coverage"):
        mine, theirs = students["values"].get(name), teacher["values"].get(name)
        if mine is None or theirs is None or not theirs:
            continue
        highest = students["intervals"].get(name, {"high": mine})["high"]
        if highest < COLLAPSED * teacher["intervals"].get(name, {"low": theirs})["low"]:
            lost.append(f"{name} {mine:.3f} against {theirs:.3f}")
    if not lost:
        return []
    parts = [r for r in result["rows"] if r["who"] == "students" and numbered(r["group"])[0] == "student"]
    worst = [
        r["group"]
        for r in parts
        if "recall" in r["values"]
        and (of := row(result, "teacher", r["group"])) is not None
        and r["values"]["recall"] < COLLAPSED * of["values"].get("recall", 0)
    ]
    who = f" ({', '.join(worst)})" if 0 < len(worst) < len(parts) else ""
    return [f"The students have collapsed{who}: {' and '.join(lost)} of the teacher's. The cure: {CURE}."]


def _companions(result: dict[str, Any]) -> list[str]:
    students, teacher = row(result, "students"), row(result, "teacher")
    if students is None or teacher is None or result.get("students_against") == "teacher":
        return []
    found = []
    for name, meaning in COMPANIONS.items():
        if name not in students["values"] or name not in teacher["values"]:
            continue
        mine, theirs = students["values"][name], teacher["values"][name]
        highest = students["intervals"].get(name, {"high": mine})["high"]
        if highest < teacher["intervals"].get(name, {"low": theirs})["low"]:
            found.append(f"The students' samples {meaning}: {name} {mine:.3f} against {theirs:.3f}.")
    return found


def _worst(facts: RunFacts, result: dict[str, Any]) -> list[str]:
    """Name the part and the class with the largest distance, against the teacher's on the same."""
    metric, found, told = result["metric"], list[str](), list[dict[str, Any]]()
    for kind in ("student", "class"):
        rows = [
            r
            for r in result["rows"]
            if r["who"] == "students" and numbered(r["group"])[0] == kind and metric in r["values"]
        ]
        if len(rows) < 3:  # of two, the table says the same
            continue
        worst = max(rows, key=lambda r: r["values"][metric])
        if any(worst["values"] == other["values"] for other in told):
            continue  # a student of one class
        told.append(worst)
        usual = sorted(r["values"][metric] for r in rows)[len(rows) // 2]
        teacher = row(result, "teacher", worst["group"])
        text = f"Farthest: {group_name(worst['group'], facts.class_names)}, {figure(worst['values'][metric])}"
        text += f" (the median {kind} is {figure(usual)}"
        if teacher is not None and metric in teacher["values"] and result.get("students_against") != "teacher":
            text += f", the teacher there {figure(teacher['values'][metric])}"
        found.append(text + ").")
    return found


def _cautions(result: dict[str, Any]) -> list[str]:
    found = [str(warning) for warning in result.get("warnings", [])]
    network = result.get("network", {})
    if result["metric"].startswith("fid") and network.get("weights_published") is False:
        found.append("The weights behind the FID are not the published ones: compare it with nobody else's.")
    return found


def _health(facts: RunFacts) -> list[str]:
    found, skipped = list[str](), dict[str, float]()
    for training in facts.trainings:
        where = f"{training.who}, {training.stage.objective}"
        for name, points in training.curves().items():
            if "skipped" in name.split("."):
                skipped[where] = skipped.get(where, 0) + sum(value for _, value in points)
            if name.startswith("losses.") and any(not math.isfinite(value) for _, value in points):
                found.append(f"{where}: the loss {name.removeprefix('losses.')} was not finite.")
    most = sorted((where for where in skipped if skipped[where]), key=lambda where: -skipped[where])
    if most:
        total, first = sum(skipped.values()), f"{most[0]} ({skipped[most[0]]:.0f})"
        what = f"{counted(round(total), 'update')} {plural(round(total), 'was', 'were')} skipped"
        found.append(f"{what} for not being finite, most of them by {first}.")
    return found


# Numbers for people.


def measured(line: dict[str, Any], metric: str) -> str:
    """Return a value with its 95 % interval, if it has one."""
    span = line["intervals"].get(metric)
    value = figure(line["values"][metric])
    return value if span is None else f"{value} ({figure(span['low'])} to {figure(span['high'])})"


def better(metric: str) -> str:
    return "lower is better" if lower_is_better(metric) else "higher is better"
