"""A look at pictures before anything is made of them: how large, grey or colour, how bright, how many of each class."""

from __future__ import annotations

import math
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from msdcli.data.base import held_out
from msdcli.data.files.labels import empty_classes
from msdcli.data.folder import BadPicture, PictureFiles, listed, refusal
from msdcli.errors import UserError

MOST = 2000  # pictures that are decoded: spread over all of them, of which there may be a million
FEW = 30  # pictures of a class below which a network learns little but these


@dataclass(frozen=True)
class Survey:
    """What pictures are like. `sizes` are width and height as they lie; `mean` and `deviation` are of all numbers of
    the pictures as the recipe makes them, in [-1, 1], and None where none can be used.
    """

    path: str
    pictures: int
    looked_at: int
    sizes: list[tuple[tuple[int, int], int]]  # the most frequent first
    grey: int  # of those that were looked at, how many have no colour
    mean: float | None
    deviation: float | None
    class_names: list[str]
    per_class: list[int]
    bad: list[BadPicture]
    held_out: int = 0  # of all pictures, how many the recipe keeps out of training

    def lines(self) -> list[str]:
        """Return what was seen, for people."""
        colour = (
            "grey"
            if self.grey == self._decoded
            else "colour"
            if not self.grey
            else f"{self.grey:,} grey, others in colour"
        )
        sizes = [
            f"{width}x{height}" + ("" if n == self._decoded else f" ({n:,})") for (width, height), n in self.sizes[:5]
        ]
        more = f", and {len(self.sizes) - 5:,} other sizes" if len(self.sizes) > 5 else ""
        looked = "" if self.looked_at == self.pictures else f"; {self.looked_at:,} of {self.pictures:,} were looked at"
        found = [f"{', '.join(sizes)}{more}, {colour}{looked}"] if self.sizes else []
        if self.deviation is not None:
            found.append(f"mean {self.mean:.3f}, standard deviation {self.deviation:.3f} (in [-1, 1])")
        low, high = min(self.per_class), max(self.per_class)
        each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        count = len(self.class_names)
        found.append(f"{count:,} {'class' if count == 1 else 'classes'} of {each} pictures")
        if self.held_out:
            found.append(f"{self.held_out:,} pictures are held out of training: distances are measured against these")
        return found

    def remarks(self, sigma_data: float | None = None) -> list[str]:
        """Return what deserves a look before hours are spent on these pictures."""
        found = []
        if sigma_data is not None and self.deviation and not 0.7 < self.deviation / sigma_data < 1.4:
            found.append(
                f"their standard deviation is {self.deviation:.2f}, and teacher.sigma_data is {sigma_data:g}: "
                f"teacher.sigma_data={self.deviation:.2f} suits them"
            )
        if empty := empty_classes(np.repeat(np.arange(len(self.per_class)), self.per_class), len(self.per_class)):
            found.append(f"{len(empty):,} of {len(self.per_class):,} classes have no picture")
        few = [name for name, n in zip(self.class_names, self.per_class, strict=True) if 0 < n < FEW]
        if few:
            named = ", ".join(few[:5]) + (", ..." if len(few) > 5 else "")
            found.append(
                f"{len(few):,} {'class has' if len(few) == 1 else 'classes have'} fewer than {FEW} pictures: {named}"
            )
        if self.bad:
            found.append(f"{len(self.bad):,} of {self.looked_at:,} pictures are bad and will be left out")
            found += listed(self.path, self.bad)
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "pictures": self.pictures,
            "looked_at": self.looked_at,
            "sizes": [{"width": w, "height": h, "pictures": n} for (w, h), n in self.sizes],
            "grey": self.grey,
            "mean": self.mean,
            "standard_deviation": self.deviation,
            "classes": dict(zip(self.class_names, self.per_class, strict=True)),
            "held_out": self.held_out,
            "bad": {b.name: b.reason for b in self.bad},
        }

    @property
    def _decoded(self) -> int:
        return sum(n for _, n in self.sizes)


def survey(pictures: PictureFiles, most: int = MOST) -> Survey:
    """Look at up to `most` pictures, spread over all, and count the classes of all."""
    count = len(pictures)
    numbers = range(count) if count <= most else [i * count // most for i in range(most)]
    sizes, grey, bad = Counter[tuple[int, int]](), 0, list[BadPicture]()
    sums = np.zeros(3)  # of pixels: how many, their values and squares
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        for size, is_grey, numbers_of in pool.map(lambda number: _seen(pictures, number), numbers):
            if size is not None:
                sizes[size] += 1
                grey += is_grey
            if isinstance(numbers_of, BadPicture):
                bad.append(numbers_of)
            else:
                sums += numbers_of
    labels, share = pictures.labels(range(count)), pictures.settings.held_out
    per_class = np.bincount(labels.numpy(), minlength=len(pictures.class_names)).tolist()
    mean = deviation = None
    if sums[0]:
        mean = float(sums[1] / sums[0])
        deviation = math.sqrt(max(0.0, float(sums[2] / sums[0]) - mean * mean))
    return Survey(
        *(pictures.settings.path, count, len(numbers), sizes.most_common(), grey, mean, deviation),
        *(pictures.class_names, per_class, bad, 0 if share is None else len(held_out(labels, share))),
    )


def _seen(pictures: PictureFiles, number: int) -> tuple[tuple[int, int] | None, bool, np.ndarray | BadPicture]:
    """Return size as it lies, whether it is grey, and the sums of what the recipe makes of it."""
    try:
        raw = pictures.raw(number)
    except UserError as error:
        return None, False, BadPicture(pictures.name(number), error.message)
    size, grey = (raw.shape[1], raw.shape[0]), bool((raw == raw[:, :, :1]).all())
    made = pictures.fitted(number, raw)
    if isinstance(made, BadPicture):
        return size, grey, made
    x = made / 127.5 - 1
    return size, grey, np.array([x.size, x.sum(), np.square(x).sum()])


def check(pictures: PictureFiles, most: int = MOST) -> Survey:
    """Look at pictures. UserError where a run would refuse them."""
    found = survey(pictures, most)
    if found.bad and (pictures.settings.on_bad == "refuse" or len(found.bad) == found.looked_at):
        raise refusal(pictures.settings, found.bad, of=found.looked_at)
    return found
