"""`msd partition`: who gets which classes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msdcli import console
from msdcli.cli import options


def register(app: typer.Typer) -> None:
    app.command("partition")(partition)


def partition(
    recipe: options.Recipe,
    overrides: options.Overrides = None,
    picture: Annotated[Path | None, typer.Option(help="Also draw a PNG: one row of images per student.")] = None,
    json_: options.Json = False,
    dry_run: options.DryRun = False,
) -> None:
    """Show which student owns which classes: of a run as it was made, of a recipe as it would be."""
    from msdcli.engine import partition as engine
    from msdcli.recipe import load

    result, data = engine.preview(load(recipe, overrides))
    names = data.class_names
    if json_:
        console.print_json({"method": result.method, "parts": result.parts, "class_names": names})
    else:
        rows = [[str(k), ", ".join(names[c] for c in part), str(len(part))] for k, part in enumerate(result.parts)]
        console.table(f"partition: {result.method}", ["student", "classes", "number"], rows, text_columns=2)
    if picture is None:
        return
    if dry_run:
        console.say(f"would draw {picture}")
        return
    engine.draw(picture, result, data)
    if not json_:
        console.say(f"picture: {picture}")
