"""The classes of pictures, as a dataset.json and arrays give them: one integer each, or a refusal that says what."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from msdcli.data.files.listing import normal
from msdcli.errors import UserError
from msdcli.foreign import shown

LABELS_FILE = "dataset.json"  # EDM's data sets: {"labels": [["00000/img00000000.png", 3], ...]}
# Every class has a name and a vector, whether it has pictures or not. ImageNet-21k has 21,841.
MAX_CLASSES = 100_000  # of fewer pictures than that
INTEGERS = "a class is an integer from 0 on"


def most_bytes(num_pictures: int) -> int:
    """How large a dataset.json of so many pictures may be."""
    return 2**24 + 1024 * num_pictures


def from_json(content: bytes, names: Sequence[str], where: str, *, inside: str = "") -> np.ndarray | None:
    """Return the class of every picture, int64, or None where the file says that there are none.

    Names in it are relative to the folder `inside` that it lies in, or to the whole.
    """
    by_name = _by_name(content, where)
    if by_name is None:
        return None
    classes = [by_name.get(name, by_name.get(name.removeprefix(inside))) for name in names]
    for name, found in zip(names, classes, strict=True):
        if type(found) is not int:
            raise UserError(f"{where} {_complaint(shown(name), found)}", hint=_cure(found))
        if not -(2**63) <= found < 2**63:
            raise UserError(f"{where} gives {shown(name)} the class {reprlib.repr(found)}: {INTEGERS}")
    return np.array(classes, dtype=np.int64)


def checked(labels: np.ndarray, name: Callable[[int], str], where: str) -> np.ndarray:
    """Return labels as they are. UserError naming a picture whose class is negative, or beyond any that can be."""
    least, largest, limit = int(labels.argmin()), int(labels.argmax()), max(MAX_CLASSES, len(labels))
    if labels[least] < 0:
        raise UserError(f"{where}: {name(least)} has the class {labels[least]}, which is negative: {INTEGERS}")
    if labels[largest] >= limit:
        raise UserError(
            f"{where}: {name(largest)} has the class {labels[largest]}; of {len(labels):,} pictures classes are below "
            f"{limit:,}",
            hint="number the classes from 0 on, without gaps",
        )
    return labels


def empty_classes(labels: np.ndarray, num_classes: int) -> list[int]:
    """Return the classes that no picture has."""
    return np.flatnonzero(np.bincount(labels, minlength=num_classes) == 0).tolist()


def _by_name(content: bytes, where: str) -> dict[str, Any] | None:
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    if not isinstance(tree, dict) or "labels" not in tree:
        raise UserError(f"{where} holds no `labels`", hint=f'{{"labels": [["a/0.png", 3], ...]}}: {INTEGERS}')
    pairs = tree["labels"]
    if pairs is None:
        return None
    if isinstance(pairs, Mapping):
        pairs = list(pairs.items())
    if not isinstance(pairs, list):
        raise UserError(f"{where}: `labels` is {reprlib.repr(pairs)}, not a list of names with their classes")
    found: dict[str, Any] = {}
    for pair in pairs:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise UserError(f"{where}: {reprlib.repr(pair)} is not a name with its class")
        name = normal(pair[0])
        if found.setdefault(name, pair[1]) != pair[1]:
            raise UserError(f"{where} gives {shown(name)} two classes")
    return found


def _complaint(name: str, found: Any) -> str:
    if found is None:
        return f"gives {name} no class: every image has one"
    return f"gives {name} the class {reprlib.repr(found)}: {INTEGERS}"


def _cure(found: Any) -> str | None:
    if isinstance(found, list):
        return "of a one-hot label, write the place of its one"
    return "a `labels` of null, or data.labels=false, means pictures without classes" if found is None else None
