"""Refuse to train when rows laid out together are not what they are alone.

A layout that lets rows see each other or the padding, or that counts positions wrongly, trains silently on
the wrong numbers. So before its first step the learner computes the log-probs of random rows (groups that
begin alike, and a longer one) in the configured layout, and of every row on its own in a plain rectangle.
Then it computes the layout again with other tokens in every other row: the rows in between must not notice.
The second test has no rounding to allow for, because all shapes stay the same; it is as sharp in bfloat16 as
in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cod_async.errors import WorkError
from cod_async.learner.packing import FlatRows, flatten, micro_batches
from cod_async.learner.step import action_logprobs
from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.segment import Row, SegmentKey, Version, VersionSpan
from cod_async.models.layout import LayoutKind
from cod_async.models.policy import Policy
from cod_async.wire.messages import TrainItem

SELF_TEST_TOLERANCE = 1e-4
"""Largest difference of a log-prob between packed and separate rows that is still rounding in float32."""

BFLOAT16_TOLERANCE = 0.25
"""The same in bfloat16, in standard deviations of the rows' log-probs. Rounding to 8 bits in every layer
moved single log-probs of random models with 4 to 64 layers by up to 0.09 of it, so two roundings can be 0.18
apart; rows that saw each other were apart by 4. Leaks that are smaller are for the second test."""

_SHARED_TOKENS = 20
"""How many tokens a group's rows begin with alike; enough for a node of a prefix tree."""
_LONG_TOKENS = 256
"""One row is this long, where rows may be: beyond one tile of any attention kernel."""

Logprobs = Callable[[FlatRows], Tensor]
"""Log-probs of a step's action tokens, float32 [A], in the layout that training uses."""


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
        ids = rng.integers(0, vocab_size, length)
        middle = length // 2
        spans = ((1, middle), (middle + 1, length)) if middle > 1 else ((1, length),)
        count = sum(stop - start for start, stop in spans)
        items.append(
            _item(SegmentKey(index // 64, index % 64, 0), ids, spans, -3 * rng.random(count), rng.normal())
        )
    return items


def _item(
    key: SegmentKey,
    ids: npt.NDArray[np.int64],
    spans: tuple[tuple[int, int], ...],
    behavior: npt.NDArray[np.float64],
    advantage: float,
) -> TrainItem:
    row = Row(
        token_ids=Array.of(ids, "<i4"),
        action_spans=spans,
        behavior_logprobs=Array.of(behavior, "<f4"),
        versions=(VersionSpan(Version(0, 0), behavior.size),),
    )
    return TrainItem(
        key=key, kind="solve", position=0, rows=(row,), advantage=float(advantage), lag_steps=0.0
    )


def probe_items(vocab_size: int, max_row_tokens: int, *, is_changed: bool = False) -> list[TrainItem]:
    """Make the rows of the self-test: three groups of four that begin alike, and a long row.

    Args:
        vocab_size: of the model, at least 4.
        max_row_tokens: longest row the model takes, at least 4.
        is_changed: draw other tokens in every other row, at places where its group has parted already.
    """
    rng, other = np.random.default_rng(0), np.random.default_rng(1)
    shared = min(_SHARED_TOKENS, max_row_tokens // 2)
    longest_tail = max(min(max_row_tokens - shared, 28), 2)
    items = []
    for group in range(3):
        prompt = rng.integers(0, vocab_size, shared)
        for member in range(4):
            tail = rng.integers(0, vocab_size, int(rng.integers(2, longest_tail + 1)))
            tail[0] = member  # here the group parts, whatever follows
            if is_changed and member % 2:
                tail[1:] = other.integers(0, vocab_size, tail.size - 1)
            ids = np.concatenate([prompt, tail])
            behavior = np.full(ids.size - 1, -1.0)
            items.append(_item(SegmentKey(group, member, 0), ids, ((1, ids.size),), behavior, 1.0))
    ids = rng.integers(0, vocab_size, min(max_row_tokens, _LONG_TOKENS))
    items.append(_item(SegmentKey(3, 0, 0), ids, ((1, ids.size),), np.full(ids.size - 1, -1.0), 1.0))
    return items


@dataclass(frozen=True)
class SelfTest:
    """What the self-test found; log-probs in nats.

    Attributes:
        error: largest difference between a row laid out with others and alone.
        leak: largest change of a row's log-prob when only other rows changed.
        spread: standard deviation of the log-probs.
    """

    error: float
    leak: float
    spread: float


@torch.no_grad()
def compare_rows(
    model: Policy,
    temperature: float,
    max_tokens: int,
    max_row_tokens: int,
    *,
    kind: LayoutKind = "rectangle",
    logprobs: Logprobs | None = None,
) -> SelfTest:
    """Compare log-probs of rows laid out together with those of rows alone, and with changed company.

    Args:
        model: the policy.
        temperature: of the log-probs.
        max_tokens: budget of a micro-batch.
        max_row_tokens: longest row the model takes.
        kind: the layout that training uses.
        logprobs: how training computes log-probs; in micro-batches of ``kind`` on one rank when None. Where
            several ranks hold the model, all of them must call this together.
    """
    vocab_size = int(model.head_weight.shape[0])

    def laid_out(flat: FlatRows) -> Tensor:
        found = torch.zeros(flat.num_action_tokens, device=model.device)
        for batch in micro_batches(flat, max_tokens, model.device, kind=kind):
            found[batch.actions] = action_logprobs(model, batch, temperature)[0].float()
        return found

    together = laid_out if logprobs is None else logprobs
    items = probe_items(vocab_size, max_row_tokens)
    flat = flatten(items, vocab_size=vocab_size)
    changed = flatten(probe_items(vocab_size, max_row_tokens, is_changed=True), vocab_size=vocab_size)
    found = together(flat)
    alone = torch.cat(
        [
            action_logprobs(model, batch, temperature)[0].float()
            for item in items
            for batch in micro_batches(flatten([item], vocab_size=vocab_size), max_tokens, model.device)
        ]
    )
    stays = torch.from_numpy(flat.action_items % 2 == 0).to(found.device)
    leak = (found - together(changed))[stays].abs().max()
    return SelfTest(float((found - alone).abs().max()), float(leak), float(alone.std()))


def check_packing(
    model: Policy,
    temperature: float,
    max_tokens: int,
    max_row_tokens: int,
    *,
    kind: LayoutKind = "rectangle",
    logprobs: Logprobs | None = None,
    is_bfloat16: bool = False,
) -> float:
    """Return the largest difference between packed and separate rows, or refuse to train.

    Args:
        model: the policy.
        temperature: of the log-probs.
        max_tokens: budget of a micro-batch.
        max_row_tokens: longest row the model takes.
        kind: the layout that training uses.
        logprobs: as of :func:`compare_rows`.
        is_bfloat16: whether matrix products are computed in bfloat16, which has its own bound.

    Raises:
        WorkError: rows are not what they are alone: this torch build, kernel or model leaks between rows or
            misplaces them; do not train on it.
    """
    found = compare_rows(model, temperature, max_tokens, max_row_tokens, kind=kind, logprobs=logprobs)
    allowed = max(SELF_TEST_TOLERANCE, BFLOAT16_TOLERANCE * found.spread if is_bfloat16 else 0.0)
    if not found.error <= allowed:
        raise WorkError(
            f"self-test: log-probs of packed and of separate rows differ by {found.error:.2e} (allowed "
            f"{allowed:.2g}, layout {kind}); rows see each other or the padding, or lie at wrong positions, "
            "refusing to train"
        )
    if not found.leak <= SELF_TEST_TOLERANCE:
        raise WorkError(
            f"self-test: log-probs of rows change by {found.leak:.2e} when only other rows of their "
            f"micro-batch change (allowed {SELF_TEST_TOLERANCE:g}, layout {kind}); rows see each other, "
            "refusing to train"
        )
    return found.error
