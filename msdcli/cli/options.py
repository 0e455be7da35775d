"""Arguments that several verbs share."""

from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[str, typer.Argument(help="A recipe file, a run directory, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of recipe keys, e.g. stages.0.steps=50.")
]
Run = Annotated[Path, typer.Argument(help="A run directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the number and nothing else.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done, write nothing.")]


def parse_bytes(text: str) -> int:
    """Return the number of bytes in `2GB`, `512MiB` or `1000`. UserError for anything else."""
    import re

    from msdcli.errors import UserError

    units = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?) ?([kmgt]?i?)b?", text.strip().lower())
    if found is None or found[2] not in units or float(found[1]) <= 0:
        raise UserError(f"{text!r} is no amount of memory", hint="for instance 2GB or 512MiB")
    return int(float(found[1]) * units[found[2]])
