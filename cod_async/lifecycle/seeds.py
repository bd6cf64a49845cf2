"""Seeds: stable hashes, equal in every process, on every machine, in every Python.

Everything that is drawn in a run comes from a seed that is the SHA-256 of what it depends on, so no generator
has to be replayed to reach the millionth group, and nothing changes with the order in which work is done.
"""

from __future__ import annotations

import hashlib
import json


def hash64(text: str) -> int:
    """Return the first 8 bytes, big-endian, of the SHA-256 of a text: 0 .. 2^64-1."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def stable_seed(*parts: int | str) -> int:
    """Return the hash of integers and strings as compact JSON: 0 .. 2^64-1."""
    return hash64(json.dumps(parts, separators=(",", ":")))


def derived_seed(*parts: int) -> int:
    """Return the hash of integers in decimal, separated by commas, without its last bit: 0 .. 2^63-1.

    The seed of a turn, from the lifecycle's sampling seed, the ordinal and the turn.
    """
    return hash64(",".join(str(part) for part in parts)) >> 1
