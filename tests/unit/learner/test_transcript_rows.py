"""Deltas of a transcript become one row; its gradients are those of one row per segment."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
import torch
from learner_world import VOCAB, tiny_model

from cod_async.config.schema import LearnerConfig, LossConfig
from cod_async.errors import WorkError
from cod_async.learner.packing import flatten
from cod_async.learner.step import Trainer
from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.segment import Row, SegmentKey, Version, VersionSpan
from cod_async.lifecycle.transcript import NO_PARENT, mark_after
from cod_async.models.qwen3 import Qwen3
from cod_async.wire.messages import TrainItem


def _deltas(num_segments: int, member: int = 0, seed: int = 0) -> list[TrainItem]:
    """One lifecycle: deltas of 4 to 9 tokens, two action spans each, random advantages."""
    rng = np.random.default_rng(seed + 100 * member)
    items, parent = [], NO_PARENT
    for index in range(num_segments):
        length = int(rng.integers(6, 10))
        spans = ((2, 3), (length - 2, length))
        row = Row(
            token_ids=Array.of(rng.integers(0, VOCAB, length), "<i4"),
            action_spans=spans,
            behavior_logprobs=Array.of(-3.6 + 0.2 * rng.normal(size=3), "<f4"),
            versions=(VersionSpan(Version(0, 0), 3),),
            parent=parent,
        )
        parent = mark_after(row)
        key = SegmentKey(0, member, 2 * index)
        advantage = float(rng.normal())
        items.append(
            TrainItem(key=key, kind="solve", position=index, rows=(row,), advantage=advantage, lag_steps=0.0)
        )
    return items


def _apart(items: Sequence[TrainItem]) -> list[TrainItem]:
    """The reference: each segment as a whole row of its own, everything before it as context."""
    prefix: dict[int, list[int]] = {}
    result = []
    for item in items:
        (row,) = item.rows
        before = prefix.setdefault(item.key.member, [])
        base = len(before)
        before += row.token_ids.numpy().tolist()
        if item.is_context:
            continue
        whole = Row(
            token_ids=Array.of(before, "<i4"),
            action_spans=tuple((start + base, stop + base) for start, stop in row.action_spans),
            behavior_logprobs=row.behavior_logprobs,
            versions=row.versions,
        )
        result.append(msgspec.structs.replace(item, rows=(whole,)))
    return result


def _gradients(items: Sequence[TrainItem]) -> tuple[list[torch.Tensor], int]:
    model: Qwen3 = tiny_model()
    trainer = Trainer.create(model, LearnerConfig(tokens_per_micro_batch=64), LossConfig(), 0.8)
    flat = flatten(list(items), vocab_size=VOCAB)
    trainer.accumulate(flat)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert any(float(gradient.abs().max()) > 1e-4 for gradient in gradients)
    return gradients, flat.num_tokens


def test_gradients_are_those_of_one_row_per_segment() -> None:
    items = [*_deltas(6), *_deltas(5, member=1)]
    together, num_tokens = _gradients(items)
    apart, num_apart = _gradients(_apart(items))
    assert num_tokens == sum(row.num_tokens for item in items for row in item.rows) < num_apart / 3
    for ours, truth in zip(together, apart, strict=True):
        assert (ours - truth).norm() <= 1e-5 * truth.norm() + 1e-8


def test_context_segments_are_seen_and_not_trained() -> None:
    items = _deltas(6)
    for index in (0, 3):
        items[index] = msgspec.structs.replace(items[index], is_context=True, advantage=0.0)
    together, _ = _gradients(items)
    apart, _ = _gradients(_apart(items))
    assert flatten(items, vocab_size=VOCAB).num_action_tokens == 4 * 3
    for ours, truth in zip(together, apart, strict=True):
        assert (ours - truth).norm() <= 1e-5 * truth.norm() + 1e-8


def test_rows_and_transcripts_side_by_side() -> None:
    lonely = _apart(_deltas(2, member=7))
    flat = flatten([*_deltas(3), *_deltas(2, member=1), *lonely], vocab_size=VOCAB)
    assert flat.lengths.size == 2 + 2
    assert int(flat.lengths.sum()) == flat.num_tokens
    counts = np.bincount(flat.action_items)
    assert counts.tolist() == [3] * 7
    assert sorted(set(flat.action_rows[flat.action_items == 2].tolist())) == [0]
    assert sorted(set(flat.action_rows[flat.action_items == 4].tolist())) == [1]


@pytest.mark.parametrize("missing", [0, 2])
def test_a_hole_is_refused(missing: int) -> None:
    items = _deltas(5)
    del items[missing]
    with pytest.raises(WorkError, match="hole"):
        flatten(items, vocab_size=VOCAB)


def test_another_lifecycle_does_not_go_on_with_it() -> None:
    items = _deltas(3)
    stray = msgspec.structs.replace(items[2], key=SegmentKey(0, 1, 4))
    with pytest.raises(WorkError, match="hole"):
        flatten([items[0], items[1], stray], vocab_size=VOCAB)


def test_a_row_that_outgrows_the_model_is_refused() -> None:
    items = _deltas(4)
    total = sum(row.num_tokens for item in items for row in item.rows)
    assert flatten(items, vocab_size=VOCAB, max_row_tokens=total).lengths.tolist() == [total]
    with pytest.raises(WorkError, match="longer than"):
        flatten(items, vocab_size=VOCAB, max_row_tokens=total - 1)
