"""Processes of a run beside this one, on its machine: workers that take whichever student is free, and one that makes
ahead what is needed later.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import IO

import torch

from msdcli.diffusion.device_batch import PROCESSES
from msdcli.engine.distributed.device import num_devices
from msdcli.engine.distributed.interrupt import WORKER, interruptible
from msdcli.engine.tracking.events import Progress, Report, silent
from msdcli.errors import DONE, INTERRUPTED, STOPPED, USER, Interrupted, Preempted, UserError, WorkerError
from msdcli.rundir import RunDir

REPORTS = "MSD_WORKER_REPORTS"  # the descriptor that a worker's reports go to
LINGER = 5.0  # seconds that an ended worker's last reports are waited for
MOST_SAID = 20_000  # bytes of a worker's last words

Events = queue.Queue["Progress | str | Worker"]


class Worker:
    """One `msd distill RUN WORDS`: its reports go to `events`, and itself when it has ended."""

    def __init__(
        self, run_dir: RunDir, environment: dict[str, str], events: Events, words: Sequence[str] = ("--worker",)
    ) -> None:
        self.errors: IO[bytes] = tempfile.TemporaryFile("w+b")  # noqa: SIM115  (read when it has ended)
        reading, writing = os.pipe()  # of our own: any library may print to standard output
        self.reports: IO[bytes] = os.fdopen(reading, "rb")
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "msdcli", "distill", str(run_dir.root), *words],
                stdin=subprocess.PIPE,  # ends when this process does, and the worker with it: see die_with_parent
                stdout=subprocess.DEVNULL,
                stderr=self.errors,
                env=environment | {REPORTS: str(writing), WORKER: "1"},
                pass_fds=[writing],
                start_new_session=True,  # Ctrl-C reaches the parent alone, which passes it on once
            )
        finally:
            os.close(writing)
        listening = threading.Thread(target=self._listen, args=(events,), daemon=True)
        listening.start()
        threading.Thread(target=self._wait, args=(listening, events), daemon=True).start()

    def _listen(self, events: Events) -> None:
        with self.reports:
            for line in self.reports:
                if (event := _decode(line)) is not None:
                    events.put(event)

    def _wait(self, listening: threading.Thread, events: Events) -> None:
        self.process.wait()
        listening.join(LINGER)  # a process that the worker started may hold the pipe open
        events.put(self)

    def close(self) -> None:
        """Let go of the ended worker's pipes."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.errors.close()

    def failure(self) -> BaseException | None:
        """Return what the ended worker stopped with, if it failed."""
        code = self.process.returncode
        if code == DONE:
            return None
        self.errors.seek(max(0, self.errors.seek(0, os.SEEK_END) - MOST_SAID))
        said = self.errors.read().decode(errors="replace").strip()
        if code == INTERRUPTED:
            return Interrupted("stopped; the same command continues")
        if code == STOPPED:
            return Preempted("stopped; the same command continues")
        if code == USER:
            return UserError(said.rpartition("error: ")[2])
        return WorkerError(f"a worker ended with code {code}:\n{said}")


def run(run_dir: RunDir, count: int, device: torch.device, report: Report, *, threads: int | None = None) -> None:
    """Start `count` workers on a run, pass on what they report and wait for them all.

    `threads` is each one's share of the CPU where nothing else says how many: it is told, for sums of floating-point
    numbers depend on how many threads add them. Raises the worst that one of the workers ended with: Interrupted,
    UserError, or WorkerError for a bug or a killed process. A signal to stop is passed on to them.
    """
    events: Events = queue.Queue()
    if threads is not None:
        each = "one thread" if threads == 1 else f"{threads} threads"
        report(
            f"{count} processes of {each} each share the CPU; `threads: {threads}` makes a run repeatable to the bit"
        )
    with interruptible() as stop:
        workers = [Worker(run_dir, _environment(i, count, device, threads), events) for i in range(count)]
        ended: list[Worker] = []
        told = False
        while len(ended) < count:
            try:
                event = events.get(timeout=0.2)
            except queue.Empty:
                event = ""
            if isinstance(event, Worker):
                ended.append(event)
            elif event:
                report(event)
            if stop.requested and not told:
                told = True
                for worker in workers:
                    worker.process.send_signal(stop.signal or signal.SIGINT)
    failures = [failure for worker in ended if (failure := worker.failure())]
    for worker in ended:
        worker.close()
    for kind in (Interrupted, WorkerError, UserError):
        for failure in failures:
            if isinstance(failure, kind):
                raise failure
    if stop.requested:
        raise stop.error("all workers")


@contextlib.contextmanager
def beside(run_dir: RunDir, words: Sequence[str], device: torch.device, report: Report) -> Iterator[Report]:
    """Let one more process do `msd distill RUN WORDS` while the block works; give a report for the block, which passes
    on what that process reports, too.

    The block's end waits for it, and a block that fails stops it. That it fails itself is told and ends nothing: what
    it makes ahead is made, and fails, where it is needed.
    """
    events: Events = queue.Queue()
    worker = Worker(run_dir, _environment(0, 1, device), events, words)
    ended = list[Worker]()

    def pass_on(wait: float = 0.0) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                event = events.get(timeout=wait) if wait else events.get_nowait()
                ended.append(event) if isinstance(event, Worker) else report(event)

    def tell(event: Progress | str) -> None:
        pass_on()
        report(event)

    try:
        yield tell
        while not ended:
            pass_on(0.2)
        if (failure := worker.failure()) is not None:
            report(f"made later, for the process that was to make it ahead failed: {failure}")
    finally:
        if not ended:
            _stop(worker)
        worker.close()


def _stop(worker: Worker) -> None:
    """Let a worker stop as Ctrl-C does; one that does not is killed."""
    worker.process.send_signal(signal.SIGINT)
    try:
        worker.process.wait(LINGER)
    except subprocess.TimeoutExpired:
        worker.process.kill()


def _environment(number: int, count: int, device: torch.device, threads: int | None = None) -> dict[str, str]:
    """Give worker `number` of `count` one GPU where there are several, and its share of the CPU and of the GPU."""
    environment = dict(os.environ)
    devices = num_devices(device)
    environment[PROCESSES] = str(len(range(number % devices, count, devices)))
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    if devices > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(devices)]
        environment["CUDA_VISIBLE_DEVICES"] = names[number % len(names)]
    return environment


# The worker's side.


def die_with_parent() -> None:
    """End this process at once when the one that started it is gone: its end of standard input closes."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def to_parent() -> Report:
    """Return what reports to the process that started this worker, and to nobody where none did."""
    number = os.environ.pop(REPORTS, "")
    if not number.isdecimal():
        return silent
    os.set_inheritable(int(number), False)
    file = os.fdopen(int(number), "wb", buffering=0)

    def report(event: Progress | str) -> None:
        file.write(json.dumps(event if isinstance(event, str) else asdict(event)).encode() + b"\n")

    return report


def _decode(line: bytes) -> Progress | str | None:
    """Return the event of a line; None for a line that is none."""
    try:
        value = json.loads(line)
        return value if isinstance(value, str) else Progress(**value)
    except (ValueError, TypeError):
        return None
