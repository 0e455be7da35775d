"""Clocks of work on a device: of what is done in a block, and of the networks' forward passes one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from msdcli.diffusion.denoiser import Denoiser
from msdcli.engine.train.precision import synchronize
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
