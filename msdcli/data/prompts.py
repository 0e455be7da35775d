"""Prompts: texts from lines, JSONL or COCO captions, every different one a condition; with pictures if rows name them.

A row is a text and perhaps a picture. Equal texts (white space aside) are one prompt; its number is where it first
appears.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msdcli.data.base import Dataset, images_hash, to_float
from msdcli.errors import MissingFileError, UserError
from msdcli.foreign import check_file
from msdcli.recipe.data import PromptsSettings

TEXT_KEYS, IMAGE_KEYS = ("caption", "text", "prompt"), ("file_name", "image", "file")
# What is longer is no prompt: text encoders read 77 to 512 tokens. A .json is read in one piece: COCO's has 90 MB.
MAX_PROMPT, MAX_LINE, MAX_JSON = 20_000, 2**20, 2**31
Row = tuple[str, str | None]  # a text, and the name of a picture


@dataclass(frozen=True)
class Captions:
    """The rows of a file as prompt numbers, the different prompts in order, and what was left out or repeated."""

    prompts: list[str]
    numbers: list[int]
    files: list[str | None]
    empty: int

    @property
    def repeated(self) -> int:
        return len(self.numbers) - len(self.prompts)

    def told(self) -> str:
        """One line on what the file holds."""
        more = [f"{self.repeated:,} repeated" if self.repeated else "", f"{self.empty:,} empty" if self.empty else ""]
        return f"{len(self.prompts):,} prompts" + "".join(f", {m} rows" for m in more if m)


def clean(text: str) -> str:
    """A prompt without needless white space: what is compared, hashed and embedded."""
    return " ".join(text.split())


def read(settings: PromptsSettings) -> Captions:
    """Read the prompts of a data section. UserError naming file and line for what is no prompt."""
    path = Path(settings.path)
    if not path.exists():
        raise MissingFileError(
            f"{path} does not exist", hint=f"get it from {settings.source}" if settings.source else None
        )
    captions = collect(_rows(path, settings.column, settings.image_column), path)
    if settings.count is not None and settings.count != len(captions.prompts):
        raise UserError(f"{path} holds {len(captions.prompts):,} prompts, the recipe expects {settings.count:,}")
    if settings.images is not None and None in captions.files:
        where = captions.files.index(None)
        raise UserError(
            f"{path}: {captions.prompts[captions.numbers[where]]!r} names no picture, and data.images is given",
            hint="data.image_column says where it is named; without data.images prompts stand alone",
        )
    return captions


def read_lines(path: Path) -> list[str]:
    """The prompts of a text file in order, empty lines aside, repeated ones kept."""
    captions = collect(_rows(path, None, None), path)
    return [captions.prompts[number] for number in captions.numbers]


def collect(rows: Iterator[Row], path: Path) -> Captions:
    """Number the different prompts. UserError if there is none."""
    known: dict[str, int] = {}
    numbers, files, empty = list[int](), list[str | None](), 0
    for text, file in rows:
        prompt = clean(text)
        if not prompt.isascii() and any("\ud800" <= c <= "\udfff" for c in prompt):
            raise UserError(f"{path}: {ascii(prompt)[:60]} holds half a character (a lone surrogate)")
        if len(prompt) > MAX_PROMPT:
            raise UserError(
                f"{path}: {reprlib.repr(prompt)} has {len(prompt):,} characters, the limit is {MAX_PROMPT:,}"
            )
        if not prompt:
            empty += 1
            continue
        numbers.append(known.setdefault(prompt, len(known)))
        files.append(file)
    if not known:
        raise UserError(f"{path} holds no prompt")
    return Captions(list(known), numbers, files, empty)


def _rows(path: Path, column: str | None, image_column: str | None) -> Iterator[Row]:
    check_file(path, most=MAX_JSON if path.suffix == ".json" else None)
    text_keys = TEXT_KEYS if column is None else (column,)
    image_keys = IMAGE_KEYS if image_column is None else (image_column,)
    if path.suffix == ".json":
        yield from _json_rows(path, text_keys, image_keys)
        return
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
            if len(line) > MAX_LINE:
                raise UserError(
                    f"{path}:{number}: the line has more than {MAX_LINE:,} bytes, which is no prompt",
                    hint="one prompt a line (.txt), one JSON text or object a line (.jsonl), or a list (.json)",
                )
            if b"\0" in line:  # in JSON it would be written out
                raise UserError(f"{path}:{number}: not text, it holds a NUL", hint="prompts are UTF-8; is it UTF-16?")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8 text (byte {error.start} of the line)") from None
            if path.suffix != ".jsonl":
                yield text, None
            elif text.strip():
                yield _row(_parsed(text, f"{path}:{number}"), text_keys, image_keys, f"{path}:{number}")


def _json_rows(path: Path, text_keys: Sequence[str], image_keys: Sequence[str]) -> Iterator[Row]:
    """A list of texts or objects, or COCO's file of captions."""
    try:
        tree = _parsed(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if isinstance(tree, dict) and isinstance(tree.get("annotations"), list):
        try:
            files = {image["id"]: str(image["file_name"]) for image in tree.get("images", [])}
            rows = [(str(a["caption"]), files.get(a["image_id"])) for a in tree["annotations"]]
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is no file of COCO captions ({type(error).__name__}: {error})") from None
        yield from rows
        return
    if not isinstance(tree, list):
        raise UserError(f"{path} is neither a list of prompts nor a file of COCO captions")
    for number, entry in enumerate(tree):
        yield _row(entry, text_keys, image_keys, f"{path}, entry {number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None


def _row(entry: Any, text_keys: Sequence[str], image_keys: Sequence[str], where: str) -> Row:
    if isinstance(entry, str):
        return entry, None
    found = next((key for key in text_keys if key in entry), None) if isinstance(entry, Mapping) else None
    if found is None or not isinstance(entry[found], str):
        raise UserError(
            f"{where}: no text under {' or '.join(text_keys)}", hint="data.column names the key that holds the text"
        )
    file = next((entry[key] for key in image_keys if key in entry), None)
    return entry[found], None if file is None else str(file)


class Prompts:
    """Rows of prompts, with pictures from `pictures` at the numbers `at`, or with none.

    `shape` is an image's: of the pictures, or, where there are none, of what the teacher makes.
    """

    def __init__(
        self, captions: Captions, shape: tuple[int, ...], *, pictures: Dataset | None = None, at: Sequence[int] = ()
    ) -> None:
        self.prompts = captions.prompts
        self.shape = tuple(shape)
        self.has_images = pictures is not None
        self._numbers = torch.tensor(captions.numbers, dtype=torch.int64)
        self._pictures, self._at = pictures, list(at)

    @property
    def class_names(self) -> list[str]:
        """The prompts: a condition's number is its place here."""
        return self.prompts

    def __len__(self) -> int:
        return len(self._numbers)

    def labels(self, numbers: Sequence[int]) -> Tensor:
        return self._numbers[list(numbers)]

    def images(self, numbers: Sequence[int]) -> Tensor:
        return to_float(self.stored(numbers))

    def stored(self, numbers: Sequence[int]) -> Tensor:
        assert self._pictures is not None, "these prompts have no pictures"
        at = [self._at[number] for number in numbers]
        stored = getattr(self._pictures, "stored", None) or self._pictures.images
        found: Tensor = stored(at)
        return found

    def images_hash(self) -> str:
        """Return a hash of all pictures and of which row has which."""
        assert self._pictures is not None, "these prompts have no pictures"
        return hashlib.sha256(json.dumps([images_hash(self._pictures), self._at]).encode()).hexdigest()

    def text_hash(self) -> str:
        """SHA-256 of the prompts in order."""
        return hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()


def with_pictures(captions: Captions, pictures: Dataset, names: Sequence[str], *, skip: bool, where: str) -> Prompts:
    """Join rows and pictures by name. UserError listing pictures that are not there, unless their rows are skipped."""
    number = {name: i for i, name in enumerate(names)}
    alone = Counter(Path(name).name for name in names)
    number |= {last: i for i, name in enumerate(names) if (last := Path(name).name) not in number and alone[last] == 1}
    if several := sorted({file for file in captions.files if file and file not in number and alone[file] > 1}):
        raise UserError(f"{where}: {several[0]} is the name of several pictures", hint="its folder, too: a/001.png")
    at = [number.get(file or "") for file in captions.files]
    missing = sorted({str(file) for file, n in zip(captions.files, at, strict=True) if n is None})
    if missing and (not skip or len(missing) == len(set(captions.files))):
        shown = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise UserError(
            f"{where}: {len(missing):,} pictures that the rows name are not there: {shown}",
            hint="data.on_bad=skip leaves such rows out",
        )
    kept = [i for i, n in enumerate(at) if n is not None]
    rows = ((captions.prompts[captions.numbers[i]], captions.files[i]) for i in kept)
    return Prompts(collect(rows, Path(where)), pictures.shape, pictures=pictures, at=[n for n in at if n is not None])


def expected(settings: PromptsSettings, shape: tuple[int, ...]) -> Dataset:
    """The prompts, or, where the file is missing and the recipe says how many, a stand-in to plan with."""
    if Path(settings.path).exists():
        return Prompts(read(settings), shape)
    if settings.count is None:
        raise UserError(f"{settings.path} does not exist", hint="data.count lets a plan do without it")
    return ExpectedPrompts(settings.count, shape)


class ExpectedPrompts:
    """So many prompts that are not here."""

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        self.shape, self._count = tuple(shape), count
        self.prompts = self.class_names = [f"prompt {i}" for i in range(count)]

    def __len__(self) -> int:
        return self._count

    def images(self, numbers: Sequence[int]) -> Tensor:
        raise AssertionError("a plan reads no data")

    labels = images
