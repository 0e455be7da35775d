"""`msd status`: what is done, what runs, what is missing."""

from __future__ import annotations

import typer

from msdcli import console
from msdcli.cli import options


def register(app: typer.Typer) -> None:
    app.command("status")(status)


def status(run: options.Run, json_: options.Json = False) -> None:
    """Show what is done, what runs and what is missing in a run directory."""
    from msdcli.engine.report.status import status as engine
    from msdcli.rundir import RunDir

    state = engine(RunDir(run))
    if json_:
        console.print_json(state)
        return
    console.say(f"{state['run']}: teacher {state['teacher']}, partition {state['partition']}")
    rows = []
    for student in state["students"]:
        for stage in student["stages"]:
            losses = ", ".join(f"{k} {v:.4g}" for k, v in stage["losses"].items())
            steps = f"{stage['step']}/{stage['steps']}"
            rows.append(
                [str(student["student"]), stage["objective"], stage["state"], student["running"] or "", losses, steps]
            )
    console.table("students", ["student", "stage", "state", "held by", "losses", "steps"], rows, text_columns=5)
    for path in state["metrics"]:
        console.say(f"measured: {path}")
