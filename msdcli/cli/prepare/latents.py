"""`msd latents`: encode a data set once, for a latent teacher."""

from __future__ import annotations

from typing import Any

import typer

from msdcli import console
from msdcli.cli import options


def register(app: typer.Typer) -> None:
    app.command("latents")(latents)


def latents(
    recipe: options.Recipe,
    overrides: options.Overrides = None,
    json_: options.Json = False,
    dry_run: options.DryRun = False,
) -> None:
    """Encode the data of a recipe with its teacher's autoencoder, and keep the latents for every run.

    The same command again resumes; `msd distill` does it by itself where a stage looks at real images.
    """
    from msdcli.engine.inputs import latents as engine
    from msdcli.recipe import load

    loaded = load(recipe, overrides)
    if dry_run:
        lines = engine.plan(loaded)
        console.outcome("\n".join(lines), {"plan": lines}, json_=json_)
        return
    with console.Monitor(quiet=json_) as monitor:
        found = engine.encode(loaded, monitor)
    if json_:
        console.print_json(found)
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    rows = [[str(c), f"{m:.3f}", f"{s:.3f}"] for c, (m, s) in enumerate(zip(found["mean"], found["std"], strict=True))]
    console.table(f"{found['images']:,} latents of {found['shape']}", ["channel", "mean", "std"], rows)
    console.say(f"pictures survive the way there and back with {found['psnr']:.1f} dB (PSNR)")
    console.say(f"latents: {found['folder']}")
