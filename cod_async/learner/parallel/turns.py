"""What each rank computes in a step: micro-batches in turns that all ranks take together.

Data ranks share the rows of a step by cost. A sharded policy gathers a layer on all ranks at once, so every
rank must run as many forward and backward passes as every other: a rank that has fewer micro-batches computes
fillers, which have no rows and no gradient. Ranks that share rows take the same turns, each with its part of
the tokens, and with the action tokens whose predicting state it holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from cod_async.learner.parallel.world import World
from cod_async.learner.rows.balance import assign
from cod_async.learner.rows.batches import MicroBatch, filler, micro_batches
from cod_async.learner.rows.flat import FlatRows
from cod_async.models.attention.sequence import choose_mode, make_shard
from cod_async.models.layout import Layout, LayoutKind
from cod_async.models.transfer import send


@dataclass(frozen=True)
class Turn:
    """One forward pass, and a backward pass if any rank has a gradient to make.

    Attributes:
        batch: what this rank computes; perhaps without action tokens.
        has_gradient: whether a backward pass follows, on every rank.
    """

    batch: MicroBatch
    has_gradient: bool


@dataclass(frozen=True)
class Sharing:
    """How rows are laid out and shared.

    Attributes:
        world: the ranks.
        kind: how rows lie in a micro-batch.
        max_tokens: budget of a micro-batch, which ranks that share rows share.
        mode: how attention crosses ranks; ``auto`` chooses for each micro-batch.
        num_heads, num_kv_heads: of the policy's attention, for that choice.
        max_row_tokens: longest row that the device can hold, or None.
    """

    world: World
    kind: LayoutKind
    max_tokens: int
    mode: Literal["auto", "ulysses", "ring"] = "auto"
    num_heads: int = 1
    num_kv_heads: int = 1
    max_row_tokens: int | None = None

    @property
    def multiple(self) -> int:
        """Tokens of a shared micro-batch are padded to a multiple of this, which suits either mode."""
        size = self.world.sequence_parallel
        return 1 if size == 1 else 2 * size

    def turns(
        self, flat: FlatRows, device: torch.device, is_trained: npt.NDArray[np.bool_] | None = None
    ) -> Iterator[Turn]:
        """Yield this rank's turns; with several ranks, all of them must ask together.

        Args:
            flat: the whole step, the same on every rank.
            device: where the tensors go.
            is_trained: bool [N], items with a gradient, or None: all.
        """
        world = self.world
        if world.size == 1:
            for batch in micro_batches(
                flat,
                self.max_tokens,
                device,
                kind=self.kind,
                is_trained=is_trained,
                max_row_tokens=self.max_row_tokens,
            ):
                yield Turn(batch, batch.num_trained > 0)
            return
        rows = assign(flat, world.data_parallel, kind=self.kind)[world.data_rank]
        found = [
            Turn(batch, batch.num_trained > 0)
            for batch in micro_batches(
                flat,
                self.max_tokens,
                "cpu",
                kind=self.kind,
                rows=rows,
                is_trained=is_trained,
                multiple=self.multiple,
                max_row_tokens=self.max_row_tokens,
            )
        ]
        groups = [[turn for turn in found if turn.has_gradient is wanted] for wanted in (True, False)]
        counts = world.largest([len(group) for group in groups])
        for group, count, has_gradient in zip(groups, counts, (True, False), strict=True):
            blank = filler(self.kind, "cpu", multiple=self.multiple)
            for index in range(count):
                batch = group[index].batch if index < len(group) else blank
                yield Turn(to_device(self._shared(batch), device), has_gradient)

    def _shared(self, batch: MicroBatch) -> MicroBatch:
        """Return this rank's part of a micro-batch whose tokens several ranks share."""
        world = self.world
        if world.sequence_parallel == 1:
            return batch
        size, num_tokens = world.sequence_parallel, batch.input_ids.shape[1]
        mode = self.mode
        if mode == "auto":
            mode = choose_mode(self.num_heads, self.num_kv_heads, size, num_tokens)
        shard = make_shard(num_tokens, world.sequence_rank, size, mode, world.sequence_group, "cpu")
        places = shard.places
        own = torch.full((num_tokens,), -1, dtype=torch.int64)
        own[places] = torch.arange(places.numel())
        predictors = own[batch.predictors]
        mine = torch.nonzero(predictors >= 0).flatten()
        positions = batch.layout.position_ids
        return replace(
            batch,
            input_ids=batch.input_ids[:, places],
            predictors=predictors[mine],
            targets=batch.targets[mine],
            behavior_logprobs=batch.behavior_logprobs[mine],
            segment_ids=batch.segment_ids[mine],
            actions=batch.actions[mine],
            num_trained=int((mine < batch.num_trained).sum()),
            layout=replace(
                batch.layout,
                position_ids=None if positions is None else positions[:, places],
                sequence=shard,
            ),
        )


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """Return a micro-batch with its tensors on ``device``, without making the host wait for them."""
    if device.type == "cpu":
        return batch

    def move(tensor: torch.Tensor) -> torch.Tensor:
        return send(tensor, device)

    layout: Layout = batch.layout
    if layout.position_ids is not None:
        layout = replace(layout, position_ids=move(layout.position_ids))
    if layout.sequence is not None:
        layout = replace(layout, sequence=replace(layout.sequence, places=move(layout.sequence.places)))
    return replace(
        batch,
        input_ids=move(batch.input_ids),
        predictors=move(batch.predictors),
        targets=move(batch.targets),
        behavior_logprobs=move(batch.behavior_logprobs),
        segment_ids=move(batch.segment_ids),
        actions=move(batch.actions),
        layout=layout,
    )
