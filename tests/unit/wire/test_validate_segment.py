"""What a segment may not claim: one case per rule, each with its code; and valid segments pass."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from wire_samples import RUN, make_row, make_segment

from cod_async.errors import WireError
from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.segment import (
    PendingUpdate,
    Row,
    RowParent,
    Segment,
    SegmentKey,
    Transcript,
    Version,
    VersionSpan,
)
from cod_async.lifecycle.transcript import mark_after
from cod_async.wire.codec import decode_for_coordinator, encode
from cod_async.wire.messages import SegmentData
from cod_async.wire.validate import validate_segment

PACK_SIZE = 4


def validate(segment: Segment, **options: Any) -> None:
    validate_segment(
        segment,
        **{"run": RUN, "pack_size": PACK_SIZE, "group_size": 8, "vocab_size": 100, "max_context_tokens": 64}
        | options,
    )


def code_of(segment: Segment, **options: Any) -> str:
    with pytest.raises(WireError) as caught:
        validate(segment, **options)
    return caught.value.code


def with_row(**changes: Any) -> Segment:
    return make_segment(rows=(make_row(), replace(make_row(), **changes)))


@pytest.mark.parametrize("ordinal", range(2 * PACK_SIZE - 1))
def test_valid_segments_pass(ordinal: int) -> None:
    validate(make_segment(ordinal=ordinal, pack_size=PACK_SIZE))
    validate(make_segment(ordinal=ordinal, pack_size=PACK_SIZE, rows=(make_row(),) * 3))


def _delta(**changes: Any) -> Segment:
    """A segment of a transcript: its row goes on from 20 tokens, its state says so."""
    row = replace(make_row(), parent=changes.pop("parent", RowParent(20, "a" * 64)))
    segment = make_segment(rows=(row,) * changes.pop("num_rows", 1))
    mark = mark_after(row) if row.parent is not None else RowParent(0, "")
    transcript = changes.pop("transcript", Transcript(mark=mark))
    return replace(segment, state_after=replace(segment.state_after, transcript=transcript), **changes)


def test_a_delta_of_a_transcript_passes() -> None:
    validate(_delta(), is_transcript=True)
    limit = 20 + make_row().num_tokens
    validate(_delta(), is_transcript=True, max_context_tokens=limit)
    assert code_of(_delta(), is_transcript=True, max_context_tokens=limit - 1) == "row_too_long"


@pytest.mark.parametrize(
    "segment",
    [
        make_segment(),
        _delta(parent=None),
        _delta(parent=RowParent(-1, "")),
        _delta(num_rows=2),
        _delta(transcript=Transcript(mark=RowParent(20, "b" * 64))),
        _delta(
            transcript=Transcript(
                mark=mark_after(replace(make_row(), parent=RowParent(20, "a" * 64))),
                token_ids=Array.of([1], "<i4"),
            )
        ),
    ],
)
def test_what_is_no_delta_is_refused_in_a_transcript(segment: Segment) -> None:
    assert code_of(segment, is_transcript=True) == "bad_transcript"


def test_a_delta_is_refused_where_nothing_is_carried_that_way() -> None:
    assert code_of(_delta()) == "bad_transcript"


def test_a_lifecycle_without_updates_passes() -> None:
    for position in range(PACK_SIZE):
        segment = make_segment(ordinal=2 * position, pack_size=PACK_SIZE)
        state = replace(
            segment.state_after, next_ordinal=min(2 * position + 2, 2 * PACK_SIZE - 1), pending=None
        )
        validate(replace(segment, state_after=state, is_last=position == PACK_SIZE - 1))


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("wrong_run", {"run": "another"}),
        ("bad_name", {"actor": "../actor"}),
        ("bad_name", {"actor": ""}),
        ("bad_name", {"environment": "a b"}),
        ("bad_name", {"preset": "x" * 200}),
        ("bad_name", {"preset": "cross\n"}),
        ("bad_name", {"adapter": "a/b"}),
        ("bad_key", {"key": SegmentKey(-1, 0, 0)}),
        ("bad_key", {"key": SegmentKey(1 << 63, 0, 0)}),
        ("bad_key", {"key": SegmentKey(0, 8, 0)}),
        ("bad_key", {"key": SegmentKey(0, -1, 0)}),
        ("bad_key", {"key": SegmentKey(0, 0, 2 * PACK_SIZE - 1)}),
        ("bad_key", {"key": SegmentKey(0, 0, -1)}),
        ("bad_key", {"lease_epoch": -1}),
        ("bad_key", {"lease_epoch": 1 << 63}),
        ("bad_key", {"pack_seed": -1}),
        ("bad_kind", {"kind": "update"}),
        ("bad_position", {"position": 1}),
        ("bad_is_last", {"is_last": True}),
        ("bad_reward", {"reward": math.nan}),
        ("bad_reward", {"raw_reward": -math.inf}),
        ("bad_reward", {"reward": 1e300}),
        ("bad_metrics", {"metrics": {"a": math.inf}}),
        ("bad_metrics", {"metrics": {"a" * 200: 1.0}}),
        ("bad_metrics", {"metrics": {str(i): 1.0 for i in range(300)}}),
        ("bad_metrics", {"wall_s": -1.0}),
        ("bad_metrics", {"wall_s": math.nan}),
        ("bad_rows", {"rows": (make_row(),) * 2000}),
        ("no_action_tokens", {"rows": ()}),
        ("no_action_tokens", {"rows": (make_row(spans=()),)}),
    ],
)
def test_refused_claims(code: str, changes: dict[str, Any]) -> None:
    assert code_of(make_segment(**changes)) == code


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("bad_state", {"next_ordinal": 0}),
        ("bad_state", {"next_ordinal": 8}),
        ("bad_is_last", {"next_ordinal": 7}),
        ("bad_state", {"task_rewards": ()}),
        ("bad_state", {"task_rewards": (0.5, 0.5)}),
        ("bad_state", {"task_rewards": (math.nan,)}),
        ("bad_state", {"pending": None}),
        ("bad_state", {"pending": PendingUpdate("t", math.inf, "f")}),
        ("bad_state", {"next_ordinal": 2}),
    ],
)
def test_refused_states(code: str, changes: dict[str, Any]) -> None:
    segment = make_segment()
    assert code_of(replace(segment, state_after=replace(segment.state_after, **changes))) == code


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("bad_dtype", {"token_ids": Array.of(range(12), "<i8")}),
        ("bad_dtype", {"behavior_logprobs": Array.of(range(6), "<i4")}),
        ("bad_rows", {"token_ids": Array.of([], "<i4")}),
        ("row_too_long", {"token_ids": Array.of(np.zeros(65), "<i4")}),
        ("bad_token_ids", {"token_ids": Array.of([0] * 11 + [100], "<i4")}),
        ("bad_token_ids", {"token_ids": Array.of([-1] + [0] * 11, "<i4")}),
        ("bad_token_ids", {"token_ids": Array.of([-(1 << 31)] + [0] * 11, "<i4")}),
        ("bad_spans", {"action_spans": ((4, 7), (9, 13))}),
        ("bad_spans", {"action_spans": ((-1, 2), (9, 12))}),
        ("bad_spans", {"action_spans": ((4, 7), (6, 9))}),
        ("bad_spans", {"action_spans": ((9, 12), (4, 7))}),
        ("bad_spans", {"action_spans": ((4, 4), (6, 12))}),
        ("bad_spans", {"action_spans": ((7, 4), (3, 12))}),
        ("bad_spans", {"action_spans": ((4, 7),)}),
        ("bad_spans", {"action_spans": ()}),
        ("bad_logprobs", {"behavior_logprobs": Array.of([-1, -1, -1, -1, -1, math.nan], "<f4")}),
        ("bad_logprobs", {"behavior_logprobs": Array.of([-1, -1, math.inf, -1, -1, -1], "<f4")}),
        ("bad_logprobs", {"behavior_logprobs": Array.of([-math.inf, -1, -1, -1, -1, -1], "<f4")}),
        ("bad_logprobs", {"behavior_logprobs": Array.of([-1, -1, -1, -1, 1e-5, -1], "<f4")}),
        ("bad_versions", {"versions": ()}),
        ("bad_versions", {"versions": (VersionSpan(Version(0, 3), 5),)}),
        ("bad_versions", {"versions": (VersionSpan(Version(0, 3), 7), VersionSpan(Version(0, 4), -1))}),
        ("bad_versions", {"versions": (VersionSpan(Version(0, 3), 6), VersionSpan(Version(0, 4), 0))}),
        ("bad_versions", {"versions": (VersionSpan(Version(0, -3), 6),)}),
        ("bad_versions", {"versions": (VersionSpan(Version(1 << 63, 0), 6),)}),
        ("bad_planes", {"planes": {"router": Array.of(range(7), "|u1")}}),
        ("bad_planes", {"planes": {"router": Array.of(range(12), "<i4")}}),
        ("bad_planes", {"planes": {"../x": Array.of(range(12), "|u1")}}),
    ],
)
def test_refused_rows(code: str, changes: dict[str, Any]) -> None:
    assert code_of(with_row(**changes)) == code


def test_what_is_just_inside() -> None:
    validate(with_row(behavior_logprobs=Array.of([-1, 5e-7, -0.0, 0.0, -1e30, -1], "<f4")))
    validate(with_row(token_ids=Array.of([99] * 12, "<i4"), planes={"router": Array.of(range(24), "|u1")}))
    validate(with_row(action_spans=((0, 3), (3, 6))))
    validate(make_segment(finish="context_overflow", rows=()))
    validate(make_segment(finish="context_overflow", rows=(make_row(spans=()),)))
    highest = replace(make_row(), token_ids=Array.of([(1 << 31) - 1] * 12, "<i4"))
    validate(make_segment(rows=(highest,)), vocab_size=None)


def test_tokens_of_the_future() -> None:
    segment = make_segment(rows=(make_row(step=5),))
    validate(segment, newest=Version(0, 5))
    validate(segment, newest=Version(1, 0))  # an abandoned lineage is the past, however far it went
    assert code_of(segment, newest=Version(0, 4)) == "future_version"


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_spans_agree_with_a_mask(data: st.DataObject) -> None:
    """Spans are valid exactly if they are the runs of some mask, with as many log-probs as it has ones."""
    num_tokens = data.draw(st.integers(1, 20))
    ends = st.integers(-1, num_tokens + 1)
    spans = tuple(data.draw(st.lists(st.tuples(ends, ends), max_size=4)))
    mask = [0] * num_tokens
    is_valid = True
    for start, stop in spans:
        is_valid = is_valid and 0 <= start < stop <= num_tokens
        if is_valid:
            is_valid = not any(mask[start:])  # nothing set at or after: ascending and disjoint
            mask[start:stop] = [1] * (stop - start)
    num_actions = sum(mask) if is_valid else data.draw(st.integers(0, num_tokens))
    row = Row(
        token_ids=Array.of(np.zeros(num_tokens), "<i4"),
        action_spans=spans,
        behavior_logprobs=Array.of(-np.ones(num_actions), "<f4"),
        versions=(VersionSpan(Version(0, 0), num_actions),) if num_actions else (),
    )
    segment = make_segment(rows=(row,), finish="context_overflow")
    if is_valid:
        validate(segment)
    else:
        assert code_of(segment) == "bad_spans"


def _taught(**changes: Any) -> Segment:
    row = make_row()
    scores = changes.pop("scores", Array.of(-np.arange(row.num_action_tokens) - 1e-3, "<f4"))
    return make_segment(rows=(replace(row, teacher_logprobs=scores),), **changes)


def test_a_teachers_scores_pass_in_a_run_that_distills_and_only_there() -> None:
    validate(_taught(), is_distilled=True)
    validate(_taught(scores=Array.of([5e-7] * 6, "<f4")), is_distilled=True)  # rounding
    assert code_of(_taught()) == "bad_teacher"
    assert code_of(make_segment(), is_distilled=True) == "bad_teacher"
    validate(make_segment(rows=(), finish="context_overflow"), is_distilled=True)


@pytest.mark.parametrize(
    "scores",
    [
        Array.of([-1.0] * 5, "<f4"),
        Array.of([-1.0] * 7, "<f4"),
        Array.of([-1] * 6, "<i4"),
        Array.of([-1.0] * 5 + [math.nan], "<f4"),
        Array.of([-math.inf] + [-1.0] * 5, "<f4"),
        Array.of([-1.0] * 5 + [1e-3], "<f4"),
    ],
)
def test_scores_that_no_teacher_gives(scores: Array) -> None:
    assert code_of(_taught(scores=scores), is_distilled=True) == "bad_teacher"


def test_a_teachers_scores_travel() -> None:
    segment = _taught()
    message = SegmentData(seq=1, segment=segment)
    _, decoded = decode_for_coordinator(encode(message, run=RUN, session=1), run=RUN)
    assert decoded == message
    plain = encode(SegmentData(seq=1, segment=make_segment()), run=RUN, session=1)
    assert b"teacher" not in plain[1]
    assert segment.teacher_gap_nats == pytest.approx(np.mean(-0.25 * np.arange(6) + np.arange(6) + 1e-3))
    assert make_segment().teacher_gap_nats is None
