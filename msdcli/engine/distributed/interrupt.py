"""Ctrl-C, SIGTERM and SIGUSR1 end a step, not a file: the loop checkpoints and stops."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from msdcli.errors import Interrupted, Preempted

SCHEDULER = (signal.SIGTERM, signal.SIGUSR1)  # what a cluster's scheduler sends before it takes the machine away


class StopRequest:
    """Whether somebody asked for an end, and by which signal."""

    signal: int | None = None

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def error(self, where: str) -> Interrupted:
        """Return what to raise when the state is safe."""
        kind = Interrupted if self.signal == signal.SIGINT else Preempted
        return kind(f"stopped {where}; the same command continues")


@contextlib.contextmanager
def interruptible() -> Iterator[StopRequest]:
    """Turn SIGINT, SIGTERM and SIGUSR1 into `stop.requested`; a second SIGINT acts at once.

    A second SIGTERM does not: a scheduler and a launcher may both send one.
    """
    stop = StopRequest()

    def request(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    with _handled((signal.SIGINT, *SCHEDULER), request):
        yield stop


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """Raise Preempted wherever SIGTERM or SIGUSR1 arrives: for work whose artifacts are whole or absent."""

    def act(number: int, frame: FrameType | None) -> None:
        raise Preempted("stopped; the same command continues")

    with _handled(SCHEDULER, act):
        yield


@contextlib.contextmanager
def _handled(numbers: tuple[int, ...], handler: signal._HANDLER) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
