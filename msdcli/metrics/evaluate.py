"""One pass over images, and every number that their features can tell.

`collect` runs the network once and keeps moments per class (and, unless told not to, the features);
`FeatureSet.summary` turns them into FID, KID, inception score, precision, recall, density and coverage, whole and per
group of classes. `evaluate` is both, from files to a JSON-able dict.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msdcli.data.images import WHOLE, Share
from msdcli.data.opening import content_hash, is_shards
from msdcli.diffusion.device_batch import DeviceBatch
from msdcli.diffusion.float32 import exact_float32
from msdcli.errors import UserError
from msdcli.foreign import versions
from msdcli.metrics.batches import ImageSource, batches_of, opened
from msdcli.metrics.frechet import ReweightedFrechet, Statistics, frechet_distance, frechet_infinity
from msdcli.metrics.inception import FeatureNetwork, open_network
from msdcli.metrics.intervals import Interval, bootstrap, bootstrap_weights, centred_interval, mean_interval
from msdcli.metrics.kernel import (
    SPLITS,
    inception_score,
    kernel_distances,
    split_inception_score,
    subset_kernel_distance,
)
from msdcli.metrics.manifold import Manifold, manifold
from msdcli.metrics.moments import ClassMoments, Gaussian, Moments
from msdcli.metrics.reference import notes, read_statistics, takes_statistics

EXACT_PAIRS = 10_000**2  # up to here all pairs cost no more than clean-fid's 100 subsets of 1,000
KEPT = ("features", "probabilities", "labels")
FORMAT = 2  # of features of files: another number where the code reads or resizes otherwise
UNLABELLED = 2  # likewise of shards, whose pictures without a class counted as class 0 at first
PACKAGES = ("msdcli", "torch", "torchvision", "numpy", "scipy", "pillow")

# uint8, [N, H, W, 3] as numpy or [N, 3, H, W] as torch (one channel is repeated), or the floats that a network wants;
# or such a batch with its labels [N].


@dataclass
class FeatureSet:
    """What one pass leaves: moments per class; features [N, d], labels [N] (-1: none) and probabilities [N, classes]
    where they were kept.
    """

    network: dict[str, Any]  # FeatureNetwork.record(): what the features are
    moments: ClassMoments
    features: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    labels: np.ndarray | None = None
    _by_class: dict[int, np.ndarray] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def count(self) -> int:
        return self.moments.counts().total()

    def merge(self, other: FeatureSet) -> None:
        """Add another part (a rank's, a shard's) of the same set."""
        self.check_network(other.network)
        self.moments.merge(other.moments)
        self.features = _joined(self.features, other.features)
        self.probabilities = _joined(self.probabilities, other.probabilities)
        self.labels, self._by_class = _joined(self.labels, other.labels), None

    def select(self, labels: Iterable[int]) -> FeatureSet:
        """The images of some classes."""
        wanted = set(labels)
        moments = ClassMoments(self.moments.dimension)
        moments.classes = {label: m for label, m in self.moments.classes.items() if label in wanted}
        kept: tuple[np.ndarray | None, ...] = (None, None, None)
        if self.labels is not None:
            rows = self._rows_of(wanted)
            kept = tuple(None if a is None else a[rows] for a in (self.features, self.probabilities, self.labels))
        return FeatureSet(self.network, moments, *kept)

    def _rows_of(self, wanted: Iterable[int]) -> np.ndarray:
        """Return the numbers of the images of these classes, ascending."""
        if self._by_class is None:
            labels = np.asarray(self.labels)
            order = np.argsort(labels, kind="stable")
            names, starts = np.unique(labels[order], return_index=True)
            self._by_class = dict(zip(names.tolist(), np.split(order, starts[1:]), strict=True))
        parts = [self._by_class[label] for label in wanted if label in self._by_class]
        return np.sort(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.int64)

    def take(self, rows: np.ndarray) -> FeatureSet:
        """The images with these numbers, by their kept features."""
        if self.features is None or self.labels is None:
            raise UserError("Single images cannot be picked: their features were not kept.")
        features, labels = self.features[rows], self.labels[rows]
        moments = ClassMoments(self.moments.dimension)
        moments.add(torch.from_numpy(features), labels)
        return FeatureSet(
            self.network, moments, features, None if self.probabilities is None else self.probabilities[rows], labels
        )

    def check_network(self, network: Mapping[str, Any]) -> None:
        if dict(network) != self.network:
            both = f"{json.dumps(self.network)} and {json.dumps(dict(network))}"
            raise UserError(f"The two sides have features of different networks: {both}.")

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays, for `np.savez`; no array needs pickle."""
        arrays = {f"moments/{name}": array for name, array in self.moments.to_arrays().items()}
        arrays["network"] = np.array(json.dumps(self.network))
        kept = {name: getattr(self, name) for name in KEPT}
        return arrays | {name: array for name, array in kept.items() if array is not None}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> FeatureSet:
        moments = {name.removeprefix("moments/"): arrays[name] for name in arrays if name.startswith("moments/")}
        kept = {name: arrays.get(name) for name in KEPT}
        return cls(json.loads(str(arrays["network"])), ClassMoments.from_arrays(moments), **kept)

    def summary(
        self,
        reference: FeatureSet | Gaussian,
        *,
        groups: Mapping[str, Sequence[int]] | None = None,
        replicates: int = 0,
        seed: int = 0,
        extrapolate: bool = False,
        device: str | torch.device = "cpu",
        progress: Callable[[int, int], object] = lambda done, total: None,
    ) -> dict[str, Any]:
        """Every figure against `reference`, JSON-able; `replicates` adds bootstrap intervals, `groups` name classes.

        Distances of single images are taken on `device`, block by block; they are float64 everywhere. `progress` is
        told how many of the groups are done.
        """
        if isinstance(reference, FeatureSet):
            reference.check_network(self.network)
        whole = reference if isinstance(reference, Gaussian) else reference.moments.whole()
        own = self.moments.whole()
        comparison = _Comparison(self, reference, whole, replicates, seed, torch.device(device))
        figures = {"fid": frechet_distance(own, whole)} | comparison.companions()
        if extrapolate:
            figures["fid_infinity"] = frechet_infinity(comparison.features(), whole, seed=seed)
        return {
            **figures,
            "groups": self._groups(reference, groups or {}, progress),
            "intervals": comparison.intervals(figures),
            "warnings": _warnings(own, whole),
            "record": self._record(whole) | comparison.method,
        }

    def _groups(
        self,
        reference: FeatureSet | Gaussian,
        groups: Mapping[str, Sequence[int]],
        progress: Callable[[int, int], object],
    ) -> dict[str, dict[str, Any]]:
        """FID of each group against the same classes of the reference; None where a side has fewer than two images."""
        if groups and isinstance(reference, Gaussian):
            raise UserError("Published statistics do not tell classes apart.", hint="Give images as the reference.")
        figures = {}
        for name, labels in groups.items():
            mine, theirs = self.moments.group(labels), reference.moments.group(labels)  # type: ignore[union-attr]
            enough = min(mine.count, theirs.count) >= 2
            distance = frechet_distance(mine, theirs) if enough else None
            figures[name] = {"fid": distance, "count": mine.count, "reference_count": theirs.count}
            progress(len(figures), len(groups))
        return figures

    def _record(self, reference: Statistics) -> dict[str, Any]:
        return {
            **self.network,
            "count": self.count,
            "reference_count": reference.count,
            "dimension": self.moments.dimension,
            "labels": {str(label): count for label, count in self.moments.counts().items() if label >= 0},
            "versions": versions(*PACKAGES),
        }


@dataclass
class _Comparison:
    """The figures beside FID, which need features of both sides."""

    samples: FeatureSet
    reference: FeatureSet | Gaussian
    whole: Statistics
    replicates: int
    seed: int
    device: torch.device
    method: dict[str, Any] = field(default_factory=dict)  # how, for the record
    _manifold: Manifold | None = None
    _kernel_replicates: list[np.ndarray] = field(default_factory=list)  # one array, or none

    def features(self) -> np.ndarray:
        if self.samples.features is None:
            raise UserError("This figure needs the features, which were not kept.")
        return self.samples.features

    def companions(self) -> dict[str, float]:
        self.method["seed"] = self.seed
        figures: dict[str, float] = {}
        if self.samples.probabilities is not None:
            figures |= self._inception(self.samples.probabilities)
        y = self._reference_features()
        if self.samples.features is not None and y is not None:
            figures |= self._kernel(self.samples.features, y)
            if min(len(self.samples.features), len(y)) > 5:  # density's neighbourhood
                self._manifold = manifold(self.samples.features, y, device=self.device)
                figures |= self._manifold.figures()
        return figures

    def _inception(self, p: np.ndarray) -> dict[str, float]:
        figures = {"inception_score": inception_score(p)}
        if len(p) < SPLITS:
            return figures
        self.method["splits"] = SPLITS
        mean, deviation = split_inception_score(p, seed=self.seed)
        return figures | {"inception_score_splits": mean, "inception_score_splits_std": deviation}

    def intervals(self, figures: Mapping[str, float]) -> dict[str, Any]:
        if not self.replicates:
            return {}
        self.method["replicates"] = self.replicates
        features, options = self.features(), dict[str, Any](replicates=self.replicates, seed=self.seed)
        frechet = ReweightedFrechet(features, self.whole)
        found = {"fid": bootstrap(frechet.distance, len(features), influence=frechet.influence(), **options)}
        p = self.samples.probabilities
        if p is not None:
            found["inception_score"] = bootstrap(lambda weights: inception_score(p, weights), len(p), **options)
        for replicated in self._kernel_replicates:
            found["kid"] = centred_interval(figures["kid"], replicated)
        for name, values in vars(self._manifold).items() if self._manifold else ():
            found[name] = mean_interval(values, **options)
        return {name: _as_json(interval) for name, interval in found.items()}

    def _reference_features(self) -> np.ndarray | None:
        return None if isinstance(self.reference, Gaussian) else self.reference.features

    def _kernel(self, x: np.ndarray, y: np.ndarray) -> dict[str, float]:
        exact = len(x) * len(y) <= EXACT_PAIRS
        self.method["kid"] = "all pairs" if exact else "100 subsets of 1000"
        if exact:  # every pair is looked at once, for the figure and for its replicates
            weightings = [np.ones((1, len(x)))]
            if self.replicates:
                weightings.append(bootstrap_weights(len(x), self.replicates, self.seed))
            (value,), *self._kernel_replicates = kernel_distances(x, y, weightings, device=self.device)
            return {"kid": float(value)}
        return {"kid": subset_kernel_distance(x, y, seed=self.seed, device=self.device).value}


def evaluate(
    images: ImageSource,
    reference: ImageSource,
    *,
    protocol: str = "clean",
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    workers: int = 1,
    limit: int | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Compare images with a reference (images or published statistics); `options` are those of `FeatureSet.summary`.

    Of files `limit` draws so many with `seed`, as `drawn_numbers` says.
    """
    network = open_network(protocol, weights=weights, device=device)
    # The reference first: it is what can be wrong, and samples may come from a generator.
    theirs = open_reference(reference, network, batch_size=batch_size, workers=workers)
    mine = collect(images, network, batch_size=batch_size, workers=workers, limit=limit, seed=seed)
    result = mine.summary(theirs, seed=seed, **options)
    said, warnings = notes(reference, protocol) if isinstance(reference, str | Path) else ({}, [])
    return result | {"warnings": result["warnings"] + warnings, "record": result["record"] | said}


def open_reference(
    reference: ImageSource, network: FeatureNetwork, *, batch_size: int = 64, workers: int = 1
) -> FeatureSet | Gaussian:
    """Statistics from a publication's file as they are, or from one pass over images."""
    if isinstance(reference, str | Path) and takes_statistics(reference, network.protocol):
        return read_statistics(reference, network.protocol)
    return collect(reference, network, batch_size=batch_size, workers=workers)


def cache_key(path: str | Path, network: FeatureNetwork) -> str:
    """A name for the features of a file or folder under a network.

    They depend on every byte of the pictures, their names (which order them) and labels; on the network's protocol and
    weights; on Pillow, whose versions decode a JPEG differently; and on the code here (FORMAT). Batch, device and the
    version of torch move their last bits alone.
    """
    by = [FORMAT, versions(*PACKAGES)["pillow"], content_hash(path), network.record()]
    by += [UNLABELLED] if is_shards(Path(path)) else []
    parts = json.dumps(by, sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()


def collect(
    images: ImageSource,
    network: FeatureNetwork,
    *,
    labels: np.ndarray | None = None,
    batch_size: int = 64,
    workers: int = 1,
    limit: int | None = None,
    seed: int = 0,
    keep_features: bool = True,
    share: Share = WHOLE,
    memory: DeviceBatch | None = None,
) -> FeatureSet:
    """Run the network over every image once. Without `keep_features` memory does not grow with their number.

    `labels` [N] overrides those of a file; images without a label count as one class. `limit` takes so many: of a file
    those that `seed` draws (`drawn_numbers`), of a generator the first. With fewer images a UserError is raised: a FID
    of fewer is another figure. `share` (i, n) takes the i-th part of n of a file.
    """
    moments: ClassMoments | None = None
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]] = []
    seen, memory = 0, memory or DeviceBatch()
    with opened(images) as source:
        for batch, given, numbers in batches_of(source, batch_size, workers, limit, seed, network.floats, share):
            features = _features(batch, network, batch_size, memory)
            moments = moments or ClassMoments(features.shape[1])
            given = given if labels is None else labels[numbers]
            given = np.full(len(features), -1) if given is None else given
            moments.add(features, given)
            seen += len(features)
            if keep_features:
                kept.append((numbers, features.cpu().numpy(), _probabilities(features, network), given))
    if moments is None and share != WHOLE:
        raise UserError(f"{_name(images)} has no batch for each of {share[1]} processes.", hint="A smaller batch.")
    if moments is None or (limit is not None and seen < limit and share == WHOLE):
        raise UserError(f"{_name(images)} holds {seen} images, fewer than the {limit or 1} asked for.")
    return FeatureSet(network.record(), moments, *_in_order(kept))


def _features(images: torch.Tensor, network: FeatureNetwork, batch_size: int, memory: DeviceBatch) -> torch.Tensor:
    size = min(batch_size, network.cpu_batch) if network.device.type == "cpu" else batch_size
    with torch.no_grad(), exact_float32():
        return memory.map(lambda part: network.features(part.to(network.device)), images, batch=size)


def _probabilities(features: torch.Tensor, network: FeatureNetwork) -> np.ndarray | None:
    with torch.no_grad():
        return network.probabilities(features).cpu().numpy() if network.probabilities else None


def _in_order(
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]],
) -> tuple[np.ndarray | None, ...]:
    """Features, probabilities and labels by image number: batches of mixed sizes come out of order."""
    if not kept:
        return None, None, None
    numbers, *columns = zip(*kept, strict=True)
    order = np.argsort(np.concatenate(numbers))
    return tuple(None if column[0] is None else np.concatenate(column)[order] for column in columns)


def _joined(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
    return None if a is None or b is None else np.concatenate([a, b])


def _warnings(own: Moments, reference: Statistics) -> list[str]:
    sides = (("images", own.count), ("reference images", reference.count))
    return [
        f"{count} {side} are fewer than the {own.dimension} dimensions of the features: FID is biased upwards."
        for side, count in sides
        if count is not None and count <= own.dimension
    ]


def _as_json(interval: Interval) -> dict[str, float]:
    return {"low": interval.low, "high": interval.high, "level": interval.level}


def _name(images: ImageSource) -> str:
    return str(images) if isinstance(images, str | Path) else str(getattr(images, "path", "The source"))
