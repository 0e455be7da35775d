"""How fast an export answers, routing included: single requests and batches, students in memory or fetched."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msdcli.engine.export.format import ExportResult, ExportSource

BATCHES = (1, 64)
SECONDS = 0.3  # per figure, and at least
FEWEST, MOST = 3, 200  # requests


def measure(source: ExportSource, exported: ExportResult) -> list[dict[str, Any]]:
    """Time requests of random classes with all students in memory, and with no more than the options allow.

    Without a limit in the options the second is one student at a time. With it, requests of one image go round the
    students, so that they meet the one that was let go.
    """
    options, partition = source.options, source.students.partition
    limited = options.max_resident is not None or options.memory is not None
    most = options.max_resident if limited else 1
    cases: list[tuple[str, int | None, int | None]] = [("all", None, None)]
    if len(partition.parts) > 1 and exported.limited:
        cases.append((_limit(most, options.memory), most, options.memory))
    rows = []
    for resident, most_, memory in cases:
        routed = exported.open(most_, memory)
        for batch in BATCHES:
            source.report(f"speed: batch {batch}, {resident} in memory")
            requests = _requests(partition.parts, batch)
            seconds = _time(routed.sample, requests, warm=len(partition.parts) if resident == "all" else 1)
            rows.append(_row(batch, resident, seconds))
    return rows


def _limit(most: int | None, memory: int | None) -> str:
    said = [] if most is None else [f"{most} at most"]
    return ", ".join([*said, *([] if memory is None else [f"{memory / 2**20:.4g} MiB"])])


def _requests(parts: Sequence[Sequence[int]], batch: int) -> Iterator[list[int]]:
    """Classes of one request after another, the students in turn."""
    number = 0
    while True:
        at = range(number, number + batch)
        yield [parts[i % len(parts)][i // len(parts) % len(parts[i % len(parts)])] for i in at]
        number += batch


def _time(ask: Callable[[list[int]], Any], requests: Iterator[list[int]], *, warm: int) -> list[float]:
    for _ in range(warm):
        ask(next(requests))
    seconds: list[float] = []
    while len(seconds) < MOST and (len(seconds) < FEWEST or sum(seconds) < SECONDS):
        classes = next(requests)
        begun = time.perf_counter()
        ask(classes)
        seconds.append(time.perf_counter() - begun)
    return seconds


def _row(batch: int, resident: str, seconds: Sequence[float]) -> dict[str, Any]:
    ordered = sorted(seconds)
    return {
        "batch": batch,
        "resident": resident,
        "requests": len(seconds),
        "milliseconds": 1000 * statistics.median(ordered),
        "milliseconds_95": 1000 * ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        "images_per_second": batch * len(seconds) / sum(seconds),
    }
