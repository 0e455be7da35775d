"""The distances of a frontier's finished lines, and what they decide."""

from __future__ import annotations

from collections.abc import Sequence

from msdcli.engine.frontier.fitting import CellFactory
from msdcli.engine.frontier.lines import Line, Wanted, wanted
from msdcli.engine.sweep import result_of, whole


def distances(factory: CellFactory, line: Line) -> Sequence[float] | None:
    """Return a line's distance, whole, of every seed; None while one is missing."""
    found = [result_of(cell) for cell in factory.cells(line)]
    return None if None in found else [whole(result, "students")[result["metric"]] for result in found if result]


def plan(factory: CellFactory) -> Wanted:
    """Return what is wanted as far as the finished runs decide it."""
    return wanted(factory.settings, lambda line: distances(factory, line))
