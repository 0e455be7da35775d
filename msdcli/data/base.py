"""What a data set is: images and conditions, addressed by image number."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from msdcli.seeds import derive


class Dataset(Protocol):
    """Images of one shape, each with a class. Image `i` is the same image in every process and for ever."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def class_names(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def images(self, numbers: Sequence[int]) -> Tensor:
        """Return float32 [len(numbers), *shape]; pictures lie in [-1, 1]."""

    def labels(self, numbers: Sequence[int]) -> Tensor:
        """Return int64 [len(numbers)]."""


@runtime_checkable
class StoredImages(Protocol):
    """A data set that keeps its images in a file and in fewer bits, too many perhaps for memory as float32."""

    def stored(self, numbers: Sequence[int]) -> Tensor:
        """Return [len(numbers), *shape] in the type they are kept in; `to_float` of it is `images`."""


def to_float(stored: Tensor) -> Tensor:
    """Map 0..255 to [-1, 1]; what is no integer keeps its value, as float32 at least."""
    if stored.dtype == torch.uint8:
        return stored.to(torch.float32) / 127.5 - 1
    return stored.to(torch.float32) if stored.dtype == torch.float16 else stored


def in_turn(data: Dataset, numbers: Sequence[int]) -> list[int]:
    """Return the images that stand for sample `numbers`: all of the data in turn, however many are asked for.

    Files are often sorted by class, and their first few would be of one class: so the turn is shuffled, always in the
    same way. Data drawn by code are `mixed` as they are.
    """
    if getattr(data, "mixed", False):
        return [i % len(data) for i in numbers]
    places = torch.tensor(list(numbers), dtype=torch.int64) % len(data)
    found: list[int] = _order(len(data))[places].tolist()
    return found


@functools.lru_cache(maxsize=4)
def _order(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive("order", count)))


def user_cache() -> Path:
    """Where what is known of files is kept: $XDG_CACHE_HOME/msd, or ~/.cache/msd."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "msd"


@runtime_checkable
class PromptDataset(Protocol):
    """A data set whose conditions are prompts, and whose rows may be without images."""

    prompts: list[str]
    has_images: bool

    def text_hash(self) -> str:
        """Return a hash of all prompts."""


def has_images(data: Dataset) -> bool:
    """Whether there are images beside the conditions."""
    return not isinstance(data, PromptDataset) or data.has_images


PROBES = 64  # images that a fingerprint looks at


def fingerprint(data: Dataset) -> str:
    """Return a hash of the data's content, all labels and some images: what was made from other data is not reused.

    Latents are named by the pictures they are of; who made them is for the teacher's hash to say.
    """
    data = getattr(data, "pictures", data)
    content = data.labels(range(len(data))).numpy().tobytes()
    if isinstance(data, PromptDataset):
        content += data.text_hash().encode()
    if has_images(data):
        some = sorted({i * (len(data) - 1) // (PROBES - 1) for i in range(PROBES)})
        content += data.images(some).numpy().tobytes()
    return hashlib.sha256(content).hexdigest()
