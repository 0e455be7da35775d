"""What is measured of classes before they are divided: how hard each is, and with which others it is mixed up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msdcli import records
from msdcli.data.base import Dataset, has_images
from msdcli.engine.measure import classifier
from msdcli.engine.tracking.events import Report
from msdcli.errors import MissingFileError, UserError
from msdcli.nets.classifier import Classifier
from msdcli.partition import MOST_CONFUSED
from msdcli.recipe import Recipe
from msdcli.rundir import RunDir, file_hash

NEAREST = 3  # classes that a class is mixed up with the most, in partition.json


def distances(path: str, class_names: Sequence[str]) -> tuple[list[float], dict[str, Any]]:
    """Return the distance of every class that a finished run's measurement has, and what to record of it.

    UserError where the run is missing or not measured by class, or its classes are others.
    """
    run = RunDir(Path(path))
    if not run.recipe_file.is_file():
        raise MissingFileError(f"partition.run: no run at {path}", hint="msd distill makes one, of one student say")
    if (other := _other_classes(records.run(run.record_file).get("class_names", []), class_names)) is not None:
        raise UserError(
            f"partition.run: {path} has other classes than these data: {other}",
            hint="a run of the same data says how hard its classes are",
        )
    label = run.recipe().data.label
    files = [file for kind in ("fd", "l1") if (file := run.metrics / f"{kind}_{label}.json").is_file()]
    if not files:
        raise MissingFileError(f"partition.run: {path} is not measured", hint=f"msd fid {path}")
    measured = records.measurement(files[0])
    metric = measured["metric"]
    of_class = {row["group"]: row["values"].get(metric) for row in measured["rows"] if row["who"] == "students"}
    found = [of_class.get(f"class {c}") for c in range(len(class_names))]
    if missing := [class_names[c] for c, value in enumerate(found) if value is None]:
        raise UserError(
            f"partition.run: {files[0]} has no {metric} of {len(missing):,} classes: {', '.join(missing[:8])}",
            hint=f"msd fid {path} --per-class, and with more samples where a class has fewer than two",
        )
    each = [max(0.0, float(value)) for value in found if value is not None]
    return each, {"metric": metric, "measurement_sha256": file_hash(files[0]), "distances": each}


def _other_classes(there: Sequence[str], here: Sequence[str]) -> str | None:
    """Say where the classes of two runs differ; None where they do not."""
    if len(there) != len(here):
        return f"{len(there):,} there, {len(here):,} here"
    differing = (f"class {c} is {there[c]} there and {here[c]} here" for c in range(len(here)) if there[c] != here[c])
    return next(differing, None)


def check_confusion(data: Dataset) -> None:
    """Raise UserError where no classifier can say which classes are alike."""
    if not has_images(data) or len(data.shape) == 1:
        raise UserError(
            "partition.method confusion looks at the classifier of the data's pictures, and there are none",
            hint="partition.method=kmeans",
        )
    if (count := len(data.class_names)) > MOST_CONFUSED:
        raise UserError(
            f"partition.method confusion compares every class with every other: at most {MOST_CONFUSED:,}, and there "
            f"are {count:,}",
            hint="partition.method=kmeans",
        )


def confusion(
    run: RunDir, recipe: Recipe, data: Dataset, device: torch.device, report: Report
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the mean probability that the data's classifier gives to class j on held-out images of class i [classes,
    classes] (of a class without any: not a number), and what to record of it. The classifier is the one that measures
    runs, trained once. UserError where it knows nothing.
    """
    own = classifier.provide(run, recipe, data, device, report)
    if not own.held_out.knows:
        raise UserError(
            "partition.method confusion: the data's classifier knows nothing of the classes that it could mix up: "
            f"{own.held_out.told()}",
            hint="partition.method=kmeans",
        )
    said = probabilities(own.network, data, classifier.held_out(data.labels(range(len(data)))))
    mixed = said.numpy()
    return mixed, {"classifier_sha256": own.sha256, "held_out": vars(own.held_out), "mixed_with": mixed_with(mixed)}


@torch.no_grad()
def probabilities(network: Classifier, data: Dataset, numbers: Tensor) -> Tensor:
    """The mean of what the classifier says on the images of every class [classes, classes], float64."""
    num, device = len(data.class_names), next(network.parameters()).device
    total, count = torch.zeros(num, num, dtype=torch.float64), torch.zeros(num, 1, dtype=torch.float64)
    for part in numbers.split(classifier.BATCH):
        labels = data.labels(part.tolist())
        said = network.eval()(data.images(part.tolist()).to(device)).double().softmax(1).cpu()
        total.index_add_(0, labels, said)
        count.index_add_(0, labels, torch.ones(len(labels), 1, dtype=torch.float64))
    return total / count


def mixed_with(mixed: np.ndarray) -> list[list[dict[str, Any]]]:
    """The classes that each class is mixed up with the most, and how much: the mean of both directions."""
    alike = np.nan_to_num(mixed)
    alike = (alike + alike.T) / 2
    np.fill_diagonal(alike, -1)
    nearest = np.argsort(-alike, axis=1, kind="stable")[:, : min(NEAREST, len(alike) - 1)]
    return [[{"number": int(j), "share": float(alike[i, j])} for j in row] for i, row in enumerate(nearest)]
