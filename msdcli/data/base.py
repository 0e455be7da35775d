"""What a data set is: images and conditions, addressed by image number."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


class Dataset(Protocol):
    """Images of one shape, each with a class. Image `i` is the same image in every process and for ever."""

    shape: tuple[int, ...]
    class_names: list[str]

    def __len__(self) -> int: ...

    def images(self, numbers: Sequence[int]) -> Tensor:
        """Return float32 [len(numbers), *shape]; pictures lie in [-1, 1]."""

    def labels(self, numbers: Sequence[int]) -> Tensor:
        """Return int64 [len(numbers)]."""


@runtime_checkable
class EightBit(Protocol):
    """A data set that keeps its pictures in 8 bits, too many perhaps for memory as float32."""

    def pixels(self, numbers: Sequence[int]) -> Tensor:
        """Return uint8 [len(numbers), *shape]; `to_float` of it is `images`."""


def to_float(pixels: Tensor) -> Tensor:
    """Map 0..255 to [-1, 1]; what is float already stays as it is."""
    return pixels.to(torch.float32) / 127.5 - 1 if pixels.dtype == torch.uint8 else pixels


PROBES = 64  # images that a fingerprint looks at


def fingerprint(data: Dataset) -> str:
    """Return a hash of the data's content, all labels and some images: what was made from other data is not reused."""
    labels = data.labels(range(len(data))).numpy()
    some = sorted({i * (len(data) - 1) // (PROBES - 1) for i in range(PROBES)})
    return hashlib.sha256(labels.tobytes() + data.images(some).numpy().tobytes()).hexdigest()
