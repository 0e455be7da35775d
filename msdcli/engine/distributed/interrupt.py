"""Ctrl-C, SIGTERM and SIGUSR1 end a step, not a file: the loop checkpoints and stops."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from msdcli.engine.tracking.events import answering
from msdcli.errors import Interrupted, Preempted

SCHEDULER = (signal.SIGTERM, signal.SIGUSR1)  # what a cluster's scheduler sends before it takes the machine away


WORKER = "MSD_WORKER"  # in the environment of a process that another msd started and speaks for


# Signals that `preemptible` has raised: where Python or a library throws exceptions away (in a destructor, behind
# hasattr), training meets them at its next step.
_unmet: list[int] = []


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
    stop.signal = _unmet[-1] if _unmet else None

    def request(number: int, frame: FrameType | None) -> None:
        first, stop.signal = not stop.requested, number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        if first:
            _answer("stopping after this step; the checkpoint will be kept")

    with _handled((signal.SIGINT, *SCHEDULER), request):
        yield stop


def _answer(text: str) -> None:
    """Say it at once: on the live display, else on stderr past every buffer and lock that interrupted code may hold."""
    if os.environ.get(WORKER):
        return  # the process that started this worker has said it
    if answering:
        answering[-1](text)
        return
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """Raise Preempted wherever SIGTERM or SIGUSR1 arrives: for work whose artifacts are whole or absent."""

    _unmet.clear()

    def act(number: int, frame: FrameType | None) -> None:
        _unmet.append(number)
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
