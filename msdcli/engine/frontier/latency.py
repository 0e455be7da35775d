"""How long a request takes, alone and as one of a batch, for the networks of a frontier and for their teacher."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from msdcli import nets
from msdcli.diffusion.denoiser import Denoiser
from msdcli.engine.train.precision import synchronize
from msdcli.recipe.networks import NetworkSettings

BATCH = 64
WARM_UP, REPEATS = 5, 60


def measure(
    networks: Mapping[str, NetworkSettings], like: Denoiser, on: torch.device, *, repeats: int = REPEATS
) -> dict[str, dict[str, float]]:
    """Return seconds of one evaluation, by name: `request` of one image alone, `image` of each of a batch of 64.

    Medians; the networks take turns, so that what else the machine does meets all of them. `like` has their image's
    shape, classes and sigma_data. Random weights take as long as learnt ones.
    """
    built = {name: _built(settings, like).to(on).eval() for name, settings in networks.items()}
    found: dict[str, dict[str, float]] = {name: {} for name in built}
    for what, batch in (("request", 1), ("image", BATCH)):
        x, sigma = torch.randn(batch, *like.shape, device=on), torch.ones(batch, device=on)
        classes = torch.zeros(batch, dtype=torch.int64, device=on)
        times: dict[str, list[float]] = {name: [] for name in built}
        for repeat in range(-WARM_UP, repeats):
            for name, net in built.items():
                seconds = _seconds(net, (x, sigma, classes), on)
                if repeat >= 0:
                    times[name].append(seconds)
        for name, seconds_ in times.items():
            found[name][what] = statistics.median(seconds_) / batch
    return found


@torch.no_grad()
def _seconds(net: Denoiser, inputs: tuple[torch.Tensor, ...], on: torch.device) -> float:
    synchronize(on)
    begun = time.perf_counter()
    net(*inputs)
    synchronize(on)
    return time.perf_counter() - begun


def _built(settings: NetworkSettings, like: Denoiser) -> Denoiser:
    net = nets.build(settings, shape=like.shape, num_classes=like.num_classes, sigma_data=like.sigma_data)
    net.prompts = like.prompts
    return net


def machine(on: torch.device) -> dict[str, Any]:
    """Return what a latency depends on beside the network: the processor, its threads, and torch."""
    name = torch.cuda.get_device_name(on) if on.type == "cuda" else processor()
    return {"name": name, "threads": torch.get_num_threads(), "torch": str(torch.__version__), "cores": os.cpu_count()}


def processor() -> str:
    """Return what the processor is called."""
    found = Path("/proc/cpuinfo")
    for line in found.read_text(encoding="utf-8", errors="replace").splitlines() if found.is_file() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
