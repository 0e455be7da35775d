"""scikit-learn's handwritten digits (Alpaydin and Kaynak 1998): 1,797 grey 8x8 images, 10 classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from msdcli.recipe.data import DigitsSettings


class Digits:
    """[1, 8, 8] in [-1, 1]; the 17 grey levels are kept exactly."""

    shape = (1, 8, 8)
    mixed = True

    def __init__(self, settings: DigitsSettings) -> None:
        pixels, labels = load_digits(return_X_y=True)
        self._images = torch.from_numpy(pixels).to(torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
        self._labels = torch.from_numpy(labels).to(torch.int64)
        self.class_names = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self._images)

    def images(self, numbers: Sequence[int]) -> Tensor:
        return self._images[list(numbers)]

    def labels(self, numbers: Sequence[int]) -> Tensor:
        return self._labels[list(numbers)]
