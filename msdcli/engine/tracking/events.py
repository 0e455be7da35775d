"""What the engine tells whoever watches: sentences and progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """How far one piece of work is: `done` of `total` units; `losses` are means since the report before."""

    what: str
    done: int
    total: int
    unit: str = "steps"
    losses: dict[str, float] = field(default_factory=dict)
    images_per_second: float = 0.0
    seconds_left: float | None = None


Report = Callable[[Progress | str], None]


# Who shows an answer to a signal at once, the newest last; nobody: it is written to stderr.
answering: list[Callable[[str], None]] = []


def silent(event: Progress | str) -> None:
    """Tell nobody."""
