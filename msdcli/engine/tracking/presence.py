"""Who is at work on a run directory: every process that is holds a file there, and has written its name in it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import IO

from msdcli.rundir import RunDir, lines_of, try_lock

FILE = ".at-work"
PATIENCE = 0.5  # seconds: whoever asks who is there holds the file for an instant


class Presence:
    """The sign that a process is at work on a run; several may be."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def alone(self) -> bool:
        """Whether nobody else is at work. Hold the run's lock: then nobody else comes meanwhile."""
        until = time.monotonic() + PATIENCE
        while not (alone := try_lock(self._file)) and time.monotonic() < until:
            time.sleep(0.05)
        fcntl.flock(self._file, fcntl.LOCK_SH)
        return alone


@contextlib.contextmanager
def attending(run: RunDir) -> Iterator[Presence]:
    """Be one of those at work on the run until the block ends; hold the run's lock to begin."""
    with open(run.root / FILE, "a+", encoding="utf-8") as file:
        if try_lock(file):
            file.truncate(0)  # what is written there is of processes that have gone
        fcntl.flock(file, fcntl.LOCK_SH)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
        file.flush()
        yield Presence(file)


def who_attends(run: RunDir) -> list[str]:
    """Return who is at work on the run, as phrases; empty for nobody."""
    path = run.root / FILE
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return []
    except FileNotFoundError:
        return []
    except OSError:
        known = [line for line in lines_of(path.read_bytes()) if line and {"pid", "host"} <= line.keys()]
        living = [f"process {who['pid']} on {who['host']}" for who in known if _may_live(who["pid"], who["host"])]
        return living or ["another process"]


def _may_live(pid: object, host: object) -> bool:
    """Whether a process may be there still: of other machines nobody knows."""
    if host != socket.gethostname() or not isinstance(pid, int):
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
