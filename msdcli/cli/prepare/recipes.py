"""`msd recipes`: what ships, and how to start from it."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from msdcli import console
from msdcli.cli import options


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="List, copy, show and check recipes.", invoke_without_command=True, no_args_is_help=False)
    group.callback()(listing)
    for name, command in (("new", new), ("cp", copy), ("show", show), ("validate", validate), ("schema", schema)):
        group.command(name)(command)
    app.add_typer(group, name="recipes")


def listing(context: typer.Context, json_: options.Json = False) -> None:
    """List the recipes that ship with msd."""
    if context.invoked_subcommand is not None:
        return
    from msdcli.recipe import shipped

    found = [_described(path) for path in shipped()]
    if json_:
        console.print_json(found)
        return
    rows = [[r["name"], str(r["students"]), r["data"], _first(r["costs"]), _first(r["measured"])] for r in found]
    console.table("recipes", ["name", "K", "data", "costs", "measured"], rows, text_columns=5, whole=2)
    console.say("what one is: msd recipes show NAME; start from one: msd recipes cp NAME my.yaml")


def _described(path: Path) -> dict[str, Any]:
    """Return what a list of recipes says of one."""
    from msdcli.recipe import load

    recipe = load(path)
    shows, costs, measured = _header(path)
    kind = Path(getattr(recipe.data, "path", None) or recipe.data.name).stem
    told = {"name": path.stem, "students": recipe.partition.students, "data": kind}
    return told | {"shows": shows, "costs": costs, "measured": measured}


def _first(text: str) -> str:
    """Return how a text begins, for a list of a line each."""
    return re.split(r"[;:(]|\.(?: |$)| over three seeds| in TF32|, ", text, maxsplit=1)[0].strip()


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
    json_: options.Json = False,
) -> None:
    """Copy a shipped recipe, or a script for Slurm, to a file of your own, whose name its runs have."""
    from msdcli.errors import UserError
    from msdcli.recipe import find, recipes_folder
    from msdcli.rundir import write_text

    if os.path.lexists(target):
        raise UserError(f"{target} exists: nothing was written", hint="another name")
    script = recipes_folder() / "slurm" / name
    if script.is_file():
        write_text(target, script.read_text(encoding="utf-8"))
        console.outcome(f"{target}: its first lines say how it is used", {"file": str(target)}, json_=json_)
        return
    text = find(name).read_text(encoding="utf-8")
    text = re.sub(r"(?m)^name: .*\n", "", text, count=1)  # the copy's runs are no runs of the recipe that ships
    # The first line tells editors where the schema is: from the copy's place, in the installed package.
    write_text(target, text.replace("$schema=schema.json", f"$schema={(recipes_folder() / 'schema.json').as_uri()}", 1))
    console.outcome(f"{target}: edit it, then msd distill {target}", {"file": str(target)}, json_=json_)


def new(
    folder: Annotated[
        str | None,
        typer.Argument(
            metavar="[PICTURES]",
            help="Your pictures: a folder of class folders, a zip, an .npz, or shards; of a teacher that reads "
            "prompts, a file of them. With --teacher they may be absent.",
        ),
    ] = None,
    target: Annotated[Path | None, typer.Argument(help="The file to make; NAME.yaml if absent.")] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Distil this one: a folder or file as teacher.path takes it, or hub:owner/name."),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.1, max=1e6, help="How long the whole run may take here.")] = 30.0,
    students: Annotated[
        int | None, typer.Option(min=1, help="How many; one per class, at most five (of a teacher: four), if absent.")
    ] = None,
    device: Annotated[str, typer.Option(help="The device that will train: auto, cpu, cuda or mps.")] = "auto",
    json_: options.Json = False,
    dry_run: options.DryRun = False,
) -> None:
    """Write a recipe for your own pictures, or for a teacher that you have: look at them, choose a network and steps
    for this device and your time.
    """
    from msdcli.errors import UserError
    from msdcli.recipe import recipes_folder
    from msdcli.recipe.data import label_of
    from msdcli.rundir import write_text

    if teacher is not None and target is None and folder is not None and folder.endswith((".yaml", ".yml")):
        target, folder = Path(folder), None
    subject = folder or teacher
    if subject is None:
        raise UserError(
            "what is the recipe for?", hint="msd recipes new PICTURES, msd recipes new --teacher PATH, or both"
        )
    if teacher is None:
        _refuse_model(subject)
    if target is None:
        target = Path(f"{label_of(_bare(subject)) or 'my'}.yaml")
    again = [*([] if folder is None else [folder]), "another-name.yaml", *(["--teacher", teacher] if teacher else [])]
    if os.path.lexists(target):
        raise UserError(f"{target} exists: nothing was written", hint=f"msd recipes new {shlex.join(again)}")
    told, text = _proposed(folder, teacher, target, minutes, students, device)
    schema = (recipes_folder() / "schema.json").as_uri()
    if not dry_run:
        write_text(target, f"# yaml-language-server: $schema={schema}\n{text}")
    if json_:
        console.print_json({"file": None if dry_run else str(target)} | told | {"recipe": text})
        return
    if dry_run:
        sys.stdout.write(console.plain(text))
        return
    for what in ("seen", "assumed", "look"):
        for line in told[what]:
            console.say(f"{what + ':':<8} {line}")
    console.say(f"written: {target}  (next: msd distill {target} --dry-run, then without)")


def _refuse_model(path: str) -> None:
    from msdcli.engine.teacher_proposal import is_teacher
    from msdcli.errors import UserError

    if is_teacher(path):
        raise UserError(f"{path} is a model and holds no pictures", hint=f"msd recipes new --teacher {path}")
    if (Path(path) / "recipe.yaml").is_file():
        raise UserError(
            f"{path} is a run of msd and holds no pictures of yours", hint=f"msd recipes new --teacher {path}/teacher"
        )


def _bare(path: str) -> str:
    """Return what is left of a teacher's place that a run may be called by."""
    return re.sub(r"^hub:|@[^/]*$|\.pkl$", "", path)


def _proposed(
    folder: str | None, teacher: str | None, target: Path, minutes: float, students: int | None, device: str
) -> tuple[dict[str, Any], str]:
    """Return what is told of a recipe for pictures, or for a teacher, and its text."""
    from msdcli.recipe import check_name

    if teacher is not None:
        from msdcli.engine.teacher_proposal import propose as for_teacher

        made = for_teacher(teacher, folder, name=check_name(target), minutes=minutes, students=students, on=device)
        pictures = None if made.pictures is None else made.pictures.to_json()
        told = {"pictures": pictures, "teacher": teacher, "seen": made.found, "assumed": made.assumed, "look": []}
        return told | {"minutes": made.minutes}, made.text
    from msdcli.engine.proposal import propose

    assert folder is not None
    found = propose(folder, minutes=minutes, students=students, on=device)
    told = {"pictures": found.seen.to_json(), "seen": found.seen.lines()}
    told |= {"assumed": [*found.seen.remarks(), *found.assumed], "look": found.cautions, "minutes": found.minutes}
    return told, found.text


def show(
    recipe: options.Recipe,
    overrides: options.Overrides = None,
    all_: Annotated[bool, typer.Option("--all", help="Keys that do not apply, too.")] = False,
    json_: options.Json = False,
) -> None:
    """Print a recipe with every key that applies and its value, after what its file says about it."""
    from msdcli.recipe import find, load
    from msdcli.recipe.applies import readable

    loaded = load(recipe, overrides)
    if json_:
        console.print_json(loaded.dump())
        return
    said = zip(("Shows", "Costs", "Measured"), _header(find(recipe)), strict=True)
    sys.stdout.write("".join(f"# {key}: {console.plain(text)}\n" for key, text in said if text))
    sys.stdout.write(loaded.to_yaml() if all_ else readable(loaded))


def validate(recipe: options.Recipe, overrides: options.Overrides = None, json_: options.Json = False) -> None:
    """Check a recipe, and pictures of your own that it names; all mistakes are named at once."""
    from msdcli.recipe import load

    loaded = load(recipe, overrides)
    told: dict[str, Any] = {"recipe": recipe, "name": loaded.name}
    lines, path = list[str](), getattr(loaded.data, "path", None)
    if path is not None:
        from msdcli.engine import plan

        if plan.is_here(path):
            _, seen = plan.look(loaded)
            remarks = plan.remarks(loaded, seen)
            lines = ([] if seen is None else [f"data: {line}" for line in seen.lines()]) + [
                f"look: {r}" for r in remarks
            ]
            told |= {"pictures": None if seen is None else seen.to_json(), "remarks": remarks}
        else:
            lines = [f"data: {path} is not here, so nothing of it was looked at"]
    console.outcome("\n".join([f"{recipe}: a good recipe", *lines]), told, json_=json_)


def schema(sweep: Annotated[bool, typer.Option("--sweep", help="Of sweep files instead.")] = False) -> None:
    """Print the JSON Schema of recipes, for editors; recipes/schema.json is its output."""
    from msdcli.recipe import Recipe
    from msdcli.sweep import SweepSettings

    console.print_json((SweepSettings if sweep else Recipe).model_json_schema())
