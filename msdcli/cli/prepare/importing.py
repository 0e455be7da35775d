"""`msd import`: bring a teacher that somebody else trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from msdcli import console
from msdcli.cli import options


def register(app: typer.Typer) -> None:
    app.command("import")(import_)


def import_(
    teacher: Annotated[
        Path,
        typer.Argument(help="A pickle of EDM or EDM2, a diffusers folder, or hub:owner/name. Nothing in it is run."),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write model.safetensors and model.json to.")],
    check: Annotated[
        Path | None,
        typer.Option(help="An .npz of x, sigma, class_labels and the original's denoised; above 1e-5: exit code 1."),
    ] = None,
    autoencoder: Annotated[
        Path | None, typer.Option(help="The folder of a latent teacher's AutoencoderKL, where it brings none.")
    ] = None,
    json_: options.Json = False,
    dry_run: options.DryRun = False,
) -> None:
    """Read another project's teacher, safely, and write it in msd's format."""
    from msdcli.engine.inputs import hub, importing

    teacher = hub.resolve(teacher)
    importing.check_free(out, teacher)
    imported = importing.read(teacher, reference=check, autoencoder=autoencoder)
    written = imported.agrees and not dry_run
    if written:
        importing.write(imported, out)
    summary = imported.summary()
    if json_:
        console.print_json(summary | {"folder": str(out) if written else None})
    else:
        _show(summary, out, written)
    if not imported.agrees:
        console.fail(
            f"{teacher} differs from the reference by {imported.difference:.3g}, more than "
            f"{importing.TOLERANCE:g}: nothing was written",
            "is the reference of this very checkpoint?",
        )
        raise typer.Exit(1)


def _show(summary: dict[str, Any], out: Path, written: bool) -> None:
    kind = summary["network"].get("preconditioning") or summary["network"]["class_name"]
    what = "latents" if summary["autoencoder"] else "images"
    count = summary["num_classes"]
    knows = "reads prompts" if "text_sha256" in summary else f"{count} classes" if count else "no classes"
    console.say(f"network:    {kind}, {summary['parameters']:,} parameters, {what} {summary['shape']}, {knows}")
    if summary["autoencoder"]:
        console.say(f"latents of: {summary['autoencoder']}")
    console.say(f"source:     {summary['source']['file']}, sha256 {summary['source']['sha256'][:16]}")
    if "check" in summary:
        difference = float("inf") if summary["max_relative_difference"] is None else summary["max_relative_difference"]
        console.say(f"difference: {difference:.3g} (largest, relative)")
    console.say(f"written:    {out}  (next: teacher.path={out})" if written else "nothing was written")
