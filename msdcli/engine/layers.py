"""Which blocks of a U-Net cost the least to leave out (LAPTOP-Diff, Zhang et al. 2024, arXiv 2404.11098).

What leaving a block out costs is E lambda(sigma) |D - D_without|^2 on noisy data, one pass per block; costs of several
blocks nearly add up. So the blocks to leave out are a knapsack: the least cost that saves enough, of parameters, or of
the time that each block takes on this device, which is what users pay for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from msdcli.data.base import Dataset
from msdcli.diffusion import denoiser as d
from msdcli.engine.train.counting import num_parameters
from msdcli.engine.train.precision import timed
from msdcli.nets.unet import ResidualBlock, SkipBlock, leave_out, put
from msdcli.seeds import generator

IMAGES = 128  # that costs are measured on
REPEATS = 9  # of every block's time


@dataclass(frozen=True)
class BlockCost:
    """A block that can be left out: its cost, and what is saved without it as a share of the whole network."""

    name: str
    cost: float
    saved: float


def cheapest(blocks: Sequence[BlockCost], needed: float) -> list[str] | None:
    """Return the names whose costs add up to the least while they save at least `needed`; None if all save less.

    Exact: of all sums of costs and savings only those are kept that no other betters in both (Nemhauser and Ullmann).
    """
    front: list[tuple[float, float, tuple[str, ...]]] = [(0.0, 0.0, ())]  # cost, saved, names; both ascending
    for block in blocks:
        more = [(cost + block.cost, saved + block.saved, (*names, block.name)) for cost, saved, names in front]
        best, kept = -1.0, []
        for one in sorted([*front, *more], key=lambda entry: (entry[0], -entry[1])):
            if one[1] > best:
                kept.append(one)
                best = one[1]
        front = kept
    return next((list(names) for _, saved, names in front if saved >= needed), None)


def removable(teacher: d.Denoiser) -> list[str]:
    """Return the names of the blocks that can be left out."""
    return [name for name, block in teacher.net.named_modules() if isinstance(block, ResidualBlock)]


def by_parameters(teacher: d.Denoiser, data: Dataset) -> list[BlockCost]:
    """Measure what every block costs; saved is its share of the parameters."""
    total = num_parameters(teacher)
    saved = {}
    for name in removable(teacher):
        block = teacher.net.get_submodule(name)
        assert isinstance(block, ResidualBlock)
        saved[name] = (num_parameters(block) - num_parameters(SkipBlock(block))) / total
    return [BlockCost(name, cost, saved[name]) for name, cost in costs(teacher, data).items()]


def by_latency(teacher: d.Denoiser, data: Dataset) -> list[BlockCost]:
    """Measure what every block costs; saved is what an evaluation of one image takes less here without it."""
    seconds = times(teacher)
    whole = seconds.pop("")
    found = costs(teacher, data)
    return [BlockCost(name, cost, max(0.0, 1 - seconds[name] / whole)) for name, cost in found.items()]


@contextmanager
def without(teacher: d.Denoiser, name: str) -> Iterator[None]:
    """Leave a block out for a while."""
    block = leave_out(teacher.net, name)
    try:
        yield
    finally:
        put(teacher.net, name, block)


@torch.no_grad()
def costs(teacher: d.Denoiser, data: Dataset) -> dict[str, float]:
    """Return E lambda(sigma) |D - D_without|^2 of every block, on noisy data at teacher score matching's levels."""
    x, sigma, c = noisy(data, next(teacher.parameters()).device)
    whole, weight = teacher(x, sigma, c), d.edm_weight(sigma, teacher.sigma_data)
    found = {}
    for name in removable(teacher):
        with without(teacher, name):
            error = d.image_mean((teacher(x, sigma, c) - whole).square())
        found[name] = (weight * error).mean().item()
    return found


def noisy(data: Dataset, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return noisy data, their noise levels and conditions; the same in every process."""
    draws = generator("layers")
    numbers = [i * len(data) // IMAGES for i in range(IMAGES)]
    y, c = data.images(numbers), data.labels(numbers)
    sigma = d.lognormal(torch.randn(IMAGES, generator=draws), P_mean=-1.2, P_std=1.2)
    x = y + d.per_image(sigma, y) * torch.randn(y.shape, generator=draws)
    return x.to(device), sigma.to(device), c.to(device)


@torch.no_grad()
def times(teacher: d.Denoiser) -> dict[str, float]:
    """Return the seconds of an image without each block, and of the whole network as "": the least of turns."""
    device = next(teacher.parameters()).device
    x, sigma = torch.zeros(1, *teacher.shape, device=device), torch.ones(1, device=device)
    c = torch.zeros(1, dtype=torch.int64, device=device)
    took: dict[str, list[float]] = {name: [] for name in ["", *removable(teacher)]}

    for repeat in range(-1, REPEATS):
        for name, seconds in took.items():
            with without(teacher, name) if name else nullcontext():
                teacher(x, sigma, c)
                if repeat >= 0:
                    seconds.append(timed(lambda: teacher(x, sigma, c), device))
    return {name: min(seconds) for name, seconds in took.items()}
