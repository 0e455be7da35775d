"""Run the lines of a frontier: what is known to be wanted, and what follows from it, until nothing is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from msdcli.engine import pipeline
from msdcli.engine.frontier.fitting import CellFactory
from msdcli.engine.frontier.lines import Line, own_students
from msdcli.engine.frontier.measured import plan, unfinished
from msdcli.engine.frontier.record import check
from msdcli.engine.sweep import result_of
from msdcli.engine.tracking.events import Report
from msdcli.errors import UserError
from msdcli.rundir import holder_of, lock
from msdcli.sweep import Cell, FrontierSettings, SizeSettings, Sweep

PATIENCE = 2.0  # seconds between two looks at what others have finished
WORKING = ".working"  # in the sweep's folder: a lock per run


def run(
    sweep: Sweep,
    report: Report,
    *,
    worker: tuple[int, int] = (0, 1),
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Finish the runs of worker i of n, then those that nobody is at; wait for others where they decide what follows.

    What is wanted is asked again after every run, so that a sweep which was stopped anywhere goes on.
    """
    check(sweep)
    factory = CellFactory(sweep)
    factory.check()
    said = set[str]()
    while True:
        found = plan(factory)
        todo = unfinished(factory, found)
        if not todo:
            return
        index, count = worker
        mine = [cell for number, _, cell in todo if number % count == index]
        free = [cell for cell in (*mine, *(cell for _, _, cell in todo)) if holder_of(_lock_of(sweep, cell)) is None]
        if free:
            _finish(sweep, free[0], report, f"{len(todo)} known to be left")
            continue
        if not found.open:
            return  # others are at the last ones
        text = f"waiting for other workers: they decide what follows for {', '.join(found.open)}"
        if text not in said:
            report(text)
            said.add(text)
        pause(PATIENCE)


@dataclass(frozen=True)
class Known:
    """What is left of a frontier as far as it is known: runs with their lines, the sizes that more runs follow for, and
    how many runs there can be in all.
    """

    left: list[tuple[Line, Cell]]
    open: list[str]
    most: int


def known(sweep: Sweep, worker: tuple[int, int] = (0, 1)) -> Known:
    """Return what worker i of n would do now. UserError for what any of the runs would refuse."""
    check(sweep)
    factory = CellFactory(sweep)
    factory.check()
    found = plan(factory)
    left = [(line, cell) for n, line, cell in unfinished(factory, found) if n % worker[1] == worker[0]]
    return Known(left, found.open, len(sweep.settings.seeds) * _most(factory.settings))


def _most(settings: FrontierSettings) -> int:
    """Return how many lines there can be."""
    return sum(_most_of(settings, size) for size in settings.sizes)


def _most_of(settings: FrontierSettings, size: SizeSettings) -> int:
    budgets = settings.doublings_of(size) + 1
    together = len(settings.students) + len(settings.large_batch) if own_students(size) is None else 0
    if settings.all_budgets:
        return budgets * (1 + together)
    return budgets + max(0, settings.beyond - 1) + (settings.beyond + 1) * together


def _finish(sweep: Sweep, cell: Cell, report: Report, left: str) -> None:
    with lock(_lock_of(sweep, cell), cell.label, wait=report):
        if result_of(cell) is None:
            report(f"{cell.label}, seed {cell.seed} ({left})")
            pipeline.distill(cell.recipe, report)
        if result_of(cell) is None:
            raise UserError(
                f"{cell.recipe.run_dir} is finished and has no measurement of its own: a frontier is of distances",
                hint=f"msd fid {cell.recipe.run_dir} PICTURES --protocol clean",
            )


def _lock_of(sweep: Sweep, cell: Cell) -> Path:
    return sweep.folder / WORKING / Path(cell.recipe.run_dir).name
