"""Steps for the tests of rows: groups that open alike, recorded one row per turn and one row per episode."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np

from cod_async.learner.rows.batches import MicroBatch
from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.segment import Row, SegmentKey, Version, VersionSpan
from cod_async.wire.messages import TrainItem


@dataclass(frozen=True)
class Story:
    """One step, told twice.

    Attributes:
        per_turn: one row per turn, each with the whole history in front.
        per_episode: one row per episode where the history only grew.
    """

    per_turn: list[TrainItem]
    per_episode: list[TrainItem]


def make_row(ids: list[int], spans: list[tuple[int, int]], logprobs: list[float], steps: list[int]) -> Row:
    """Build a row; ``steps`` has the version step of each span."""
    versions = tuple(
        VersionSpan(Version(0, step), stop - start) for step, (start, stop) in zip(steps, spans, strict=True)
    )
    return Row(Array.of(ids, "<i4"), tuple(spans), Array.of(logprobs, "<f4"), versions)


def make_story(
    seed: int,
    *,
    vocab_size: int,
    num_groups: int = 2,
    group_size: int = 3,
    max_turns: int = 4,
    prompt_tokens: int = 20,
    max_response_tokens: int = 6,
    edit_odds: float = 0.2,
    episodes: int = 2,
) -> Story:
    """Draw groups whose lifecycles open with the same prompt; now and then a turn's history is edited."""
    rng = np.random.default_rng(seed)
    per_turn: list[TrainItem] = []
    per_episode: list[TrainItem] = []

    def draw(size: int) -> list[int]:
        return [int(value) for value in rng.integers(0, vocab_size, size)]

    for group in range(num_groups):
        prompts = [draw(max(prompt_tokens, 1)) for _ in range(episodes)]
        for member in range(group_size):
            for episode in range(episodes):
                ids = list(prompts[episode])
                turns: list[Row] = []
                rows: list[Row] = []
                spans: list[tuple[int, int]] = []
                logprobs: list[float] = []
                steps: list[int] = []
                for turn in range(int(rng.integers(1, max_turns + 1))):
                    if turn and rng.random() < edit_odds:  # a tool rewrites what was said before
                        rows.append(make_row(ids, spans, logprobs, steps))
                        ids = [*ids[: len(ids) // 2], (ids[len(ids) // 2] + 1) % vocab_size, *draw(3)]
                        spans, logprobs, steps = [], [], []
                    elif turn:
                        ids = ids + draw(int(rng.integers(1, 5)))
                    response = draw(int(rng.integers(1, max_response_tokens + 1)))
                    own = [float(value) for value in -3 * rng.random(len(response))]
                    span, step = (len(ids), len(ids) + len(response)), int(rng.integers(0, 4))
                    ids = ids + response
                    turns.append(make_row(ids, [span], own, [step]))
                    spans, logprobs, steps = [*spans, span], [*logprobs, *own], [*steps, step]
                rows.append(make_row(ids, spans, logprobs, steps))
                item = TrainItem(
                    key=SegmentKey(group, member, 2 * episode),
                    kind="solve",
                    position=episode,
                    rows=tuple(turns),
                    advantage=float(rng.normal()),
                    lag_steps=0.0,
                )
                per_turn.append(item)
                per_episode.append(msgspec.structs.replace(item, rows=tuple(rows)))
    return Story(per_turn, per_episode)


def histories(batch: MicroBatch) -> Iterator[tuple[int, ...]]:
    """Yield what each action token's predictor has seen, its own token last, read off the layout alone."""
    layout, ids = batch.layout, batch.input_ids
    if layout.kind == "rectangle":
        width = ids.shape[1]
        for place in batch.predictors.tolist():
            row, position = divmod(place, width)
            assert position < layout.lengths[row]
            yield tuple(ids[row, : position + 1].tolist())
        return
    flat = ids[0].tolist()
    assert layout.position_ids is not None and sum(layout.lengths) == len(flat)
    positions = layout.position_ids[0].tolist()
    ends = np.cumsum(layout.lengths).tolist()
    for place in batch.predictors.tolist():
        node = int(np.searchsorted(ends, place, "right"))
        seen: list[int] = flat[ends[node] - layout.lengths[node] : place + 1]
        while layout.parents and layout.parents[node] >= 0:
            assert layout.parents[node] < node
            node = layout.parents[node]
            seen = flat[ends[node] - layout.lengths[node] : ends[node]] + seen
        assert positions[place] == len(seen) - 1
        yield tuple(seen)


def told(items: list[TrainItem]) -> list[tuple[object, ...]]:
    """Return (segment, history, target, behaviour, version step, advantage) of every action token, sorted."""
    found: list[tuple[object, ...]] = []
    for item in items:
        for row in item.rows:
            ids = row.token_ids.numpy().tolist()
            behavior = iter(row.behavior_logprobs.numpy().tolist())
            steps = iter([s.version.step for s in row.versions for _ in range(s.num_tokens)])
            for start, stop in row.action_spans:
                for place in range(start, stop):
                    found.append(
                        (
                            item.key,
                            tuple(ids[:place]),
                            ids[place],
                            next(behavior),
                            next(steps),
                            item.advantage,
                        )
                    )
    return sorted(found)
