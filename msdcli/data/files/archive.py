"""A zip of somebody else's, read member by member: what is encrypted, damaged or would not end is refused by name."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from msdcli.data.files.decoding import MAX_BYTES
from msdcli.data.files.listing import is_left_out, normal
from msdcli.errors import UserError
from msdcli.foreign import check_file, shown

# Pictures compressed once more shrink by little: what grows from so little to so much is an attack or an accident.
GROWS, GROWN, ARRAY_GROWN = 200, 2**26, 2**30
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
PLAIN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # whose unpacking stops where it is told to
AGAIN = "zip it again, with deflate and without a password"


class Archive:
    """The files in a zip, by their names with `/` between folders.

    UserError where it is no zip, is encrypted, is compressed in a way that is not read, or holds a name twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_file(path)
        try:
            self._zip = zipfile.ZipFile(path)
            infos = self._zip.infolist()
        except (MemoryError, UserError):
            raise
        except Exception as error:  # a damaged directory makes zipfile raise almost anything
            raise UserError(f"{path} is no zip that can be read: {error}", hint="is it truncated?") from None
        self.members: dict[str, zipfile.ZipInfo] = {}
        for info in infos:
            name = normal(info.filename)
            if info.is_dir() or any(map(is_left_out, name.split("/"))):
                continue
            if name in self.members:
                raise UserError(f"{path} holds {shown(name)} twice", hint="zip it again: which one is meant?")
            if info.flag_bits & 1:
                raise UserError(f"{path}: {shown(name)} is encrypted", hint=AGAIN)
            if info.compress_type not in METHODS:
                method = getattr(zipfile, "compressor_names", {}).get(info.compress_type, "an unknown one")
                raise UserError(
                    f"{path}: {shown(name)} is compressed by method {info.compress_type} ({method}), which is not read",
                    hint=AGAIN,
                )
            self.members[name] = info

    def close(self) -> None:
        self._zip.close()

    def read(self, name: str, most: int = MAX_BYTES) -> bytes:
        """Return a member's bytes. UserError naming it where it cannot be read or has more than `most`."""
        info = self.members[name]
        if info.file_size > most:
            raise UserError(f"{self.path}: {shown(name)} has {info.file_size:,} bytes, the limit is {most:,}.")
        step = info.file_size + 1 if info.compress_type in PLAIN else 4096
        with self.open(name, GROWN) as file:
            return b"".join(iter(lambda: file.read(step), b""))

    @contextmanager
    def open(self, name: str, grown: int = ARRAY_GROWN) -> Iterator[IO[bytes]]:
        """Open a member to read it piece by piece; its failures, then too, are UserErrors naming it.

        One that grows to more than `grown` bytes, and to very many times what it is packed in, is not unpacked.
        """
        info, where = self.members[name], f"{self.path}: {shown(name)}"
        if info.file_size > max(grown, GROWS * info.compress_size):
            raise UserError(
                f"{where} is {info.file_size:,} bytes, packed in {info.compress_size:,}: it is not unpacked."
            )
        try:
            with self._zip.open(info) as file:
                yield file
        except (MemoryError, UserError, GeneratorExit):
            raise
        except Exception as error:  # a damaged member makes zipfile and its decompressors raise almost anything
            raise UserError(f"{where} cannot be read: {error}.") from error
