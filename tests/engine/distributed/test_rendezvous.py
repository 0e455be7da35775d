"""A process that hangs is named by those that wait for it, after a time that is long and ends; one that died is not."""

from __future__ import annotations

import os
import signal
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch
from torch import distributed

from msdcli.engine.distributed import group, rendezvous
from msdcli.errors import ElsewhereError, UserError, WorkerError

CPU = torch.device("cpu")


@pytest.fixture
def second_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], None]], int]]:
    """Fork a process of number 1, which joins and then does what it is told; this one has number 0. Return its pid."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rendezvous, "_OTHERS_NOTICE", 0.1)
    started = list[int]()

    def start(then: Callable[[], None]) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads of other tests, which this child leaves alone
            pid = os.fork()
        monkeypatch.setenv("RANK", "0" if pid else "1")
        if pid:
            started.append(pid)
            return pid
        try:
            with group.join_torchrun():
                then()
                time.sleep(60)
        finally:
            os._exit(1)

    yield start
    for pid in started:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if distributed.is_initialized():
        distributed.destroy_process_group()


def timeout_of(processes: object) -> timedelta:
    found: timedelta = processes._get_backend(CPU).options._timeout  # type: ignore[attr-defined]
    return found


def test_who_does_not_come_is_named(second_process: Callable[[Callable[[], None]], int]) -> None:
    pid = second_process(lambda: None)

    def steps() -> None:
        with group.join_torchrun() as joined:
            assert timeout_of(joined._votes) == rendezvous.PATIENCE == timedelta(hours=1)
            gradients = timeout_of(distributed.distributed_c10d._get_default_group())
            assert rendezvous.PATIENCE < gradients < 2 * rendezvous.PATIENCE
            assert timeout_of(joined._hosts) > timedelta(days=7), "of what the leader prepares"
            joined._votes._get_backend(CPU)._set_default_timeout(timedelta(seconds=0.2))  # type: ignore[union-attr]
            assert joined.vote(0) == 0, "nobody waits for this one"
            joined.vote(0)

    said = rf"^process 1 \(pid {pid} on .+\) has not answered for 60 min 0 s: stopped, hanging"
    with pytest.raises(WorkerError, match=said):
        steps()


def test_who_died_is_gone_and_has_said_why(second_process: Callable[[Callable[[], None]], int]) -> None:
    def fails() -> None:
        raise UserError("too small")

    def steps() -> None:
        with group.join_torchrun() as joined:
            joined.broadcast(1)
            joined.gather(1)

    second_process(fails)
    with pytest.raises(ElsewhereError) as ended:
        steps()
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("said", "kind", "sentence"),
    [
        (
            "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1c0",
            UserError,
            "two processes .* on one GPU",
        ),
        ("[pair.cc:534] Connection closed by peer [127.0.0.1]:5", WorkerError, "another process of this run has ended"),
        ("Timed out waiting 1800000ms for recv operation to complete", WorkerError, "have not heard of each other"),
    ],
)
def test_what_torch_says_is_one_sentence(said: str, kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=sentence), rendezvous.somebody_may_die():
        raise RuntimeError(said)
