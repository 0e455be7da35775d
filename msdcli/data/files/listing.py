"""Which names in a folder or an archive are pictures, and which are left out: hidden ones, and those of tools."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from msdcli.errors import UserError
from msdcli.foreign import shown

SUFFIXES = {".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}  # clean-fid's, without .npy
# What file managers, storage boxes and tools leave beside pictures, in small letters; names with a dot are hidden.
TOOLS = {
    *("__macosx", "@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "lost+found"),
    *("$recycle.bin", "recycler", "system volume information", "thumbs.db", "__pycache__", "cvs"),
    *("network trash folder", "temporary items"),
}
MAX_FOLDERS = 1_000_000  # links can make a tree of any size out of a few folders


def is_left_out(part: str) -> bool:
    """Whether a folder or a file of this name is hidden or a tool's: no class, no picture."""
    return (part.startswith(".") and part != "..") or part.lower() in TOOLS


def is_picture(name: str) -> bool:
    """Whether a name inside a folder or an archive is that of a picture."""
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not any(map(is_left_out, path.parts))


def normal(name: str) -> str:
    """A name in an archive with `/` between folders: some programs on Windows write `\\`."""
    return str(PurePosixPath(name.replace("\\", "/")))


def walk(root: Path) -> Iterator[str]:
    """Yield the names of all files under a folder, relative to it. Links are followed, as torchvision does, except
    those that lead back to a folder they are in. UserError for a folder that cannot be listed.
    """
    left: list[tuple[str, str, frozenset[tuple[int, int]]]] = [(str(root), "", frozenset())]
    seen = 0
    while left:
        folder, prefix, above = left.pop()
        try:
            stat = os.stat(folder)
            if (here := (stat.st_dev, stat.st_ino)) in above:
                continue
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"{shown(folder)} cannot be listed: {error.strerror}") from None
        if (seen := seen + 1) > MAX_FOLDERS:
            raise UserError(f"{shown(str(root))} holds more than {MAX_FOLDERS:,} folders; do links lead in circles?")
        for entry in found:
            if is_left_out(entry.name):
                continue
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                left.append((entry.path, f"{prefix}{entry.name}/", above | {here}))
            elif entry.is_symlink() and "." not in entry.name and not os.path.exists(entry.path):
                raise UserError(
                    f"{shown(entry.path)} is a link to {shown(os.readlink(entry.path))}, which does not exist",
                    hint="if it is a class, its pictures are missing; mend or remove the link",
                )
            else:
                yield prefix + entry.name


def common_folder(names: Sequence[str], *, keep: int = 0) -> str:
    """Return the folder that all names are in (with its `/`; "" if none), the last `keep` folders of each aside."""
    first, last = (name.split("/") for name in (min(names), max(names)))  # what they share, all between them do
    most = min(name.count("/") for name in names) - keep
    pairs = zip(first, last, strict=False)
    common = itertools.takewhile(lambda pair: pair[0] == pair[1], itertools.islice(pairs, max(most, 0)))
    return "".join(f"{part}/" for part, _ in common)
