"""The unit noise that images are sampled from: image i's depends on the seed and on i alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from msdcli.seeds import derive, generator

WORTH_A_THREAD = 2**18  # normal numbers that take about a millisecond to draw


def image_noise(seed: int, numbers: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Return unit noise [len(numbers), *shape] on the CPU; image i's depends on `seed` and i alone."""
    z = torch.empty(len(numbers), *shape)

    def draw(places: range) -> None:
        for place in places:
            torch.randn(shape, generator=generator("image", seed, numbers[place]), out=z[place])

    threads = min(torch.get_num_threads(), z.numel() // WORTH_A_THREAD) or 1
    shares = [range(i, len(numbers), threads) for i in range(threads)]
    if threads == 1:
        draw(shares[0])
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(draw, shares))
    return z


def step_noise(seed: int, numbers: Sequence[int], shape: tuple[int, ...], steps: int) -> Tensor | None:
    """Return the unit noise between the steps [len(numbers), steps - 1, *shape], None for one step.

    That before step k of image i depends on `seed`, i and k alone.
    """
    if steps == 1:
        return None
    return torch.stack([image_noise(derive("step", k, seed), numbers, shape) for k in range(1, steps)], dim=1)


def noises(
    seed: int, batches: Sequence[tuple[Sequence[int], int]], shape: tuple[int, ...], *, ahead: bool = False
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield `image_noise` and `step_noise` of every batch, which is its numbers and its steps; with `ahead` the next
    ones are drawn while one is used, by a GPU say.
    """

    def draw(batch: tuple[Sequence[int], int]) -> tuple[Tensor, Tensor | None]:
        numbers, steps = batch
        return image_noise(seed, numbers, shape), step_noise(seed, numbers, shape, steps)

    if not ahead:
        yield from map(draw, batches)
        return
    with ThreadPoolExecutor(1) as background:
        drawn = draw(batches[0])
        for batch in batches[1:]:
            following = background.submit(draw, batch)
            yield drawn
            drawn = following.result()
        yield drawn
