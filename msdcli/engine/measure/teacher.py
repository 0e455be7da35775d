"""Is the teacher fit to be distilled? Measured alone, before the students start: none becomes better than what it
learns from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from msdcli import records
from msdcli.engine.measure.feature_metric import FidOptions, Reference
from msdcli.engine.measure.fid import EvaluationContext
from msdcli.engine.measure.rows import Measurement, MeasurementRows, Row
from msdcli.engine.tracking.events import Report
from msdcli.engine.tracking.formatting import figure
from msdcli.errors import UserError
from msdcli.metrics.moments import Gaussian
from msdcli.partition import Partition
from msdcli.recipe import Recipe
from msdcli.recipe.teacher import TeacherSettings
from msdcli.rundir import RunDir, key, read_json, write_json

FOLDER = "teacher"  # in metrics/: what is known of the teacher alone is no result of the run
SURE = 500  # samples below which a figure is too uncertain to stop a run for
# Pairs by which a teacher is judged without more samples. The digits' teacher: 0.152 and 0.129 by 2,048 samples each,
# 0.130 by 5,000, and 7.5 would be weak.
ENOUGH = 2000
# A model whose every sample is the one picture with the mean features of the data is at a Frechet distance of the
# features' whole variance, tr(Sigma): ||m - m||^2 + tr(Sigma + 0 - 0). What is not well below that has learnt little.
UNFIT_SPREAD, WEAK_SPREAD = 0.5, 0.1
# Of the way from guessing a sample's class to naming it as often as a real image's.
UNFIT_ACCURACY, WEAK_ACCURACY = 0.5, 0.8


class UnfitTeacherError(UserError):
    """The teacher is plainly not fit to be distilled."""


@dataclass(frozen=True)
class Verdict:
    """Whether a teacher is fit: `fit`, `weak` or `unfit`; and one sentence on it."""

    state: str
    said: str


def enough(recipe: Recipe) -> int:
    """Return how many samples say whether a teacher is fit: the pairs, which students need anyway, where they are not
    few; the table has all that the recipe measures.
    """
    samples = recipe.evaluation.samples
    return min(samples, recipe.pairs.count) if recipe.needs_pairs and recipe.pairs.count >= ENOUGH else samples


def measure(run: RunDir, report: Report, *, samples: int, brief: bool = False) -> tuple[Measurement, Verdict]:
    """Measure a run's teacher alone by so many `samples` and write metrics/teacher/NAME.json; `brief`: as a whole, and
    without intervals.

    What it costs to sample and to measure is kept for the run's end.
    """
    context = EvaluationContext(run, FidOptions(samples=samples), report)
    real, mine = context.real(), context.teacher()
    partition = Partition.load(run.partition)
    if brief:
        lines = MeasurementRows(context.metric, partition, replicates=0, whole_only=True)
        rows = [*context.halves(real), *lines.of("teacher", mine, real)]
    else:
        lines = context.lines(partition, mine.moments.dimension)
        rows = [*context.halves(real), *context.of_teacher(lines, mine, real)]
    found = verdict(context.metric.name, rows, _spread(real), guess=_guess(context))
    record = {
        "samples": context.count,
        "class_names": list(context.data.class_names),
        "warnings": [*context.warnings, *lines.warnings],
        "verdict": vars(found),
        "judged": _judged_by(run),
    }
    result = Measurement(context.metric.name, context.metric.protocol, rows, record | context.metric.record)
    write_json(run.metrics / FOLDER / f"{context.metric.name}.json", result.to_json())
    return result, found


def judged(run: RunDir) -> Verdict | None:
    """Return what was found of this teacher, with this solver, against these data; None where nobody has judged it."""
    for path in sorted((run.metrics / FOLDER).glob("*.json")):
        known = read_json(path)
        if isinstance(known, dict) and known.get("judged") == _judged_by(run):
            return Verdict(**known["verdict"])
    return None


def _judged_by(run: RunDir) -> str:
    """Name all that a verdict depends on."""
    made_from, recipe = records.run(run.record_file), run.recipe()
    teacher = recipe.teacher
    said = [made_from.get("data"), made_from.get("teacher"), teacher.solver.record(), recipe.pairs.seed]
    return key("judged", *said, recipe.evaluation.samples, recipe.data.model_dump(mode="json"))


def verdict(metric: str, rows: list[Row], spread: float, *, guess: float | None) -> Verdict:
    """Judge a teacher by its row, that of two halves of the data, the variance of the data's features, and how often
    guessing names a class right; None: the classifier is not shown to know the classes.
    """
    mine = next(row for row in rows if (row.who, row.group) == ("teacher", "whole"))
    best = next((row.values for row in rows if row.who == "real halves"), {})
    # Points are measured by a distance of histograms, which is no variance; their Wasserstein distance is the root.
    distance = mine.values.get("sliced_wasserstein")
    distance = mine.values[metric] if distance is None else distance**2
    said = f"{metric} {figure(mine.values[metric])} by {mine.samples:,} samples"
    if metric in best:
        said += f" (two halves of the data: {figure(best[metric])})"
    worst = "unfit" if distance >= UNFIT_SPREAD * spread else "weak" if distance >= WEAK_SPREAD * spread else "fit"
    if worst != "fit":
        said += f", {distance / spread:.0%} of the distance of a model that makes one average picture only"
    mine_right, real_right = mine.values.get("accuracy"), best.get("accuracy")
    if guess is not None and mine_right is not None and real_right is not None and real_right > guess:
        way = (mine_right - guess) / (real_right - guess)
        by_class = "unfit" if way < UNFIT_ACCURACY else "weak" if way < WEAK_ACCURACY else "fit"
        worst = max(worst, by_class, key=["fit", "weak", "unfit"].index)
        said += (
            f"; {mine_right:.0%} of its samples are recognised as their class, of real images {real_right:.0%}, by "
            f"guessing {guess:.0%}"
        )
    unsure = guess is None and "accuracy" in mine.values  # by features of a classifier that may know nothing
    if worst == "unfit" and (unsure or mine.samples < SURE):
        worst = "weak"
    heads = {
        "fit": "The teacher is fit to be distilled",
        "weak": "The teacher is weak, and no student becomes better than it",
        "unfit": "The teacher is not fit to be distilled",
    }
    return Verdict(worst, f"{heads[worst]}: {said}.")


def _spread(real: Reference) -> float:
    """The variance of the data's features, in all directions together; of points, in one direction."""
    if not isinstance(real, Gaussian) and real.features is not None and real.features.shape[1] == 2:
        return float(real.features.var(axis=0).mean())
    gaussian = real if isinstance(real, Gaussian) else real.moments.whole().gaussian()
    return float(np.trace(gaussian.sigma))


def _guess(context: EvaluationContext) -> float | None:
    held_out: dict[str, Any] = context.metric.record.get("held_out", {})
    knows = held_out.get("images") and not context.metric.warnings
    return held_out["guessed"] / held_out["images"] if knows else None


def refusal(found: Verdict, settings: TeacherSettings, run: RunDir) -> UnfitTeacherError:
    """The error that stops a run before its students, with what to look at in such a teacher."""
    cure = _cure_of_trained(settings) if settings.path is None else _cure_of_given(settings)
    return UnfitTeacherError(
        f"{found.said} Its samples: {run.samples / 'teacher.png'}",
        hint=f"{cure}; evaluation.judge=tell goes on all the same",
    )


def _cure_of_trained(settings: TeacherSettings) -> str:
    steps = settings.training.steps
    return (
        f"teacher.training.steps={4 * steps} (now {steps}) trains it longer, a larger teacher.network learns more, and "
        "teacher.sigma_data is the deviation of the pictures (msd recipes validate)"
    )


def _cure_of_given(settings: TeacherSettings) -> str:
    """What is usually wrong where somebody else's teacher, which was good there, makes bad samples here."""
    solver, guidance = settings.solver, settings.guidance
    scale = "" if guidance is None else f", and teacher.guidance.scale (now {guidance.scale}) is what it wants"
    return (
        "look at them: are data and classes those that it learnt, in the same order, size, colours and range (msd "
        "import --check compares its predictions with the original's, which shows a wrong scale of its noise, "
        f"sigma_data); are {solver.steps} steps of teacher.solver {solver.name} enough "
        f"(teacher.solver.steps={2 * solver.steps}){scale}"
    )
