"""How a prompt that nobody has seen finds its student: rules that divide embeddings, or hash the text itself.

A rule is made from the prompts that are trained on, stored with the partition, and asked for every new prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from msdcli.errors import UserError
from msdcli.seeds import derive

if TYPE_CHECKING:
    import numpy as np

CHUNK = 8192  # embeddings held at once in float64


@dataclass(frozen=True)
class Placed:
    """Where prompts belong: `owner` [n], the student across the nearest border `second` [n], and the distance to that
    border `margin` [n] in the units of the embeddings. A rule without borders knows no second and no margin.
    """

    owner: np.ndarray
    second: np.ndarray | None = None
    margin: np.ndarray | None = None


class Rule:
    """One way to divide all prompts, seen and unseen, among the students."""

    kind: ClassVar[str]
    embeds: ClassVar[bool] = True  # does it look at the embedding?

    def place(self, prompts: Sequence[str], vectors: np.ndarray | None) -> Placed:
        """Place prompts by their texts and their pooled embeddings [n, width]."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        raise NotImplementedError


@dataclass(frozen=True)
class Quadrants(Rule):
    """The leading principal components, one after the other split at their medians.

    The second component's median is taken in either half by itself, and so on, so that all parts are equal however the
    components depend on each other. MSD (arXiv 2410.23274) says "quadrants" without naming coordinates.
    """

    kind: ClassVar[str] = "quadrants"
    mean: np.ndarray  # [width]
    components: np.ndarray  # [levels, width], orthonormal
    thresholds: list[list[float]]  # of level l: one for each of its 2^l cells

    @classmethod
    def fit(cls, vectors: np.ndarray, num_parts: int) -> Quadrants:
        """Find components and medians of `vectors` [n, width]. UserError unless `num_parts` is a power of two."""
        import numpy as np

        levels = check_quadrants(num_parts)
        mean = sum(chunk.sum(0) for chunk in _chunks(vectors)) / len(vectors)
        covariance = sum((chunk - mean).T @ (chunk - mean) for chunk in _chunks(vectors)) / len(vectors)
        components = np.linalg.eigh(covariance)[1].T[::-1][:levels]
        largest = np.abs(components).argmax(1)
        components = components * np.sign(components[np.arange(levels), largest])[:, None]  # the same on any machine
        rule = cls(mean, components, [])
        coordinates, cell = rule.coordinates(vectors), np.zeros(len(vectors), np.int64)
        for level in range(levels):
            medians = [_median(coordinates[cell == c, level]) for c in range(2**level)]
            rule.thresholds.append(medians)
            cell = 2 * cell + (coordinates[:, level] > np.array(medians)[cell])
        return rule

    def coordinates(self, vectors: np.ndarray) -> np.ndarray:
        """The embeddings along the components [n, levels]."""
        import numpy as np

        return np.concatenate([(chunk - self.mean) @ self.components.T for chunk in _chunks(vectors)])

    def place(self, prompts: Sequence[str], vectors: np.ndarray | None) -> Placed:
        import numpy as np

        assert vectors is not None, "quadrants look at embeddings"
        coordinates = self.coordinates(vectors)
        owner = self._descend(coordinates)
        levels = len(self.thresholds)
        gaps, across = np.empty((levels, len(vectors))), np.empty((levels, len(vectors)), np.int64)
        for level in range(levels):
            cell = owner >> (levels - level)
            gaps[level] = np.abs(coordinates[:, level] - np.array(self.thresholds[level])[cell])
            across[level] = self._descend(coordinates, flip=level)
        nearest = gaps.argmin(0)[None]
        return Placed(
            owner, np.take_along_axis(across, nearest, 0)[0], np.take_along_axis(gaps, nearest, 0)[0]
        )  # along a component nothing else changes, so this is the distance

    def _descend(self, coordinates: np.ndarray, *, flip: int | None = None) -> np.ndarray:
        """The cells of `coordinates`; with `flip`, those across the border of that level."""
        import numpy as np

        cell = np.zeros(len(coordinates), np.int64)
        for level, thresholds in enumerate(self.thresholds):
            above = coordinates[:, level] > np.array(thresholds)[cell]
            cell = 2 * cell + (~above if level == flip else above)
        return cell

    def to_json(self) -> dict[str, Any]:
        arrays = {"mean": self.mean.tolist(), "components": self.components.tolist()}
        return {"kind": self.kind, "thresholds": self.thresholds} | arrays


@dataclass(frozen=True)
class Centres(Rule):
    """The nearest centre, by squared distance plus a price for each centre that makes the parts equally large.

    Prices are the dual solution of the balanced assignment, so the rule gives every prompt that it was made from to
    the part that it is in.
    """

    kind: ClassVar[str] = "centres"
    centres: np.ndarray  # [parts, width]
    prices: np.ndarray  # [parts]

    def place(self, prompts: Sequence[str], vectors: np.ndarray | None) -> Placed:
        import numpy as np

        assert vectors is not None, "centres look at embeddings"
        cost = squared_distances(vectors, self.centres) + self.prices
        rows, owner = np.arange(len(cost)), cost.argmin(1)
        if len(self.centres) == 1:
            return Placed(owner)
        apart = np.sqrt(squared_distances(self.centres, self.centres))
        # Between two centres the border is a plane: c_b - c_a = 2 |b - a| times the distance to it.
        between = 2 * apart[owner]
        between[rows, owner] = 0
        gaps = np.where(between > 0, cost - cost[rows, owner][:, None], np.inf) / np.where(between > 0, between, 1)
        second = gaps.argmin(1)
        return Placed(owner, second, gaps[rows, second])

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "centres": self.centres.tolist(), "prices": self.prices.tolist()}


@dataclass(frozen=True)
class Hash(Rule):
    """A hash of the text: the same on every machine, and blind to what the prompt means."""

    kind: ClassVar[str] = "hash"
    embeds: ClassVar[bool] = False
    num_parts: int
    seed: int = 0

    def place(self, prompts: Sequence[str], vectors: np.ndarray | None) -> Placed:
        import numpy as np

        return Placed(np.array([derive("prompt", self.seed, p) % self.num_parts for p in prompts], np.int64))

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "num_parts": self.num_parts, "seed": self.seed}


def from_json(stored: Any) -> Rule:
    """Read a rule from partition.json. KeyError, TypeError or ValueError if it is none."""
    import numpy as np

    if stored["kind"] == "hash":
        return Hash(int(stored["num_parts"]), int(stored["seed"]))
    if stored["kind"] == "centres":
        centres, prices = np.array(stored["centres"], float), np.array(stored["prices"], float)
        if centres.ndim != 2 or prices.shape != centres.shape[:1]:
            raise ValueError("centres and prices do not fit")
        return Centres(centres, prices)
    if stored["kind"] != "quadrants":
        raise ValueError(f"no rule is called {stored['kind']!r}")
    mean, components = np.array(stored["mean"], float), np.array(stored["components"], float)
    thresholds = [[float(t) for t in level] for level in stored["thresholds"]]
    if components.shape != (len(thresholds), len(mean)) or [len(t) for t in thresholds] != [
        2**level for level in range(len(thresholds))
    ]:
        raise ValueError("components and thresholds do not fit")
    return Quadrants(mean, components, thresholds)


def check_quadrants(num_parts: int) -> int:
    """Return how many components split into `num_parts`. UserError unless it is a power of two."""
    levels = num_parts.bit_length() - 1
    if num_parts != 2**levels or levels == 0:
        raise UserError(
            f"partition: quadrants are halves of halves: 2, 4, 8, ... students, not {num_parts}",
            hint="partition.students=4, or partition.method=kmeans",
        )
    return levels


def _median(values: np.ndarray) -> float:
    """The middle between the two middle values, the lower half being the larger one; 0 of none."""
    import numpy as np

    if len(values) < 2:
        return float(values[0]) if len(values) else 0.0
    middle = (len(values) + 1) // 2
    ordered = np.partition(values, [middle - 1, middle])
    return float(ordered[middle - 1] + 0.5 * (ordered[middle] - ordered[middle - 1]))


def _chunks(vectors: np.ndarray) -> Iterator[np.ndarray]:
    import numpy as np

    for start in range(0, len(vectors), CHUNK):
        yield np.asarray(vectors[start : start + CHUNK], dtype=np.float64)


def squared_distances(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return |v - c|^2 [n, centres], float64, a chunk of vectors at a time."""
    import numpy as np

    origin = centres.mean(0)  # distances among far-off vectors would lose digits
    there = centres - origin
    rows = []
    for chunk in _chunks(vectors):
        here = chunk - origin
        rows.append(np.square(here).sum(1)[:, None] - 2 * here @ there.T + np.square(there).sum(1))
    squared: np.ndarray = np.concatenate(rows)
    return squared.clip(min=0)


# Balanced assignment.


def balanced(
    cost: np.ndarray, capacity: Sequence[int], prices: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Give every row of `cost` [n, K] a column, column k to `capacity[k]` rows, at the least total cost.

    Returns the column of every row, and prices such that row i's column minimises cost[i, k] + prices[k] (the dual
    solution). Soft assignment at falling temperature comes close, then shortest paths of exchanges between
    columns make it exact; `prices` of a similar problem save the first part.
    """
    import numpy as np

    wanted = np.asarray(capacity)
    prices = _entropic_prices(cost, wanted, prices)
    owner = (cost + prices).argmin(1)
    counts = np.bincount(owner, minlength=len(wanted))
    while (counts != wanted).any():
        path = _cheapest_exchange(*_exchanges(cost, owner), counts - wanted)
        for row, column in path:
            counts[owner[row]] -= 1
            owner[row] = column
            counts[column] += 1
    return owner, _dual(_exchanges(cost, owner)[0])


def _entropic_prices(cost: np.ndarray, capacity: np.ndarray, start: np.ndarray | None) -> np.ndarray:
    """Prices at which soft shares of the rows fill the columns, at ever lower temperatures.

    Newton's method, and Sinkhorn's step, which is slower and always right, where that does not help.
    """
    import numpy as np

    scale = float((cost.max(1) - cost.min(1)).mean()) or 1.0
    prices = np.zeros(cost.shape[1]) if start is None else start.copy()
    for temperature in scale * 0.25 * 0.5 ** np.arange(0 if start is None else 5, 14):
        share, load = _shares(cost, prices, temperature)
        for _ in range(8):
            error = np.abs(load - capacity).sum()
            if error < 0.5:
                break
            curvature = np.diag(load) - share.T @ share + 1e-9 * len(cost) * np.eye(len(load))
            step = temperature * np.linalg.solve(curvature, load - capacity)
            longest = max(float(np.abs(step).max()), 4 * temperature)
            trial = prices + step * (4 * temperature / longest)
            share, load_there = _shares(cost, trial, temperature)
            if np.abs(load_there - capacity).sum() > 0.7 * error:
                trial = prices + temperature * np.log(np.maximum(load, 1e-300) / capacity).clip(-20, 20)
                share, load_there = _shares(cost, trial, temperature)
            prices, load = trial, load_there
    return prices


def _shares(cost: np.ndarray, prices: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """The part of every row that each column gets [n, K], and how full the columns are [K]."""
    import numpy as np

    exponent = -(cost + prices) / temperature
    share = np.exp(exponent - exponent.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    return share, share.sum(0)


def _exchanges(cost: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What it costs to move the cheapest row of column a to column b, [K, K], and which row that is."""
    import numpy as np

    num = cost.shape[1]
    price, row = np.full((num, num), np.inf), np.zeros((num, num), np.int64)
    for a in range(num):
        rows = np.flatnonzero(owner == a)
        if len(rows):
            more = cost[rows] - cost[rows, a][:, None]
            best = more.argmin(0)
            price[a], row[a] = more[best, np.arange(num)], rows[best]
    np.fill_diagonal(price, 0)
    return price, row


def _cheapest_exchange(price: np.ndarray, row: np.ndarray, excess: np.ndarray) -> list[tuple[int, int]]:
    """The moves (row, new column) that take one row out of a column with too many into one with too few."""
    import numpy as np

    distance, before = np.where(excess > 0, 0.0, np.inf), np.full(len(excess), -1)
    slack = 1e-12 * float(np.abs(price[np.isfinite(price)]).max())
    for _ in range(len(excess) - 1):  # Bellman and Ford
        through = distance[:, None] + price
        best = through.argmin(0)
        closer = through[best, np.arange(len(excess))] < distance - slack
        before[closer], distance = best[closer], np.where(closer, through.min(0), distance)
    column = int(np.where(excess < 0, distance, np.inf).argmin())
    path = list[tuple[int, int]]()
    while before[column] >= 0 and len(path) < len(excess):
        path.append((int(row[before[column], column]), column))
        column = int(before[column])
    return path


def _dual(price: np.ndarray) -> np.ndarray:
    """Prices under which no exchange pays, in the middle of those that do: p_a - p_b <= price[a, b]."""
    import numpy as np

    distance = price.copy()
    for k in range(len(distance)):  # Floyd and Warshall
        distance = np.minimum(distance, distance[:, k, None] + distance[None, k])
    prices: np.ndarray = 0.5 * (distance.mean(1) - distance.mean(0))
    return prices
