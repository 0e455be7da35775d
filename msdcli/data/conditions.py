"""Classes without images, for a teacher that is given and stages that look at no real image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Conditions:
    """One row for every class of a teacher; `shape` is that of what it makes."""

    has_images = False
    mixed = True  # rows in turn are classes in turn

    def __init__(self, shape: tuple[int, ...], num_classes: int) -> None:
        self.shape = tuple(shape)
        self.class_names = [str(c) for c in range(num_classes)] if num_classes else ["all"]

    def __len__(self) -> int:
        return len(self.class_names)

    def labels(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(list(numbers), dtype=torch.int64)

    def images(self, numbers: Sequence[int]) -> Tensor:
        raise AssertionError("there are no images")
