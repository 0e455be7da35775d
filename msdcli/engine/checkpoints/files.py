"""The checkpoints in a stage's folder: names, ages, and what they say of themselves; imports no torch.

A checkpoint is one file, or, where the networks are sharded, a folder with one file from every process and a record.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

from msdcli.errors import UserError
from msdcli.rundir import discard, key, read_json

FILE, PARTS = "state.safetensors", "state"  # the newest; the one before is state.1.safetensors, or state.1
RECORD = "state.json"  # in a folder of parts, written last
HEADER = 100_000_000  # bytes that safetensors allow for it


class DamagedError(UserError):
    """A file is not what was written."""


def damaged(path: Path, why: object) -> DamagedError:
    """Return the error for a file or a folder that cannot be trusted."""
    hint = f"remove {path.parent}, and the same command makes it again"
    return DamagedError(f"{path} is damaged or truncated: {why}", hint=hint)


def stored(folder: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints in a folder with their ages, the newest (age 0) first."""
    found = []
    for path in folder.glob(f"{PARTS}*"):
        name = re.fullmatch(r"state(?:\.([1-9]\d*))?(\.safetensors)?", path.name)
        if name is not None and path.is_dir() == (name[2] is None):
            found.append((int(name[1] or 0), path))
    return sorted(found)


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint in a folder, or None."""
    return next((path for _, path in stored(folder)), None)


def step_of(folder: Path) -> int | None:
    """Return the step of the newest checkpoint that says it; None where there is none."""
    for _, path in stored(folder):
        with contextlib.suppress(DamagedError):  # or it is changing its name
            return int(numbers(path)["step"])
    return None


def size(path: Path) -> int:
    """Return the bytes that a checkpoint takes."""
    return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))


def numbers(path: Path) -> dict[str, float]:
    """Return the step and the cost of a checkpoint, without reading its tensors, and what passes were cut to, if they
    were. DamagedError where it does not say.
    """
    try:
        said = record(path) if path.is_dir() else _metadata(path)
        names = ("step", "seconds", "images", "flops", *(["cut_to"] if "cut_to" in said else []))
        return {name: float(said[name]) for name in names}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, error) from None


def record(path: Path) -> dict[str, Any]:
    """Return what a folder of parts says of itself, its files' hashes above all. DamagedError where that changed."""
    try:
        said: dict[str, Any] = read_json(path / RECORD)
        own = said.pop("check")
        names = [*said["files"]]
    except (UserError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, error) from None
    if own != key(said) or any(Path(name).name != name for name in names):
        raise damaged(path / RECORD, "its content does not have its hash")
    return said


def _metadata(path: Path) -> dict[str, Any]:
    """Read the JSON that safetensors begin with."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        found: dict[str, Any] = json.loads(file.read(min(length, HEADER)))["__metadata__"]
    return found


def make_room(folder: Path, *, for_file: bool) -> None:
    """Let every checkpoint grow one older; a file has its name all the while that another is about to take it."""
    for age, path in reversed(stored(folder)):
        older = folder / f"{PARTS}.{age + 1}{'' if path.is_dir() else Path(FILE).suffix}"
        if age == 0 and for_file and path.is_file():
            _also_named(path, older)
        else:
            os.replace(path, older)


def drop(folder: Path, keep: int) -> None:
    """Remove the checkpoints that are older than the newest `keep`."""
    for age, path in stored(folder):
        if age >= keep:
            discard(path)


def _also_named(source: Path, target: Path) -> None:
    """Give a file a second name, and take that name from what had it."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # no hard links here: for an instant the file has its new name only
        os.replace(source, target)
