"""Whatever images come from, in the batches that a feature network is shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msdcli.data.images import WHOLE, ImageArray, ImageFiles, Share
from msdcli.data.opening import Images, open_images
from msdcli.errors import UserError

ImageBatch = np.ndarray | torch.Tensor | tuple[Any, Any]
ImageSource = str | Path | Images | Iterable[ImageBatch]


def drawn_numbers(have: int, wanted: int, seed: int) -> np.ndarray:
    """Return the numbers of `wanted` of `have` images of a file, ascending.

    They are those that NVlabs' fid.py draws (EDM's ImageFolderDataset with `max_size` and `random_seed`): the first of
    files sorted by name are often of one class.
    """
    order = np.arange(have)
    if wanted < have:
        np.random.RandomState(seed % 2**31).shuffle(order)
    return np.sort(order[:wanted])


def opened(images: ImageSource) -> Any:
    if isinstance(images, str | Path):
        return closing(open_images(images))
    return nullcontext(images)


def batches_of(
    source: Images | Iterable[ImageBatch],
    batch_size: int,
    workers: int,
    limit: int | None,
    seed: int,
    floats: bool,
    share: Share,
) -> Iterator[tuple[torch.Tensor, np.ndarray | None, np.ndarray]]:
    """Batches as the network wants them, uint8 [N, 3, H, W] or floats, with labels and numbers, whatever the source."""
    if isinstance(source, ImageFiles | ImageArray):
        numbers = None if limit is None else drawn_numbers(len(source), limit, seed).tolist()
        for batch in source.batches(batch_size, workers=workers, numbers=numbers, share=share):
            labels = None if source.labels is None else source.labels[batch.numbers]
            yield as_tensor(batch.images, floats), labels, batch.numbers
        return
    assert share == WHOLE, "a generator is shared out by whoever makes it"
    start = 0
    for item in source:
        images, labels = item if isinstance(item, tuple) else (item, None)
        images = as_tensor(images, floats)[: None if limit is None else limit - start]
        labels = None if labels is None else np.asarray(labels)[: len(images)]
        yield images, labels, np.arange(start, start + len(images))
        start += len(images)
        if start == limit:
            return


def as_tensor(images: np.ndarray | torch.Tensor, floats: bool) -> torch.Tensor:
    if floats:
        if not (isinstance(images, torch.Tensor) and images.is_floating_point()):
            raise UserError("This network measures what a model draws, as floats, and not the pictures of a file.")
        return images
    x = torch.from_numpy(images).permute(0, 3, 1, 2) if isinstance(images, np.ndarray) else images
    if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] not in (1, 3):
        raise UserError(f"Images must be uint8 with 1 or 3 channels, not {x.dtype} {list(x.shape)}.")
    return x.contiguous().expand(-1, 3, -1, -1)
