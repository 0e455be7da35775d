"""`msd status`: what is done, what runs, what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from msdcli import console
from msdcli.cli import options


def register(app: typer.Typer) -> None:
    app.command("status")(status)


def status(
    run: Annotated[Path | None, typer.Argument(help="A run directory; without it, the runs in ./runs.")] = None,
    json_: options.Json = False,
) -> None:
    """Show what is done, what runs and what is missing in a run directory, or which runs are here."""
    from msdcli.engine.report.status import status as engine
    from msdcli.rundir import RunDir

    if run is None:
        _list(json_)
        return
    state = engine(RunDir(run))
    if json_:
        console.print_json(state)
        return
    left = ""
    if state["state"] == "running":
        from msdcli.engine.report.live import ProgressTracker

        seconds = ProgressTracker(RunDir(run)).progress().seconds_left
        left = "" if seconds is None else f"; about {console.minutes(seconds)} left"
    here = f", {' and '.join(state['at_work'][:3])} at work" if state["at_work"] else ""
    console.say(f"{state['run']}: {state['state']}{here}; partition {state['partition']}{left}")
    rows = [_row(part["part"], "", part, part["running"]) for part in state["shared"] if part["part"] != "measurement"]
    sizes = {student["parameters"] for student in state["students"]} - {None}
    for student in state["students"]:
        own = student["parameters"] if len(sizes) > 1 else None  # where all are alike, the report says it
        who = f"student {student['student']}" + (f", {own:,} parameters" if own else "")
        for stage in student["stages"]:
            holder = student["running"] if stage["state"] == "running" else None
            rows.append(_row(who, stage["objective"], stage, holder))
    rows += [_row(part["part"], "", part, part["running"]) for part in state["shared"] if part["part"] == "measurement"]
    console.table("parts", ["", "stage", "state", "held by", "losses", "steps"], rows, text_columns=5)
    for path, said in zip(state["metrics"], _figures(state), strict=True):
        console.say(f"measured: {said}, in {path}")


def _row(who: str, stage: str, part: dict[str, Any], holder: str | None) -> list[str]:
    losses = ", ".join(f"{name} {value:.4g}" for name, value in part["losses"].items())
    steps = f"{part['step']}/{part['steps']}" if part["steps"] else ""
    return [who, stage, part["state"], holder or "", losses, steps]


def _list(json_: bool) -> None:
    """Show the runs that are here, a line each; one that cannot be read says so."""
    from msdcli.engine.report.status import runs_here
    from msdcli.engine.report.status import status as engine
    from msdcli.errors import UserError

    states: list[dict[str, Any]] = []
    for run in runs_here():
        try:
            states.append(engine(run))
        except UserError as error:
            states.append({"run": str(run.root), "state": "damaged", "problem": error.message})
    if json_:
        console.print_json(states)
    elif not states:
        console.say("no runs in ./runs; msd distill digits begins one")
    else:
        console.table("runs", ["run", "state", "steps", "measured"], [_line(state) for state in states], text_columns=2)


def _line(state: dict[str, Any]) -> list[str]:
    if "problem" in state:
        return [state["run"], f"{state['state']}: {state['problem']}", "", ""]
    stages = [stage for student in state["students"] for stage in student["stages"]]
    steps = f"{sum(s['step'] for s in stages):,}/{sum(s['steps'] for s in stages):,}"
    return [state["run"], state["state"], steps, ", ".join(_figures(state))]


def _figures(state: dict[str, Any]) -> list[str]:
    from msdcli.engine.tracking.formatting import figure

    return [f"{name} {figure(value)}".rstrip() for name, value in state["measured"].items()]
