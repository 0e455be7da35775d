"""`msd fid`: measure a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from msdcli import console
from msdcli.cli import options

if TYPE_CHECKING:
    from msdcli.engine.fid import Measurement


def register(app: typer.Typer) -> None:
    app.command("fid")(fid)


def fid(run: options.Run, json_: options.Json = False, dry_run: options.DryRun = False) -> None:
    """Measure teacher and students against the data: whole, per student and per class."""
    from msdcli.rundir import RunDir

    directory = RunDir(run)
    recipe = directory.recipe()
    if dry_run:
        console.say(f"would draw {recipe.evaluation.samples:,} samples of the students and of the teacher of {run}")
        return
    from msdcli.engine import fid as engine

    with console.Monitor(quiet=json_) as monitor:
        result = engine.measure(directory, monitor)
    if json_:
        console.print_json(result.to_json())
    else:
        show(result, brief=False)
        console.say(f"written: {directory.metrics / (result.metric + '.json')}")


def show(result: Measurement, *, brief: bool) -> None:
    """Print the table; `brief` leaves the single classes out."""
    names = list(result.rows[0].values)
    rows = [
        [row.who, row.group, f"{row.samples:,}", f"{row.reference:,}", *(f"{row.values[name]:.4f}" for name in names)]
        for row in result.rows
        if not (brief and row.group.startswith("class "))
    ]
    console.table(
        f"{result.metric}: {result.protocol}", ["", "of", "samples", "reference", *names], rows, text_columns=2
    )


def cost_table(costs: list[dict[str, Any]]) -> None:
    """Print what every part of a run has cost."""
    rows = [
        [
            c["part"],
            f"{c['seconds']:.0f}",
            f"{c['images']:,.0f}",
            f"{c['flops']:.3g}",
            f"{c['peak_bytes'] / 2**20:,.0f}",
        ]
        for c in costs
    ]
    console.table("cost", ["", "seconds", "images", "FLOP", "peak MiB"], rows)
