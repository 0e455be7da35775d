"""`msd export`: the students as a folder to give away."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from msdcli import console
from msdcli.cli import options


def register(app: typer.Typer) -> None:
    app.command("export")(export)


def export(
    run: options.Run,
    format_: Annotated[
        Literal["bundle"], typer.Option("--format", help="bundle: safetensors, partition, README.")
    ] = "bundle",
    out: Annotated[Path | None, typer.Option(help="Where to write; RUN/export/bundle if absent.")] = None,
    json_: options.Json = False,
    dry_run: options.DryRun = False,
) -> None:
    """Write the students and their router to a folder, and check it against the run before saying done."""
    from msdcli.engine import export as engine
    from msdcli.engine import sample
    from msdcli.rundir import RunDir

    directory = RunDir(run)
    target = out or directory.export / format_
    if dry_run:
        count = len(sample.load(run).folders)
        console.say(f"would write {count} students to {target}")
        return
    record = engine.bundle(directory, target)
    if json_:
        console.print_json(record)
    else:
        difference = f"largest difference from the run's samples: {record['max_difference']:g}"
        console.say(f"{record['students']} students: {target} ({difference})")
        console.say(f"five lines of Python that sample from it: {target / 'README.md'}")
