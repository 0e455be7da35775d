"""Randomness is derived, not stored: every draw comes from a hash of what it is for."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part and on nothing else."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a torch generator seeded with `derive(*parts)`."""
    import torch  # whoever only derives starts without it

    return torch.Generator(device).manual_seed(derive(*parts))
