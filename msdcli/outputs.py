"""What msd writes where users say: it replaces what it wrote there itself, and nothing that is somebody else's.

A file of msd's own making bears a mark that its format has room for. A folder has a record that lists its files by
hash: exactly these are replaced, and only while they are what was written.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from msdcli.errors import UserError, WrongValueError
from msdcli.rundir import building, file_hash, key, place_beside, write_json

MARK = "msd"
# How a file begins, and what says in its first or last bytes that msd wrote it.
KINDS: Mapping[str, tuple[bytes, bytes]] = {
    ".png": (b"\x89PNG\r\n", b"tEXtSoftware\x00msd"),
    ".pdf": (b"%PDF", b"/Creator (msd)"),
    ".svg": (b"<?xml", b"<dc:title>msd</dc:title>"),
    ".html": (b"<!", b'<meta name="generator" content="msd '),
    ".zip": (b"PK", b"\x0b\x00msd samples"),  # the archive's comment, after its length
    ".npz": (b"PK", b"\x0b\x00msd samples"),
}
COMMENT = b"msd samples"
FIGURES = (
    "toy.pdf",
    "curves.pdf",
    "table.pdf",
    "frontier.pdf",
    "report.html",
)  # as `plot` and `report` call them by themselves
NEAR = 65536  # bytes at either end that are looked at
RECORDS = ("bundle.json", "export.json")
PROGRAMS = "programs"  # the folder of a run or of a bundle that students' ONNX programs are kept in
FILES, CHECK = "files", "check"  # of a folder's record: its files by hash, and the hash of the rest of itself


# Files.


def check_file(path: Path, kind: str) -> None:
    """Raise UserError unless `path` ends in this kind (a suffix) and is free, or such a file that msd wrote."""
    if path.is_dir():
        raise UserError(f"{path} is a folder", hint=f"--out {shlex.quote(str(path / ('out' + kind)))}")
    if os.path.lexists(path) and not path.is_file():
        raise UserError(f"{path} is no ordinary file: nothing was written", hint="a new file with --out")
    if (run := _run_around(path)) is not None and path.suffix.lower() != kind:
        raise UserError(
            f"{path} would be a file among the records of {run} and is none of them: nothing was written",
            hint=f"a file that ends in {kind}, or another folder, with --out",
        )
    if path.is_file() and not _is_ours(path, kind):
        raise UserError(
            f"{path} exists and is no {kind[1:]} file that msd wrote: nothing was written",
            hint="a new file with --out",
        )
    if path.suffix.lower() != kind:
        raise WrongValueError(
            f"{path} does not end in {kind}, as what is written does: nothing was written",
            hint=f"--out {shlex.quote(str(path.with_name((path.stem or path.name) + kind)))}",
        )


def _is_ours(path: Path, kind: str) -> bool:
    begins, mark = KINDS[kind]
    with open(path, "rb") as file:
        head = file.read(NEAR)
        file.seek(max(0, os.fstat(file.fileno()).st_size - NEAR))
        tail = file.read()
    if head.lstrip()[:9].lower().startswith(begins.lower()) and (mark in head or mark in tail):
        return True
    # Earlier versions left no mark: in a run's own places they are known by what they are.
    return in_own_place(path) and head.lstrip().startswith(begins)


def in_own_place(path: Path) -> bool:
    """Whether msd itself chooses such a name: of a figure in a run, or among the samples of a run or of a bundle."""
    folder = path.absolute().parent
    if path.name in FIGURES and (folder / "recipe.yaml").is_file():
        return True
    return folder.name == "samples" and any((folder.parent / name).is_file() for name in ("recipe.yaml", "bundle.json"))


def _run_around(path: Path) -> Path | None:
    """Return the run directory that a path lies in, None where it lies in none."""
    return next(
        (p for p in path.absolute().parents if all((p / n).is_file() for n in ("recipe.yaml", "run.json"))), None
    )


def is_marked_picture(path: Path) -> bool:
    """Whether a file is a PNG that bears msd's mark."""
    with open(path, "rb") as file:
        head = file.read(NEAR)
    begins, mark = KINDS[".png"]
    return head.startswith(begins) and mark in head


def mark_archive(path: Path) -> None:
    """Leave the mark in a zip or an .npz: its comment."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = COMMENT


# Folders.


def listed(folder: Path) -> dict[str, str] | None:
    """Return the files by hash that a folder's record says msd wrote, the record among them; None: it has none."""
    for name in RECORDS:
        record = _record(folder / name)
        if record is not None:
            return {**record[FILES], name: file_hash(folder / name)}
    return None


def _record(path: Path) -> dict[str, Any] | None:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        check, files = said.pop(CHECK), said[FILES]
        names = [Path(name) for name in files]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    plain = all(not name.is_absolute() and ".." not in name.parts for name in names)
    return said if plain and check == key(said) and isinstance(files, dict) else None


def with_files(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a record that lists the files that are in the folder, before it is written itself."""
    said = {**record, FILES: {name: file_hash(folder / name) for name in files_in(folder) if name not in RECORDS}}
    return said | {CHECK: key(said)}


def relist(path: Path) -> None:
    """Let a folder's record list the files that are there now, if it lists others."""
    said = json.loads(path.read_text(encoding="utf-8"))
    now = with_files({name: value for name, value in said.items() if name not in (FILES, CHECK)}, path.parent)
    if now != said:
        write_json(path, now)


def files_in(folder: Path) -> list[str]:
    """Return the files, links included, below a folder."""
    found = []
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        found += [(Path(root) / name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(found)


def check_unchanged(folder: Path, own: Mapping[str, str]) -> None:
    """Raise UserError where a file is no longer what msd wrote there."""
    for name, sha256 in own.items():
        path = folder / name
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file() or file_hash(path) != sha256):
            raise UserError(
                f"{path} was changed since msd wrote it and would be lost: nothing was written",
                hint="move it away, or write to another folder",
            )


def check_folder(folder: Path, what: str) -> dict[str, str]:
    """Return the files that may be replaced. UserError unless the folder is free or was written by msd, unchanged."""
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return {}
    own = listed(folder) if folder.is_dir() else None
    if own is None:
        raise UserError(
            f"{folder} exists and is no {what} that lists its files: nothing was written",
            hint="another folder with --out; what an earlier version wrote is yours to remove",
        )
    check_unchanged(folder, own)
    return own


@contextlib.contextmanager
def replacing(folder: Path, own: Mapping[str, str]) -> Iterator[Path]:
    """Give an empty folder to fill; at the end its files take the place of `own`, those that msd wrote in `folder`.

    Everything else there stays. UserError, before anything is moved, where it is in the way.
    """
    folder = folder.resolve()
    if not folder.exists() or set(files_in(folder)) <= own.keys():
        with building(folder) as place:
            yield place
            check_unchanged(folder, own)
        return
    with place_beside(folder) as place:
        made = place / "made"
        made.mkdir()
        yield made
        _merge(made, folder, own)


def _merge(made: Path, folder: Path, own: Mapping[str, str]) -> None:
    """Move files into a folder that holds others: records last, so that one never lists what is not there yet."""
    names = sorted(files_in(made), key=lambda name: name in RECORDS)
    for name in names:
        above = [parent for parent in (folder / name).parents if folder in parent.parents]
        if blocked := next((p for p in [folder / name, *above] if _blocks(p, folder / name, name in own)), None):
            raise UserError(
                f"{blocked} is not msd's and in the way: nothing was written", hint="move it away, or another folder"
            )
    check_unchanged(folder, own)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(made / name, folder / name)
    for name in own.keys() - set(names):
        (folder / name).unlink(missing_ok=True)
        for parent in (folder / name).parents:
            if folder not in parent.parents or not parent.is_dir() or any(parent.iterdir()):
                break
            parent.rmdir()


def _blocks(path: Path, target: Path, own: bool) -> bool:
    """Whether something keeps a file from its place: anything at it that is not ours, or no folder above it."""
    if path == target:
        return os.path.lexists(path) and not own
    return os.path.lexists(path) and (path.is_symlink() or not path.is_dir())


def check_drawn_table(path: Path) -> None:
    """Raise UserError unless a picture is free, or a table that was drawn: by earlier versions without msd's mark."""
    if path.is_file():
        with open(path, "rb") as file:
            head = file.read(NEAR)
        if head.startswith(KINDS[".png"][0]) and b"tEXtSoftware\x00Matplotlib" in head:
            return
    if os.path.lexists(path):
        check_file(path, ".png")


def check_table(path: Path, begins: str) -> None:
    """Raise UserError unless a text file is free, or a table as msd writes them, known by its first words."""
    if not os.path.lexists(path):
        return
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if not text.startswith(begins) or (begins[0] == "|" and re.search(r"^[^|]", text, re.MULTILINE)):
        raise UserError(f"{path} exists and is no table that msd wrote: nothing was written", hint="move it away")
