"""Rectangles hold every row once and keep every number where it belongs."""

from __future__ import annotations

import itertools
import random

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_world import VOCAB

from cod_async.errors import WorkError
from cod_async.learner.packing import flatten, micro_batches, rectangles
from cod_async.learner.selftest import random_items
from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.segment import Row, Version, VersionSpan


def test_micro_batches_against_a_loop_over_rows() -> None:
    items = random_items(57, vocab_size=VOCAB, min_tokens=2, max_tokens=40)
    two_rows = msgspec.structs.replace(items[3], rows=items[3].rows + items[4].rows)
    items[3] = two_rows
    flat = flatten(items, vocab_size=VOCAB)
    expected = []
    for index, item in enumerate(items):
        for row in item.rows:
            ids, behavior = row.token_ids.numpy(), iter(row.behavior_logprobs.numpy().tolist())
            for start, stop in row.action_spans:
                for position in range(start, stop):
                    expected.append((index, tuple(ids[: position + 1].tolist()), next(behavior)))
    found = []
    for batch in micro_batches(flat, 200):
        width = batch.input_ids.shape[1]
        assert batch.input_ids.numel() <= 200
        for predictor, target, behavior_logprob, segment in zip(
            batch.predictors.tolist(),
            batch.targets.tolist(),
            batch.behavior_logprobs.tolist(),
            batch.segment_ids.tolist(),
            strict=True,
        ):
            row, position = divmod(predictor, width)
            history = (*batch.input_ids[row, : position + 1].tolist(), target)
            found.append((segment, history, behavior_logprob))
    assert sorted(found) == sorted(expected)
    assert flat.num_tokens == sum(row.num_tokens for item in items for row in item.rows)
    assert flat.num_action_tokens == len(expected)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(1, 300), st.integers(0, 200))
@settings(max_examples=150, deadline=None)
def test_rectangles_partition_within_the_budget(lengths: list[int], budget: int, overhead: int) -> None:
    sizes = np.array(lengths, dtype=np.int64)
    cut = rectangles(sizes, budget, overhead)
    assert sorted(np.concatenate(cut).tolist()) == list(range(len(lengths)))
    for rows in cut:
        assert rows.size == 1 or rows.size * sizes[rows].max() <= budget
        assert sizes[rows].tolist() == sorted(sizes[rows].tolist())


@given(st.lists(st.integers(1, 12), min_size=1, max_size=7), st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_rectangles_cost_what_the_best_cut_costs(lengths: list[int], overhead: int) -> None:
    sizes = sorted(lengths)

    def cost(parts: list[list[int]]) -> int:
        return sum(max(part) * len(part) + overhead for part in parts)

    best = min(
        cost([sizes[a:b] for a, b in itertools.pairwise([0, *cuts, len(sizes)])])
        for count in range(len(sizes))
        for cuts in itertools.combinations(range(1, len(sizes)), count)
    )
    found = rectangles(np.array(lengths), 10_000, overhead)
    assert cost([[lengths[i] for i in rows] for rows in found]) == best


def test_many_distinct_lengths_stay_a_partition() -> None:
    sizes = np.arange(1, 1200)[::-1].copy()
    cut = rectangles(sizes, 4096)
    assert sorted(np.concatenate(cut).tolist()) == list(range(1199))
    padded = sum(rows.size * int(sizes[rows].max()) for rows in cut)
    assert padded < 1.1 * int(sizes.sum())


def test_packing_does_not_depend_on_the_order_of_arrival() -> None:
    items = random_items(40, vocab_size=VOCAB, min_tokens=2, max_tokens=30)
    shuffled = items[:]
    random.Random(1).shuffle(shuffled)
    shuffled.sort(key=lambda item: item.key)
    for a, b in zip(
        micro_batches(flatten(items, vocab_size=VOCAB), 128),
        micro_batches(flatten(shuffled, vocab_size=VOCAB), 128),
        strict=True,
    ):
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.segment_ids, b.segment_ids)


def _item(ids: list[int], spans: tuple[tuple[int, int], ...], num_logprobs: int) -> list[object]:
    (item,) = random_items(1, vocab_size=VOCAB, min_tokens=4, max_tokens=4)
    row = Row(
        Array.of(ids, "<i4"),
        spans,
        Array.of([-1.0] * num_logprobs, "<f4"),
        (VersionSpan(Version(0, 0), num_logprobs),),
    )
    return [msgspec.structs.replace(item, rows=(row,))]


@pytest.mark.parametrize(
    ("ids", "spans", "num_logprobs", "part"),
    [
        ([1, 2, 3], ((0, 2),), 2, "action span"),
        ([1, 2, 3], ((1, 4),), 3, "action span"),
        ([1, 2, 3], ((2, 2),), 0, "action span"),
        ([1, 2, 3], ((1, 3),), 1, "miss its spans"),
        ([], (), 0, "is empty"),
        ([1, VOCAB, 3], ((1, 3),), 2, "token id outside"),
        ([1, -1, 3], ((1, 3),), 2, "token id outside"),
        ([1] * 9, ((1, 3),), 2, "longer than 8"),
    ],
)
def test_rows_no_engine_can_have_made_are_refused(
    ids: list[int], spans: tuple[tuple[int, int], ...], num_logprobs: int, part: str
) -> None:
    with pytest.raises(WorkError, match=part):
        flatten(_item(ids, spans, num_logprobs), vocab_size=VOCAB, max_row_tokens=8)  # type: ignore[arg-type]
