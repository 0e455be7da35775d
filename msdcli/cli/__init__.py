"""The command line: one file per verb; torch is imported only inside the commands."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

import typer
from typer.core import TyperGroup

from msdcli import console, errors
from msdcli.cli import docs
from msdcli.cli.observe import plot, report, status, watch
from msdcli.cli.prepare import importing, latents, partition, recipes
from msdcli.cli.results import export, fid, push, sample
from msdcli.cli.train import advise, bench, distill, sweep


class VerbGroup(TyperGroup):
    """Turns whatever ends a command into one sentence and an exit code (MSD_DEBUG=1: the traceback instead)."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            if os.environ.get("MSD_DEBUG") or hasattr(error, "exit_code"):  # typer's own have one
                raise
            code, message, hint = errors.explain(error)
            if code == errors.STOPPED:
                _ignore_schedulers()
            if message:
                stopped = code in (errors.STOPPED, errors.INTERRUPTED)
                console.tell(message) if stopped else console.fail(message, hint)
            raise typer.Exit(code) from None


app = typer.Typer(
    name="msd",
    cls=VerbGroup,
    help="Distil one diffusion teacher into K students of one or a few steps, each for its own part of the conditions.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Start: msd distill digits; the manual: msd docs. The same command again resumes. Exit codes: 0 done, 1 "
    "failed while working, 2 something for you to fix, 75 stopped by SIGTERM or SIGUSR1 (the same command continues), "
    "130 interrupted.",
)
for verb in (
    recipes,
    importing,
    latents,
    partition,
    distill,
    status,
    watch,
    sample,
    fid,
    report,
    plot,
    export,
    push,
    sweep,
    advise,
    bench,
    docs,
):
    verb.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        from msdcli.foreign import versions

        console.say(f"msd {versions('msdcli')['msdcli']}")
        raise typer.Exit


@app.callback()
def _root(version: bool = typer.Option(False, "--version", help="Print the version.", callback=_version)) -> None: ...


# What a cluster's scheduler sends before it takes the machine away.
_SCHEDULER = (signal.SIGTERM, signal.SIGUSR1)


def _ignore_schedulers() -> None:
    """Let no second signal, of a launcher beside the scheduler, end a command that is about to say that it stopped."""
    for number in _SCHEDULER:
        signal.signal(number, signal.SIG_IGN)


def _stop(number: int, frame: FrameType | None) -> None:
    raise errors.Preempted(f"stopped; {errors.CONTINUES}")


def main() -> None:
    """Run the command line.

    Where the reader of its output goes away, as `head` does, it ends as git does: silently. A scheduler's signal is met
    from the start, also while libraries are loaded.
    """
    for number in _SCHEDULER:
        signal.signal(number, _stop)
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at the end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(errors.READER_GONE) from None
