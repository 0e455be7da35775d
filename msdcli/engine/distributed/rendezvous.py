"""How the processes of a run meet, how long they wait for each other, and what is said when one of them is missing."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from torch import distributed

from msdcli.engine.tracking.formatting import duration
from msdcli.errors import UserError, WorkerError

# How long a training step waits for a process that does not come: longer than the slowest one compiles its networks, or
# the leader writes, while the others are done (NCCL alone would end them after ten minutes).
PATIENCE = timedelta(hours=1)
# Devices wait a little longer than hosts, so that who is missing is said before NCCL ends the process.
_ON_DEVICES = 1.1
_AS_LONG_AS_IT_TAKES = timedelta(days=30)  # for the leader makes pairs, or measures, while the others wait
_STORE_ANSWERS = timedelta(seconds=10)  # or went away with the process that kept it
_OTHERS_NOTICE = 3.0  # seconds in which all that wait for the same process stop waiting
_TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)


def meet(backend: str) -> None:
    """Wait for the other processes. UserError where the launcher's variables lead to nobody."""
    try:
        distributed.init_process_group(backend, timeout=PATIENCE * _ON_DEVICES)
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
        raise UserError(
            f"the processes of this run could not meet at {where}: {str(error).splitlines()[0][:200]}",
            hint="torchrun sets MASTER_ADDR and MASTER_PORT; for one process, unset WORLD_SIZE and RANK",
        ) from error
    own = f"process {distributed.get_rank()} (pid {os.getpid()} on {socket.gethostname()})"
    _store().set(_name(distributed.get_rank()), own)


def on_hosts(*, patient: bool = True) -> distributed.ProcessGroup:
    """Return a group of all processes that waits as long as it takes, or unless `patient` as a training step does; all
    must ask.
    """
    timeout = _AS_LONG_AS_IT_TAKES if patient else PATIENCE
    group = distributed.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, distributed.ProcessGroup), "every process is in this group"
    return group


@contextmanager
def somebody_may_die() -> Iterator[None]:
    """Say in one sentence that a neighbour is gone, or which one does not answer."""
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if "Duplicate GPU" in said:  # NCCL
            raise UserError(
                "two processes of this run compute on one GPU", hint="as many processes as GPUs: --nproc-per-node"
            ) from error
        raise WorkerError(_missing() if _TIMED_OUT.search(said) else "another process of this run has ended") from error


def _missing() -> str:
    """Say who is waited for: those who, unlike this process, have not stopped waiting either."""
    waited, names = duration(PATIENCE.total_seconds()), list[str]()
    with suppress(RuntimeError, ValueError):
        store, size = _store(), distributed.get_world_size()
        store.set_timeout(_STORE_ANSWERS)
        store.set(_waits(distributed.get_rank()), "")
        time.sleep(_OTHERS_NOTICE)
        late = [rank for rank in range(size) if not store.check([_waits(rank)])]
        names = [store.get(_name(rank)).decode() for rank in late]
    if not names:
        return f"the processes of this run have not heard of each other for {waited}"
    verb = "has" if len(names) == 1 else "have"
    return f"{', '.join(names)} {verb} not answered for {waited}: stopped, hanging, or far slower than the others"


def failed_before(rank: int, code: int) -> int | None:
    """Note that this process ends with `code`; return the code of the one that ended before it, if one did."""
    try:
        store = _store()
        store.set_timeout(_STORE_ANSWERS)
        first, said = store.compare_set("msd/ended", "", f"{rank} {code}").decode().split()
    except (RuntimeError, ValueError):
        return code  # the store went away with whoever kept it
    return None if int(first) == rank else int(said)


def _store() -> Any:
    return distributed.distributed_c10d._get_default_store()


def _name(rank: int) -> str:
    return f"msd/name/{rank}"


def _waits(rank: int) -> str:
    return f"msd/waits/{rank}"
