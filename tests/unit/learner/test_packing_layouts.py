"""Every layout trains every action token once, behind the right history, with the numbers it came with."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_world import Story, histories, make_row, make_story, told

from cod_async.config.learner import LearnerConfig
from cod_async.errors import InputError, WorkError
from cod_async.learner.packing import (
    FlatRows,
    choose_layout,
    filler,
    flatten,
    layout_metrics,
    micro_batches,
    plan_micro_batches,
    token_budget,
)
from cod_async.learner.rows.flat import RowOrder
from cod_async.learner.rows.tree import MIN_SHARED_TOKENS, build_tree, plan_trees
from cod_async.learner.selftest import random_items
from cod_async.lifecycle.segment import SegmentKey, Version
from cod_async.models.layout import LayoutKind
from cod_async.wire.messages import TrainItem

VOCAB = 5
KINDS: tuple[LayoutKind, ...] = ("rectangle", "packed", "tree")
LEARNER = Version(0, 5)


def flat_of(items: list[TrainItem], *, is_merged: bool = False) -> FlatRows:
    return flatten(items, vocab_size=VOCAB, version=LEARNER, has_prefix_merging=is_merged)


def heard(flat: FlatRows, items: list[TrainItem], **options: Any) -> list[tuple[object, ...]]:
    """What the micro-batches say, in the words of ``told``; every action token must come up once."""
    found: list[tuple[object, ...]] = []
    seen: list[int] = []
    for batch in micro_batches(flat, **options):
        columns = zip(
            histories(batch),
            batch.targets.tolist(),
            batch.behavior_logprobs.tolist(),
            batch.segment_ids.tolist(),
            batch.actions.tolist(),
            strict=True,
        )
        for history, target, behavior, segment, action in columns:
            assert segment == flat.action_items[action]
            assert behavior == flat.behavior_logprobs[action]
            step = LEARNER.step - int(flat.action_lags[action])
            advantage = float(flat.advantages[segment])
            found.append((items[segment].key, history, target, behavior, step, advantage))
            seen.append(action)
    assert sorted(seen) == list(range(flat.num_action_tokens))
    return sorted(found)


def stories() -> st.SearchStrategy[Story]:
    return st.builds(
        make_story,
        st.integers(0, 10_000),
        vocab_size=st.just(VOCAB),
        group_size=st.integers(1, 3),
        max_turns=st.integers(1, 4),
        prompt_tokens=st.sampled_from([1, 3, 15, 16, 17, 40]),
        edit_odds=st.sampled_from([0.0, 0.3]),
        episodes=st.integers(1, 2),
    )


@pytest.mark.parametrize("kind", KINDS)
@given(story=stories(), budget=st.sampled_from([1, 40, 100, 10_000]), is_merged=st.booleans())
@settings(max_examples=25, deadline=None)
def test_every_action_token_once_with_its_own_numbers(
    kind: LayoutKind, story: Story, budget: int, is_merged: bool
) -> None:
    flat = flat_of(story.per_turn, is_merged=is_merged)
    assert heard(flat, story.per_turn, max_tokens=budget, kind=kind) == told(story.per_turn)


@pytest.mark.parametrize("kind", KINDS)
@given(story=stories(), multiple=st.sampled_from([1, 4, 8]))
@settings(max_examples=10, deadline=None)
def test_trained_items_come_first_and_padding_stays_outside(
    kind: LayoutKind, story: Story, multiple: int
) -> None:
    flat = flat_of(story.per_turn, is_merged=True)
    is_trained = flat.advantages > 0
    options: dict[str, Any] = {"max_tokens": 80, "kind": kind, "multiple": multiple, "is_trained": is_trained}
    assert heard(flat, story.per_turn, **options) == told(story.per_turn)
    for batch in micro_batches(flat, **options):
        trained = is_trained[batch.segment_ids.numpy()]
        assert trained[: batch.num_trained].all() and not trained[batch.num_trained :].any()
        if kind != "rectangle":
            assert batch.input_ids.shape[1] % multiple == 0


@pytest.mark.parametrize("kind", KINDS)
@given(story=stories(), budget=st.sampled_from([30, 100]))
@settings(max_examples=15, deadline=None)
def test_plans_keep_to_the_budget_and_know_their_sizes(kind: LayoutKind, story: Story, budget: int) -> None:
    flat = flat_of(story.per_turn)
    plans = plan_micro_batches(flat, budget, kind=kind)
    batches = list(micro_batches(flat, budget, kind=kind))
    assert sorted(np.concatenate([plan.rows for plan in plans]).tolist()) == list(range(flat.num_rows))
    for plan, batch in zip(plans, batches, strict=True):
        assert batch.input_ids.numel() == plan.num_computed_tokens
        assert batch.num_tokens == plan.num_tokens <= plan.num_row_tokens
        assert plan.num_computed_tokens <= budget or plan.rows.size == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_arrival_changes_nothing(kind: LayoutKind) -> None:
    story = make_story(3, vocab_size=VOCAB, prompt_tokens=18)
    shuffled = story.per_turn[:]
    random.Random(1).shuffle(shuffled)
    shuffled.sort(key=lambda item: item.key)
    one = micro_batches(flat_of(story.per_turn, is_merged=True), 90, kind=kind)
    other = micro_batches(flat_of(shuffled, is_merged=True), 90, kind=kind)
    for a, b in zip(one, other, strict=True):
        for name in ("input_ids", "predictors", "targets", "behavior_logprobs", "segment_ids", "actions"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert (a.layout.lengths, a.layout.parents) == (b.layout.lengths, b.layout.parents)


def test_a_tree_by_hand() -> None:
    """Two rows share 20 ids, one of them shares 20 more with a third; a fourth parts after 15 of its own."""
    a = [1] * 20
    rows = [a + [2] * 20 + [3], a + [2] * 20 + [4, 4], [*a, 0], [1] * 15 + [3]]
    items = [
        TrainItem(
            key=SegmentKey(0, index, 0),
            kind="solve",
            position=0,
            rows=(make_row(ids, [(len(ids) - 1, len(ids))], [-1.0], [0]),),
            advantage=1.0,
            lag_steps=0.0,
        )
        for index, ids in enumerate(rows)
    ]
    flat = flat_of(items)
    (tree,) = plan_trees(flat, np.arange(4), 1000)
    # In the order of ids: [1]*20 with [0], and with [2]*20, which goes on with [3] and [4, 4]; [1]*15+[3]
    # shares too little.
    assert tree.lengths.tolist() == [20, 1, 20, 1, 2, 16]
    assert tree.parents.tolist() == [-1, 0, 0, 2, 2, -1]
    assert tree.depths.tolist() == [0, 20, 20, 40, 40, 0]
    assert tree.paths == ((0, 2, 3), (0, 2, 4), (0, 1), (5,))
    (batch,) = micro_batches(flat, 1000, kind="tree")
    # The action tokens of rows 0 and 2 are the first of their nodes: the last tokens of the parents say them.
    assert batch.predictors.tolist() == [40, 42, 19, 58]
    assert batch.targets.tolist() == [3, 4, 0, 3]
    numbers = layout_metrics(plan_micro_batches(flat, 1000, kind="tree"))
    assert numbers["tree_share_rate"] == pytest.approx(1 - 60 / (41 + 42 + 21 + 16))
    assert numbers["packing_efficiency"] == 1.0


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=50), min_size=1, max_size=9),
    st.lists(st.integers(0, 8), max_size=9),
)
@settings(max_examples=60, deadline=None)
def test_a_tree_computes_no_more_than_a_trie_that_never_cuts_short(
    rows: list[list[int]], copies: list[int]
) -> None:
    """Against the trie of single ids: at most MIN_SHARED_TOKENS - 1 more per row, and no less."""
    rows = rows + [rows[index % len(rows)] + [1] for index in copies]
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    flat = FlatRows(
        tokens=np.concatenate([np.array(row, dtype=np.int64) for row in rows]),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        action_items=np.zeros(0, dtype=np.int64),
        action_rows=np.zeros(0, dtype=np.int64),
        action_offsets=np.zeros(0, dtype=np.int64),
        action_lags=np.zeros(0, dtype=np.int64),
        behavior_logprobs=np.zeros(0, dtype=np.float32),
        advantages=np.zeros(0),
        row_lifecycles=np.zeros(len(rows), dtype=np.int64),
    )
    order = RowOrder(flat, np.arange(len(rows)))
    tree = build_tree(flat, order, 0, len(rows))
    trie = {tuple(row[: end + 1]) for row in rows for end in range(len(row))}
    assert len(trie) <= tree.num_tokens <= len(trie) + (MIN_SHARED_TOKENS - 1) * len(rows)
    for row, path in enumerate(tree.paths):
        ids: list[int] = []
        for node in path:
            start = tree.starts[node]
            assert tree.depths[node] == len(ids)
            ids += flat.tokens[start : start + tree.lengths[node]].tolist()
        assert ids == rows[row]


def test_mixed_lengths_pack_without_padding_and_evenly() -> None:
    rng = np.random.default_rng(0)
    items = random_items(400, vocab_size=VOCAB, min_tokens=2, max_tokens=3)
    long = []
    for item, length in zip(items, (rng.lognormal(5.0, 1.2, 400).astype(int) + 2).tolist(), strict=True):
        size = min(length, 4000)
        row = make_row([1] * size, [(size - 1, size)], [-1.0], [0])
        long.append(msgspec.structs.replace(item, rows=(row,)))
    flat = flat_of(long)
    numbers = layout_metrics(plan_micro_batches(flat, 4096, kind="packed", multiple=16))
    plans = plan_micro_batches(flat, 4096, kind="packed", multiple=16)
    assert numbers["packing_efficiency"] >= 0.99
    assert numbers["micro_batch_balance"] >= 0.95
    assert len(plans) <= -(-flat.num_tokens // 4096) + 1


def test_a_row_beyond_the_device_is_refused_by_its_length() -> None:
    flat = flat_of(random_items(4, vocab_size=VOCAB, min_tokens=10, max_tokens=10))
    assert len(plan_micro_batches(flat, 4, kind="packed", max_row_tokens=10)) == 4
    with pytest.raises(WorkError, match="a row has 10 tokens, and a micro-batch of one row can have 9"):
        plan_micro_batches(flat, 4, kind="packed", max_row_tokens=9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_filler_has_padding_only(kind: LayoutKind) -> None:
    batch = filler(kind, multiple=8)
    assert batch.is_filler and batch.targets.numel() == 0 and batch.num_tokens == 0
    assert batch.input_ids.shape[1] == (1 if kind == "rectangle" else 8)
    assert sum(batch.layout.lengths) == batch.input_ids.shape[1] and batch.layout.kind == kind


def test_layouts_follow_the_configuration() -> None:
    def chosen(device: str, is_recurrent: bool = False, **options: Any) -> LayoutKind:
        return choose_layout(LearnerConfig(**options), device, is_recurrent=is_recurrent)

    assert chosen("cpu") == "rectangle" and chosen("cuda") == "packed"
    assert chosen("cuda", is_recurrent=True) == "rectangle"
    assert chosen("cpu", layout="packed") == "packed" and chosen("cuda", layout="rectangles") == "rectangle"
    assert chosen("cpu", has_prefix_tree=True) == "tree"
    with pytest.raises(InputError, match=r"learner\.layout: packed"):
        chosen("cuda", is_recurrent=True, layout="packed")
    with pytest.raises(InputError, match=r"learner\.has_prefix_tree"):
        chosen("cuda", is_recurrent=True, has_prefix_tree=True)
    learner = LearnerConfig(tokens_per_micro_batch=9999)
    assert token_budget(learner, "cpu", "rectangle") == 2048
    assert token_budget(learner, "cpu", "packed") == token_budget(learner, "cuda", "rectangle") == 9999
