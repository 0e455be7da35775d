"""Pictures in WebDataset shards: plain tar files, indexed once and then read by image number.

A sample is what shares a name up to the first dot: `000017.jpg` with its class in `000017.cls` and its caption in
`000017.txt` or `000017.json`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from msdcli.data.base import file_stamp, user_cache
from msdcli.data.files.decoding import MAX_BYTES
from msdcli.data.files.listing import SUFFIXES, is_left_out
from msdcli.data.images import ImageFiles
from msdcli.errors import UserError
from msdcli.foreign import check_file, problem, shown

MAX_SHARDS = 100_000
BRACES = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
CAPTION_KEYS = ("caption", "text", "prompt")
DESCRIPTIONS = (".cls", ".txt", ".json")
MAX_CAPTION = 2**20  # bytes
VERSION = 3  # of the stored index and of its key

Place = tuple[int, int]  # offset and size of a file in its shard; (0, 0) is none


@dataclass
class Index:
    """The samples of one shard, in order, as parallel lists; `bad` and `unlabelled` say why, by place in the lists."""

    names: list[str] = field(default_factory=list)
    pictures: list[Place] = field(default_factory=list)
    captions: list[Place] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)
    unlabelled: dict[int, str] = field(default_factory=dict)
    labelled: bool = False

    def add(self, name: str, files: dict[str, Place], label: bytes | None) -> None:
        """Add what shares a name; without a picture it is bad."""
        number = len(self.names)
        suffix = next((s for s in files if s in SUFFIXES), "")
        if not suffix:
            self.bad[number] = f"has no picture, only {', '.join(files)}"
        self.names.append(name + suffix)
        self.pictures.append(files.get(suffix, (0, 0)))
        self.captions.append(files.get(".txt") or files.get(".json") or (0, 0))
        self._label(number, label)

    def damage(self, offset: int) -> None:
        """Add what a damaged shard may have held besides: one picture that cannot be read."""
        self.bad[len(self.names)] = f"cannot be read: damaged from byte {offset:,} on"
        self.names.append("(rest of the shard)")
        self.pictures.append((0, 0))
        self.captions.append((0, 0))
        self.labels.append(0)

    def _label(self, number: int, content: bytes | None) -> None:
        self.labels.append(0)
        if content is None:
            self.unlabelled[number] = "has no .cls, others have"
        elif content.strip().isdigit() and len(content.strip()) < 10:
            self.labels[number] = int(content)
        else:
            self.unlabelled[number] = f"has a .cls that is no class number: {content[:20]!r}"
        self.labelled |= content is not None


class TarFiles(ImageFiles):
    """The pictures of shards, by shard and then by place in it, as `ImageFiles` gives those of a folder.

    What a damaged shard still holds can be read; the rest of it counts as one picture that cannot, so that it is
    refused or skipped by name like any other. `unlabelled` says by number which pictures lack a class, and why.
    """

    def __init__(self, pattern: str | Path) -> None:
        self.path = Path(pattern)
        self.shards = shards(pattern)
        self.described = True  # folders inside a tar mean nothing
        # Before anything of them is read: what replaces a shard later has another stamp.
        self.stamps = [(shard.name, *file_stamp(shard)) for shard in self.shards]
        with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
            indices = list(pool.map(_stored_index, self.shards))
        self.names = [f"{shard.name}/{n}" for shard, i in zip(self.shards, indices, strict=True) for n in i.names]
        if all(index.bad.keys() >= {*range(len(index.names))} for index in indices):
            raise UserError(f"{pattern} holds no picture", hint=f"Pictures end in {', '.join(sorted(SUFFIXES))}.")
        starts = [0, *itertools.accumulate(len(index.names) for index in indices)]
        self._shard = np.repeat(np.arange(len(indices)), np.diff(starts))
        self._pictures = np.array([p for i in indices for p in i.pictures], np.int64).reshape(-1, 2)
        self._captions = np.array([p for i in indices for p in i.captions], np.int64).reshape(-1, 2)
        self._bad = {s + n: why for s, i in zip(starts, indices, strict=False) for n, why in i.bad.items()}
        self.unlabelled: dict[int, str] = {}
        self.labels: np.ndarray | None = None
        if any(index.labelled for index in indices):
            self.labels = np.array([label for i in indices for label in i.labels], np.int64)
            found = ((s + n, why) for s, i in zip(starts, indices, strict=False) for n, why in i.unlabelled.items())
            self.unlabelled = dict(found)
            self.labels[[*self.unlabelled]] = -1

    def close(self) -> None:
        """Nothing stays open."""

    def caption(self, number: int) -> str | None:
        """Return the text of a picture: its .txt, or `caption`, `text` or `prompt` of its .json."""
        if not self._captions[number].any():
            return None
        if (size := self._captions[number][1]) > MAX_CAPTION:
            name = shown(self.names[number])
            raise UserError(f"{self.path}: the caption of {name} has {size:,} bytes, the limit is {MAX_CAPTION:,}.")
        text = self._content(number, self._captions[number]).decode("utf-8", "replace").strip()
        try:
            content = json.loads(text) if text.startswith("{") else text
        except (ValueError, RecursionError):
            content = text  # a caption that only looks like JSON
        if isinstance(content, str):
            return content
        return next((content[key] for key in CAPTION_KEYS if isinstance(content.get(key), str)), None)

    def content(self, number: int) -> bytes:
        if number in self._bad:
            raise UserError(f"{self._called(number)} {self._bad[number]}.")
        return self._content(number, self._pictures[number])

    def _content(self, number: int, place: np.ndarray) -> bytes:
        offset, size = map(int, place)
        if size > MAX_BYTES:
            raise UserError(f"{self._called(number)} has {size:,} bytes, the limit is {MAX_BYTES:,}.")
        try:
            with open(self.shards[self._shard[number]], "rb") as file:
                content = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise UserError(f"{self._called(number)} cannot be read: {error}.") from error
        if len(content) < size:
            raise UserError(f"{self._called(number)} cannot be read: the shard ends before it does.")
        return content


def tars(folder: Path) -> list[Path]:
    """Return the .tar files of a folder, hidden ones aside (a Mac leaves `._a.tar` beside `a.tar`)."""
    return sorted(path for path in folder.glob("*.tar") if not is_left_out(path.name))


def shards(pattern: str | Path) -> list[Path]:
    """Return the files that `shards-{000..010}.tar`, a folder or one .tar means. UserError naming those that lack."""
    path = Path(pattern)
    files = tars(path) if path.is_dir() else [Path(name) for name in expand(str(pattern))]
    missing = [file for file in files if problem(file) == "does not exist"]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(f"{', '.join(map(str, missing[:5]))}{more} does not exist.")
    for file in files:
        check_file(file)
    return files


def expand(pattern: str) -> list[str]:
    """Write out `{000..010}`, as often as it occurs, with as many digits as its first number has."""
    parts = BRACES.split(pattern)
    texts, spans = parts[::3], list(zip(parts[1::3], parts[2::3], strict=True))
    if any(int(low) > int(high) for low, high in spans):
        raise UserError(f"{pattern}: a range of shards must ascend")
    count = int(np.prod([float(int(high) - int(low) + 1) for low, high in spans]))
    if count > MAX_SHARDS:
        raise UserError(f"{pattern} means {count:,} shards, the limit is {MAX_SHARDS:,}")
    ranges = [[f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1)] for low, high in spans]
    return [
        "".join(a + b for a, b in zip(texts, [*numbers, ""], strict=True)) for numbers in itertools.product(*ranges)
    ]


# The index of a shard.


def _stored_index(shard: Path) -> Index:
    """Return a shard's index from the user's cache, or make it and keep it there: a million headers take a minute."""
    # An index depends on the shard's headers and .cls files, which the stamp follows, and on the code that reads them
    # (VERSION). It holds no pixels and no captions: these are read from the shard whenever they are asked for.
    stamp = file_stamp(shard)
    named = f"{VERSION} {shard.resolve()} {stamp}"
    file = user_cache() / "shards" / f"{hashlib.sha256(named.encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        stored = json.loads(file.read_text(encoding="utf-8"))
        numbered = {key: {int(n): why for n, why in stored[key].items()} for key in ("bad", "unlabelled")}
        return Index(**stored | numbered)
    index = _index(shard)
    if file_stamp(shard) != stamp:  # somebody writes to it: what was read is no index of what will be there
        return index
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, no more
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=file.parent, suffix=".tmp", delete=False, encoding="utf-8"
        ) as temporary:
            json.dump(asdict(index), temporary)
        os.replace(temporary.name, file)
    return index


def _index(shard: Path) -> Index:
    """Read the headers of one shard. UserError for what is no plain tar."""
    samples: dict[str, dict[str, Place]] = {}
    labels: dict[str, bytes] = {}
    try:
        with tarfile.open(shard, "r:") as file, open(shard, "rb") as raw:  # compressed: no member can be read by itself
            for info in _readable(file):
                path = PurePosixPath(info.name)
                if any(map(is_left_out, path.parts)):
                    continue
                stem, dot, rest = path.name.partition(".")
                suffix, name = f".{rest.lower()}", str(path.with_name(stem or "_"))
                if not stem or not dot or suffix not in (*SUFFIXES, *DESCRIPTIONS):
                    continue
                files = samples.setdefault(name, {})
                if suffix in files:
                    raise UserError(f"{shard} holds {shown(info.name)} twice")
                files[suffix] = (info.offset_data, info.size)
                if suffix == ".cls":
                    labels[name] = os.pread(raw.fileno(), min(info.size, 64), info.offset_data)
            end = file.offset
    except (UserError, MemoryError, OSError):
        raise
    except Exception as error:  # a damaged first header makes tarfile raise almost anything
        raise UserError(
            f"{shard} is no tar file, or a compressed one: {error}", hint="gunzip it: shards are read by image number"
        ) from None
    index = Index()
    for name, files in samples.items():
        index.add(name, files, labels.get(name))
    if _ends_early(shard, end):
        index.damage(min(end, shard.stat().st_size))
    return index


def _readable(file: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield files as long as headers are whole; what comes after the first that is not, is for the caller to see."""
    while True:
        try:
            info = file.next()
        except MemoryError:
            raise
        except Exception:  # a damaged header makes tarfile raise almost anything
            return
        if info is None or info.size < 0:
            return
        if info.isfile() and not info.issparse():  # what is sparse does not lie there in one piece
            yield info


def _ends_early(shard: Path, end: int) -> bool:
    """Whether there is anything but zeros after the last whole member, or that member is cut off."""
    with open(shard, "rb") as raw:
        raw.seek(end)
        return end > shard.stat().st_size or bool(raw.read(512).strip(b"\0"))
