"""The transcript carry: a whole lifecycle as one growing conversation, sealed piece by piece.

Nothing is summarised: turn after turn is appended, over all tasks, so a lifecycle is one token sequence with
many segments, each with its own reward, return and advantage. On the wire a segment is only the *delta* to
the sequence before it, and names that sequence by length and a digest chained over all deltas. Whoever needs
the sequence puts deltas end to end: the coordinator for an actor that takes a lifecycle over, the learner for
a training row. A delta that does not belong where it claims to belong is refused by its digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from msgspec.structs import replace

from cod_async.errors import InputError
from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.segment import LifecycleState, Row, RowParent, Segment

NO_PARENT = RowParent(num_tokens=0, digest="")
"""What the first delta of a lifecycle extends: nothing."""


def chained_digest(parent: RowParent, delta: bytes) -> str:
    """Return the digest of a sequence that is ``parent`` and then ``delta``.

    Args:
        parent: the sequence before.
        delta: int32 ids, little-endian.

    Returns:
        SHA-256 of the parent's digest and the delta, as 64 hexadecimal digits.
    """
    return hashlib.sha256(parent.digest.encode("ascii") + b"\0" + delta).hexdigest()


def mark_after(row: Row) -> RowParent:
    """Return what a delta makes of its parent: the mark that the next delta must name.

    Raises:
        InputError: the row is not a delta.
    """
    if row.parent is None:
        raise InputError("a row of a transcript must name its parent")
    return RowParent(
        num_tokens=row.parent.num_tokens + row.num_tokens,
        digest=chained_digest(row.parent, row.token_ids.data),
    )


def token_ids_of(state: LifecycleState) -> list[int]:
    """Return the conversation so far.

    Raises:
        InputError: as for :func:`conversation_of`.
    """
    ids: list[int] = conversation_of(state).numpy().tolist()
    return ids


def conversation_of(state: LifecycleState) -> Array:
    """Return the conversation so far, int32; empty before the first delta.

    Raises:
        InputError: the state names a conversation but does not hold it; it came from a segment and has to be
            completed by :func:`continued` or :func:`assembled`.
    """
    transcript = state.transcript
    if transcript is None or transcript.mark.num_tokens == 0:
        return Array.of((), "<i4")
    ids = transcript.token_ids
    if ids is None or ids.length != transcript.mark.num_tokens:
        raise InputError(
            f"the state names a conversation of {transcript.mark.num_tokens} tokens and holds "
            f"{0 if ids is None else ids.length}; it cannot be continued"
        )
    return ids


def continued(before: LifecycleState, segment: Segment) -> LifecycleState:
    """Return a segment's ``state_after`` with the conversation that its delta leads to, if there is one."""
    after = segment.state_after
    if after.transcript is None:
        return after
    return _with_tokens(after, [conversation_of(before), *(row.token_ids for row in segment.rows)])


def assembled(state: LifecycleState, segments: Sequence[Segment]) -> LifecycleState:
    """Return ``state`` with the conversation that the segments of its lifecycle, in order, add up to.

    Raises:
        InputError: the deltas do not chain up to the state's mark.
    """
    if state.transcript is None:
        return state
    deltas: list[Array] = []
    mark = NO_PARENT
    for segment in segments:
        for row in segment.rows:
            if row.parent != mark:
                raise InputError(f"segment {segment.key} does not follow the segment before it")
            mark = mark_after(row)
            deltas.append(row.token_ids)
    if mark != state.transcript.mark:
        raise InputError(f"{len(segments)} segments do not add up to the conversation of the state")
    return _with_tokens(state, deltas)


def _with_tokens(state: LifecycleState, parts: Sequence[Array]) -> LifecycleState:
    """Return ``state`` with its conversation filled in: the parts end to end, as bytes."""
    assert state.transcript is not None  # noqa: S101  (callers check)
    length = sum(part.length for part in parts)
    ids = Array(dtype="<i4", length=length, data=b"".join(part.data for part in parts))
    return replace(state, transcript=replace(state.transcript, token_ids=ids))


def system_digest(system: str) -> str:
    """Return a short digest of the rules that opened a conversation, to tell whether a task has others."""
    return hashlib.sha256(system.encode("utf-8", "surrogatepass")).hexdigest()[:16]
