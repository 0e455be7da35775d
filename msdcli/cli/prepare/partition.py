"""`msd partition`: who gets which classes or prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from msdcli import console
from msdcli.cli import options

if TYPE_CHECKING:
    from msdcli.engine.partitioning.explaining import Explanation
    from msdcli.partition import Partition

EXAMPLES = 5  # prompts shown of every student


def register(app: typer.Typer) -> None:
    app.command("partition")(partition)


def partition(
    recipe: options.Recipe,
    overrides: options.Overrides = None,
    explain: Annotated[
        str | None,
        typer.Option(metavar="PROMPT", help="Where this prompt (or class) goes, by how much, and with whom."),
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Also draw a PNG: one row of images per student.")] = None,
    json_: options.Json = False,
    dry_run: options.DryRun = False,
) -> None:
    """Show which student owns which classes or prompts: of a run as it was made, of a recipe as it would be."""
    from msdcli.engine.partitioning import explaining
    from msdcli.engine.partitioning import making as engine
    from msdcli.outputs import check_file
    from msdcli.recipe import load

    if picture is not None:
        check_file(picture, ".png")
    loaded = load(recipe, overrides)
    if dry_run and (count := engine.to_embed(loaded, explaining=explain is not None)):
        console.outcome(f"would embed {count:,} prompts first", {"prompts_to_embed": count}, json_=json_)
        return
    if dry_run and engine.classifier_first(loaded):
        said = "would first train the classifier of the data, unless a run beside this one has"
        console.outcome(said, {"classifier": True}, json_=json_)
        return
    with console.Monitor(quiet=json_) as monitor:
        if explain is not None:
            _show_explanation(explaining.explain(loaded, explain, monitor), json_)
            return
        result, data = engine.preview(loaded, monitor)
    _show(result, data.class_names, loaded.has_prompts, json_)
    if picture is None:
        return
    if not dry_run:
        engine.draw(picture, result, data)
    if not json_:
        console.say(f"would draw {picture}" if dry_run else f"picture: {picture}")


def _show(result: Partition, names: Sequence[str], prompts: bool, json_: bool) -> None:
    """Print the parts, and what was measured of the classes where that made them; of prompts number and examples."""
    from msdcli.engine.partitioning.explaining import reasons, totals

    if json_:
        if prompts:
            parts = [{"number": len(part), "examples": [names[c] for c in part[:EXAMPLES]]} for part in result.parts]
            console.print_json({"method": result.method, "parts": parts})
        else:
            more = {} if result.evidence is None else {"evidence": result.evidence}
            console.print_json({"method": result.method, "parts": result.parts, "class_names": names} | more)
        return
    shown = [[names[c] for c in (part[:EXAMPLES] if prompts else part)] for part in result.parts]
    between, total = "\n" if prompts else ", ", totals(result)
    rows = [[str(k), between.join(s), f"{len(p):,}"] for k, (s, p) in enumerate(zip(shown, result.parts, strict=True))]
    columns = ["student", "prompts (the first)" if prompts else "classes", "number"]
    if total is not None:
        columns, rows = [*columns, "distances"], [[*row, f"{t:.4g}"] for row, t in zip(rows, total, strict=True)]
    if origins := (result.evidence or {}).get("origins"):
        columns, rows = [*columns, "from"], [[*row, origin] for row, origin in zip(rows, origins, strict=True)]
    console.table(f"partition: {result.method}", columns, rows, text_columns=2)
    if why := reasons(result, names):
        rows = [[names[c], str(k), why[c]] for k, part in enumerate(result.parts) for c in part]
        console.table("why each class is where it is", ["class", "student", "why"], rows, text_columns=3)


def _show_explanation(found: Explanation, json_: bool) -> None:
    if json_:
        console.print_json(found.to_json())
        return
    console.say(f"{found.condition}: student {found.student}")
    if found.reason is not None:
        console.say(found.reason)
    elif found.margin is None:
        console.say("no border: this partition does not look at what the conditions are like")
    else:
        console.say(
            f"margin {found.margin:.4g} (distance to the border, in the units of the embeddings); "
            f"{found.percentile:.0f} % of those trained on lie nearer to a border"
        )
        console.say(f"second choice: student {found.second}")
    for near in found.neighbours:
        how = f" (similarity {near['similarity']:.3f})" if "similarity" in near else ""
        console.say(f"  {'like' if how else 'with'} {near['name']}: student {near['student']}{how}")
    if found.seconds:
        from msdcli.engine.tracking.formatting import three_digits

        times = ", ".join(f"{what} {three_digits(1e3 * seconds)} ms" for what, seconds in found.seconds.items())
        console.say(times)
