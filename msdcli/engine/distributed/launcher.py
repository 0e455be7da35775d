"""What a launcher such as torchrun says of this process by variables of the environment; imports no torch."""

from __future__ import annotations

import os

from msdcli.errors import UserError

NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")
_MOST = {"WORLD_SIZE": 2**20, "RANK": 2**20, "LOCAL_RANK": 2**16, "MASTER_PORT": 65535}


def num_processes() -> int:
    """Return how many processes a launcher started, 1 without one."""
    size = _number("WORLD_SIZE", 1)
    if size < 1:
        raise UserError(f"WORLD_SIZE={size} is no number of processes", hint=_HINT)
    return size


def share() -> tuple[int, int]:
    """Return this process's number and how many there are: (0, 1) without a launcher.

    An empty variable counts as none. UserError for what no launcher says.
    """
    size = num_processes()
    if size == 1:
        return 0, 1
    if lacking := [name for name in NEEDED if not os.environ.get(name, "").strip()]:
        raise UserError(f"WORLD_SIZE={size} says that processes work together, but {lacking[0]} is not set", hint=_HINT)
    rank = _number("RANK", 0)
    _number("MASTER_PORT", 0)
    if rank >= size:
        raise UserError(f"RANK={rank} is no process of WORLD_SIZE={size}: they are 0 to {size - 1}", hint=_HINT)
    return rank, size


def local_rank() -> int:
    """Return this process's number on its machine."""
    return _number("LOCAL_RANK", 0)


def _number(name: str, absent: int) -> int:
    text = os.environ.get(name, "").strip()
    if not text:
        return absent
    if not (text.isascii() and text.isdecimal()) or int(text[:20]) > _MOST[name]:
        raise UserError(f"{name}={text[:40]!r} is no whole number from 0 to {_MOST[name]}", hint=_HINT)
    return int(text)


_HINT = "torchrun sets these variables; for one process, unset WORLD_SIZE and RANK"
