"""Images for metrics, as uint8 RGB in a stable order: from a zip, a folder or an `.npz`, a batch at a time."""

from __future__ import annotations

import zipfile
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from msdcli.data.files import labels
from msdcli.data.files.archive import Archive
from msdcli.data.files.decoding import MAX_BYTES, decode
from msdcli.data.files.labels import LABELS_FILE
from msdcli.data.files.listing import SUFFIXES, common_folder, is_picture, walk
from msdcli.errors import UserError
from msdcli.foreign import check_file, shown

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
    """The pictures of a folder (recursive) or of a zip, sorted by name; what is hidden or a tool's is left out.

    `classes` are the folders that pictures lie in, by picture: in a zip, inside the folder that it was made of.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip = Archive(path) if path.is_file() else None
        names = set(self._zip.members if self._zip else walk(path))
        self.names = sorted(filter(is_picture, names))
        if not self.names:
            raise UserError(
                f"{path} holds no image.",
                hint=f"Images end in {', '.join(sorted(SUFFIXES))}; hidden folders, and those of tools, are left out.",
            )
        within = common_folder(self.names) if self._zip else ""
        inside = [within[: i + 1] for i, c in enumerate(within) if c == "/"]
        described = next((folder for folder in ["", *inside] if folder + LABELS_FILE in names), None)
        self.described = described is not None
        self.labels = None if described is None else self._read_labels(described)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def classes(self) -> list[str]:
        """The folder that each picture lies in; "" where it lies in none."""
        root = len(common_folder(self.names, keep=1)) if self._zip else 0
        return [name[root:].partition("/")[0] if "/" in name[root:] else "" for name in self.names]

    def picture(self, number: int) -> np.ndarray:
        """Decode one picture to uint8 RGB [H, W, 3]; any thread may ask. UserError naming it if it is damaged."""
        return decode(self.content(number), self._called(number))

    def content(self, number: int) -> bytes:
        """Return the bytes of one picture's file."""
        return self._read(self.names[number])

    def close(self) -> None:
        if self._zip:
            self._zip.close()

    def batches(
        self,
        batch_size: int,
        *,
        workers: int = 1,
        numbers: Sequence[int] | None = None,
        share: Share = WHOLE,
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
        return [pool.submit(decode, self.content(n), self._called(n)) for n in numbers]

    def _called(self, number: int) -> str:
        return f"{self.path}: {shown(self.names[number])}"

    def _read(self, name: str, most: int = MAX_BYTES) -> bytes:
        if self._zip:
            return self._zip.read(name, most)
        try:
            check_file(self.path / name, most=most)
            return (self.path / name).read_bytes()
        except UserError as error:
            why = error.message.removeprefix(shown(str(self.path / name)))
            raise UserError(f"{self.path}: {shown(name)}{why}.", hint=error.hint) from None
        except OSError as error:
            raise UserError(f"{self.path}: {shown(name)} cannot be read: {error}.") from error

    def _read_labels(self, folder: str) -> np.ndarray | None:
        content = self._read(folder + LABELS_FILE, labels.most_bytes(len(self)))
        return labels.from_json(content, self.names, f"{self.path}: {LABELS_FILE}", inside=folder)


class ImageArray:
    """The uint8 array [N, H, W, 3] of an `.npz`, streamed from the file: half a million images need no more memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip = Archive(path)
        self._member = self._named(ARRAY_NAMES)
        if self._member is None:
            raise UserError(f"{path} holds no image array.", hint=f"It should be named {' or '.join(ARRAY_NAMES)}.")
        with self._zip.open(self._member) as file:
            self.shape = self._checked_shape(file)
            begin = file.tell()
        one = int(np.prod(self.shape[1:], dtype=object))
        whole = max(self._zip.members[self._member].file_size - begin, 0) // one
        if whole < len(self):
            raise UserError(f"{path} ends before image {whole + 1}.")
        self.labels = self._read_labels()

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def names(self) -> list[str]:
        """What a picture is called where there is no file of its own."""
        return [f"image {number}" for number in range(len(self))]

    def close(self) -> None:
        self._zip.close()

    def batches(
        self,
        batch_size: int,
        *,
        workers: int = 1,
        numbers: Sequence[int] | None = None,
        share: Share = WHOLE,
    ) -> Iterator[Batch]:
        """Read all, or `numbers`, which ascend, in order; there is nothing to decode: `workers` changes nothing."""
        assert self._member is not None
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

    def _named(self, names: tuple[str, ...]) -> str | None:
        return next((f"{name}.npy" for name in names if f"{name}.npy" in self._zip.members), None)

    def _checked_shape(self, file: IO[bytes]) -> tuple[int, ...]:
        shape, fortran, dtype = _header(file, f"{self.path}: {self._member}")
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3):
            raise UserError(f"{self.path}: images must be uint8 [N, H, W, 3], not {_told(dtype)} {list(shape)}.")
        if fortran and sum(n > 1 for n in shape) > 1:
            raise UserError(
                f"{self.path}: the images are stored in Fortran's order, column by column.",
                hint="np.ascontiguousarray(images) is to be saved",
            )
        if not all(shape):
            raise UserError(f"{self.path} holds no image: its array is {list(shape)}.")
        return shape

    def _read_labels(self) -> np.ndarray | None:
        member = self._named(LABEL_NAMES)
        if member is None:
            return None
        what = f"{self.path}: {member.removesuffix('.npy')}"
        with self._zip.open(member) as file:
            shape, _, dtype = _header(file, f"{self.path}: {member}")
            if shape != (len(self),) or dtype.kind not in "iu":
                raise UserError(f"{what} must be one integer per image, not {_told(dtype)} {list(shape)}.")
            content = file.read(len(self) * dtype.itemsize)
        if len(content) < len(self) * dtype.itemsize:
            raise UserError(f"{what} ends before that of image {len(content) // dtype.itemsize + 1}.")
        found = np.frombuffer(content, dtype)
        if int(found.max()) >= 2**63:
            raise UserError(f"{what} holds the class {found.max()}: {labels.INTEGERS}.")
        return found.astype(np.int64)


def _header(file: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the header of an .npy: shape, whether it is in Fortran's order, and type."""
    formats = np.lib.format
    try:
        version = formats.read_magic(file)
        # Version 3 differs from 2 in the encoding of names, which no array of ours has.
        read = formats.read_array_header_1_0 if version == (1, 0) else formats.read_array_header_2_0
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise UserError(
                f"{where} is an array in version {'.'.join(map(str, version))} of its format, 3.0 is known."
            )
        shape, fortran, dtype = read(file)
    except (MemoryError, UserError, OSError, zipfile.BadZipFile, zlib.error):
        raise  # of the zip
    except Exception as error:  # a damaged header makes numpy's reader raise almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where} has a damaged header: {reason:.200}") from error
    if any(isinstance(n, bool) or not 0 <= n < 2**63 for n in shape):
        raise UserError(f"{where} has a damaged header: its shape is {shape!s:.200}")
    return shape, fortran, dtype


def _told(dtype: np.dtype) -> str:
    return "Python's objects (a pickle)" if dtype.hasobject else f"{dtype!s:.60}"


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] to 8 bits, by the rounding with which EDM and its successors save PNGs."""
    return (x * 127.5).add_(128).clamp_(0, 255).to(torch.uint8)


def _by_size(images: list[np.ndarray], numbers: Sequence[int]) -> Iterator[Batch]:
    sizes: dict[Any, list[int]] = {}
    for i, image in enumerate(images):
        sizes.setdefault(image.shape, []).append(i)
    for members in sizes.values():
        yield Batch(np.stack([images[i] for i in members]), np.array([numbers[i] for i in members]))


def _as_rgb(images: np.ndarray) -> np.ndarray:
    return images if images.shape[3] == 3 else images.repeat(3, axis=3)
