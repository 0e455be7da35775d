"""`msd advise`: which K, size and stages suit, from a frontier that was measured."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from msdcli import console
from msdcli.cli import options


def register(app: typer.Typer) -> None:
    app.command("advise")(advise)


def advise(
    recipe: options.Recipe,
    frontier: Annotated[Path, typer.Argument(help="A sweep's folder with frontier.json, or such a file.")],
    latency: Annotated[float | None, typer.Option(min=1e-6, help="Milliseconds that a request may take.")] = None,
    memory: Annotated[str | None, typer.Option(help="What all students' weights may take, e.g. 2MB.")] = None,
    budget: Annotated[float | None, typer.Option(min=1, help="FLOPs that training all students may take.")] = None,
    json_: options.Json = False,
) -> None:
    """Say which students suit a latency, a memory or a budget: from what a frontier's sweep measured, or not at all.

    Nothing is written.
    """
    from msdcli.engine.frontier.advice import Limits
    from msdcli.engine.frontier.advice import advise as engine
    from msdcli.engine.report.frontier import load as read
    from msdcli.recipe import load

    most = None if memory is None else options.parse_bytes(memory)
    limits = Limits(None if latency is None else latency / 1e3, most, budget)
    found = engine(read(frontier), load(recipe), limits)
    if json_:
        console.print_json({"line": found.line, "as_close": found.as_close, "keys": found.keys, "said": found.said})
        return
    for line in found.said:
        console.say(line)
    console.say(shlex.join(["msd", "distill", recipe, *found.keys]))
