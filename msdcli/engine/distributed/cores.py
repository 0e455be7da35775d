"""The cores that a process leaves idle: calls side by side in threads, with what each of them gives left as it is."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from msdcli.engine.distributed.interrupt import WORKER

MOST = 4  # calls at once: each holds what a batch needs

Item = TypeVar("Item")
Result = TypeVar("Result")


def spare(device: torch.device) -> int:
    """Return how many calls of this process's number of threads the CPU has cores for; 1 on any other device, and in a
    worker, whose neighbours have the other cores.
    """
    if device.type != "cpu" or WORKER in os.environ or not hasattr(os, "sched_getaffinity"):
        return 1
    return max(1, min(MOST, len(os.sched_getaffinity(0)) // torch.get_num_threads()))


def side_by_side(call: Callable[[Item], Result], items: Iterable[Item], count: int) -> Iterator[Result]:
    """Yield `call` of every item, in order, `count` of them at work at once.

    Each is called with as many threads as this process has: its sums have the order that they have alone. A call that
    fails ends it as it would alone; those that have not begun are left.
    """
    if count == 1:
        yield from map(call, items)
        return
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(threads,))
    try:
        begun = deque[Future[Result]]()
        for item in items:
            begun.append(pool.submit(call, item))
            if len(begun) > count:  # what is done and not yet asked for takes memory too
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
