"""`msd sweep`: a grid of runs, and the table that sums it up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from msdcli import console
from msdcli.cli import options
from msdcli.errors import UserError

if TYPE_CHECKING:
    from msdcli.sweep import Sweep


def register(app: typer.Typer) -> None:
    app.command("sweep")(sweep)


def sweep(
    source: Annotated[str, typer.Argument(metavar="SWEEP", help="A sweep file, or the name of a shipped one.")],
    worker: Annotated[str, typer.Option(help="i/n: take every n-th run, starting at i (from 0).")] = "0/1",
    table: Annotated[bool, typer.Option("--table", help="Run nothing: sum up what is finished.")] = False,
    json_: options.Json = False,
    dry_run: options.DryRun = False,
) -> None:
    """Run a grid of recipes times seeds; every cell is an ordinary run that resumes, and shares teacher and pairs.

    Several processes or machines share one sweep: --worker 0/2 here and --worker 1/2 there.
    """
    from msdcli.sweep import load

    loaded = load(source)
    share = _share(worker)
    if loaded.settings.frontier is not None:
        _frontier(loaded, share, table=table, json_=json_, dry_run=dry_run)
        return
    if dry_run:
        cells = loaded.cells[share[0] :: share[1]]
        if json_:
            console.print_json([{"run": cell.recipe.run, "label": cell.label, "seed": cell.seed} for cell in cells])
            return
        for cell in cells:
            console.say(f"{cell.recipe.run}: {cell.label}, seed {cell.seed}")
        return
    from msdcli.engine import sweep as engine

    if not table:
        with console.Monitor(quiet=json_) as monitor:
            engine.run(loaded, monitor, worker=share)
    lines = engine.lines(loaded)
    paths = engine.write(loaded, lines)
    if json_:
        console.print_json({"lines": [vars(line) for line in lines], "files": [str(path) for path in paths]})
        return
    columns, rows = engine.summary(lines)
    console.table(f"{loaded.name}: mean ± standard deviation over seeds", columns, rows)
    console.say("written: " + ", ".join(map(str, paths)))


def _frontier(loaded: Sweep, share: tuple[int, int], *, table: bool, json_: bool, dry_run: bool) -> None:
    from msdcli.engine.frontier import record, run
    from msdcli.engine.report import frontier

    if dry_run:
        known = run.known(loaded, share)
        told = [
            vars(line) | {"label": line.label, "seed": cell.seed, "run": cell.recipe.run} for line, cell in known.left
        ]
        text = [f"{cell.recipe.run}: {cell.label}, seed {cell.seed}" for _, cell in known.left]
        if known.open:
            text.append(
                f"more follow from their distances, of {', '.join(known.open)}: {known.most} runs in all at most"
            )
        console.outcome("\n".join(text), {"runs": told, "open": known.open, "most": known.most}, json_=json_)
        return
    with console.Monitor(quiet=json_) as monitor:
        if not table:
            run.run(loaded, monitor, worker=share)
        found, paths = record.write(loaded, monitor)
    if json_:
        console.print_json({"frontier": found, "files": [str(path) for path in paths]})
        return
    console.table(f"{loaded.name}: sizes", *frontier.sizes(found))
    console.table("mean ± standard deviation over seeds", *frontier.table(found))
    for note in frontier.notes(found):
        console.say(note)
    console.say("written: " + ", ".join(map(str, paths)))


def _share(text: str) -> tuple[int, int]:
    left, slash, right = text.partition("/")
    if slash and left.isdecimal() and right.isdecimal() and int(left) < int(right):
        return int(left), int(right)
    raise UserError(f"--worker {text!r} is not of the form i/n with i from 0 to n - 1")
