"""The checkpoints of one stage: the last few, written in the background, each checked before it is trusted."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import TracebackType

from torch import Tensor

from msdcli.engine import checkpoint
from msdcli.engine.checkpoint import STATE, DamagedError, TrainState
from msdcli.engine.distributed import Group
from msdcli.engine.events import Report
from msdcli.rundir import sweep_temporaries, writing


def path_of(folder: Path, age: int) -> Path:
    """Return the file of a stage's newest checkpoint (age 0), or of the one `age` before it."""
    return folder / (f"state.{age}.safetensors" if age else STATE)


def ages(folder: Path) -> list[int]:
    """Return the ages of the checkpoints that are there, the newest first."""
    older = [path.name.split(".")[1] for path in folder.glob("state.*.safetensors")]
    return [0] * path_of(folder, 0).exists() + sorted(int(age) for age in older if age.isdecimal())


class Keeper:
    """Saves and loads the state of a stage; leaving it as a context waits for what is being written."""

    def __init__(self, state: TrainState, folder: Path, keep: int, group: Group) -> None:
        self.state, self.folder, self.keep, self.group = state, folder, keep, group
        self._saved = time.monotonic()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def seconds(self) -> float:
        """Return the time since the last checkpoint; raise what its writing met with."""
        self._raise()
        return time.monotonic() - self._saved

    def load(self, report: Report) -> None:
        """Take up the newest checkpoint that is whole, if there is one, and say so where a newer one is not."""
        if self.group.leads and self.folder.is_dir():
            sweep_temporaries(self.folder)
        damaged: DamagedError | None = None
        for age in ages(self.folder):
            try:
                self.state.load(path_of(self.folder, age))
            except DamagedError as error:
                damaged = damaged or error
                continue
            if damaged is not None:
                report(f"{damaged.message}; going on from the checkpoint before it, of step {self.state.step}")
            return
        if damaged is not None:
            raise damaged

    def save(self) -> None:
        """Copy the state and write it while training goes on. UserError if it is not finite."""
        self.close()
        self.state.check_finite()
        tensors, numbers = self.state.snapshot()
        if self.group.leads:
            self._thread = threading.Thread(target=self._write, args=(tensors, numbers), name="checkpoint")
            self._thread.start()
        self._saved = time.monotonic()

    def close(self) -> None:
        """Wait until the last checkpoint is on the disk; raise what its writing met with."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    def __enter__(self) -> Keeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._thread is not None:
            self._thread.join()

    def _write(self, tensors: dict[str, Tensor], numbers: dict[str, str]) -> None:
        try:
            with writing(path_of(self.folder, 0)) as temporary:
                checkpoint.write_tensors(temporary, tensors, numbers, hashed=True)
                self._make_room()
        except BaseException as error:  # for the thread that trains
            self._error = error

    def _make_room(self) -> None:
        """Let every checkpoint grow one older, up to the number that is kept; the newest has its name all the while."""
        for age in reversed(ages(self.folder)):
            if age > 0 and age >= self.keep:
                path_of(self.folder, age).unlink()
            if age + 1 < self.keep:
                _also_named(path_of(self.folder, age), path_of(self.folder, age + 1))

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def _also_named(source: Path, target: Path) -> None:
    """Give a file a second name, and take that name from what had it."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # no hard links here: for an instant the file has its new name only
        os.replace(source, target)
