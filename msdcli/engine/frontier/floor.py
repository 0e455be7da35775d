"""What the metric cannot tell apart: two halves of the data, and the teacher beside itself with other noise."""

from __future__ import annotations

from typing import Any

from msdcli.engine.measure.feature_metric import FidOptions
from msdcli.engine.measure.fid import EvaluationContext
from msdcli.engine.tracking.events import Report
from msdcli.rundir import RunDir
from msdcli.seeds import derive


def floor(run: RunDir, result: dict[str, Any], report: Report) -> dict[str, float]:
    """Return the distances between random halves of the real data (`halves`), and of the teacher's samples from those
    with other noise, as many as students are measured with (`teacher`), by the metric of a measured run.

    The teacher's other samples are kept with the features that runs share.
    """
    context = EvaluationContext(run, FidOptions(), report)
    mine = context.teacher()
    pairs = context.recipe.pairs
    other = pairs.model_copy(update={"seed": derive("floor", pairs.seed)})
    context.recipe = context.recipe.model_copy(update={"pairs": other})
    figures, _, _ = context.metric.compare(mine, context.teacher(), 0, False)
    found = {"teacher": figures[context.metric.name]}
    halves = next((row for row in result["rows"] if row["who"] == "real halves"), None)
    return found if halves is None else {"halves": halves["values"][context.metric.name]} | found
