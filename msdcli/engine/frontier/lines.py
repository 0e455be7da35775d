"""The lines of a frontier: which sizes, numbers of students and budgets are wanted, as far as measurements decide it.

For each size the budget of one student is doubled until its distance falls by less than the spread over seeds. There,
and at its doubles, K students get the same budget, and one student gets as many devices.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from msdcli.sweep import FrontierSettings, SizeSettings


@dataclass(frozen=True)
class Line:
    """A size of network, K students, the devices that train them, and how often the first budget is doubled."""

    size: str
    students: int
    devices: int
    doubling: int

    @property
    def batch_factor(self) -> int:
        """How many devices share a student's batch, which is as many times as large."""
        return self.devices // self.students

    @property
    def label(self) -> str:
        batch = f", batch x {self.batch_factor}" if self.batch_factor > 1 else ""
        return f"{self.size}, K = {self.students}{batch}, budget x {2**self.doubling}"


# The distances of a line, one per seed; None while a seed is not measured.
Distances = Callable[[Line], Sequence[float] | None]


@dataclass(frozen=True)
class Wanted:
    """The lines that are known to be wanted, and per size the doubling at which one student is saturated: None where it
    is not, at the largest budget; sizes that are not decided yet are in `open`.
    """

    lines: list[Line]
    saturated: dict[str, int | None]
    open: list[str]


def wanted(settings: FrontierSettings, distances: Distances) -> Wanted:
    """Return what is to be measured as far as what has been measured decides it."""
    if settings.all_budgets:
        return _all_budgets(settings, distances)
    lines, decided, undecided = list[Line](), dict[str, int | None](), list[str]()
    for size in settings.sizes:
        alone, measured, most = list[Line](), list[Sequence[float]](), settings.doublings_of(size)
        for doubling in range(most + 1):
            alone.append(alone_line(size, doubling))
            if (found := distances(alone[-1])) is None:
                break
            measured.append(found)
            if saturation(measured) is not None:
                break
        at = saturation(measured)
        lines += alone
        if at is None and len(measured) <= most:
            undecided.append(size.label)
            continue
        decided[size.label] = at
        budgets = range(max(0, most - settings.beyond), most + 1) if at is None else range(at, at + settings.beyond + 1)
        lines += [line for d in budgets if (line := alone_line(size, d)) not in alone]
        lines += together(settings, size, budgets)
    return Wanted(lines, decided, undecided)


def _all_budgets(settings: FrontierSettings, distances: Distances) -> Wanted:
    """Return the lines of all budgets; one student is saturated as far as it is measured."""
    lines, decided = list[Line](), dict[str, int | None]()
    for size in settings.sizes:
        budgets = range(settings.doublings_of(size) + 1)
        alone = [alone_line(size, d) for d in budgets]
        found = itertools.takewhile(lambda distance: distance is not None, map(distances, alone))
        decided[size.label] = saturation([distance for distance in found if distance is not None])
        lines += [*alone, *together(settings, size, budgets)]
    return Wanted(lines, decided, [])


def own_students(size: SizeSettings) -> int | None:
    """Return how many students a size is of, where it lists one network for each (`student.parts`)."""
    said = size.set.get("student")
    parts = size.set.get("student.parts", said.get("parts") if isinstance(said, dict) else None)
    return len(parts) if isinstance(parts, list) and parts else None


def alone_line(size: SizeSettings, doubling: int) -> Line:
    """Return a size's line of a single student, or of as many as it lists networks for."""
    count = own_students(size) or 1
    return Line(size.label, count, count, doubling)


def together(settings: FrontierSettings, size: SizeSettings, budgets: range) -> list[Line]:
    """Return the lines of several devices: K students, and one with as many times the batch; none for a size that says
    itself how many students it has.
    """
    if own_students(size) is not None:
        return []
    lines = [Line(size.label, k, k, d) for d in budgets for k in sorted(settings.students)]
    return lines + [Line(size.label, 1, n, d) for d in budgets for n in sorted(settings.large_batch)]


def every(settings: FrontierSettings) -> Iterator[Line]:
    """Yield every line that could be wanted, in an order that no measurement changes: by it workers share them."""
    for size in settings.sizes:
        budgets = range(settings.doublings_of(size) + (0 if settings.all_budgets else settings.beyond) + 1)
        yield from (alone_line(size, d) for d in budgets)
        yield from together(settings, size, budgets)


def size_of(settings: FrontierSettings, line: Line) -> SizeSettings:
    """Return the section of a line's size."""
    return next(size for size in settings.sizes if size.label == line.size)


def saturation(measured: Sequence[Sequence[float]]) -> int | None:
    """Return the first budget whose double brings the mean distance down by less than the spread over seeds; `measured`
    has the distances of each seed at every budget, each the double of the one before.

    The spread is the root of the mean of both variances, 0 for a single seed.
    """
    for doubling, (here, there) in enumerate(itertools.pairwise(measured)):
        if statistics.fmean(here) - statistics.fmean(there) <= spread(here, there):
            return doubling
    return None


def spread(*groups: Sequence[float]) -> float:
    """Return the standard deviation over seeds, pooled over groups; 0 where none has two seeds."""
    several = [statistics.variance(values) for values in groups if len(values) > 1]
    return math.sqrt(statistics.fmean(several)) if several else 0.0
