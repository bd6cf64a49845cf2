"""Refuse to train when rows in a rectangle are not what they are alone.

Packing that lets rows see each other or the padding trains silently on the wrong numbers. So the learner
compares log-probs of random rows computed in rectangles with those of every row on its own before its first
step.
"""

from __future__ import annotations

import numpy as np
import torch

from cod_async.errors import WorkError
from cod_async.learner.packing import flatten, micro_batches
from cod_async.learner.step import action_logprobs
from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.segment import Row, SegmentKey, Version, VersionSpan
from cod_async.models.qwen3 import Qwen3
from cod_async.wire.messages import TrainItem

SELF_TEST_TOLERANCE = 1e-4
"""Largest difference of a log-prob between packed and separate rows that is still rounding."""


def random_items(
    num_items: int, *, vocab_size: int, min_tokens: int, max_tokens: int, seed: int = 0
) -> list[TrainItem]:
    """Make items with one random row each (two action spans where the row is long enough); for checks and
    benches.
    """
    rng = np.random.default_rng(seed)
    items = []
    for index in range(num_items):
        length = int(rng.integers(max(min_tokens, 2), max(max_tokens, 2) + 1))
        middle = length // 2
        spans = ((1, middle), (middle + 1, length)) if middle > 1 else ((1, length),)
        count = sum(stop - start for start, stop in spans)
        row = Row(
            token_ids=Array.of(rng.integers(0, vocab_size, length), "<i4"),
            action_spans=spans,
            behavior_logprobs=Array.of(-3 * rng.random(count), "<f4"),
            versions=(VersionSpan(Version(0, 0), count),),
        )
        items.append(
            TrainItem(
                key=SegmentKey(index // 64, index % 64, 0),
                kind="solve",
                position=0,
                rows=(row,),
                advantage=float(rng.normal()),
                lag_steps=0.0,
            )
        )
    return items


@torch.no_grad()
def packing_error(model: Qwen3, temperature: float, max_tokens: int, max_row_tokens: int) -> float:
    """Return the largest difference between log-probs in rectangles and alone, over random rows."""
    vocab_size = model.head_weight.shape[0]
    items = random_items(12, vocab_size=vocab_size, min_tokens=2, max_tokens=min(max_row_tokens, 48))
    together: dict[int, torch.Tensor] = {}
    for batch in micro_batches(flatten(items, vocab_size=vocab_size), max_tokens, model.device):
        logprobs, _ = action_logprobs(model, batch, temperature)
        for segment in sorted(set(batch.segment_ids.tolist())):
            together[segment] = logprobs[batch.segment_ids == segment]
    worst = 0.0
    for index, item in enumerate(items):
        (alone,) = micro_batches(flatten([item], vocab_size=vocab_size), max_tokens, model.device)
        logprobs, _ = action_logprobs(model, alone, temperature)
        worst = max(worst, float((logprobs - together[index]).abs().max()))
    return worst


def check_packing(model: Qwen3, temperature: float, max_tokens: int, max_row_tokens: int) -> float:
    """Return the packing error, or refuse to train.

    Raises:
        WorkError: the error is above 1e-4: this torch build or model leaks between rows; do not train on it.
    """
    error = packing_error(model, temperature, max_tokens, max_row_tokens)
    if not error <= SELF_TEST_TOLERANCE:
        raise WorkError(
            f"self-test: log-probs of packed and of separate rows differ by {error:.2e} "
            f"(allowed {SELF_TEST_TOLERANCE:g}); "
            "rows see each other or the padding, refusing to train"
        )
    return error
