"""Read a pickle of plain arrays (EDM's and EDM2's reference statistics, of any of pickle's protocols), running nothing.

The machine is that of the teachers' pickles, with other names: numpy's plain arrays alone, no objects and no calls.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from msdcli.errors import UserError
from msdcli.nets.pickle_machine import (
    DAMAGED,
    HANDLERS,
    ArrayRecord,
    Budget,
    Machine,
    RefusedError,
    expect,
    handlers,
    mapped,
    names,
    push,
)

MAX_OPCODES = 10_000  # two networks' statistics of EDM2 take under 200
MAX_DEPTH = 4  # of dicts in dicts
LONGEST_NUMBER = 64  # characters


def read_arrays(path: Path) -> Any:
    """Return what a pickle holds: dicts with arrays, which are views of the file. UserError for anything else."""
    data = mapped(path)
    # Old protocols spell bytes as text, read once and encoded once: no more than that is ever made of a file.
    machine = Machine(data, _NAMES, budget=Budget(MAX_OPCODES, 2 * len(data)), handlers=_HANDLERS)
    try:
        return _plain(machine.load(), MAX_DEPTH)
    except RefusedError as error:
        raise UserError(f"{path} is not a pickle of plain arrays: it holds {error}; nothing in it was run.") from None
    except DAMAGED:
        raise UserError(f"{path} is damaged: its pickle makes no sense at byte {machine.at}.") from None


def _plain(value: Any, depth: int) -> Any:
    """The arrays of records; what is neither a dict nor an array stays what it is, and is for the caller to refuse."""
    if isinstance(value, ArrayRecord):
        return value.array
    if type(value) is dict and depth:
        return {key: _plain(inner, depth - 1) for key, inner in value.items()}
    return value


def _encode(machine: Machine, text: Any, encoding: Any) -> memoryview:
    """_codecs.encode: bytes, which pickle's protocols below 3 spell as an encoded text."""
    if encoding != "latin1":
        raise RefusedError(f"the encoding {ascii(encoding)[:40]}")
    machine.budget.spend_text(len(expect(str, text)))
    return memoryview(text.encode("latin1"))


_NAMES = names([("_codecs", "encode", _encode, None)])


# The opcodes of protocols 0 and 1 that arrays need: their arguments are lines of text.


def _line(machine: Machine) -> bytes:
    """The rest of the line, searched for in growing pieces: it may be a whole covariance, or all of a damaged file."""
    window = 256
    while (end := bytes(machine.data[machine.at : machine.at + window]).find(b"\n")) < 0:
        if window >= len(machine.data) - machine.at:
            raise RefusedError(f"an end in the middle of a value at byte {machine.at} (is the file truncated?)")
        window *= 4
    machine.budget.spend_text(end)
    return bytes(machine.take(end + 1)[:-1])


def _short(machine: Machine) -> str:
    return str(machine.take(_length(machine))[:-1], "ascii")


def _length(machine: Machine) -> int:
    return bytes(machine.data[machine.at : machine.at + LONGEST_NUMBER]).index(b"\n") + 1


def _whole_number(machine: Machine) -> int | bool:
    text = _short(machine)
    return text == "01" if text in ("00", "01") else int(text)


def _dict(machine: Machine) -> dict[str, Any]:
    items = machine.items()
    return {expect(str, key): value for key, value in zip(items[::2], items[1::2], strict=True)}


def _put(machine: Machine) -> None:
    machine.memo[int(_short(machine))] = machine.stack[-1]


_TEXT: dict[str, Callable[[Machine], Any]] = {
    "INT": push(_whole_number),
    "LONG": push(lambda machine: int(_short(machine).removesuffix("L"))),
    "FLOAT": push(lambda machine: float(_short(machine))),
    "UNICODE": push(lambda machine: str(_line(machine), "raw-unicode-escape")),
    "DICT": push(_dict),
    "LIST": push(lambda machine: machine.items()),
    "PUT": _put,
    "GET": push(lambda machine: machine.memo[int(_short(machine))]),
}
_HANDLERS = HANDLERS | handlers(_TEXT)
