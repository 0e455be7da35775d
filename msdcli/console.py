"""The one console: errors, tables, progress. Text that comes from users is never read as markup."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from msdcli.engine.tracking.events import Progress as Event

out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


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
    """Print a value as JSON on stdout; `compact` is one line, of many that follow each other."""
    sys.stdout.write(json.dumps(value, indent=None if compact else 1) + "\n")
    sys.stdout.flush()


def outcome(text: str, value: Any, *, json_: bool) -> None:
    """Print what came of a command: as a line, or as JSON and nothing else."""
    print_json(value) if json_ else say(text)


def sheet() -> Console:
    """Return where tables go: the terminal, or paper of a fixed width."""
    return out if out.is_terminal else Console(highlight=False, width=120, emoji=False)


def page(text: str) -> None:
    """Show Markdown: rendered on a terminal, as it is elsewhere."""
    if not out.is_terminal:
        sys.stdout.write(text)
        return
    from rich.markdown import Markdown

    out.print(Markdown(text), soft_wrap=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1) -> None:
    """Print a table; the first `text_columns` are text, the others numbers."""
    grid = Table(title=_shown(title), title_justify="left", title_style="bold")
    for i, name in enumerate(columns):
        grid.add_column(_shown(name), justify="left" if i < text_columns else "right", overflow="fold")
    for row in rows:
        grid.add_row(*map(_shown, row))
    sheet().print(grid)


class Monitor:
    """Shows the engine's reports: live lines on a terminal, else a plain line now and then."""

    def __init__(self, *, quiet: bool = False, every: float = 5.0) -> None:
        self.quiet, self.every = quiet, every
        self._live: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._printed: dict[str, float] = {}

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
            tell(event)
        elif self._live:
            self._show(self._live, event)
        else:
            self._print(event)

    def _show(self, live: Progress, event: Event) -> None:
        extra = _shown(_extra(event))
        if event.what not in self._tasks:
            self._tasks[event.what] = live.add_task(_shown(event.what), total=event.total, extra=extra)
        live.update(self._tasks[event.what], completed=event.done, total=event.total, extra=extra)

    def _print(self, event: Event) -> None:
        now = time.monotonic()
        if event.done < event.total and now - self._printed.get(event.what, -self.every) < self.every:
            return
        self._printed[event.what] = now
        left = "" if event.seconds_left is None else f", {event.seconds_left:.0f} s left"
        err.print(_shown(f"{event.what}: {event.done}/{event.total} {event.unit}{_extra(event)}{left}"))


def _extra(event: Event) -> str:
    losses = "".join(f", {name} loss {value:.4g}" for name, value in event.losses.items())
    return losses + (f", {event.images_per_second:.0f} images/s" if event.images_per_second else "")
