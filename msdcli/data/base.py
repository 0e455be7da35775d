"""What a data set is: images and conditions, addressed by image number."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from msdcli.errors import UserError
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
    return bool(getattr(data, "has_images", True))


# A part of the data that is kept out of training.


class Subset:
    """Some of a data set's images, in the order of `numbers`."""

    def __init__(self, whole: Dataset, numbers: Tensor) -> None:
        self.whole, self.numbers = whole, numbers
        self.shape, self.class_names = whole.shape, whole.class_names

    def __len__(self) -> int:
        return len(self.numbers)

    def images(self, numbers: Sequence[int]) -> Tensor:
        return self.whole.images(self._theirs(numbers))

    def labels(self, numbers: Sequence[int]) -> Tensor:
        return self.whole.labels(self._theirs(numbers))

    def images_hash(self) -> str:
        """Return a hash of all images of the whole, and of which of them these are."""
        return hashlib.sha256(images_hash(self.whole).encode() + self.numbers.numpy().tobytes()).hexdigest()

    def _theirs(self, numbers: Sequence[int]) -> list[int]:
        found: list[int] = self.numbers[list(numbers)].tolist()
        return found


class StoredSubset(Subset):
    """Some of the images of a data set that keeps them in a file."""

    def stored(self, numbers: Sequence[int]) -> Tensor:
        assert isinstance(self.whole, StoredImages)
        return self.whole.stored(self._theirs(numbers))


def subset(whole: Dataset, numbers: Tensor) -> Subset:
    return (StoredSubset if isinstance(whole, StoredImages) else Subset)(whole, numbers)


def split(data: Dataset, share: float | None) -> tuple[Dataset, Dataset]:
    """Return the images to train on and those to measure against: a `share` of every class that is held out; without
    one, all of them twice. UserError where too few are held out to be measured against.
    """
    if share is None:
        return data, data
    held = held_out(data.labels(range(len(data))), share)
    if len(held) < 2:
        raise UserError(
            f"data.held_out: {share:g} of {len(data):,} images are too few to measure a distance against",
            hint="leave it out: distances are measured against all images",
        )
    rest = torch.ones(len(data), dtype=torch.bool)
    rest[held] = False
    return subset(data, rest.nonzero().flatten()), subset(data, held)


def held_out(labels: Tensor, share: float) -> Tensor:
    """Return the numbers of a `share` of every class's images, in ascending order and the same ones for equal labels:
    of each class one at least, and of a class of one image none.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(derive("split", len(labels))))
    found = []
    for own in (order[labels[order] == k] for k in labels.unique()):
        found.append(own[: max(1, round(share * len(own))) if len(own) > 1 else 0])
    return torch.cat(found).sort().values


# What a data set is, as a name for what is made from it.

FINGERPRINT = 2  # the version of what `fingerprint` hashes: run.json says by which one a run was begun
PROBES = 64  # images that `spread` names
STEP = 1000  # images held at once while all are hashed


@runtime_checkable
class HashedImages(Protocol):
    """A data set that can name all of its images without reading every one of them again."""

    def images_hash(self) -> str:
        """Return a hash of everything that decides the images."""


def fingerprint(data: Dataset) -> str:
    """Return a hash of all that a data set is: what was made from other data is not reused.

    That is the shape, the number and order of the images, every pixel, every label, the classes' names or the prompts,
    and whether samples take the images in turn as they are. Latents are named by the pictures they are of; who made
    them is for the teacher's hash to say. 50,000 pictures of 32x32 take 0.2 s, or nothing where they were decoded
    here.
    """
    data = getattr(data, "pictures", data)
    texts = data.text_hash() if isinstance(data, PromptDataset) else data.class_names
    labels = data.labels(range(len(data))).numpy().tobytes()
    parts = (
        *(FINGERPRINT, list(data.shape), getattr(data, "mixed", False), texts),
        *(len(data), hashlib.sha256(labels).hexdigest(), images_hash(data) if has_images(data) else None),
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def images_hash(data: Dataset) -> str:
    """Return a hash of all images in the type they are kept in."""
    if isinstance(data, HashedImages):
        return data.images_hash()
    read = data.stored if isinstance(data, StoredImages) else data.images
    digest = hashlib.sha256()
    for start in range(0, len(data), STEP):
        digest.update(read(range(start, min(start + STEP, len(data)))).contiguous().numpy().tobytes())
    return digest.hexdigest()


def fingerprint_of_version_1(data: Dataset) -> str:
    """Return what msd 0.1.0 wrote into run.json: labels and 64 images. For resuming its runs, and for nothing new."""
    data = getattr(data, "pictures", data)
    content = data.labels(range(len(data))).numpy().tobytes()
    if isinstance(data, PromptDataset):
        content += data.text_hash().encode()
    if has_images(data):
        content += data.images(spread(len(data))).numpy().tobytes()
    return hashlib.sha256(content).hexdigest()


def spread(count: int) -> list[int]:
    """Return up to 64 image numbers from the first to the last."""
    return sorted({i * (count - 1) // (PROBES - 1) for i in range(PROBES)})


def file_stamp(path: Path) -> list[int]:
    """Return what changes with a file's content: its inode, size, and the times of its content and of its entry.

    The last one nobody can set back: a file that was edited and given its old time (cp -p, rsync, touch -r) is another.
    UserError where the file is gone.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", hint="the same command again, once it is") from None
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
