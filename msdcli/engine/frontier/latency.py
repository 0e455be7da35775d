"""How long a request takes, alone and as one of a batch, for the networks of a frontier and for their teacher."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from msdcli.diffusion.denoiser import Denoiser
from msdcli.engine.distributed import device
from msdcli.engine.search import built
from msdcli.engine.train.precision import timed_in_turn
from msdcli.recipe.networks import NetworkSettings

BATCH = 64
WARM_UP, REPEATS = 5, 60


@torch.no_grad()
def measure(
    networks: Mapping[str, NetworkSettings], like: Denoiser, on: torch.device, *, repeats: int = REPEATS
) -> dict[str, dict[str, float]]:
    """Return seconds of one evaluation, by name: `request` of one image alone, `image` of each of a batch of 64.

    Medians; the networks take turns, so that what else the machine does meets all of them. `like` has their image's
    shape, classes and sigma_data. Random weights take as long as learnt ones.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in networks}
    made = {name: built(settings, like).to(on).eval() for name, settings in networks.items()}
    for what, batch in (("request", 1), ("image", BATCH)):
        x, sigma = torch.randn(batch, *like.shape, device=on), torch.ones(batch, device=on)
        classes = torch.zeros(batch, dtype=torch.int64, device=on)
        calls = {name: partial(net, x, sigma, classes) for name, net in made.items()}
        for name, seconds in timed_in_turn(calls, on, repeats, warm_up=WARM_UP).items():
            found[name][what] = statistics.median(seconds) / batch
    return found


def machine(on: torch.device) -> dict[str, Any]:
    """Return what a latency depends on beside the network: the processor, its threads, and torch."""
    name = device.name_of(on) if on.type == "cuda" else processor()
    return {"name": name, "threads": torch.get_num_threads(), "torch": str(torch.__version__), "cores": os.cpu_count()}


def processor() -> str:
    """Return what the processor is called."""
    found = Path("/proc/cpuinfo")
    for line in found.read_text(encoding="utf-8", errors="replace").splitlines() if found.is_file() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
