"""`msd docs`: the manual, page by page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msdcli import console

FOLDER = Path(__file__).parent.parent / "docs"


def register(app: typer.Typer) -> None:
    app.command("docs")(docs)


def pages() -> dict[str, Path]:
    """Return the pages by topic, in reading order: a page's file name starts with its number."""
    files = sorted(FOLDER.glob("*.md"), key=lambda path: int(path.stem.partition("-")[0]))
    return {path.stem.partition("-")[2]: path for path in files}


def docs(topic: Annotated[str | None, typer.Argument(help="A page; without it, the list of pages.")] = None) -> None:
    """Read the manual: first steps, teachers, data, numbers, clusters, new objectives, troubleshooting, the code."""
    import difflib

    from msdcli.errors import UserError

    found = pages()
    if topic is None:
        titles = [[name, path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")] for name, path in found.items()]
        console.table("manual", ["topic", "about"], titles, text_columns=2)
        console.say("read one: msd docs start")
        return
    if topic not in found:
        near = difflib.get_close_matches(topic, found, n=1)
        raise UserError(
            f"no page about {topic!r}", hint=f"msd docs {near[0]}" if near else f"one of {', '.join(found)}"
        )
    console.page(found[topic].read_text(encoding="utf-8"))
