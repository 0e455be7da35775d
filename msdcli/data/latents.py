"""A data set as a latent teacher sees it: the same numbers and classes, latents in the place of pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from msdcli.data.base import Dataset
from msdcli.errors import UserError
from msdcli.noise import image_noise

LATENTS, RECORD = "latents.bin", "latents.json"
DTYPES = {"float16": np.float16, "float32": np.float32}


class Latents:
    """Mean and standard deviation of every latent, memory-mapped from one file [n, 2, c, h, w], in the teacher's units.

    Image `i` is the mean, or mean + std noise with a noise that depends on `seed` and `i` alone. Without a `folder`
    only shape and labels are known: enough where no stage looks at images.
    """

    def __init__(
        self,
        pictures: Dataset,
        shape: tuple[int, ...],
        folder: Path | None = None,
        *,
        posterior: Literal["mean", "sample"] = "sample",
        seed: int = 0,
    ) -> None:
        self.pictures, self.shape, self.class_names = pictures, tuple(shape), pictures.class_names
        self.posterior, self.seed = posterior, seed
        for name in ("prompts", "has_images", "text_hash"):  # of a data set whose conditions are texts
            if hasattr(pictures, name):
                setattr(self, name, getattr(pictures, name))
        self._moments = None if folder is None else self._mapped(folder)

    def __len__(self) -> int:
        return len(self.pictures)

    def labels(self, numbers: Sequence[int]) -> Tensor:
        return self.pictures.labels(numbers)

    def stored(self, numbers: Sequence[int]) -> Tensor:
        """Return the latents in the type they are kept in."""
        assert self._moments is not None, "these latents were not encoded: no stage was said to look at images"
        moments = torch.from_numpy(self._moments[list(numbers)])
        if self.posterior == "mean" or not len(moments):
            return moments[:, 0]
        noise = image_noise(self.seed, numbers, self.shape)
        return (moments[:, 0].float() + moments[:, 1].float() * noise).to(moments.dtype)

    def images(self, numbers: Sequence[int]) -> Tensor:
        return self.stored(numbers).to(torch.float32)

    def _mapped(self, folder: Path) -> np.memmap:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        dtype, shape = DTYPES[record["dtype"]], tuple(record["shape"])
        size = (folder / LATENTS).stat().st_size
        if shape != (len(self), 2, *self.shape) or size != np.prod(shape) * np.dtype(dtype).itemsize:
            hint = f"remove {folder}, and the same command makes it again"
            raise UserError(f"{folder / LATENTS} is damaged", hint=hint)
        return np.memmap(folder / LATENTS, dtype, "r", shape=shape)
