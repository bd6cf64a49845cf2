"""Rows that continue each other become one; rows with an edited history do not."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_world import make_row, make_story

from cod_async.learner.packing import flatten, merging_metrics, split_lifecycles
from cod_async.lifecycle.segment import SegmentKey
from cod_async.wire.messages import TrainItem

VOCAB = 5


def item(rows: list[list[int]], member: int = 0, ordinal: int = 0) -> TrainItem:
    """An item whose rows each end with one action token."""
    return TrainItem(
        key=SegmentKey(0, member, ordinal),
        kind="solve",
        position=0,
        rows=tuple(
            make_row(ids, [(len(ids) - 1, len(ids))], [-0.25 * (1 + index)], [0])
            for index, ids in enumerate(rows)
        ),
        advantage=1.0,
        lag_steps=0.0,
    )


def kept(items: list[TrainItem]) -> list[list[int]]:
    flat = flatten(items, vocab_size=VOCAB, has_prefix_merging=True)
    return [
        flat.tokens[start : start + length].tolist()
        for start, length in zip(flat.starts, flat.lengths, strict=True)
    ]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[0, 1], [0, 1, 2, 3]], [[0, 1, 2, 3]]),
        ([[0, 1], [0, 1, 2], [0, 1, 2, 3, 4]], [[0, 1, 2, 3, 4]]),
        ([[0, 1, 2, 3], [0, 1, 3, 3, 4]], [[0, 1, 2, 3], [0, 1, 3, 3, 4]]),  # edited
        ([[0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 0]], [[0, 1, 2], [0, 1, 3, 0]]),  # two continue one
        ([[0, 1, 2], [4, 4], [0, 1, 2, 3], [4, 4, 4]], [[0, 1, 2, 3], [4, 4, 4]]),  # interleaved
        ([[0, 1, 2], [0, 1]], [[0, 1, 2]]),  # out of order
        ([[0, 1, 2], [0, 1, 2]], [[0, 1, 2]]),  # the same turn twice
        ([[1, 0], [0, 1, 0]], [[1, 0], [0, 1, 0]]),  # an end is no beginning
    ],
)
def test_chains_by_hand(rows: list[list[int]], expected: list[list[int]]) -> None:
    assert kept([item(rows)]) == expected
    # In another lifecycle the same rows are others; in a later segment of the same one they merge.
    assert kept([item(rows), item(rows, member=1)]) == expected + expected
    assert kept([item([row], ordinal=index) for index, row in enumerate(rows)]) == expected


@given(st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=6), min_size=1, max_size=8))
@settings(max_examples=80, deadline=None)
def test_kept_rows_are_those_that_begin_no_other(rows: list[list[int]]) -> None:
    expected = {tuple(a) for a in rows if not any(len(b) > len(a) and b[: len(a)] == a for b in rows)}
    found = kept([item(rows)])
    assert len(found) == len(expected) and {tuple(row) for row in found} == expected


@given(st.integers(0, 1000), st.sampled_from([0.0, 0.4]))
@settings(max_examples=30, deadline=None)
def test_turn_by_turn_becomes_what_an_episode_would_have_been(seed: int, edit_odds: float) -> None:
    story = make_story(seed, vocab_size=VOCAB, edit_odds=edit_odds, episodes=1)
    merged = flatten(story.per_turn, vocab_size=VOCAB, has_prefix_merging=True)
    whole = flatten(story.per_episode, vocab_size=VOCAB)
    for name in ("action_items", "action_offsets", "action_lags", "behavior_logprobs", "advantages"):
        assert np.array_equal(getattr(merged, name), getattr(whole, name)), name
    # An edited history may by chance begin another row; else the rows are the very same.
    if edit_odds == 0.0:
        assert merged.lengths.tolist() == whole.lengths.tolist()
        assert np.array_equal(merged.action_rows, whole.action_rows)
    assert merged.num_recorded_rows == sum(len(each.rows) for each in story.per_turn)


def test_what_is_recorded_as_one_row_stays_as_it_is() -> None:
    story = make_story(5, vocab_size=VOCAB, edit_odds=0.0)
    plain = flatten(story.per_episode, vocab_size=VOCAB)
    merged = flatten(story.per_episode, vocab_size=VOCAB, has_prefix_merging=True)
    assert np.array_equal(plain.starts, merged.starts)
    assert np.array_equal(plain.action_rows, merged.action_rows)
    numbers = merging_metrics(merged)
    assert numbers == {"merge_rate": 1.0, "merged_rows_frac": 0.0, "merged_tokens_frac": 0.0}


def test_metrics_by_hand() -> None:
    grown = item([[0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4, 4]])
    edited = item([[1, 1], [1, 2, 1, 1]], member=1)
    alone = item([[2, 2, 2]], member=2)
    items = [grown, edited, alone]
    unmerged = merging_metrics(flatten(items, vocab_size=VOCAB))
    assert unmerged == {"merge_rate": 0.0}
    numbers = merging_metrics(flatten(items, vocab_size=VOCAB, has_prefix_merging=True))
    # Three turns are not the first of their segment; two of them continue a row.
    assert numbers["merge_rate"] == pytest.approx(2 / 3)
    assert numbers["merged_rows_frac"] == pytest.approx(2 / 6)
    assert numbers["merged_tokens_frac"] == pytest.approx((2 + 4) / 21)
    assert "merge_rate" not in merging_metrics(flatten([alone], vocab_size=VOCAB))


def test_parts_of_a_merged_step_hold_its_rows() -> None:
    story = make_story(8, vocab_size=VOCAB, num_groups=3)
    flat = flatten(story.per_turn, vocab_size=VOCAB, has_prefix_merging=True)
    parts = split_lifecycles(flat, 3)
    assert sum(part.num_rows for part, _ in parts) == flat.num_rows
    assert sorted(np.concatenate([actions for _, actions in parts]).tolist()) == list(
        range(flat.num_action_tokens)
    )
    for part, actions in parts:
        ends = part.starts[part.action_rows] + part.action_offsets
        assert np.array_equal(
            part.tokens[ends], flat.tokens[(flat.starts[flat.action_rows] + flat.action_offsets)[actions]]
        )


def test_context_takes_no_row_in() -> None:
    """A row without action tokens is not computed, so it must not become longer company for one that is."""
    long = item([[0, 1, 2, 3]], ordinal=2)
    items = [item([[0, 1]]), msgspec.structs.replace(long, is_context=True)]
    flat = flatten(items, vocab_size=VOCAB, has_prefix_merging=True)
    assert flat.lengths[flat.action_rows].tolist() == [2]
