"""scikit-learn's handwritten digits (Alpaydin and Kaynak 1998): 1,797 grey 8x8 images, 10 classes."""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from msdcli.errors import UserError
from msdcli.recipe.data import DigitsSettings

FILE = Path("datasets", "data", "digits.csv.gz")  # in scikit-learn's package: 64 pixels and a label in every line


class Digits:
    """[1, 8, 8] in [-1, 1]; the 17 grey levels are kept exactly."""

    shape = (1, 8, 8)
    mixed = True

    def __init__(self, settings: DigitsSettings) -> None:
        pixels, labels = _read()
        self._images = torch.from_numpy(pixels).to(torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
        self._labels = torch.from_numpy(labels).to(torch.int64)
        self.class_names = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self._images)

    def images(self, numbers: Sequence[int]) -> Tensor:
        return self._images[list(numbers)]

    def labels(self, numbers: Sequence[int]) -> Tensor:
        return self._labels[list(numbers)]


def _read() -> tuple[np.ndarray, np.ndarray]:
    """Return pixels [1797, 64] and labels, as scikit-learn's `load_digits` does, without importing it for one table:
    that takes half a second in every process.
    """
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise UserError("data digits come with scikit-learn, which is not installed", hint="pip install scikit-learn")
    path = Path(found.submodule_search_locations[0]) / FILE
    if not path.is_file():  # a scikit-learn that keeps it elsewhere
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        return pixels, labels
    with gzip.open(path, "rt", encoding="ascii") as file:
        table = np.array([line.split(",") for line in file.read().split()], dtype=np.float64)
    return table[:, :-1], table[:, -1].astype(np.int64)
