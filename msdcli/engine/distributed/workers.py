"""Several students at once on one machine: worker processes that take whichever student is free."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict
from typing import IO

import torch

from msdcli.engine.distributed.interrupt import interruptible
from msdcli.engine.tracking.events import Progress, Report
from msdcli.errors import DONE, INTERRUPTED, USER, Interrupted, UserError, WorkerError
from msdcli.rundir import RunDir

Events = queue.Queue["Progress | str | Worker"]


class Worker:
    """One `msd distill RUN --worker`: its reports go to `events`, and itself when it has ended."""

    def __init__(self, run_dir: RunDir, environment: dict[str, str], events: Events) -> None:
        self.errors: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  (read when it has ended)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "msdcli", "distill", str(run_dir.root), "--worker"],
            stdin=subprocess.PIPE,  # ends when this process does, and the worker with it: see die_with_parent
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the parent alone, which passes it on once
        )
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def _listen(self, events: Events) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            events.put(_decode(line))
        self.process.wait()
        events.put(self)

    def close(self) -> None:
        """Let go of the ended worker's pipes."""
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            if pipe is not None:
                pipe.close()

    def failure(self) -> BaseException | None:
        """Return what the ended worker stopped with, if it failed."""
        code = self.process.returncode
        if code == DONE:
            return None
        self.errors.seek(0)
        said = self.errors.read().strip()
        if code == INTERRUPTED:
            return Interrupted("stopped; the same command continues")
        if code == USER:
            return UserError(said.removeprefix("error: "))
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
        workers = [Worker(run_dir, _environment(i, device, threads), events) for i in range(count)]
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


def _environment(number: int, device: torch.device, threads: int | None = None) -> dict[str, str]:
    """Give each worker one GPU where there are several, and its share of the CPU."""
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    if device.type == "cuda" and device.index is None and torch.cuda.device_count() > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
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


def encode(event: Progress | str) -> str:
    """Return an event as a line of JSON."""
    return json.dumps(event if isinstance(event, str) else asdict(event))


def _decode(line: str) -> Progress | str:
    value = json.loads(line)
    return value if isinstance(value, str) else Progress(**value)
