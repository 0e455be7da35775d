"""Pictures of the user's own: from files as they lie (`PictureFiles`), or decoded once (`DecodedPictures`)."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from msdcli.data.base import Dataset, file_stamp, to_float
from msdcli.data.files.labels import checked
from msdcli.data.images import ImageArray, ImageFiles
from msdcli.data.opening import is_there, open_images
from msdcli.data.webdataset import TarFiles
from msdcli.errors import UserError
from msdcli.foreign import shown
from msdcli.recipe.data import FolderSettings

FILTERS = {
    "box": Image.Resampling.BOX,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
PIXELS, RECORD = "pixels.bin", "data.json"
SHOWN, NAMED = 20, 5  # bad pictures, and names of one cause where there are more


@dataclass(frozen=True)
class BadPicture:
    """A picture that cannot be used: its name and why; its width and height where they are what is wrong."""

    name: str
    reason: str
    size: tuple[int, int] | None = None


class PictureFiles:
    """The files as they lie: numbered by name, classed by folder or dataset.json, decoded when asked for."""

    def __init__(self, settings: FolderSettings) -> None:
        self.settings, path = settings, Path(settings.path)
        # Before anything of the file is read: what replaces it later has another stamp.
        opened = [file_stamp(path)] if path.is_file() else None
        self._source = open_images(path)
        self._opened = self._source.stamps if isinstance(self._source, TarFiles) else opened
        classes, self.class_names = _classes(self._source, settings)
        self._labels = torch.from_numpy(classes)
        self._check_expected()
        self.size = settings.size or self._first_size()
        self.shape = (settings.channels, self.size, self.size)

    def __len__(self) -> int:
        return len(self._source)

    def labels(self, numbers: Sequence[int]) -> Tensor:
        return self._labels[list(numbers)]

    def images(self, numbers: Sequence[int]) -> Tensor:
        if not len(numbers):
            return torch.zeros(0, *self.shape)
        return to_float(torch.stack([torch.from_numpy(self._good(n)) for n in numbers]))

    def picture(self, number: int) -> np.ndarray | BadPicture:
        """Return image `number`, uint8 [channels, size, size], or why it cannot be used."""
        try:
            return self.fitted(number, self.raw(number))
        except UserError as error:
            return BadPicture(self.name(number), error.message)

    def fitted(self, number: int, raw: np.ndarray) -> np.ndarray | BadPicture:
        """Bring image `number` as it lies, uint8 RGB [H, W, 3], to [channels, size, size], or say why not."""
        if self.settings.labels and isinstance(self._source, TarFiles) and number in self._source.unlabelled:
            return BadPicture(self.name(number), self._source.unlabelled[number])
        try:
            return _fitted(raw, self.settings, self.size)
        except UserError as error:
            return BadPicture(self.name(number), error.message, (raw.shape[1], raw.shape[0]))

    def raw(self, number: int) -> np.ndarray:
        """Return image `number` as it lies, uint8 RGB [H, W, 3]. UserError where it cannot be read."""
        return self._source.picture(number) if isinstance(self._source, ImageFiles) else self._array[number]

    @property
    def names(self) -> list[str]:
        """The names of all pictures, in order."""
        return [self.name(number) for number in range(len(self))]

    def name(self, number: int) -> str:
        return _name(self._source, number)

    def caption(self, number: int) -> str | None:
        """Return the text that comes with image `number` (WebDataset: .txt or .json), if there is one."""
        return self._source.caption(number) if isinstance(self._source, TarFiles) else None

    def decode_all(self, workers: int) -> Iterator[np.ndarray | BadPicture]:
        """Yield every image in order; `workers` threads decode ahead."""
        ahead: deque[Any] = deque()
        with ThreadPoolExecutor(workers) as pool:
            for number in range(len(self)):
                ahead.append(pool.submit(self.picture, number))
                if len(ahead) > 8 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def fingerprint(self) -> str:
        """Name what the pictures and their classes are, without reading pictures: the classes, their names, and every
        file by its name below the folder and its stamp.

        dataset.json is in it by what it says. Zips, arrays and shards are as they were when they were opened.
        """
        return self._named(self._opened or self._stamps())

    def changed(self, fingerprint: str) -> bool:
        """Whether the files are others than those that had this fingerprint."""
        return self._named(self._stamps()) != fingerprint

    def _named(self, stamps: Sequence[Any]) -> str:
        said = json.dumps([self.class_names, stamps])
        return hashlib.sha256(said.encode() + self._labels.numpy().tobytes()).hexdigest()

    def _stamps(self) -> list[Any]:
        path, source = Path(self.settings.path), self._source
        if isinstance(source, TarFiles):
            return [(shard.name, *file_stamp(shard)) for shard in source.shards]
        return [file_stamp(path)] if path.is_file() else [_named_stamp(path, name) for name in source.names]

    def _good(self, number: int) -> np.ndarray:
        picture = self.picture(number)
        if isinstance(picture, BadPicture):
            raise refusal(self.settings, [picture])
        return picture

    @functools.cached_property
    def _array(self) -> np.ndarray:
        return np.concatenate([batch.images for batch in self._source.batches(1024)])

    def _first_size(self) -> int:
        """The side of the first picture that can be decoded."""
        if isinstance(self._source, ImageArray):
            return min(self._source.shape[1:3])
        bad: list[BadPicture] = []
        for number in range(len(self)):
            try:
                return int(min(self.raw(number).shape[:2]))
            except UserError as error:
                if self.settings.on_bad == "refuse":
                    raise
                bad.append(BadPicture(self.name(number), error.message))
        raise refusal(self.settings, bad, of=len(self))

    def _check_expected(self) -> None:
        for what, wanted, found in (
            ("pictures", self.settings.count, len(self)),
            ("classes", self.settings.classes, len(self.class_names)),
        ):
            if wanted is not None and wanted != found:
                raise UserError(f"{self.settings.path} holds {found:,} {what}, the recipe expects {wanted:,}")


class DecodedPictures:
    """The decoded whole: 8-bit pixels memory-mapped from one file, so that all processes of a machine share them."""

    def __init__(self, folder: Path) -> None:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        self.class_names: list[str] = record["class_names"]
        self.shape = tuple(record["shape"])
        self._labels = torch.tensor(record["labels"], dtype=torch.int64)
        shape = (len(self._labels), *self.shape)
        if (folder / PIXELS).stat().st_size != np.prod(shape):
            hint = f"remove {folder}, and the same command makes it again"
            raise UserError(f"{folder / PIXELS} is damaged", hint=hint)
        self._pixels = np.memmap(folder / PIXELS, np.uint8, "r", shape=shape)
        self._images_hash: str | None = record.get("sha256")

    def __len__(self) -> int:
        return len(self._labels)

    def labels(self, numbers: Sequence[int]) -> Tensor:
        return self._labels[list(numbers)]

    def stored(self, numbers: Sequence[int]) -> Tensor:
        return torch.from_numpy(self._pixels[list(numbers)])

    def images(self, numbers: Sequence[int]) -> Tensor:
        return to_float(self.stored(numbers))

    def images_hash(self) -> str:
        """Return the hash of all pixels, taken while they were decoded."""
        if self._images_hash is None:  # decoded before hashes were kept
            self._images_hash = hashlib.sha256(self._pixels.data).hexdigest()
        return self._images_hash


class ExpectedPictures:
    """What a recipe says of data that are not here: enough to plan a run."""

    def __init__(self, settings: FolderSettings) -> None:
        assert settings.size and settings.classes and settings.count
        self.shape = (settings.channels, settings.size, settings.size)
        self.class_names = list(map(str, range(settings.classes))) if settings.labels else ["all"]
        self._count = settings.count

    def __len__(self) -> int:
        return self._count

    def images(self, numbers: Sequence[int]) -> Tensor:
        raise AssertionError("a plan reads no data")

    labels = images


def expected(settings: FolderSettings) -> Dataset:
    """Return the data, or, where they are missing and the recipe says enough of them, their stand-in."""
    if is_there(settings.path):
        return PictureFiles(settings)
    if not (settings.size and settings.classes and settings.count):
        raise UserError(
            f"{settings.path} does not exist", hint="data.size, data.classes and data.count let a plan do without it"
        )
    return ExpectedPictures(settings)


def refusal(settings: FolderSettings, bad: Sequence[BadPicture], *, of: int | None = None) -> UserError:
    """The error that lists pictures which cannot be used: one by one, or by cause where there are many; `of` is how
    many were looked at.
    """
    count = "1 picture" if len(bad) == 1 else f"{len(bad):,} pictures"
    among = "" if of is None else f"all {of:,}" if len(bad) == of > 1 else f"{len(bad):,} of {of:,}"
    what = f"{among} pictures" if among else count
    return UserError(
        f"{settings.path}: {what} cannot be used\n" + "\n".join(f"  {line}" for line in listed(settings.path, bad)),
        hint=_cure(settings, bad, every=len(bad) == of),
    )


def _cure(settings: FolderSettings, bad: Sequence[BadPicture], *, every: bool) -> str:
    """How such pictures become usable; leaving them out is no cure where all of them are bad."""
    sizes, found = {b.size for b in bad if b.size is not None}, list[str]()
    if every and settings.size and len(sizes) == 1 and len(set(side := next(iter(sizes)))) == 1:
        found.append(f"data.size={side[0]} takes them as they are")
    if settings.size and settings.pad == "none" and all(max(size) <= settings.size for size in sizes) and sizes:
        found.append(f"data.pad=edge fills them up to {settings.size}x{settings.size}")
    if not settings.crop and any(width != height for width, height in sizes):
        found.append("data.crop=true cuts out their central square")
    if settings.resize == "none" and sizes:
        found.append("data.resize=lanczos scales them")
    if sizes and not settings.size:
        found.append("data.size says another size than the first picture's")
    if settings.on_bad == "refuse" and not every:
        found.append("data.on_bad=skip leaves them out")
    return "; ".join(found) or "check data.path: none of its pictures can be read"


def listed(path: str, bad: Sequence[BadPicture]) -> list[str]:
    """Return bad pictures of the folder at `path` as lines: one by one, or by cause where there are many."""
    reasons = [b.reason.removeprefix(f"{path}: {b.name} ") for b in bad]
    if len(bad) <= SHOWN:
        return [f"{b.name}: {reason}" for b, reason in zip(bad, reasons, strict=True)]
    causes, said = dict[str, list[str]](), dict[str, set[str]]()
    for b, reason in zip(bad, reasons, strict=True):
        causes.setdefault(_cause(reason), []).append(b.name)
        said.setdefault(_cause(reason), set()).add(reason)
    most_first = sorted(causes.items(), key=lambda item: -len(item[1]))
    lines = [f"{len(names):,}: {_one(said[cause], cause)}: {_few(names)}" for cause, names in most_first[:SHOWN]]
    return lines + ([f"and {len(most_first) - SHOWN:,} more causes"] if len(most_first) > SHOWN else [])


def _one(reasons: set[str], cause: str) -> str:
    """The reason that all pictures of a cause have, or the cause."""
    return next(iter(reasons)) if len(reasons) == 1 else cause


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def _cause(reason: str) -> str:
    """What many pictures' reasons have in common: neither where the damage is, nor which wrong size it is."""
    return re.sub(r"^is \d+x\d+, ", "is ", reason.partition(":")[0].removesuffix("."))


def _classes(source: ImageFiles | ImageArray, settings: FolderSettings) -> tuple[np.ndarray, list[str]]:
    """The class of every image, and the classes' names."""
    if not settings.labels:
        return np.zeros(len(source), np.int64), ["all"]
    if source.labels is not None:
        known = source.labels.clip(min=0) if isinstance(source, TarFiles) else source.labels  # -1: `fitted` says why
        found = checked(known, functools.partial(_name, source), settings.path)
        return found, list(map(str, range(int(found.max()) + 1)))
    # EDM's unlabelled sets have folders too, which mean nothing; their dataset.json says so.
    folders = source.classes if isinstance(source, ImageFiles) and not source.described else [""]
    if "" in folders:
        raise UserError(
            f"{settings.path} gives no classes: neither every picture in a folder named after its class, nor labels",
            hint="data.labels=false makes them one class",
        )
    names = sorted(set(folders))
    number = {name: i for i, name in enumerate(names)}
    return np.array([number[folder] for folder in folders], np.int64), list(map(shown, names))


def _named_stamp(folder: Path, name: str) -> tuple[Any, ...]:
    """The stamp of a picture; a link that leads nowhere is a bad picture, and stays one."""
    try:
        return (name, *file_stamp(folder / name))
    except UserError:
        if (folder / name).is_symlink():
            return (name, "a link to nothing")
        raise


def _name(source: ImageFiles | ImageArray, number: int) -> str:
    """What a picture is called, as it can be printed and stored."""
    return shown(source.names[number]) if isinstance(source, ImageFiles) else f"image {number}"


def _fitted(picture: np.ndarray, settings: FolderSettings, size: int) -> np.ndarray:
    """Bring uint8 RGB [H, W, 3] to [channels, size, size], only in the ways that the recipe states."""
    height, width = picture.shape[:2]
    if height != width and settings.crop:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        picture = picture[top : top + side, left : left + side]
    if settings.pad != "none" and max(picture.shape[:2]) <= size:
        picture = _padded(picture, size, settings.pad)
    if picture.shape[:2] != (size, size):
        picture = _resized(picture, settings, size)
    if settings.channels == 1:
        return np.asarray(Image.fromarray(picture).convert("L"))[None]
    return np.ascontiguousarray(picture.transpose(2, 0, 1))


def _padded(picture: np.ndarray, size: int, pad: str) -> np.ndarray:
    """Put a picture into the middle of a square of `size`, the odd pixel to its right and below."""
    rest = [size - side for side in picture.shape[:2]]
    around = [*((r // 2, r - r // 2) for r in rest), (0, 0)]
    if pad == "edge":
        return np.pad(picture, around, mode="edge")
    return np.pad(picture, around, constant_values=0 if pad == "black" else 255)


def _resized(picture: np.ndarray, settings: FolderSettings, size: int) -> np.ndarray:
    height, width = picture.shape[:2]
    if height != width:
        raise UserError(f"is {width}x{height}, not square")
    if settings.resize == "none":
        raise UserError(f"is {width}x{height}, not {size}x{size}")
    return np.asarray(Image.fromarray(picture).resize((size, size), FILTERS[settings.resize]))
