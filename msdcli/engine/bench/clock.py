"""Clocks for `msd bench`: the networks' forward passes one by one, and what the device can multiply."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from msdcli.diffusion.denoiser import Denoiser
from msdcli.engine.train.precision import dtype, synchronize, timed
from msdcli.objectives import Objective


@contextmanager
def adding(seconds: dict[str, float], name: str, on: torch.device) -> Iterator[None]:
    """Add what happens inside, and all that it starts on the device, to the seconds of `name`."""
    synchronize(on)
    begun = time.perf_counter()
    yield
    synchronize(on)
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begun


class NetworkTimer:
    """Adds up, while `watching` an objective, the seconds that each of its networks is evaluated for, and other parts.

    The device is waited for before and after each; outside of `watching` nothing is timed and nothing waits.
    """

    def __init__(self, on: torch.device) -> None:
        self.on = on
        self.seconds: dict[str, float] = {}
        self._watching = False

    @contextmanager
    def watching(self, objective: Objective) -> Iterator[None]:
        named: dict[int, tuple[str, nn.Module]] = {}
        for name, net in [*objective.nets.items(), *vars(objective).items()]:
            if isinstance(net, nn.Module):
                named.setdefault(id(net), (name, net))
        self._watching = True
        for name, net in named.values():
            net.forward = self._timed(f"{name} forward", net.forward)
            if isinstance(net, Denoiser):
                net.features = self._timed(f"{name} forward", net.features)  # type: ignore[method-assign]
        try:
            yield
        finally:
            self._watching = False
            for _, net in named.values():
                vars(net).pop("forward"), vars(net).pop("features", None)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add what happens inside to the seconds of `name`."""
        with adding(self.seconds, name, self.on) if self._watching else nullcontext():
            yield

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*args: Any, **keys: Any) -> Any:
            with self.part(name):
                return call(*args, **keys)

        return clocked


def peak_flops(precision: str, on: torch.device, *, repeats: int = 5) -> float:
    """Return the most operations per second that a large matrix product reaches, in this type, on the device.

    In float32 that is what convolutions multiply in too, if it is asked for inside `fast_float32`.
    """
    n = 8192 if on.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=on).to(dtype(precision) or torch.float32) for _ in range(2))
    best = min(timed(lambda: a @ b, on) for _ in range(repeats + 1))
    return 2 * n**3 / best


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the least and the greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(mine: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Return the spread of `mine` over `others`, repeat by repeat: they were taken in turn."""
    return spread([a / b for a, b in zip(mine, others, strict=True)])
