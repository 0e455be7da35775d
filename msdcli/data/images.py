"""Images for metrics, as uint8 RGB in a stable order: from a zip, a folder or an `.npz`, a batch at a time.

Decoding follows clean-fid where it is defined (grey repeated, palettes looked up, alpha dropped, CMYK by PIL), because
its numbers are what people publish. What PIL would silently damage, such as 16 bits per channel, is refused by name.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from msdcli.errors import UserError

SUFFIXES = {".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}  # clean-fid's, without .npy
LABELS_FILE = "dataset.json"  # EDM's data sets: {"labels": [["00000/img00000000.png", 3], ...]}
ARRAY_NAMES = ("arr_0", "images")
LABEL_NAMES = ("arr_1", "labels")


Share = tuple[int, int]  # (i, n): of every n batches the one with number i, as one of n processes takes them
WHOLE: Share = (0, 1)


@dataclass(frozen=True)
class Batch:
    """Images of one size, uint8 [N, H, W, 3], with their numbers in the source."""

    images: np.ndarray
    numbers: np.ndarray


class ImageFiles:
    """The pictures of a folder (recursive) or of a zip, sorted by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip = zipfile.ZipFile(path) if path.is_file() else None
        names = self._zip.namelist() if self._zip else [p.relative_to(path).as_posix() for p in path.rglob("*")]
        self.names = sorted({name for name in names if _is_picture(name)})
        if not self.names:
            raise UserError(f"{path} holds no image.", hint=f"Images end in {', '.join(sorted(SUFFIXES))}.")
        self.described = LABELS_FILE in set(names)
        self.labels = self._read_labels(set(names))

    def __len__(self) -> int:
        return len(self.names)

    def picture(self, number: int) -> np.ndarray:
        """Decode one picture to uint8 RGB [H, W, 3]; any thread may ask. UserError naming it if it is damaged."""
        return decode(self.content(number), f"{self.path}: {self.names[number]}")

    def content(self, number: int) -> bytes:
        """Return the bytes of one picture's file."""
        return self._read(self.names[number])

    def close(self) -> None:
        if self._zip:
            self._zip.close()

    def batches(
        self, batch_size: int, *, workers: int = 1, numbers: Sequence[int] | None = None, share: Share = WHOLE
    ) -> Iterator[Batch]:
        """Read all, or `numbers`, which ascend, in order, `workers` threads decoding; mixed sizes are split by size, so
        that each batch is one array.
        """
        numbers = range(len(self)) if numbers is None else numbers
        starts = range(0, len(numbers), batch_size)[share[0] :: share[1]]
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            # One window ahead: the threads decode it while the caller works on the one before.
            ahead = deque(self._submit(pool, numbers[start : start + batch_size]) for start in starts[:1])
            for start in starts:
                coming = start + starts.step
                if coming < len(numbers):
                    ahead.append(self._submit(pool, numbers[coming : coming + batch_size]))
                images = [future.result() for future in ahead.popleft()]
                yield from _by_size(images, numbers[start : start + batch_size])

    def _submit(self, pool: ThreadPoolExecutor, numbers: Sequence[int]) -> list[Future[np.ndarray]]:
        # A zip has one file handle, so it is read here and only decoded in the threads.
        return [pool.submit(decode, self.content(n), f"{self.path}: {self.names[n]}") for n in numbers]

    def _read(self, name: str) -> bytes:
        try:
            return self._zip.read(name) if self._zip else (self.path / name).read_bytes()
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path}: {name} cannot be read: {error}.") from error

    def _read_labels(self, names: set[str]) -> np.ndarray | None:
        if LABELS_FILE not in names:
            return None
        try:
            labels = json.loads(self._read(LABELS_FILE))["labels"]
            if labels is None:
                return None
            by_name = dict(labels)
            return np.array([by_name[name] for name in self.names], dtype=np.int64)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.path}: {LABELS_FILE} does not give every image one class ({error}).") from error


class ImageArray:
    """The uint8 array [N, H, W, 3] of an `.npz`, streamed from the file: half a million images need no more memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip = zipfile.ZipFile(path)
        members = set(self._zip.namelist())
        name = next((name for name in ARRAY_NAMES if f"{name}.npy" in members), None)
        if name is None:
            raise UserError(f"{path} holds no image array.", hint=f"It should be named {' or '.join(ARRAY_NAMES)}.")
        self._member = f"{name}.npy"
        with self._zip.open(self._member) as file:
            self.shape = self._checked_shape(file)
        self.labels = self._read_labels(members)

    def __len__(self) -> int:
        return self.shape[0]

    def close(self) -> None:
        self._zip.close()

    def batches(
        self, batch_size: int, *, workers: int = 1, numbers: Sequence[int] | None = None, share: Share = WHOLE
    ) -> Iterator[Batch]:
        """Read all, or `numbers`, which ascend, in order; there is nothing to decode: `workers` changes nothing."""
        wanted = np.arange(len(self)) if numbers is None else np.asarray(numbers)
        with self._zip.open(self._member) as file:
            self._checked_shape(file)
            begin = file.tell()
            for start in range(0, len(wanted), batch_size)[share[0] :: share[1]]:
                own = wanted[start : start + batch_size]
                images = np.frombuffer(self._content(file, begin, own), dtype=np.uint8)
                yield Batch(_as_rgb(images.reshape(len(own), *self.shape[1:])), own)

    def _content(self, file: IO[bytes], begin: int, numbers: np.ndarray) -> bytearray:
        """The bytes of images whose numbers ascend, neighbours in one piece."""
        one, content = int(np.prod(self.shape[1:])), bytearray()
        for run in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1):
            file.seek(begin + int(run[0]) * one)
            content += file.read(len(run) * one)
        if len(content) < len(numbers) * one:
            raise UserError(f"{self.path} ends before image {numbers[-1] + 1}.")
        return content

    def _checked_shape(self, file: IO[bytes]) -> tuple[int, ...]:
        read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = read[np.lib.format.read_magic(file)[0]](file)
        if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] not in (1, 3):
            raise UserError(f"{self.path}: images must be uint8 [N, H, W, 3], not {dtype} {list(shape)}.")
        if not shape[0]:
            raise UserError(f"{self.path} holds no image.")
        return shape

    def _read_labels(self, members: set[str]) -> np.ndarray | None:
        name = next((name for name in LABEL_NAMES if f"{name}.npy" in members), None)
        if name is None:
            return None
        with np.load(self.path, allow_pickle=False) as arrays:
            labels = arrays[name]
        if labels.shape != (len(self),) or not np.issubdtype(labels.dtype, np.integer):
            raise UserError(f"{self.path}: {name} must be one integer per image, not {labels.dtype} {labels.shape}.")
        return np.asarray(labels, dtype=np.int64)


def decode(content: bytes, name: str) -> np.ndarray:
    """Decode one picture to uint8 RGB [H, W, 3]; `name` is what an error calls it."""
    try:
        with Image.open(io.BytesIO(content)) as picture:
            # Byte 24 of a PNG is its bit depth, of which PIL keeps 8 bits without a word.
            if picture.mode[0] in "IF" or (picture.format == "PNG" and content[24] == 16):
                raise UserError(f"{name} has more than 8 bits per channel, which no FID protocol defines.")
            # By way of RGBA a palette with transparency gives the same colours, without PIL's warning about it.
            through = picture.convert("RGBA") if "transparency" in picture.info else picture
            return np.asarray(through.convert("RGB"))
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is not an image.") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"{name} is damaged: {error}.") from error


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] to 8 bits, by the rounding with which EDM and its successors save PNGs."""
    return (x * 127.5).add_(128).clamp_(0, 255).to(torch.uint8)


def _is_picture(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")  # "._x.png" is macOS's metadata


def _by_size(images: list[np.ndarray], numbers: Sequence[int]) -> Iterator[Batch]:
    sizes: dict[Any, list[int]] = {}
    for i, image in enumerate(images):
        sizes.setdefault(image.shape, []).append(i)
    for members in sizes.values():
        yield Batch(np.stack([images[i] for i in members]), np.array([numbers[i] for i in members]))


def _as_rgb(images: np.ndarray) -> np.ndarray:
    return images if images.shape[3] == 3 else images.repeat(3, axis=3)
