"""A step's batch, read from the run database: what the coordinator sends, and what a replay rebuilds.

Both come from here, so a replayed step is flattened from the very items that the learner had.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from cod_async.lifecycle.segment import Segment, SegmentKey, Version
from cod_async.store.history import HistoryTable
from cod_async.store.segments import SegmentTable
from cod_async.wire.messages import TrainItem


def step_items(
    history: HistoryTable, segments: SegmentTable, version: Version, *, is_transcript: bool
) -> Iterator[TrainItem]:
    """Yield the segments of a step's plan by key, and before each those that its transcript goes on from.

    Args:
        history: of the run.
        segments: of the run.
        version: that the step starts from.
        is_transcript: whether segments are deltas of a growing conversation.

    Raises:
        StoreError: a payload is not kept any more.
    """
    last: SegmentKey | None = None
    for item in history.items(version):
        key = item.key
        if is_transcript:
            is_same = last is not None and (last.group, last.member) == (key.group, key.member)
            after = last.ordinal if last is not None and is_same else -1
            for ordinal in segments.ordinals_between(key.group, key.member, after, key.ordinal):
                context = segments.payload(SegmentKey(key.group, key.member, ordinal))
                yield _train_item(context, advantage=0.0, lag_steps=0.0, is_context=True)
            last = key
        segment = segments.payload(key)
        yield _train_item(
            segment, advantage=item.advantage, lag_steps=float(item.lag_steps), is_context=False
        )


def _train_item(segment: Segment, *, advantage: float, lag_steps: float, is_context: bool) -> TrainItem:
    is_taught = any(row.teacher_logprobs is not msgspec.UNSET for row in segment.rows)
    return TrainItem(
        key=segment.key,
        kind=segment.kind,
        position=segment.position,
        rows=segment.rows,
        advantage=advantage,
        lag_steps=lag_steps,
        is_context=is_context,
        environment=f"{segment.environment}.{segment.preset}" if is_taught else msgspec.UNSET,
    )
