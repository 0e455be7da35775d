"""The unit noise that images are sampled from: image i's depends on the seed and on i alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from msdcli.seeds import generator

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


def noises(
    seed: int, batches: Sequence[Sequence[int]], shape: tuple[int, ...], *, ahead: bool = False
) -> Iterator[Tensor]:
    """Yield the `image_noise` of every batch; with `ahead` the next one is drawn while one is used, by a GPU say."""
    if not ahead:
        yield from (image_noise(seed, numbers, shape) for numbers in batches)
        return
    with ThreadPoolExecutor(1) as background:
        z = image_noise(seed, batches[0], shape)
        for numbers in batches[1:]:
            following = background.submit(image_noise, seed, numbers, shape)
            yield z
            z = following.result()
        yield z
