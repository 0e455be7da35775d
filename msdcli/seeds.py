"""Randomness is derived, not stored: every draw comes from a hash of what it is for."""

import hashlib
import json


def derive(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part and on nothing else."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
