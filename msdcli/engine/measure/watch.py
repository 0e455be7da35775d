"""Follow a run that is being trained: measure every new checkpoint of its students, and draw the curve."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from msdcli import records
from msdcli.diffusion.generator import Generator, levels_of
from msdcli.engine import sample, search
from msdcli.engine.checkpoints import files as checkpoint_files
from msdcli.engine.checkpoints import storage
from msdcli.engine.checkpoints.model import MODEL, is_complete, load_model
from msdcli.engine.measure.feature_metric import FidOptions, Reference
from msdcli.engine.measure.fid import EvaluationContext
from msdcli.engine.tracking.events import Report, silent
from msdcli.engine.train.student import is_finished, new_network
from msdcli.metrics.evaluate import FeatureSet
from msdcli.metrics.moments import Gaussian
from msdcli.recipe import Recipe
from msdcli.recipe.stages import GeneratorSettings
from msdcli.rundir import RunDir, append_line, read_lines, writing

PICTURE = "watch.png"


@dataclass(frozen=True)
class StudentSnapshot:
    """The newest weights of a student: stage, step, and whether it is finished."""

    stage: int
    step: int
    done: bool


def watch(run: RunDir, report: Report, options: FidOptions, *, poll: float = 2.0) -> Iterator[dict[str, Any]]:
    """Yield a line for every change of the students' weights until all are finished.

    A student counts from its first checkpoint in a stage that makes images; the whole is measured when all
    of them have one. Lines go to metrics/watch.jsonl, the curve to metrics/watch.png.
    """
    recipe = run.recipe()
    if options.protocol not in (None, "data"):
        options = replace(options, lean=True)  # a curve of distances; the companions are for the end
    _wait_for_teacher(run, report, poll)
    context = EvaluationContext(run, options, report)
    against = context.teacher() if context.planar else context.real()
    students = sample.of_run(run, context.device)
    context.report = silent  # the lines say enough
    seen: dict[int, StudentSnapshot] = {}
    sets: dict[int, FeatureSet] = {}
    while True:
        found = {k: p for k in range(len(students.folders)) if (p := newest(run, recipe, k)) is not None}
        changed = [k for k, snapshot in found.items() if seen.get(k) != snapshot]
        for k in changed:
            generator, seen[k] = load_snapshot(run, recipe, k, found[k])
            students.put(k, generator)
            sets[k] = context.students(students, students.partition.parts[k])
        if changed:
            line = _line(context, students, seen, sets, against)
            _append(run.watched, line)
            draw(run.metrics / PICTURE, run.watched, recipe)
            yield line
        if len(seen) == len(students.folders) and all(snapshot.done for snapshot in seen.values()):
            return
        time.sleep(poll)


def newest(run: RunDir, recipe: Recipe, number: int) -> StudentSnapshot | None:
    """Return the newest weights of a student, or None while there are none that make images."""
    for i, stage in reversed([*enumerate(recipe.stages)]):
        folder = run.stage(number, i, stage.objective)
        if not isinstance(stage, GeneratorSettings):
            continue
        if is_finished(folder, stage):
            return StudentSnapshot(i, records.trained(folder / MODEL)["steps"], i == len(recipe.stages) - 1)
        if (step := checkpoint_files.step_of(folder)) is not None:
            return StudentSnapshot(i, step, False)
    return None


def load_snapshot(
    run: RunDir, recipe: Recipe, number: int, snapshot: StudentSnapshot
) -> tuple[Generator, StudentSnapshot]:
    """Read a student's weights; training goes on meanwhile, so the step is told again with them."""
    stage = recipe.stages[snapshot.stage]
    folder = run.stage(number, snapshot.stage, stage.objective)
    assert isinstance(stage, GeneratorSettings), "only these have snapshots"
    if is_finished(folder, stage):
        net, description = load_model(folder, base=lambda: load_model(run.teacher)[0])
        sigmas = levels_of(description["stage"])  # a kept student may have been made by another stage
        return Generator(net, sigmas), replace(snapshot, step=description["steps"])
    teacher, _ = load_model(run.teacher)
    net = new_network(search.resolve(run, recipe, teacher, silent), teacher, number)
    net.anchor = getattr(stage, "anchor", 0.0)
    step = storage.read_average(folder, net.requires_grad_(False).eval())
    return Generator(net, tuple(stage.sigmas)), replace(snapshot, step=step)


def _wait_for_teacher(run: RunDir, report: Report, poll: float) -> None:
    told = False
    while not (run.partition.is_file() and is_complete(run.teacher)):
        if not told:
            report(f"waiting for the teacher and the partition of {run.root}")
            told = True
        time.sleep(poll)


def _line(
    context: EvaluationContext,
    students: sample.Students,
    points: dict[int, StudentSnapshot],
    sets: dict[int, FeatureSet],
    against: Reference,
) -> dict[str, Any]:
    lines = {}
    for k, snapshot in sorted(points.items()):
        values = _values(context, sets[k], students.partition.parts[k], against)
        stage = {
            "stage": context.recipe.stages[snapshot.stage].objective,
            "number": snapshot.stage,
            "step": snapshot.step,
        }
        lines[str(k)] = stage | {"samples": sets[k].count, "value": values.get(context.metric.name), "values": values}
    whole: dict[str, float] = {}
    if len(sets) == len(students.folders):
        first, *others = sets.values()
        merged = first.select(first.moments.classes)  # a set of its own: merging leaves the parts alone
        for part in others:
            merged.merge(part)
        whole = _values(context, merged, None, against)
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "metric": context.metric.name,
        "protocol": context.metric.protocol,
        "network": context.metric.network.record(),
        "samples": context.count,
        "reference": against.count,
        "students": lines,
        "whole": whole.get(context.metric.name),
        "values": whole,
    }


def _values(
    context: EvaluationContext, mine: FeatureSet, part: list[int] | None, against: Reference
) -> dict[str, float]:
    """Compare; a part is compared with the same classes, where the reference knows them."""
    if part is not None:
        if isinstance(against, Gaussian) or set(against.moments.classes) == {-1}:
            return {}
        against = against.select(part)
    return context.metric.compare(mine, against, 0, False)[0]


def _append(path: Path, line: dict[str, Any]) -> None:
    """Add a line, unless the last one says the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = read_lines(path)
    if before and before[-1] | {"time": ""} == line | {"time": ""}:
        return
    append_line(path, line)


def draw(target: Path, lines: Path, recipe: Recipe) -> None:
    """Draw the last watched metric against the steps, one curve per student and one for the whole."""
    from matplotlib.figure import Figure

    measured = records.watched(lines)
    metric = measured[-1]["metric"]
    starts = [sum(stage.steps for stage in recipe.stages[:i]) for i in range(len(recipe.stages))]
    curves: dict[str, dict[int, float]] = {}
    for line in (line for line in measured if line["metric"] == metric):
        steps = {k: starts[s["number"]] + s["step"] for k, s in line["students"].items()}
        for k, student in line["students"].items():
            if student["value"] is not None:
                curves.setdefault(f"student {k}", {})[steps[k]] = student["value"]
        if line["whole"] is not None:
            curves.setdefault("whole", {})[min(steps.values())] = line["whole"]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="steps", ylabel=metric, title=measured[-1]["protocol"])
    axes.title.set_fontsize(8)
    for name, curve in sorted(curves.items(), reverse=True):
        style = {"color": "black", "linewidth": 2} if name == "whole" else {"alpha": 0.7}
        axes.plot(*zip(*sorted(curve.items()), strict=True), marker=".", label=name, **style)
    axes.legend(fontsize=8, ncols=1 + len(curves) // 12)
    with writing(target) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
