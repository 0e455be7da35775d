"""Means and covariances of features, accumulated in float64 so that partial results merge exactly.

The update is Chan, Golub and LeVeque's pairwise one (Updating Formulae and a Pairwise Algorithm for Computing Sample
Variances, 1979): every chunk is centred on its own mean, so nothing cancels whatever the features' offset, and merging
two partial results is the same formula as adding a chunk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from msdcli.errors import UserError

CHUNK = 512  # rows per float64 product: float32 sums would be wrong by 1e-5, these are right to 1e-14


@dataclass(frozen=True)
class Gaussian:
    """A mean [d] and an unbiased covariance [d, d] in float64; `count` is None where a publication does not tell it."""

    mean: np.ndarray
    sigma: np.ndarray
    count: int | None = None

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.sigma.shape != (len(self.mean), len(self.mean)):
            raise UserError(f"A mean of shape {self.mean.shape} and a covariance of {self.sigma.shape} do not fit.")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.sigma).all()):
            raise UserError("The statistics contain NaN or infinity.")

    def gaussian(self) -> Gaussian:
        return self


class Moments:
    """Count, mean and scatter of rows of features.

    Rows stay as they came until there are as many as dimensions; only then are they folded into a d x d scatter matrix.
    So a thousand classes of fifty images cost their rows, not a thousand 2048 x 2048 matrices.
    """

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self._rows: list[torch.Tensor] = []
        self._num_rows = 0
        self._folded = 0  # how many rows `_mean` and `_scatter` stand for
        self._mean: torch.Tensor | None = None
        self._scatter: torch.Tensor | None = None

    @property
    def count(self) -> int:
        return self._folded + self._num_rows

    @property
    def mean(self) -> np.ndarray:
        return np.asarray(self._settled()[0].cpu())

    def covariance(self) -> np.ndarray:
        """Unbiased covariance [d, d], float64 and symmetric to the last bit."""
        return self.gaussian().sigma

    def gaussian(self) -> Gaussian:
        if self.count < 2:
            raise UserError(f"A covariance needs at least 2 images, but there are {self.count}.")
        mean, scatter = (tensor.cpu().numpy() for tensor in self._settled())
        return Gaussian(mean, (scatter + scatter.T) / (2 * (self.count - 1)), self.count)

    def few_rows(self) -> torch.Tensor | None:
        """Return all rows, [N, d] float64 on the CPU, where they are at most half as many as dimensions; None where
        they are more, or no longer known one by one.
        """
        if self._scatter is not None or not 2 <= 2 * self._num_rows <= self.dimension:
            return None
        return torch.cat(self._rows).cpu().double()

    def add(self, features: torch.Tensor | np.ndarray) -> None:
        """Add rows [N, d], on whatever device they are."""
        self._keep(_checked(features, self.dimension).clone())  # the caller may reuse its buffer

    def _keep(self, rows: torch.Tensor) -> None:
        """Add rows that have been checked and are nobody else's."""
        self._rows.append(rows)
        self._num_rows += len(rows)
        if self._num_rows >= max(self.dimension, CHUNK):
            self._fold()

    def merge(self, other: Moments) -> None:
        """Add what `other` has seen; the order of merging moves the result by rounding only."""
        if other.dimension != self.dimension:
            raise UserError(f"Features of {other.dimension} and {self.dimension} dimensions cannot be merged.")
        if other._mean is not None and other._scatter is not None:
            self._combine(other._folded, other._mean, other._scatter)
        for rows in other._rows:
            self._keep(rows)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The exact state as arrays, for `np.savez` or safetensors."""
        rows = torch.cat(self._rows) if self._rows else torch.empty(0, self.dimension)
        arrays = {"folded": np.array([self._folded]), "rows": rows.cpu().numpy()}
        if self._mean is not None and self._scatter is not None:
            arrays |= {"mean": self._mean.cpu().numpy(), "scatter": self._scatter.cpu().numpy()}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Moments:
        self = cls(arrays["rows"].shape[1])
        if "scatter" in arrays:  # first, as it was: what is read back gives the same bits
            folded = int(arrays["folded"][0])
            self._combine(folded, torch.from_numpy(arrays["mean"]), torch.from_numpy(arrays["scatter"]))
        if len(arrays["rows"]):
            self.add(arrays["rows"])
        return self

    def _settled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and scatter of everything, without folding the rows of `self` for good."""
        everything = Moments(self.dimension)
        everything.merge(self)
        everything._fold()
        if everything._mean is None or everything._scatter is None:
            raise UserError("There is no image to take statistics of.")
        return everything._mean, everything._scatter

    def _fold(self) -> None:
        if self._num_rows:
            rows = torch.cat(self._rows)
            self._rows, self._num_rows = [], 0
            for chunk in torch.split(rows, CHUNK):
                x = chunk.double()
                mean = x.mean(dim=0)
                self._combine(len(x), mean, (x - mean).T @ (x - mean))

    def _combine(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        if self._mean is None or self._scatter is None:
            self._folded, self._mean, self._scatter = count, mean.clone(), scatter.clone()
            return
        total = self._folded + count
        delta = mean.to(self._mean) - self._mean
        self._scatter += scatter.to(self._scatter)
        self._scatter.addr_(delta, delta, alpha=self._folded * count / total)
        self._mean += delta * (count / total)
        self._folded = total


class ClassMoments:
    """One `Moments` per class, so that any grouping of classes is a merge; images without a label are class -1."""

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self.classes: dict[int, Moments] = {}

    def add(self, features: torch.Tensor, labels: np.ndarray | None = None) -> None:
        """Add rows [N, d] with their integer labels [N]."""
        labels = np.full(len(features), -1) if labels is None else np.asarray(labels)
        assert labels.shape == (len(features),), "one label per row"
        rows = _checked(features, self.dimension)
        # Sorted by class in one piece: a device is asked once per batch, and not once per class of it.
        order = np.argsort(labels, kind="stable")
        found, counts = np.unique(labels, return_counts=True)
        ordered = rows[torch.from_numpy(order).to(rows.device)]
        for label, part in zip(found.tolist(), ordered.split(counts.tolist()), strict=True):
            self.classes.setdefault(label, Moments(self.dimension))._keep(part)

    def merge(self, other: ClassMoments) -> None:
        for label, moments in other.classes.items():
            self.classes.setdefault(label, Moments(self.dimension)).merge(moments)

    def whole(self) -> Moments:
        return self.group(self.classes)

    def group(self, labels: Iterable[int]) -> Moments:
        """Merge the classes in `labels`; a class that was not seen counts no image."""
        merged = Moments(self.dimension)
        for label in sorted(set(labels)):
            if label in self.classes:
                merged.merge(self.classes[label])
        return merged

    def counts(self) -> Counter[int]:
        return Counter({label: self.classes[label].count for label in sorted(self.classes)})

    def to_arrays(self) -> dict[str, np.ndarray]:
        arrays = {"dimension": np.array([self.dimension])}
        for label, moments in self.classes.items():
            arrays |= {f"class/{label}/{name}": array for name, array in moments.to_arrays().items()}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> ClassMoments:
        self = cls(int(arrays["dimension"][0]))
        parts: dict[int, dict[str, np.ndarray]] = {}
        for key, array in arrays.items():
            if key.startswith("class/"):
                _, label, name = key.split("/")
                parts.setdefault(int(label), {})[name] = array
        self.classes = {label: Moments.from_arrays(part) for label, part in parts.items()}
        return self


def _checked(features: torch.Tensor | np.ndarray, dimension: int) -> torch.Tensor:
    """Return rows [N, d] as a tensor. UserError for another shape, and for what is not finite: the device is asked."""
    rows = torch.as_tensor(features).detach()
    if rows.ndim != 2 or rows.shape[1] != dimension:
        raise UserError(f"Expected features of shape [N, {dimension}], got {list(rows.shape)}.")
    if not torch.isfinite(rows).all():
        raise UserError("The feature network returned NaN or infinity.", hint="Full precision, or --device cpu.")
    return rows
