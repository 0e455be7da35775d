"""What other people made: their files, looked at before they are read (what they are, how large, and whether they are
here at all), and which of their packages are installed.
"""

from __future__ import annotations

import functools
import os
import stat
import unicodedata
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from msdcli.errors import MissingFileError, UserError

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
POINTER = b"version https://git-lfs.github.com/spec/"
POINTER_SAYS = "is a pointer of git-lfs, not the file itself"
POINTER_HINT = "`git lfs pull`, in the repository that it comes from, brings the file"


def shown(name: str) -> str:
    """A file's name as it can be printed and stored: bytes that are not UTF-8 are written out."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def visible(name: str) -> str:
    """Return a name, which may come from anywhere, without letters that steer instead of being shown."""
    unseen = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join("\ufffd" if unicodedata.category(ch) in unseen else ch for ch in name)


def is_pointer(content: bytes) -> bool:
    """Whether the beginning of a file says that git-lfs keeps the rest elsewhere."""
    return content.startswith(POINTER)


def problem(path: Path) -> str | None:
    """Return why a path cannot be read as a file (links are followed): pipes and devices would never end. None: it can.

    The answer goes on a sentence that begins with the file's name.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "is a link to what does not exist" if path.is_symlink() else "does not exist"
    except (OSError, ValueError) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    return None if stat.S_ISREG(mode) else f"is {KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file"


def check_file(path: Path, *, most: int | None = None) -> None:
    """Raise UserError unless a path is a file that is whole here, of `most` bytes where that is given."""
    why = problem(path)
    if why is not None:
        kind = MissingFileError if why == "does not exist" else UserError
        raise kind(f"{shown(str(path))} {why}")
    try:
        with path.open("rb") as file:
            begin = file.read(len(POINTER))
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{shown(str(path))} cannot be read: {error.strerror}") from None
    if is_pointer(begin):
        raise UserError(f"{shown(str(path))} {POINTER_SAYS}", hint=POINTER_HINT)
    if most is not None and size > most:
        raise UserError(f"{shown(str(path))} has {size:,} bytes, the limit is {most:,}")


def versions(*packages: str) -> dict[str, str]:
    """Return the version of each package; `not installed` of one that is absent, or run from its files."""
    return {package: _version(package) for package in packages}


@functools.cache  # a record of a table's every line names them, and each look parses the package's metadata
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
