"""`msd watch`: a run live in the terminal."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from msdcli import console
from msdcli.cli import options

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from msdcli.engine.report.live import ProgressTracker, RunProgress, StageProgress

STYLES = {"running": "bold green", "stopped": "yellow", "done": "dim", "waiting": "dim"}


def register(app: typer.Typer) -> None:
    app.command("watch")(watch)


def watch(
    run: options.Run,
    once: Annotated[bool, typer.Option("--once", help="Show the run as it is now, and stop.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    json_: options.Json = False,
) -> None:
    """Follow a run in the terminal until it ends: progress, losses, speed, health, distances; Ctrl-C leaves.

    It only reads the run's files, so the run may be on another host.
    """
    from rich.live import Live

    from msdcli.engine.report.live import ProgressTracker
    from msdcli.rundir import RunDir

    watcher = ProgressTracker(RunDir(run))
    progress = watcher.progress()
    show = _print_json if json_ else _print
    if once:
        show(progress)
        return
    try:
        if json_ or not console.out.is_terminal:
            _log(watcher, every, show)
            return
        with Live(console=console.out, auto_refresh=False) as live:
            while True:
                live.update(render(progress, height=console.out.height, width=console.out.width), refresh=True)
                if progress.done:
                    return
                time.sleep(every)
                progress = watcher.progress()
    except KeyboardInterrupt:
        return


def _print(progress: RunProgress) -> None:
    sheet = console.sheet()
    sheet.print(render(progress, height=10_000, width=sheet.width), soft_wrap=False)


def _print_json(progress: RunProgress) -> None:
    console.print_json(dataclasses.asdict(progress), compact=True)


def _log(watcher: ProgressTracker, every: float, show: Callable[[RunProgress], None]) -> None:
    """Print a frame whenever something has changed: for a file or a pipe."""
    before = None
    while True:
        progress = watcher.progress()
        if before is None or progress.parts != before.parts or progress.distances != before.distances or progress.done:
            show(progress)
        if progress.done:
            return
        before = progress
        time.sleep(every)


def render(progress: RunProgress, *, height: int, width: int) -> RenderableType:
    """Return one picture of the run that fits a terminal of this size."""
    from rich.console import Group
    from rich.text import Text

    done, total = sum(p.step for p in progress.parts), sum(p.steps for p in progress.parts)
    left = "" if progress.seconds_left is None else f", about {console.minutes(progress.seconds_left)} left"
    head = Text(progress.name, style="bold")
    head.append(f"  {done:,} of {total:,} steps ({done / max(total, 1):.0%}){left}", style="default")
    lines: list[RenderableType] = [head]
    shown = _shown(progress.parts, max(4, height - 6 - len(progress.distances)))
    lines.append(_table(shown, narrow=width < 100))
    if hidden := len(progress.parts) - len(shown):
        counts = {s: sum(p.state == s for p in progress.parts) for s in ("done", "running", "stopped", "waiting")}
        said = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        lines.append(Text(f"{hidden} more; of all: {said}", style="dim"))
    lines += [Text(line) for line in progress.distances]
    lines += [Text(line) for line in _beside(progress)]
    if progress.done:
        lines.append(Text("the run has ended", style="green"))
    elif all(part.state == "done" for part in progress.parts):
        what = "is measuring them" if progress.at_work else "have not been measured: msd distill RUN does it"
        lines.append(Text(f"all students are finished; {progress.at_work[0] if progress.at_work else 'they'} {what}"))
    elif progress.at_work and not progress.running:
        lines.append(Text(f"{progress.at_work[0]} is at what students share: teacher, its samples and figures, pairs"))
    elif progress.shared and not progress.running:
        lines.append(Text("somebody is at what runs share: teacher, pairs or features"))
    elif not progress.running:
        lines.append(Text("nobody is at work on it now: msd distill RUN goes on", style="yellow"))
    return Group(*lines)


def _beside(progress: RunProgress) -> list[str]:
    """Say what runs beside teacher and students."""
    at_work = [p for name, p in progress.beside.items() if name != "teacher" and p["state"] == "running"]
    return [f"{p['part']}: running{f', held by {p_}' if (p_ := p['running']) else ''}" for p in at_work]


def _shown(parts: list[StageProgress], most: int) -> list[StageProgress]:
    """Return the parts that fit: those at work first, then those that wait for somebody, in the run's order."""
    order = {"running": 0, "stopped": 1, "waiting": 2, "done": 3}
    chosen = sorted(range(len(parts)), key=lambda i: (order[parts[i].state], i))[:most]
    return [parts[i] for i in sorted(chosen)]


def _table(parts: list[StageProgress], *, narrow: bool) -> Table:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    health = any(part.health for part in parts)
    for name in ("", "stage", "") if narrow else ("", "stage", "", ""):
        grid.add_column(name, no_wrap=True)
    for name in ("step", "left") if narrow else ("step", "images/s", "left"):
        grid.add_column(name, justify="right", no_wrap=True)
    for name in ("losses", "health") if health else ("losses",):
        grid.add_column(name, no_wrap=name == "losses")  # where there is no room, health gives way
    for part in parts:
        losses = "  ".join(f"{name} {value:.4g}" for name, value in part.losses.items())
        cells: list[RenderableType] = [
            part.who,
            part.stage,
            Text(part.state, style=STYLES[part.state]),
            *([] if narrow else [ProgressBar(total=part.steps, completed=part.step, width=12)]),
            f"{part.step:,}/{part.steps:,}",
            *([] if narrow else ["" if part.speed is None else f"{part.speed:,.0f}"]),
            "" if part.seconds_left is None else console.minutes(part.seconds_left),
            Text(losses, no_wrap=True, overflow="ellipsis"),
            *([_health(part.health)] if health else []),
        ]
        grid.add_row(*cells)
    return grid


def _health(figures: dict[str, float]) -> Text:
    """Return what was noted beside the losses; updates that were skipped come first and stand out."""
    from rich.text import Text

    text = Text(no_wrap=True, overflow="ellipsis")
    skipped = sum(value for name, value in figures.items() if "skipped" in name.split("."))
    if skipped:
        text.append(f"{skipped:.0f} skipped  ", style="bold red")
    others = [(name, value) for name, value in figures.items() if "skipped" not in name.split(".")]
    # The most telling first and the least last, where there is room.
    others.sort(key=lambda item: (not item[0].startswith("measured"), item[0].startswith("gradient")))
    others = [(name.removeprefix("measured."), value) for name, value in others]
    text.append("  ".join(f"{name.replace('_', ' ').replace('.', ' ')} {value:.3g}" for name, value in others[:4]))
    return text
