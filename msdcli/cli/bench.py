"""`msd bench`: how fast parts of msd are on this machine, beside other people's programs."""

from __future__ import annotations

from typing import Annotated

import typer

from msdcli import console
from msdcli.cli import options


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Measure speed on this machine, as ratios to other programs.", no_args_is_help=True)
    group.callback()(_group)  # a group also while it has one command
    group.command("fid")(fid)
    app.add_typer(group, name="bench")


def _group() -> None: ...


def fid(
    images: Annotated[int, typer.Option(min=2, help="Pictures of 64 x 64 on each side.")] = 1000,
    network_images: Annotated[int, typer.Option(min=1, help="Pictures through the full Inception.")] = 32,
    json_: options.Json = False,
) -> None:
    """Time `msd fid` beside clean-fid and scipy on one core, part by part; about two minutes."""
    from msdcli.engine.bench_fid import bench_fid

    result = bench_fid(num_images=images, num_network_images=network_images)
    if json_:
        console.print_json(result)
        return
    rows = [
        [part, *(f"{t[key]:.2f}" for key in ("ours_s", "theirs_s", "ratio")), _apart(t)] for part, t in result.items()
    ]
    console.table(
        f"one core, {images:,} pictures a side", ["", "msd (s)", "clean-fid, scipy (s)", "ratio", "difference"], rows
    )
    console.say("network: random weights of the full architecture; whole: the parts added up for all pictures")


def _apart(timing: dict[str, float]) -> str:
    """How far the two sides' results are apart, where both were computed."""
    return f"{timing['relative_difference']:.1g}" if "relative_difference" in timing else ""
