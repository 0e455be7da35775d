"""Numbers for people, as reports, plots and model cards write them; imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ONES = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
HUES = [255, 40, 150, 320, 90, 200, 10, 120]  # far apart for neighbours; then by the golden angle


def hue(number: int) -> int:
    """Return the colour of student (or run) `number`, as an angle."""
    return HUES[number] if number < len(HUES) else round(number * 137.508) % 360


def word(count: int) -> str:
    """Return a small number as a word, a larger one with commas."""
    return ONES[count] if 0 <= count < len(ONES) else f"{count:,}"


def plural(count: int, one: str, many: str | None = None) -> str:
    return one if count == 1 else many or f"{one}s"


def counted(count: int, one: str, many: str | None = None) -> str:
    """Return `1 student` or `1,024 students`."""
    return f"{count:,} {plural(count, one, many)}"


def numbered(group: str) -> tuple[str, int | None]:
    """Return (`student` or `class`, number) of such a line; ("", None) of the whole and of what a user has named."""
    found = re.fullmatch(r"(student|class) ([0-9]+)", group)
    return ("", None) if found is None else (found[1], int(found[2]))


def named_students(numbers: Sequence[int]) -> str:
    """Return `student 3`, or `students 0 to 2, 5`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][-1] == number - 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    said = [f"{span[0]} to {span[-1]}" if span[-1] > span[0] else str(span[0]) for span in spans]
    return f"{plural(len(numbers), 'student')} {', '.join(said)}"


def evaluations(steps: int) -> str:
    """Return `one network evaluation`, or how many there are."""
    return f"{word(steps)} network {plural(steps, 'evaluation')}"


def figure(value: float | None) -> str:
    """Return a measured number with the digits that matter."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def three_digits(value: float) -> str:
    """Return a number of 1 or more with three digits that count, and never as a power of ten."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def short(number: float) -> str:
    """Return 151281 as 151 k, 7.03e12 as 7.03 T."""
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{three_digits(number / scale)} {unit}"
    return f"{number:.0f}"


def flop(number: float) -> str:
    """Return 7.03e12 as 7.03 TFLOP."""
    text = short(number)
    return f"{text}FLOP" if " " in text else f"{text} FLOP"


def size(number: float) -> str:
    """Return bytes as KiB, MiB or GiB."""
    if number >= 2**30:
        return f"{number / 2**30:,.2f} GiB"
    return f"{number / 2**20:.0f} MiB" if number >= 2**20 else f"{number / 2**10:.0f} KiB"


def duration(seconds: float) -> str:
    """Return seconds as 48 s, 6 min 10 s or 3 h 20 min."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """Return the lines of a table in Markdown; after the first `left` columns numbers are set to the right."""
    rule = f"|{'---|' * left}{'---:|' * (len(columns) - left)}"
    return [f"| {' | '.join(columns)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def roughly(seconds: float) -> str:
    """Return a time that is estimated: 40 s, 7 min or 3.5 hours."""
    if seconds < 95:
        return f"{seconds:.0f} s" if seconds < 10 else f"{round(seconds / 5) * 5} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def describe_selected(students: Sequence[dict[str, Any]]) -> list[str]:
    """Say which averages finished students are, by their model.json; nothing where they are simply the last ones."""
    found = [model for model in students if "selected" in model]
    if not found:
        return []
    first, at = found[0]["selected"], sorted(model["selected"]["step"] for model in found)
    steps = f"step {at[0]:,}" if at[0] == at[-1] else f"steps {at[0]:,} to {at[-1]:,}"
    some = f"{word(len(found)).capitalize()} of the students {plural(len(found), 'is', 'are')}"
    all_ = "The student is" if len(students) == 1 else "Every student is"
    whose = all_ if len(found) == len(students) else some
    seconds = sum(model["selected"]["seconds"] for model in found)
    return [
        f"{whose} the best of {word(first['of'])} averages that were measured while it trained, by {first['metric']} "
        f"on {first['samples']:,} samples: of {steps} of {found[0]['steps']:,}. A figure flatters what it chose, so "
        f"the result is measured with other noise. Choosing took {duration(seconds)} beside the training."
    ]


def describe_kept(students: Mapping[int, dict[str, Any]]) -> list[str]:
    """Say which finished students came as they were from another run (`partition.method: extend`), by their number and
    model.json; nothing where none did.
    """
    runs = {number: Path(model["kept"]["run"]).name for number, model in students.items() if "kept" in model}
    if not runs:
        return []
    from_ = f"the {plural(len(set(runs.values())), 'run')} {', '.join(sorted(set(runs.values())))}"
    return [
        f"Kept as in {from_}, and not trained in this one: {plural(len(runs), 'student')} {', '.join(map(str, runs))}."
    ]
