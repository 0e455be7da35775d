"""`msd push`: an exported folder as a repository of the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msdcli import console
from msdcli.cli import options
from msdcli.engine.tracking.formatting import counted


def register(app: typer.Typer) -> None:
    app.command("push")(push)


def push(
    exported: Annotated[Path, typer.Argument(metavar="EXPORT", help="A folder that `msd export` wrote.")],
    to: Annotated[
        str | None,
        typer.Option(help="A folder, laid out as the Hub's repositories are, or hub:owner/name. Absent: a listing."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository on the Hub is private.")] = False,
    json_: options.Json = False,
    dry_run: options.DryRun = False,
) -> None:
    """Publish an exported folder: written as a Hub repository, or uploaded to one. Without --to, only listed."""
    from msdcli.engine.export import push as engine

    planned = engine.plan(exported, to)
    where = None if to is None or dry_run else engine.run(planned, private=private)
    if json_:
        files = [{"name": name, "bytes": size} for name, size in planned.files]
        console.print_json({"files": files, "bytes": planned.size, "to": to, "written": where})
        return
    if where is None:
        rows = [[name, f"{size:,}"] for name, size in planned.files]
        console.table(f"{exported}: would go to {to or 'a repository'}", ["file", "bytes"], rows)
    size = f"{counted(len(planned.files), 'file')}, {planned.size / 2**20:,.1f} MiB"
    hint = " (nothing was written; --to FOLDER or --to hub:owner/name)" if to is None else ""
    console.say(f"{size}: {where}" if where else f"{size}{hint}")
