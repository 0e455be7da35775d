"""The random draws of one turn of training: the same numbers whenever and wherever they are asked for."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from msdcli.data.base import StoredImages, to_float
from msdcli.diffusion.device_batch import free_share
from msdcli.seeds import generator

if TYPE_CHECKING:
    from msdcli.data.base import Dataset


class Source:
    """Where a student's draws come from: its part of the data, on the device where it fits, and the teacher's pairs.

    `classes` are the student's conditions; `pairs` is (z, y, c) of the teacher, or None where no stage needs them; the
    images with the numbers `without` are left out. With `mirror` every image that is drawn is mirrored, left to right,
    half of the times.
    """

    def __init__(
        self,
        data: Dataset,
        classes: Sequence[int],
        *,
        pairs: tuple[Tensor, Tensor, Tensor] | None = None,
        without: Tensor | None = None,
        mirror: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape, self.mirror = data.shape, mirror
        self.device = torch.device(device)
        self.classes = torch.tensor(list(classes), device=self.device)
        labels = data.labels(range(len(data)))
        kept = torch.isin(labels, self.classes.cpu())
        if without is not None:
            kept[without] = False
        self.numbers = kept.nonzero().flatten()
        self._data = data
        self.image_labels = labels[self.numbers].to(self.device)
        self._pairs = None if pairs is None else [t.to(self.device) for t in pairs]
        self._pairs_of_part: Tensor | None = None

    def only(self, classes: Sequence[int]) -> Source:
        """Return the source of those of these classes that the part has, with the pairs of these classes alone."""
        wanted, found = torch.tensor(list(classes), device=self.device), copy.copy(self)
        kept = torch.isin(self.image_labels, wanted)
        found.numbers, found.image_labels = self.numbers[kept.cpu()], self.image_labels[kept]
        found.classes = self.classes[torch.isin(self.classes, wanted)]
        if self._pairs is not None:
            of = torch.isin(self._pairs[2], wanted)
            found._pairs = [t[of] for t in self._pairs]
        found._pairs_of_part = None
        found.__dict__.pop("_images", None)  # those of all classes
        return found

    @functools.cached_property
    def _images(self) -> Tensor | None:
        """All images, on the device where they fit; read when an objective first asks for one."""
        return resident(self._data, self.numbers, self.device)

    def images(self, index: Tensor) -> Tensor:
        """Return the images at places `index` of the student's part, float32 on the device."""
        if self._images is not None:
            return to_float(self._images[index])
        assert isinstance(self._data, StoredImages)
        return to_float(self._data.stored(self.numbers[index.cpu()].tolist()).to(self.device))

    def pairs_of(self, only_part: bool) -> tuple[Sequence[Tensor], Tensor]:
        """Return the pairs and the numbers of those that may be drawn."""
        assert self._pairs is not None, "this objective needs the teacher's pairs"
        if not only_part:
            return self._pairs, torch.arange(len(self._pairs[0]), device=self.device)
        if self._pairs_of_part is None:
            self._pairs_of_part = torch.isin(self._pairs[2], self.classes).nonzero().flatten()
        return self._pairs, self._pairs_of_part


def resident(data: Dataset, numbers: Tensor, device: torch.device) -> Tensor | None:
    """Return the images of `numbers` on the device, in the type they are kept in, or None to fetch every batch.

    What is stored in a file stays there, memory-mapped, on a CPU, where all processes share it, and on a GPU unless it
    fits into half of this process' share of the memory that is free.
    """
    if not isinstance(data, StoredImages):
        return data.images(numbers.tolist()).to(device)
    free = free_share(device)
    if not free or len(numbers) * data.stored(numbers[:1].tolist()).nbytes > free // 2:
        return None
    chunks = [data.stored(chunk.tolist()).to(device) for chunk in numbers.split(10_000)]
    return torch.cat(chunks)


class Draws:
    """The draws of one turn: functions of key (seed, student, stage, step), turn and purpose, and of nothing else.

    `part` (i, n) is the i-th of n equal slices of the batch: what one process, or one of several passes through a
    network, takes on. The slices together are the batch that one process would draw, image for image.
    """

    def __init__(
        self, source: Source, batch: int, key: tuple[int | str, ...], turn: int, part: tuple[int, int] = (0, 1)
    ) -> None:
        assert batch % part[1] == 0, f"a batch of {batch} has no {part[1]} equal slices"
        self.source = source
        self.batch = batch
        self.key = key
        self.turn = turn
        self.part = part

    def of_step(self) -> Draws:
        """The draws that all turns of the step share."""
        return Draws(self.source, self.batch, self.key, -1, self.part)

    def normal(self, purpose: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return unit normal numbers [slice, *shape]; an image's shape unless given."""
        size = (self.batch, *(self.source.shape if shape is None else shape))
        return self._own(torch.randn(size, generator=self._generator(purpose), device=self.source.device))

    def uniform(self, purpose: str) -> Tensor:
        """Return uniform numbers in [0, 1), [slice]."""
        return self._own(torch.rand(self.batch, generator=self._generator(purpose), device=self.source.device))

    def real(self) -> tuple[Tensor, Tensor]:
        """Return real images of the student's part and their classes."""
        index = self._index("real", len(self.source.numbers), self.batch)
        y = self.source.images(index)
        if self.source.mirror:
            turned = self.uniform("mirror") < 0.5
            y = torch.where(turned[:, None, None, None], y.flip(-1), y)
        return y, self.source.image_labels[index]

    def labels(self, how: str) -> Tensor:
        """Return conditions of the student's part: `uniform` over classes, or as frequent as in the `data`."""
        if how == "data":
            return self.source.image_labels[self._index("labels", len(self.source.numbers), self.batch)]
        return self.source.classes[self._index("labels", len(self.source.classes), self.batch)]

    def one_of(self, purpose: str, count: int) -> int:
        """Return a number below `count`, the same for all slices; of `count` steps in a row each has another."""
        *key, step = self.key
        assert isinstance(step, int), "the last part of a key is the step"
        order = torch.randperm(count, generator=generator(*key, step // count, self.turn, purpose))
        return int(order[step % count])

    def pairs(self, only_part: bool, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the slice of `count` pairs (or a batch): unit noise z, the teacher's sample y from it, its class."""
        (z, y, c), allowed = self.source.pairs_of(only_part)
        index = allowed[self._index("pairs", len(allowed), count or self.batch)]
        return z[index], y[index], c[index]

    def _index(self, purpose: str, high: int, count: int) -> Tensor:
        device = self.source.device
        return self._own(torch.randint(high, (count,), generator=self._generator(purpose), device=device))

    def _own(self, whole: Tensor) -> Tensor:
        """Cut this slice out of what was drawn for the whole batch."""
        index, count = self.part
        size = len(whole) // count
        return whole[index * size : (index + 1) * size]

    def _generator(self, purpose: str) -> Generator:
        return generator(*self.key, self.turn, purpose, device=self.source.device)


class Batch(Draws):
    """The draws of one turn in a loop of your own: your images and their classes, noise from torch's generator.

    `y` [batch, *shape] float32 and `c` [batch] int64 are real images; conditions of samples are `c` too. `pairs` is
    (z, y, c) of the teacher, for objectives that use them. Make one for every turn.
    """

    def __init__(self, y: Tensor, c: Tensor, *, pairs: tuple[Tensor, Tensor, Tensor] | None = None) -> None:
        self.y, self.c, self.batch, self.part, self._pairs = y, c, len(y), (0, 1), pairs

    def of_step(self) -> Draws:
        return self

    def normal(self, purpose: str, shape: tuple[int, ...] | None = None) -> Tensor:
        return torch.randn(self.batch, *(self.y.shape[1:] if shape is None else shape), device=self.y.device)

    def uniform(self, purpose: str) -> Tensor:
        return torch.rand(self.batch, device=self.y.device)

    def real(self) -> tuple[Tensor, Tensor]:
        return self.y, self.c

    def labels(self, how: str) -> Tensor:
        return self.c

    def one_of(self, purpose: str, count: int) -> int:
        return int(torch.randint(count, ()))

    def pairs(self, only_part: bool, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        assert self._pairs is not None, "this objective needs the teacher's pairs"
        return self._pairs
