"""`msd report`: one HTML file that shows runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msdcli import console
from msdcli.cli import options


def register(app: typer.Typer) -> None:
    app.command("report")(report)


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Run directories, finished or not; or the folder of a sweep with a frontier."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Where to write; report.html in the first run if absent.")] = None,
    pictures: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="Draw samples, which needs the networks.")
    ] = True,
    json_: options.Json = False,
    dry_run: options.DryRun = False,
) -> None:
    """Write one HTML file with figures, curves, samples, partition, cost and recipe; it opens anywhere, offline."""
    from msdcli.engine.report import frontier
    from msdcli.engine.report.facts import load_runs
    from msdcli.outputs import check_file

    target = out or runs[0] / "report.html"
    check_file(target, ".html")
    if dry_run:
        record = frontier.of_sweep(runs)
        labels = [facts.label for facts in load_runs(runs)] if record is None else [record["sweep"]]
        planned = {"file": str(target), "runs": labels}
        console.outcome(f"would write {target} about {', '.join(labels)}", planned, json_=json_)
        return
    from msdcli.engine.report import report as engine

    with console.Monitor(quiet=json_) as monitor:
        found = engine.write(runs, target, monitor, pictures=pictures)
    if json_:
        missing = {facts.label: facts.missing for facts in found}
        console.print_json({"file": str(target), "bytes": target.stat().st_size, "missing": missing})
        return
    for facts in found:
        for line in facts.missing[:5]:
            console.tell(f"{facts.label}: {line}")
    console.say(f"report: {target} ({target.stat().st_size / 1e6:.1f} MB)")
