"""`msd recipes`: what ships, and how to start from it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from msdcli import console
from msdcli.cli import options


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="List, copy, show and check recipes.", invoke_without_command=True, no_args_is_help=False)
    group.callback()(listing)
    for name, command in (("cp", copy), ("show", show), ("validate", validate), ("schema", schema)):
        group.command(name)(command)
    app.add_typer(group, name="recipes")


def listing(context: typer.Context) -> None:
    """List the recipes that ship with msd."""
    if context.invoked_subcommand is not None:
        return
    from msdcli.recipe import shipped

    rows = [[path.stem, *_header(path)] for path in shipped()]
    console.table("recipes", ["name", "shows", "costs", "measured"], rows, text_columns=4)
    console.say("start from one: msd recipes cp NAME my.yaml")


def _header(path: Path) -> list[str]:
    """Return what the recipe's first comment lines say after `Shows:`, `Costs:` and `Measured:`."""
    comments = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    found = dict.fromkeys(("Shows", "Costs", "Measured"), "")
    current = None
    for line in comments:
        key, colon, rest = line.partition(":")
        current = key if colon and key in found else current
        if current:
            found[current] += (" " if found[current] else "") + (rest.strip() if key == current else line)
    return list(found.values())


def copy(
    name: Annotated[
        str, typer.Argument(help="Name of a shipped recipe, or of a script for Slurm: array.sh, torchrun.sh.")
    ],
    target: Annotated[Path, typer.Argument(help="The file to make.")],
) -> None:
    """Copy a shipped recipe, or a script for Slurm, to a file of your own."""
    from msdcli.errors import UserError
    from msdcli.recipe import find, recipes_folder
    from msdcli.rundir import write_text

    if os.path.lexists(target):
        raise UserError(f"{target} exists: nothing was written", hint="another name")
    script = recipes_folder() / "slurm" / name
    if script.is_file():
        write_text(target, script.read_text(encoding="utf-8"))
        console.say(f"{target}: its first lines say how it is used")
        return
    text = find(name).read_text(encoding="utf-8")
    # The first line tells editors where the schema is: from the copy's place, in the installed package.
    write_text(target, text.replace("$schema=schema.json", f"$schema={(recipes_folder() / 'schema.json').as_uri()}", 1))
    console.say(f"{target}: edit it, then msd distill {target}")


def show(recipe: options.Recipe, overrides: options.Overrides = None) -> None:
    """Print a recipe with every key and its value."""
    from msdcli.recipe import load

    sys.stdout.write(load(recipe, overrides).to_yaml())


def validate(recipe: options.Recipe, overrides: options.Overrides = None) -> None:
    """Check a recipe; all mistakes are named at once."""
    from msdcli.recipe import load

    load(recipe, overrides)
    console.say(f"{recipe}: a good recipe")


def schema(sweep: Annotated[bool, typer.Option("--sweep", help="Of sweep files instead.")] = False) -> None:
    """Print the JSON Schema of recipes, for editors; recipes/schema.json is its output."""
    from msdcli.recipe import Recipe
    from msdcli.sweep import SweepSettings

    console.print_json((SweepSettings if sweep else Recipe).model_json_schema())
