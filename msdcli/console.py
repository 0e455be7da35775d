"""The one console: errors, tables, progress. Text that comes from users is never read as markup."""

from __future__ import annotations

import importlib
import io
import json
import math
import re
import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from msdcli.engine.tracking import events

if TYPE_CHECKING:
    from rich.console import RenderableType

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


def say_prose(text: str) -> None:
    """Print sentences: a terminal gets them broken between words. Not for commands, which are copied from there."""
    out.print(_shown(text), soft_wrap=not out.is_terminal)


def tell(text: str) -> None:
    """Print a sentence about the work on stderr, where it does not mix with results."""
    err.print(_shown(text), soft_wrap=not err.is_terminal)


def fail(message: str, hint: str | None) -> None:
    """Print an error and the next step on stderr; a command in the latter stays in one piece."""
    err.print(f"[bold red]error:[/] {_shown(message)}", soft_wrap=not err.is_terminal)
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
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text_columns: int = 1,
    whole: int | None = None,
) -> None:
    """Print a table; the first `text_columns` are text, the others numbers.

    Where `whole` is given a row is one line: all of it on paper, on a terminal cut to its width behind the first
    `whole` columns.
    """
    grid = Table(title=_shown(title), title_justify="left", title_style="bold")
    for i, name in enumerate(columns):
        side: Literal["left", "right"] = "left" if i < text_columns else "right"
        grid.add_column(_cell(name, whole), justify=side, overflow="fold", no_wrap=whole is not None and i < whole)
    for row in rows:
        grid.add_row(*(_cell(text, whole) for text in row))
    on = _Console(highlight=False, width=_WIDEST, emoji=False) if whole is not None and not out.is_terminal else sheet()
    on.print(grid)


_WIDEST = 10_000  # letters: on paper no line is cut


def _cell(text: str, whole: int | None) -> Text | str:
    return _shown(text) if whole is None else Text(plain(text), no_wrap=True, overflow="ellipsis")


class Monitor:
    """Shows the engine's reports: live lines on a terminal and in a notebook, else a plain line now and then, with the
    time since the start, and only where there is something new.
    """

    def __init__(self, *, quiet: bool = False, every: float = 5.0) -> None:
        self.quiet, self.every = quiet, every
        self._live: _Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._begun = time.monotonic()
        self._printed: dict[str, tuple[float, int]] = {}  # when a piece of work was last told, and how far it was
        self._first: dict[str, tuple[float, int]] = {}  # the same when it was first heard of
        self._extra: dict[str, str] = {}
        self._total_told = -math.inf

    def __enter__(self) -> Monitor:
        if (err.is_terminal or err.is_jupyter) and not self.quiet:
            self._live = _NotebookBars() if err.is_jupyter else _Bars()
            self._live.start()
            events.answering.append(self._live.answer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            events.answering.remove(self._live.answer)
            self._live.total = ""
            self._live.stop()

    def __call__(self, event: Event | str) -> None:
        if self.quiet:
            return
        if isinstance(event, str):
            self._live.tell(event) if self._live else tell(f"{self._elapsed()} {event}")
        elif self._live:
            self._show(self._live, event)
        else:
            self._print(event)

    def total(self, seconds_left: float) -> None:
        """Say how long all that is left takes: below the live lines, or as a line of its own now and then."""
        said = f"the whole training: about {minutes(seconds_left)} left"
        if self._live:
            self._live.total = said
        elif time.monotonic() - self._total_told >= self._pause(60.0):
            self._total_told = time.monotonic()
            self(said)

    def _show(self, live: _Bars, event: Event) -> None:
        if (text := _extra(event)) or event.what not in self._extra:  # a report between two lines has no losses
            self._extra[event.what] = text.removeprefix(", ")
        ends = None if event.seconds_left is None else time.monotonic() + event.seconds_left
        fields: dict[str, Any] = {"extra": _shown(self._extra[event.what]), "ends": ends}
        if event.what not in self._tasks:
            self._tasks[event.what] = live.add_task(_shown(event.what), total=event.total, **fields)
        elif event.done < next(task.completed for task in live.tasks if task.id == self._tasks[event.what]):
            live.reset(self._tasks[event.what], total=event.total)  # the same work of another run, as in a sweep
        live.update(self._tasks[event.what], completed=event.done, total=event.total, **fields)

    def _print(self, event: Event) -> None:
        now = time.monotonic()
        told, before = self._printed.get(event.what, (-math.inf, -1))
        if event.done < before:  # the same work of another run, as in a sweep
            told, before = -math.inf, -1
            del self._first[event.what]
        since, first = self._first.setdefault(event.what, (now, event.done))
        if event.done == before or (event.done < event.total and now - told < self._pause(self.every)):
            return
        self._printed[event.what] = now, event.done
        pace = (now - since) / (event.done - first) if event.done > first else None
        left = event.seconds_left
        if left is None and pace is not None:
            left = pace * (event.total - event.done)
        rate = f", {_rate(1 / pace)} {event.unit}/s" if pace and not event.images_per_second else ""
        remaining = f", {minutes(left)} left" if left is not None and event.done < event.total else ""
        line = f"{event.what}: {event.done}/{event.total} {event.unit}{_extra(event)}{rate}{remaining}"
        err.print(_shown(f"{self._elapsed()} {line}"))

    def _pause(self, least: float) -> float:
        """Return the seconds between two lines about one thing: more the longer it takes, so that a log stays short."""
        return max(least, min((time.monotonic() - self._begun) / 50, 600.0)) if least else 0.0

    def _elapsed(self) -> str:
        """Return the time since the start, for logs."""
        seconds = int(time.monotonic() - self._begun)
        return f"[{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}]"


class _Bars(Progress):
    """Live lines: as many as the terminal has room for, of what is finished the last; below them the time that all
    takes, and the answer to a signal.
    """

    def __init__(self) -> None:
        self.total = self.said = ""
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), _TimeColumn())
        super().__init__(*columns, TextColumn("{task.fields[extra]}"), console=err)

    def answer(self, text: str) -> None:
        """Show a word at the next redrawing: takes no lock, since whoever holds it may have been interrupted."""
        self.said = text

    def tell(self, text: str) -> None:
        """Print a sentence above the lines."""
        tell(text)

    def room(self) -> int:
        """Return how many lines are shown."""
        return max(3, err.height - 4)

    def get_renderables(self) -> Iterable[RenderableType]:
        tasks, room = self.tasks, self.room()
        hidden = [task.id for task in tasks if task.finished][: max(0, len(tasks) - room)]
        yield self.make_tasks_table([task for task in tasks if task.id not in hidden])
        yield from (Text(line) for line in (self.total, self.said) if line)


class _NotebookBars(_Bars):
    """The live lines in a notebook: one output of the cell, which is replaced a few times a second; sentences stand
    above the bars in it. rich alone needs ipywidgets for that, and prints a block a line.
    """

    PAUSE = 0.25  # seconds between two drawings
    SENTENCES, BARS = 12, 6  # the last ones, so that a cell's output stays short

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self._output: Any = None  # what replaces the output, once there is one
        self._drawn = -math.inf
        super().__init__()

    def start(self) -> None:
        """Nothing is shown before there is something to show, and no thread draws."""

    def stop(self) -> None:
        """Draw how it ended."""
        self._draw()

    def room(self) -> int:
        return self.BARS

    def tell(self, text: str) -> None:
        self.sentences.append(plain(text))
        self._draw()

    def update(self, task_id: TaskID, **fields: Any) -> None:
        super().update(task_id, **fields)
        self.refresh()

    def refresh(self) -> None:
        if time.monotonic() - self._drawn >= self.PAUSE:
            self._draw()

    def _draw(self) -> None:
        if not self.tasks and not self.sentences:
            return
        self._drawn = time.monotonic()
        paper = Console(
            file=io.StringIO(),
            record=True,
            width=110,
            color_system="truecolor",
            force_terminal=True,
            force_jupyter=False,
        )
        paper.print(
            *(Text(line) for line in self.sentences[-self.SENTENCES :]), sep="\n", end="\n" * bool(self.sentences)
        )
        paper.print(*self.get_renderables(), sep="\n")
        shown = {
            "text/plain": paper.export_text(clear=False),
            "text/html": paper.export_html(inline_styles=True, code_format=_CELL),
        }
        if self._output is None:
            display = importlib.import_module("IPython.display").display
            self._output = display(shown, raw=True, display_id=True)
        else:
            self._output.update(shown, raw=True)


# As rich's own form for notebooks, in the colours of the page.
_CELL = '<pre style="white-space: pre; overflow-x: auto; line-height: normal; font-family: monospace">{code}</pre>'


class _TimeColumn(ProgressColumn):
    """What is left, as the engine says or else as the pace does; of what is finished, what it took."""

    def render(self, task: Task) -> Text:
        if task.finished:
            return Text("" if task.finished_time is None else f"took {minutes(task.finished_time)}", style="dim")
        ends = task.fields.get("ends")
        left = task.time_remaining if ends is None else max(0.0, ends - time.monotonic())
        return Text("" if left is None else f"{minutes(left)} left", style="cyan")


def minutes(seconds: float) -> str:
    """Return a time as people say it."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 7200 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _rate(count: float) -> str:
    """Return how many there are a second, without powers of ten."""
    return f"{count:,.0f}" if count >= 100 else f"{count:.3g}"


def _extra(event: Event) -> str:
    # The teacher and the classifier are what trains, too, and no students.
    plain = not event.what.startswith("student ")
    names = {name: "loss" if plain and name == "student" else f"{name} loss" for name in event.losses}
    losses = "".join(f", {names[name]} {value:.4g}" for name, value in event.losses.items())
    return losses + (f", {event.images_per_second:,.0f} images/s" if event.images_per_second else "")
