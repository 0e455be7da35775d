"""The checkpoints of one stage: the last few, written in the background, each checked before it is trusted."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType

from msdcli.engine.checkpoints import files as checkpoint_files
from msdcli.engine.checkpoints import storage
from msdcli.engine.checkpoints.files import DamagedError
from msdcli.engine.checkpoints.host_copies import HostCopy
from msdcli.engine.checkpoints.train_state import TrainState
from msdcli.engine.distributed.group import ProcessGroup
from msdcli.engine.tracking.events import Report
from msdcli.rundir import sweep_temporaries

SHARE = 1 / 50  # of the time in which training may be held up by copies of its state


class CheckpointManager:
    """Saves and loads the state of a stage; leaving it as a context waits for what is being written."""

    def __init__(self, state: TrainState, folder: Path, keep: int, group: ProcessGroup) -> None:
        self.state, self.folder, self.group = state, folder, group
        self.writer = storage.writer(folder, keep, group, parts=state.is_sharded)
        self._saved = time.monotonic()
        self._stopped = 0.0  # seconds that training was held up by the last copy
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def due(self, seconds: float) -> bool:
        """Whether the last checkpoint, which must be on the disk, is more than `seconds` old, and so old that copies do
        not take more than their `SHARE` of the time; with 0 seconds always. Raise what its writing met with.

        The leader's clock decides for its group.
        """
        self._raise()
        if not self.group.is_leader or not seconds:
            return self.group.is_leader
        writing = self._thread is not None and self._thread.is_alive()
        return not writing and time.monotonic() - self._saved > max(seconds, self._stopped / SHARE)

    def load(self, report: Report) -> None:
        """Take up the newest checkpoint that is whole, if there is one, and say so where a newer one is not."""
        if self.group.is_leader and self.folder.is_dir():
            sweep_temporaries(self.folder)
        damaged: DamagedError | None = None
        for name in self.group.broadcast([path.name for _, path in checkpoint_files.stored(self.folder)]):
            stored = storage.StoredCheckpoint(self.folder / name)
            try:
                stored.verify(self.group)
                self.state.load(stored)
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
        self.state.check_finite(self.group)
        begun = time.monotonic()
        what = (self.writer.copy(self.state.tensors()), self.state.numbers(), begun)
        self._thread = threading.Thread(target=self._write, args=what, name="checkpoint")
        self._thread.start()
        self._saved = time.monotonic()

    def close(self) -> None:
        """Wait until the last checkpoint is on the disk; raise what its writing met with."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._thread is not None:
            self._thread.join()

    def _write(self, copied: HostCopy, numbers: dict[str, float], begun: float) -> None:
        try:
            tensors = copied.wait()
            self._stopped = time.monotonic() - begun
            self.writer.write(tensors, numbers)
        except BaseException as error:  # for the thread that trains
            self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
