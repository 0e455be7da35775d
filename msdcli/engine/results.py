"""What the functions behind `msd distill` return: each says in a line what it is, and is the path of its run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from msdcli.engine.measure.rows import Measurement
from msdcli.engine.measure.teacher import Verdict
from msdcli.rundir import RunDir


@dataclass(frozen=True)
class DistillResult:
    """What `distill` did: the run, its measurement (None for prompts and without data) and picture, both None
    where only some students were asked for, and what is left.
    """

    run: RunDir
    measurement: Measurement | None
    grid: Path | None
    unfinished: list[int]

    def __fspath__(self) -> str:
        """The run directory, wherever a path is asked for."""
        return str(self.run.root)

    def __repr__(self) -> str:
        left = f", unfinished students {self.unfinished}" if self.unfinished else ""
        return f"DistillResult({str(self.run.root)!r}, {self.measurement}{left})"


@dataclass(frozen=True)
class TeachResult:
    """A teacher alone: its run, its measurement and what it says, and a picture of its samples."""

    run: RunDir
    measurement: Measurement
    verdict: Verdict
    grid: Path

    def __fspath__(self) -> str:
        return str(self.run.root)

    def __repr__(self) -> str:
        return f"TeachResult({str(self.run.root)!r}, {self.verdict.state}, {self.measurement})"
