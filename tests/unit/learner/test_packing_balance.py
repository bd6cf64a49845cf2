"""Ranks and micro-batches get about equal work, each row exactly one place."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_world import make_story

from cod_async.learner.packing import (
    FlatRows,
    RowCost,
    assign,
    balance_of,
    flatten,
    plan_micro_batches,
    row_metrics,
)
from cod_async.learner.rows.balance import fill, row_costs
from cod_async.learner.selftest import random_items
from cod_async.models.layout import LayoutKind

VOCAB = 7


def step_of(count: int, seed: int = 0, max_tokens: int = 60) -> FlatRows:
    items = random_items(count, vocab_size=VOCAB, min_tokens=2, max_tokens=max_tokens, seed=seed)
    return flatten(items, vocab_size=VOCAB)


def test_costs_by_hand() -> None:
    cost = RowCost(attention_tokens=100.0, head_share=0.5)
    lengths, actions = np.array([10, 100]), np.array([4, 0])
    assert cost.of(lengths, actions).tolist() == [10 + 1 + 2, 200]
    # 60 shared tokens leave 40 of the linear layers and 100^2 - 60^2 of attention.
    assert cost.of(lengths[1:], actions[1:], 60).tolist() == [40 + 64]
    qwen = RowCost.of_shape(15_728_640, 2048, 28, 151_936 * 1024)
    assert qwen.attention_tokens == RowCost().attention_tokens == 7680
    assert qwen.head_share == pytest.approx(RowCost().head_share, abs=0.01)


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 99), st.sampled_from(["rectangle", "tree"]))
@settings(max_examples=60, deadline=None)
def test_every_row_has_one_rank(count: int, num_ranks: int, seed: int, kind: LayoutKind) -> None:
    flat = step_of(count, seed)
    parts = assign(flat, num_ranks, kind=kind)
    assert len(parts) == num_ranks
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))
    assert all((np.diff(part) > 0).all() for part in parts)
    again = assign(flat, num_ranks, kind=kind)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


@given(st.integers(2, 6), st.integers(2, 3), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_ranks_are_within_four_thirds_of_the_best_split(count: int, num_ranks: int, seed: int) -> None:
    flat = step_of(count, seed)
    costs = row_costs(flat, RowCost())
    best = min(
        max(float(costs[np.array(places) == rank].sum()) for rank in range(num_ranks))
        for places in itertools.product(range(num_ranks), repeat=count)
    )
    worst = max(float(costs[part].sum()) for part in assign(flat, num_ranks))
    assert worst <= (4 / 3 - 1 / (3 * num_ranks)) * best + 1e-9


def test_long_rows_count_for_more_than_their_tokens() -> None:
    items = random_items(8, vocab_size=VOCAB, min_tokens=30, max_tokens=30)
    long = random_items(1, vocab_size=VOCAB, min_tokens=120, max_tokens=120)
    flat = flatten([*items, *long], vocab_size=VOCAB)
    cost = RowCost(attention_tokens=50.0)
    alone = [part for part in assign(flat, 2, cost) if 8 in part.tolist()]
    assert alone[0].tolist() == [8]  # as costly as all the others together, in tokens it is less
    assert len(assign(flat, 2, RowCost(attention_tokens=1e9, head_share=0.0))[0]) == 3


def test_a_tree_keeps_rows_that_begin_alike_together() -> None:
    story = make_story(1, vocab_size=VOCAB, num_groups=8, group_size=4, episodes=1, prompt_tokens=60)
    flat = flatten(story.per_episode, vocab_size=VOCAB)

    def computed(kind: LayoutKind) -> int:
        parts = assign(flat, 4, kind=kind)
        assert balance_of(flat, parts) > 0.75
        return sum(
            plan.num_tokens
            for part in parts
            for plan in plan_micro_batches(flat, 10_000, kind="tree", rows=part)
        )

    assert computed("tree") < 0.8 * computed("packed")


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=40),
    st.integers(20, 100),
)
@settings(max_examples=80, deadline=None)
def test_filled_micro_batches_keep_to_the_budget(lengths: list[int], budget: int) -> None:
    sizes = np.array(lengths, dtype=np.int64)
    parts = fill(sizes, sizes.astype(np.float64) ** 2, budget)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
    for part in parts:
        assert int(sizes[part].sum()) <= budget or part.size == 1
    # Any two of the micro-batches that best fit makes are too full to be one, so at most twice too many.
    assert len(parts) <= 2 * -(-int(np.minimum(sizes, budget).sum()) // budget)


def test_the_metrics_of_a_step_are_of_all_ranks() -> None:
    story = make_story(2, vocab_size=VOCAB, prompt_tokens=30)
    flat = flatten(story.per_turn, vocab_size=VOCAB, has_prefix_merging=True)
    alone = row_metrics(flat, 200, kind="packed")
    assert alone["packing_efficiency"] == 1.0 and 0.5 < alone["micro_batch_balance"] <= 1.0
    assert 0 < alone["merged_tokens_frac"] < 1 and 0 < alone["merge_rate"] <= 1
    assert "rank_balance" not in alone and "tree_share_rate" not in alone
    shared = row_metrics(flat, 200, kind="packed", num_ranks=3, multiple=8)
    assert shared["rank_balance"] == balance_of(flat, assign(flat, 3)) > 0.8
    parts = [part for part in assign(flat, 3) if part.size]
    padded = [
        p for rows in parts for p in plan_micro_batches(flat, 200, kind="packed", rows=rows, multiple=8)
    ]
    real, computed = flat.num_tokens, sum(-(-plan.num_tokens // 8) * 8 for plan in padded)
    assert shared["packing_efficiency"] == pytest.approx(real / computed) and computed > real
    assert row_metrics(flat, 4096, kind="tree")["tree_share_rate"] > 0.2


def test_nothing_to_compute_is_nothing() -> None:
    empty = np.zeros(0, dtype=np.int64)
    assert fill(empty, empty.astype(np.float64), 10) == []
    flat = step_of(3)
    assert plan_micro_batches(flat, 10, rows=empty, kind="packed") == []
    assert plan_micro_batches(flat, 10, rows=empty, kind="tree") == []
    assert plan_micro_batches(flat, 10, rows=empty) == []
