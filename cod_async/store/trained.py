"""Digests of what was trained: equal digests mean the same segments with the same advantages in the same
steps.

A step's plan has a digest over its items; the surviving history has a chained digest over its plans. The
learner keeps the chain in its checkpoints and the coordinator keeps it in the run database, so that after a
crash both can prove that they speak of the same history before a single new step is taken.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

from cod_async.lifecycle.segment import SegmentKey

EMPTY_TRAINED_DIGEST = ""
"""Digest of the history before the first step."""


def plan_digest(items: Iterable[tuple[SegmentKey, int, float]]) -> str:
    """Return the SHA-256 (hex) of a step's plan.

    Args:
        items: (key, lease epoch, weighted advantage) of every item, in any order; sorted by key here.
    """
    hasher = hashlib.sha256()
    for key, lease_epoch, advantage in sorted(items, key=lambda item: item[0]):
        hasher.update(struct.pack("<qqqqd", key.group, key.member, key.ordinal, lease_epoch, advantage))
    return hasher.hexdigest()


def extend_trained_digest(digest: str, step_plan_digest: str) -> str:
    """Return the digest of a history after one more step: SHA-256 (hex) of ``digest + step_plan_digest``."""
    return hashlib.sha256((digest + step_plan_digest).encode("ascii")).hexdigest()
