"""`msd docs`: the manual, page by page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from msdcli import console
from msdcli.cli import options

FOLDER = Path(__file__).parent.parent / "docs"


def register(app: typer.Typer) -> None:
    app.command("docs")(docs)


def pages() -> dict[str, Path]:
    """Return the pages by topic, in reading order: a page's file name starts with its number."""
    files = sorted(FOLDER.glob("*.md"), key=lambda path: int(path.stem.partition("-")[0]))
    return {path.stem.partition("-")[2]: path for path in files}


def find(topic: str) -> list[str]:
    """Return the pages meant by a number, a name or its beginning, or else by a word in a title or in the text: of
    several the one that says it most often comes first.
    """
    found, wanted = pages(), topic.strip().lower()
    if not wanted:
        return []
    if wanted in found:
        return [wanted]
    if by_number := [name for name, path in found.items() if wanted in (path.stem.partition("-")[0], path.stem)]:
        return by_number
    if by_prefix := [name for name in found if name.startswith(wanted)]:
        return by_prefix
    word = re.compile(rf"\b{re.escape(wanted)}", re.IGNORECASE)
    texts = {name: path.read_text(encoding="utf-8") for name, path in found.items()}
    titled = [name for name, text in texts.items() if word.search(text.splitlines()[0])]
    counts = {name: len(word.findall(text)) for name, text in texts.items()} if len(wanted) > 1 else {}
    return titled or sorted((name for name in counts if counts[name]), key=lambda name: -counts[name])


def docs(
    topic: Annotated[
        str | None,
        typer.Argument(help="A page's name, number or beginning, or a word; without it, the list of pages."),
    ] = None,
    json_: options.Json = False,
) -> None:
    """Read the manual: first steps, teachers, data, numbers, clusters, new objectives, troubleshooting, the code."""
    import difflib

    from msdcli.errors import UserError

    found = pages()
    if topic is None:
        titles = {name: _title(path) for name, path in found.items()}
        if json_:
            console.print_json([{"topic": name, "about": title} for name, title in titles.items()])
            return
        rows = [[found[name].stem.partition("-")[0], name, title] for name, title in titles.items()]
        console.table("manual", ["", "topic", "about"], rows, text_columns=3)
        console.say("read one: msd docs start, or msd docs 1; msd docs WORD finds what is written about it")
        return
    meant = find(topic)
    if not meant:
        near = difflib.get_close_matches(topic, found, n=1)
        raise UserError(
            f"no page about {topic!r}", hint=f"msd docs {near[0]}" if near else f"one of {', '.join(found)}"
        )
    text = found[meant[0]].read_text(encoding="utf-8")
    if json_:
        console.print_json({"topic": meant[0], "text": text, "others": meant[1:]})
        return
    console.page(text)
    if meant[0] != topic:
        also = f"; {topic!r} is also in {', '.join(meant[1:])}" if len(meant) > 1 else ""
        console.tell(f"this is msd docs {meant[0]}{also}")


def _title(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
