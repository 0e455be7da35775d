"""The distances of a frontier's finished lines, what they decide, and what is left."""

from __future__ import annotations

from collections.abc import Sequence

from msdcli.engine.frontier.fitting import CellFactory
from msdcli.engine.frontier.lines import Line, Wanted, every, wanted
from msdcli.engine.sweep import result_of, whole
from msdcli.sweep import Cell


def distances(factory: CellFactory, line: Line) -> Sequence[float] | None:
    """Return a line's distance, whole, of every seed; None while one is missing."""
    found = [result_of(cell) for cell in factory.cells(line)]
    return None if None in found else [whole(result, "students")[result["metric"]] for result in found if result]


def plan(factory: CellFactory) -> Wanted:
    """Return what is wanted as far as the finished runs decide it."""
    return wanted(factory.settings, lambda line: distances(factory, line))


def unfinished(factory: CellFactory, found: Wanted) -> list[tuple[int, Line, Cell]]:
    """Return the runs that are left to do, each with its number, which no measurement changes."""
    seeds = len(factory.sweep.settings.seeds)
    number = {line: seeds * n for n, line in enumerate(every(factory.settings))}
    cells = [(number[line] + s, line, cell) for line in found.lines for s, cell in enumerate(factory.cells(line))]
    return [(n, line, cell) for n, line, cell in cells if result_of(cell) is None]
