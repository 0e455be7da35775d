"""The one console: errors, tables, progress. Text that comes from users is never read as markup."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from msdcli.engine.tracking.events import Progress as Event


class _Console(Console):
    """A console that lets its caller know when nobody reads any more."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


out = _Console(highlight=False, soft_wrap=True, emoji=False)
err = _Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


# Letters that steer a terminal instead of being shown: controls (but for tab and newline) and those that turn the
# direction of writing. Half surrogates, of file names that are no UTF-8, no terminal can show.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def plain(text: str) -> str:
    """Return text of whatever origin as a terminal may have it: what would steer it is spelled out."""
    return _STEERING.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def _shown(text: str) -> str:
    """Return text that is neither markup nor orders to the terminal."""
    return escape(plain(text))


def say(text: str) -> None:
    """Print a line."""
    out.print(_shown(text))


def tell(text: str) -> None:
    """Print a line about the work on stderr, where it does not mix with results."""
    err.print(_shown(text))


def fail(message: str, hint: str | None) -> None:
    """Print an error and the next step on stderr."""
    err.print(f"[bold red]error:[/] {_shown(message)}")
    if hint:
        err.print(f"[bold]try:[/] {_shown(hint)}")


def print_json(value: Any, *, compact: bool = False) -> None:
    """Print a value as JSON on stdout; `compact` is one line, of many that follow each other.

    JSON has no word for what is not finite: that is null.
    """
    sys.stdout.write(json.dumps(_finite(value), indent=None if compact else 1, allow_nan=False) + "\n")
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    """Return plain data with None in the place of every number that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def outcome(text: str, value: Any, *, json_: bool) -> None:
    """Print what came of a command: as a line, or as JSON and nothing else."""
    print_json(value) if json_ else say(text)


def sheet() -> Console:
    """Return where tables go: the terminal, or paper of a fixed width."""
    return out if out.is_terminal else _Console(highlight=False, width=120, emoji=False)


def page(text: str) -> None:
    """Show Markdown: rendered on a terminal, as it is elsewhere."""
    if not out.is_terminal:
        sys.stdout.write(text)
        return
    from rich.markdown import Markdown

    out.print(Markdown(text), soft_wrap=False)


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1, fit: bool = False
) -> None:
    """Print a table; the first `text_columns` are text, the others numbers. With `fit` a row is one line, cut."""
    grid = Table(title=_shown(title), title_justify="left", title_style="bold")
    for i, name in enumerate(columns):
        side: Literal["left", "right"] = "left" if i < text_columns else "right"
        grid.add_column(_shown(name), justify=side, overflow="ellipsis" if fit else "fold", no_wrap=fit)
    for row in rows:
        grid.add_row(*map(_shown, row))
    sheet().print(grid)


class Monitor:
    """Shows the engine's reports: live lines on a terminal, else a plain line now and then, with the time since the
    start, and only where there is something new.
    """

    def __init__(self, *, quiet: bool = False, every: float = 5.0) -> None:
        self.quiet, self.every = quiet, every
        self._live: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._begun = time.monotonic()
        self._printed: dict[str, tuple[float, int]] = {}  # when a piece of work was last told, and how far it was
        self._first: dict[str, tuple[float, int]] = {}  # the same when it was first heard of
        self._extra: dict[str, str] = {}

    def __enter__(self) -> Monitor:
        if err.is_terminal and not self.quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[extra]}"),
                TimeRemainingColumn(),
            )
            self._live = Progress(*columns, console=err)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, event: Event | str) -> None:
        if self.quiet:
            return
        if isinstance(event, str):
            tell(event if self._live else f"{self._elapsed()} {event}")
        elif self._live:
            self._show(self._live, event)
        else:
            self._print(event)

    def _show(self, live: Progress, event: Event) -> None:
        if (text := _extra(event)) or event.what not in self._extra:  # a report between two lines has no losses
            self._extra[event.what] = text
        extra = _shown(self._extra[event.what])
        if event.what not in self._tasks:
            self._tasks[event.what] = live.add_task(_shown(event.what), total=event.total, extra=extra)
        live.update(self._tasks[event.what], completed=event.done, total=event.total, extra=extra)

    def _print(self, event: Event) -> None:
        now = time.monotonic()
        since, first = self._first.setdefault(event.what, (now, event.done))
        told, before = self._printed.get(event.what, (-math.inf, -1))
        if event.done == before or (event.done < event.total and now - told < self.every):
            return
        self._printed[event.what] = now, event.done
        pace = (now - since) / (event.done - first) if event.done > first else None
        left = event.seconds_left
        if left is None and pace is not None:
            left = pace * (event.total - event.done)
        rate = f", {1 / pace:,.3g} {event.unit}/s" if pace and not event.images_per_second else ""
        remaining = f", {minutes(left)} left" if left is not None and event.done < event.total else ""
        line = f"{event.what}: {event.done}/{event.total} {event.unit}{_extra(event)}{rate}{remaining}"
        err.print(_shown(f"{self._elapsed()} {line}"))

    def _elapsed(self) -> str:
        """Return the time since the start, for logs."""
        seconds = int(time.monotonic() - self._begun)
        return f"[{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}]"


def minutes(seconds: float) -> str:
    """Return a time as people say it."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 7200 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _extra(event: Event) -> str:
    # The teacher and the classifier are what trains, too, and no students.
    plain = not event.what.startswith("student ")
    names = {name: "loss" if plain and name == "student" else f"{name} loss" for name in event.losses}
    losses = "".join(f", {names[name]} {value:.4g}" for name, value in event.losses.items())
    return losses + (f", {event.images_per_second:,.0f} images/s" if event.images_per_second else "")
