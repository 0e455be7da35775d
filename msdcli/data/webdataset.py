"""Pictures in WebDataset shards: plain tar files, indexed once and then read by image number.

A sample is what shares a name up to the first dot: `000017.jpg` with its class in `000017.cls` and its caption in
`000017.txt` or `000017.json`.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from msdcli.data.images import SUFFIXES, ImageFiles
from msdcli.errors import UserError

MAX_SHARDS = 100_000
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
CAPTION_KEYS = ("caption", "text", "prompt")
DAMAGE = " damage"  # no suffix of a file: where a shard ends too early
DESCRIPTIONS = {*SUFFIXES, DAMAGE, ".cls", ".json", ".txt"}  # what makes files a sample


@dataclass(frozen=True)
class Member:
    """A file inside a shard: where its bytes are."""

    shard: Path
    offset: int
    size: int


class TarFiles(ImageFiles):
    """The pictures of shards, by shard and then by place in it, as `ImageFiles` gives those of a folder.

    What a damaged shard still holds can be read; the rest of it counts as one picture that cannot, so that it is
    refused or skipped by name like any other.
    """

    def __init__(self, pattern: str | Path) -> None:
        self.path = Path(pattern)
        self.shards = shards(pattern)
        self.described = True  # folders inside a tar mean nothing
        with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
            indices = list(pool.map(_index, self.shards))
        found = [(f"{shard.name}/{n}", f) for shard, i in zip(self.shards, indices, strict=True) for n, f in i]
        self._samples = {name + _suffix(files): files for name, files in found if DESCRIPTIONS & files.keys()}
        self.names = list(self._samples)
        if not self.names:
            raise UserError(f"{pattern} holds no picture", hint=f"Pictures end in {', '.join(sorted(SUFFIXES))}.")
        self.unlabelled: dict[int, str] = {}  # why, by number
        self.labels = self._read_classes()

    def close(self) -> None:
        """Nothing stays open."""

    def caption(self, number: int) -> str | None:
        """Return the text of a picture: its .txt, or `caption`, `text` or `prompt` of its .json."""
        files = self._samples[self.names[number]]
        if ".txt" in files:
            return self._content(files[".txt"], f"{self.names[number]}: .txt").decode("utf-8", "replace").strip()
        if ".json" not in files:
            return None
        try:
            content = json.loads(self._content(files[".json"], f"{self.names[number]}: .json"))
        except ValueError as error:
            raise UserError(f"{self.path}: {self.names[number]}: .json is damaged: {error}") from None
        found = (content[key] for key in CAPTION_KEYS if isinstance(content, dict) and key in content)
        caption = next(found, None)
        return caption if isinstance(caption, str) else None

    def _read(self, name: str) -> bytes:
        files = self._samples[name]
        if DAMAGE in files:
            raise UserError(f"{self.path}: {name} cannot be read: damaged from byte {files[DAMAGE].offset:,} on.")
        if not _suffix(files):
            raise UserError(f"{self.path}: {name} has no picture, only {', '.join(files)}.")
        return self._content(files[_suffix(files)], name)

    def _content(self, member: Member, name: str) -> bytes:
        try:
            with open(member.shard, "rb") as file:
                content = os.pread(file.fileno(), member.size, member.offset)
        except OSError as error:
            raise UserError(f"{self.path}: {name} cannot be read: {error}.") from error
        if len(content) < member.size:
            raise UserError(f"{self.path}: {name} cannot be read: the shard ends before it does.")
        return content

    def _read_classes(self) -> np.ndarray | None:
        """The numbers in the .cls files; where only some pictures have one, the others go to `unlabelled`."""
        if not any(".cls" in files for files in self._samples.values()):
            return None
        labels = np.zeros(len(self), dtype=np.int64)
        for number, (name, files) in enumerate(self._samples.items()):
            if DAMAGE in files:
                continue  # reading it says what is wrong
            if ".cls" not in files:
                self.unlabelled[number] = "has no .cls, others have"
                continue
            content = self._content(files[".cls"], f"{name}: .cls").strip()
            if content.isdigit() and len(content) < 10:
                labels[number] = int(content)
            else:
                self.unlabelled[number] = f"has a .cls that is no class number: {content[:20]!r}"
        return labels


def shards(pattern: str | Path) -> list[Path]:
    """Return the files that `shards-{000..010}.tar`, a folder or one .tar means. UserError naming those that lack."""
    path = Path(pattern)
    files = sorted(path.glob("*.tar")) if path.is_dir() else [Path(name) for name in expand(str(pattern))]
    missing = [file for file in files if not file.is_file()]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(f"{', '.join(map(str, missing[:5]))}{more} does not exist.")
    return files


def expand(pattern: str) -> list[str]:
    """Write out `{000..010}`, as often as it occurs, with as many digits as its first number has."""
    parts = BRACES.split(pattern)
    texts, spans = parts[::3], list(zip(parts[1::3], parts[2::3], strict=True))
    ranges = [[f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1)] for low, high in _bounded(pattern, spans)]
    if not all(ranges):
        raise UserError(f"{pattern}: a range of shards must ascend")
    return [
        "".join(a + b for a, b in zip(texts, [*numbers, ""], strict=True)) for numbers in itertools.product(*ranges)
    ]


def _bounded(pattern: str, spans: list[tuple[str, str]]) -> list[tuple[str, str]]:
    count = 1
    for low, high in spans:
        count *= max(0, int(high) - int(low) + 1)
    if count > MAX_SHARDS:
        raise UserError(f"{pattern} means {count:,} shards, the limit is {MAX_SHARDS:,}")
    return spans


def _index(shard: Path) -> list[tuple[str, dict[str, Member]]]:
    """Return the samples of one shard in order: the files of each by suffix. UserError for what is no plain tar."""
    samples: dict[str, dict[str, Member]] = {}
    for name, member in _members(shard):
        path = PurePosixPath(name)
        stem, dot, suffix = path.name.partition(".")
        if not stem or not dot:  # hidden files, and files without a suffix
            continue
        files = samples.setdefault(str(path.with_name(stem)), {})
        suffix = DAMAGE if member.size < 0 else "." + suffix.lower()
        if suffix in files:
            raise UserError(f"{shard} holds {name} twice")
        files[suffix] = member
    return list(samples.items())


def _members(shard: Path) -> Iterator[tuple[str, Member]]:
    size = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as file:  # not compressed: only then a member can be read by itself
            yield from _readable(file, shard, size)
    except (tarfile.ReadError, EOFError) as error:
        raise UserError(
            f"{shard} is no tar file, or a compressed one: {error}", hint="gunzip it: shards are read by image number"
        ) from None


def _readable(file: tarfile.TarFile, shard: Path, size: int) -> Iterator[tuple[str, Member]]:
    """Yield members as long as their headers are whole; then, unless the end is the end, where the damage begins."""
    end = 0
    while True:
        try:
            info = file.next()
        except (tarfile.TarError, EOFError, OSError, ValueError):
            info = None
            if end == 0:
                raise
        if info is None:
            break
        end = file.offset
        if info.isfile():
            yield info.name, Member(shard, info.offset_data, info.size)
    with open(shard, "rb") as raw:
        raw.seek(end)
        rest = raw.read(512)
    if end > size or rest.strip(b"\0"):
        yield f"(rest of the shard).{DAMAGE.strip()}", Member(shard, min(end, size), -1)


def _suffix(files: dict[str, Member]) -> str:
    """The suffix of a sample's picture; empty where it has none."""
    return next((suffix for suffix in files if suffix in SUFFIXES), "")
