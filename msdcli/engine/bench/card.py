"""What was measured on a machine with a card (`tests/gpu/run.sh` writes it) as a table of Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, cast

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from msdcli.engine.tracking.formatting import markdown_table
from msdcli.errors import MissingFileError, UserError

Text = Annotated[str, Field(max_length=200, pattern=r"^[\w .,:;()/=+%*'-]*$")]  # what a table of Markdown may hold
Figure = Annotated[float, Field(ge=0, le=1e30)]
Count = Annotated[int, Field(ge=0, le=2**62)]
_LOOSE = ConfigDict(extra="allow")


@with_config(_LOOSE)
class Way(TypedDict):
    """One way to run the networks of a stage."""

    images_per_second: Figure
    flops_per_second: Figure
    memory_bytes: Count
    counted_bytes: NotRequired[Count]
    ratio: dict[Literal["median", "min", "max"], Figure]


@with_config(_LOOSE)
class Stage(TypedDict):
    """A stage of `msd bench RECIPE --json`."""

    objective: Text
    batch: Count
    micro_batch: Count
    own: Text
    modes: dict[Text, Way]


@with_config(_LOOSE)
class Training(TypedDict):
    """The result of `msd bench RECIPE --json`."""

    recipe: Text
    float32: Text
    parameters: dict[Text, Count]
    peak_flops: dict[Text, Figure]
    stages: Annotated[list[Stage], Field(max_length=100)]
    sampling: dict[str, Any]


@with_config(_LOOSE)
class Measuring(TypedDict):
    """The result of `msd bench measuring RECIPE --json`."""

    recipe: Text
    images: Count
    classes: Count
    students: Count
    seconds: dict[Text, Figure]
    lines: Count
    peak_bytes: Count | None


@with_config(_LOOSE)
class Tests(TypedDict):
    """How the tests marked `gpu` ended."""

    passed: Count
    failed: Annotated[list[Text], Field(max_length=1000)]
    skipped: Count


class Card(TypedDict):
    """The file: the machine, and what was run on it."""

    card: Text
    memory_bytes: Count
    torch: Text
    python: Text
    date: Text
    tests: Tests | None
    training: Annotated[list[Training], Field(max_length=100)]
    measuring: Annotated[list[Measuring], Field(max_length=100)]


_CARD: TypeAdapter[Card] = TypeAdapter(Card)
MOST_BYTES = 2**24


def read(path: Path) -> Card:
    """Read and check a file. UserError where it holds something else."""
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist", hint="bash tests/gpu/run.sh FOLDER on a machine with a card")
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path} is too large for what tests/gpu/run.sh writes")
    try:
        return _CARD.validate_python(json.loads(path.read_text()))
    except (ValueError, RecursionError, ValidationError) as error:
        said = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in _errors(error)[:3]) or str(error)
        raise UserError(f"{path} is not what tests/gpu/run.sh writes ({said[:300]})") from error


def _errors(error: Exception) -> list[Any]:
    return cast("list[Any]", error.errors()) if isinstance(error, ValidationError) else []


def markdown(card: Card) -> str:
    """Return the tables: an update of every stage in every mode, and what figures take."""
    lines = [f"{card['card']}, torch {card['torch']}, {card['date']}.", ""]
    updates = [row for result in card["training"] for stage in result["stages"] for row in _stage(result, stage)]
    figures = [row for found in card["measuring"] for row in _measuring(found)]
    if updates:
        columns = ["an update of", "in", "images/s", "times plain", "of the peak", "GiB", "counted"]
        lines += [*markdown_table(columns, updates, left=2), ""]
    if figures:
        lines += [*markdown_table(["measuring", "s", "images/s"], figures), ""]
    if card["tests"] is not None:
        tests = card["tests"]
        failed = (
            f", {len(tests['failed'])} failed ({', '.join(tests['failed'])})" if tests["failed"] else ", none failed"
        )
        lines.append(f"Tests marked `gpu`: {tests['passed']} passed{failed}, {tests['skipped']} skipped.")
    return "\n".join(lines).rstrip()


def _stage(result: Training, stage: Stage) -> Iterator[list[str]]:
    cut = f" in passes of {stage['micro_batch']}" if stage["micro_batch"] < stage["batch"] else ""
    size = f"{result['parameters'].get('student', 0) / 1e6:.1f} M"
    title = f"{result['recipe']}: {stage['objective']}, {size}, batch {stage['batch']}{cut}"
    for name, way in stage["modes"].items():
        peak = result["peak_flops"].get(name.split()[0])
        yield [
            title,
            f"{name.replace('float32', result['float32'])}{' (own)' if name == stage['own'] else ''}",
            f"{way['images_per_second']:,.0f}",
            f"{way['ratio']['median']:.2f}",
            f"{way['flops_per_second'] / peak:.0%}" if peak else "",
            f"{way['memory_bytes'] / 2**30:.1f}",
            f"{way['counted_bytes'] / 2**30:.1f}" if "counted_bytes" in way else "",
        ]
        title = ""


def _measuring(found: Measuring) -> Iterator[list[str]]:
    for part, seconds in found["seconds"].items():
        what = f"{found['recipe']}: {found['images']:,} images of {found['classes']:,} classes, {part}"
        yield [what, f"{seconds:.1f}", f"{found['images'] / seconds:,.0f}" if seconds else ""]
