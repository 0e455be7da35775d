"""What a data set is: images and conditions, addressed by image number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

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
