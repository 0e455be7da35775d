"""What measures: a network, how two sets of its features are compared, and what a figure is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msdcli.data.base import Dataset
from msdcli.engine.measure import classifier
from msdcli.engine.tracking.events import Report
from msdcli.errors import UserError
from msdcli.metrics.evaluate import FeatureSet
from msdcli.metrics.inception import VIT_MODELS, FeatureNetwork, open_network
from msdcli.metrics.intervals import bootstrap, mean_interval
from msdcli.metrics.moments import Gaussian
from msdcli.metrics.planar import histogram_l1, sliced_wasserstein
from msdcli.nets.classifier import Classifier
from msdcli.recipe import Recipe
from msdcli.rundir import RunDir

Reference = FeatureSet | Gaussian
Values = dict[str, float]
Intervals = dict[str, dict[str, float]]


@dataclass(frozen=True)
class FidOptions:
    """How a run is measured; what is None is for the recipe or the protocol to say."""

    protocol: str | None = None
    weights: Path | None = None
    reference: str | None = None
    samples: int | None = None
    batch: int | None = None
    workers: int = 1
    device: str | None = None
    bootstrap: int | None = None
    infinity: bool = False
    lean: bool = False
    save: int = 0
    groups: tuple[str, ...] = ()  # as groups.parse reads them
    seed: int | None = None  # of which pictures of a file `samples` takes; a run's recipe has its own
    per_class: bool = False  # a line for every class, however many there are

    def deciding(self) -> dict[str, str]:
        """Return what of it decides the figures, but for last bits (how many images are drawn at once)."""
        return {name: str(value) for name, value in vars(self).items() if name not in ("batch", "workers")}


# How two sets of features are compared.


@dataclass(frozen=True)
class FeatureMetric:
    """The network that measures, the name of its first figure, and what is said about it."""

    network: FeatureNetwork
    name: str
    protocol: str
    compare: Callable[[FeatureSet, Reference, int, bool], tuple[Values, Intervals, list[str]]]
    record: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    unseen: Values = field(default_factory=dict)  # of real images that the network was not trained on


def metric_of(
    run: RunDir, recipe: Recipe, data: Dataset, options: FidOptions, on: torch.device, report: Report
) -> FeatureMetric:
    """Open what measures this run: the data's own classifier, or the network of a published protocol."""
    name, protocol = recipe.data.label, options.protocol or "data"
    if protocol == "data" and not recipe.has_measure:
        raise UserError(
            f"{'prompts have' if recipe.has_prompts else 'without data there is'} no classifier to measure by",
            hint=f"msd fid {run.root} PICTURES --protocol clean (or clip)",
        )
    if len(data.shape) == 1:
        if protocol != "data" or options.reference:
            raise UserError(f"{name} holds points, which have no {protocol} features", hint="leave the protocol out")
        what = "L1 distance of 100 x 100 histograms over [-1.5, 1.5]^2, sliced 2-Wasserstein over 128 directions"
        return FeatureMetric(
            FeatureNetwork("points", lambda x: x, floats=True), f"l1_{name}", what, _points(f"l1_{name}")
        )
    if protocol == "data":
        if options.reference or options.weights:
            raise UserError(
                f"the classifier of {name} is the run's own, and compares with the run's own data",
                hint="--protocol clean (or another) for a reference or weights of yours",
            )
        return _own_metric(name, len(data.class_names), classifier.provide(run, recipe, data, on, report), on)
    network = open_network(protocol, weights=options.weights, device=on)
    metric = ("fd_" if protocol in VIT_MODELS else "fid_") + protocol.replace("-", "_")
    return FeatureMetric(network, metric, protocol, by_frechet(metric, on, knows=False))


def _own_metric(name: str, num_classes: int, own: classifier.TrainedClassifier, on: torch.device) -> FeatureMetric:
    """Measure by the data's own classifier, and say how much it knows of images that it was not trained on."""
    network, metric, held_out = classifier.as_network(own.network, own.sha256, on), f"fd_{name}", own.held_out
    dimension = Classifier.num_features
    return FeatureMetric(
        network,
        metric,
        f"Frechet distance, {dimension} features of a classifier trained on {name} ({held_out.told()})",
        by_frechet(metric, on, knows=True),
        {"classifier_sha256": own.sha256, "held_out": vars(held_out) | {"accuracy": held_out.accuracy}},
        held_out.warnings(metric, num_classes),
        {} if held_out.accuracy is None else {"accuracy": held_out.accuracy},
    )


def by_frechet(metric: str, on: torch.device, *, knows: bool) -> Callable[..., tuple[Values, Intervals, list[str]]]:
    """Compare by the Frechet distance and its companions; `knows`: the network's classes are the data's own."""

    def compare(mine: FeatureSet, theirs: Reference, replicates: int, extrapolate: bool) -> Any:
        found = mine.summary(theirs, replicates=replicates, extrapolate=extrapolate, device=on)
        intervals = found.pop("intervals")
        warnings: list[str] = found.pop("warnings")
        figures = {k: v for k, v in found.items() if isinstance(v, float)}
        values, own = {metric: figures.pop("fid")}, intervals.pop("fid", None)
        spans = {} if own is None else {metric: own}
        if "fid_infinity" in figures:
            values[f"{metric}_infinity"] = figures.pop("fid_infinity")
        if knows and mine.probabilities is not None and mine.labels is not None:
            right = (mine.probabilities.argmax(axis=1) == mine.labels).astype(float)
            values["accuracy"] = float(right.mean())
            if replicates:
                spans["accuracy"] = asdict(mean_interval(right, replicates=replicates, seed=0))
            # Of a network that is not Inception:
            figures, intervals = ({k: v for k, v in d.items() if "inception" not in k} for d in (figures, intervals))
        return values | figures, spans | intervals, warnings

    return compare


def _points(metric: str) -> Callable[..., tuple[Values, Intervals, list[str]]]:
    """Compare points in the plane."""

    def compare(mine: FeatureSet, theirs: FeatureSet, replicates: int, extrapolate: bool) -> Any:
        x, y = _tensor(mine), _tensor(theirs)
        values = {metric: histogram_l1(x, y), "sliced_wasserstein": sliced_wasserstein(x, y)}

        def reweighted(weights: np.ndarray) -> float:
            return histogram_l1(x.repeat_interleave(torch.from_numpy(weights).long(), dim=0), y)

        if not replicates:
            return values, {}, []
        return values, {metric: asdict(bootstrap(reweighted, len(x), replicates=replicates, seed=0))}, []

    return compare


def _tensor(points: FeatureSet) -> Tensor:
    assert points.features is not None, "points are always kept"
    return torch.from_numpy(points.features)
