"""`msd sample`: routed one-step samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from msdcli import console
from msdcli.cli import options


def register(app: typer.Typer) -> None:
    app.command("sample")(sample)


def sample(
    run: Annotated[Path, typer.Argument(help="A run directory or an exported bundle.")],
    classes: Annotated[str | None, typer.Option(help="Classes by number, e.g. 3,7 (drawn in turn).")] = None,
    all_: Annotated[bool, typer.Option("--all", help="All classes in turn.")] = False,
    number: Annotated[int, typer.Option("-n", min=1, help="How many samples in all.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Sample i depends on the seed, i and its class alone.")] = 0,
    format_: Annotated[
        Literal["grid", "png", "npz", "latents"],
        typer.Option("--format", help="One picture, a PNG per image, one .npz, or one .npz of undecoded latents."),
    ] = "grid",
    out: Annotated[Path | None, typer.Option(help="Where to write; RUN/samples/... if absent.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 500,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    json_: options.Json = False,
    dry_run: options.DryRun = False,
) -> None:
    """Draw samples, one network evaluation each; every class goes to the student that owns it."""
    import time

    from msdcli.engine import sample as engine
    from msdcli.engine.device import resolve
    from msdcli.errors import UserError

    students = engine.load(run, resolve(device))
    if (classes is None) == (not all_):
        raise UserError("say which classes: --classes 3,7 or --all")
    wanted = (
        list(range(len(students.class_names)))
        if classes is None
        else engine.parse_classes(classes, students.class_names)
    )
    asked = [wanted[i % len(wanted)] for i in range(number)]
    target = out or engine.default_target(run, format_, wanted, seed, everything=all_)
    serving = sorted(students.partition.route(asked))
    if dry_run:
        console.say(f"would draw {number} samples from students {', '.join(map(str, serving))} and write {target}")
        return
    begun = time.perf_counter()
    images = students.sample(asked, seed=seed, batch=batch, latents=format_ == "latents")
    seconds = time.perf_counter() - begun
    engine.save(target, images, asked, students.class_names, format_)
    if json_:
        console.print_json(
            {"file": str(target), "classes": asked, "seed": seed, "students": serving, "seconds": seconds}
        )
    else:
        console.say(f"{number} samples of {len(wanted)} classes from students {', '.join(map(str, serving))}: {target}")
