"""`msd plot`: figures for papers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from msdcli import console
from msdcli.cli import options


def register(app: typer.Typer) -> None:
    app.command("plot")(plot)


def plot(
    kind: Annotated[
        Literal["toy", "curves", "table", "frontier"],
        typer.Argument(
            help="toy: points in the plane; curves: losses and distances; table: the figures of every run; frontier: "
            "distance against latency, memory and budget."
        ),
    ],
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run directories; several share a figure. frontier: a sweep's folder."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="FILE.pdf, .svg or .png; RUN/KIND.pdf of the first if absent.")
    ] = None,
    health: Annotated[bool, typer.Option("--health", help="curves: the health figures instead of the losses.")] = False,
    json_: options.Json = False,
    dry_run: options.DryRun = False,
) -> None:
    """Draw a figure for a paper, as vectors: PDF, SVG, or PNG at 300 dpi."""
    target = out or runs[0] / f"{kind}.pdf"
    if dry_run:
        from msdcli.engine.report.facts import load_runs
        from msdcli.engine.report.frontier import load

        labels = [load(runs[0])["sweep"]] if kind == "frontier" else [facts.label for facts in load_runs(runs)]
        planned = {"file": str(target), "kind": kind, "runs": labels}
        console.outcome(f"would draw {kind} of {', '.join(labels)} to {target}", planned, json_=json_)
        return
    from msdcli.engine.report.plot import plot as engine

    engine(kind, runs, target, health=health)
    drawn = {"file": str(target), "kind": kind, "runs": [str(run) for run in runs]}
    console.outcome(f"figure: {target}", drawn, json_=json_)
