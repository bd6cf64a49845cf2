"""What every implementation shares: the problem, the walk over chunks of rows, and the merge over ranks.

An engine holds one chunk of logits. ``forward`` fills it and returns statistics of its rows, ``backward``
turns it into gradients. The three walks differ only in what lies between: nothing (log-probs alone), a
second forward (plain autograd, four matrix products), or the loss itself (three).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

FirstProduct = Literal["plain", "fused"]
"""How the first matrix product ends: in logits that other passes read, or in exponentials at once."""


@dataclass(frozen=True)
class Problem:
    """Everything of a call.

    Attributes:
        hidden: [T, H].
        weight: [V, H]; this rank's rows of the head.
        targets: int64 or int32 [T], in the whole vocabulary.
        bias: [V] or None.
        inverse_temperature: float or tensor [T, 1] in the compute dtype.
        softcap: ceiling of the logits' size, or None.
        has_entropy: whether the entropy is computed.
        chunk_rows: rows per chunk.
        compute_dtype: float32, or float64 when the hidden states are.
        group: process group over which the vocabulary is split, or None.
        vocab_start: first token id of this rank's rows.
        first_product: ``plain`` (logits are stored) or ``fused`` (exponentials leave the product).
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    inverse_temperature: Tensor | float
    softcap: float | None
    has_entropy: bool
    chunk_rows: int
    compute_dtype: torch.dtype
    group: Any = None
    vocab_start: int = 0
    first_product: FirstProduct = "plain"

    def chunks(self) -> Iterator[slice]:
        """Yield the chunks in order."""
        for start in range(0, self.hidden.shape[0], self.chunk_rows):
            yield slice(start, min(start + self.chunk_rows, self.hidden.shape[0]))

    def inverse(self, rows: slice) -> Tensor | float:
        """Return 1 / temperature of a chunk, broadcastable to [C, V]."""
        value = self.inverse_temperature
        return value[rows] if isinstance(value, Tensor) else value

    def local_targets(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Return (column of each target [C, 1], clamped into this rank's rows; whether it is one of them).

        The second is None when every target is known to be: on the CPU with an unsplit vocabulary.
        """
        local = self.targets[rows].long() - self.vocab_start
        if self.group is None and local.device.type == "cpu":
            return local[:, None], None
        size = self.weight.shape[0]
        return local.clamp(0, size - 1)[:, None], (local >= 0) & (local < size)


@dataclass(frozen=True)
class Stats:
    """Statistics of a chunk's rows, [C] each in the compute dtype.

    Attributes:
        logprob: of the target; NaN where the target is not among this rank's rows.
        lse: log of the sum of exponentials.
        entropy: of this rank's distribution, in nats, or None.
    """

    logprob: Tensor
    lse: Tensor
    entropy: Tensor | None


class Engine(ABC):
    """One chunk of logits, and the gradients it adds to.

    Attributes:
        problem: the call.
        fresh_rows: the chunk whose logits the buffers hold, or None.
        d_hidden, d_weight, d_bias: gradients in the making, or None where not wanted. ``d_weight`` and
            ``d_bias`` are in the compute dtype whatever the dtype of the weights.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.fresh_rows: slice | None = None
        self.d_hidden: Tensor | None = None
        self.d_weight: Tensor | None = None
        self.d_bias: Tensor | None = None

    def want(self, needs: tuple[bool, bool, bool]) -> None:
        """Make room for the gradients of (hidden, weight, bias)."""
        problem, dtype = self.problem, self.problem.compute_dtype
        # Zeros: rows that are never trained keep them.
        self.d_hidden = torch.zeros_like(problem.hidden, dtype=self.hidden_dtype) if needs[0] else None
        self.d_weight = torch.zeros_like(problem.weight, dtype=dtype) if needs[1] else None
        self.d_bias = torch.zeros_like(problem.weight[:, 0], dtype=dtype) if needs[2] else None

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Dtype in which the gradient of the hidden states is made."""
        return self.problem.compute_dtype

    @property
    def is_wanted(self) -> bool:
        """Whether there is any gradient to make."""
        return any(grad is not None for grad in (self.d_hidden, self.d_weight, self.d_bias))

    @abstractmethod
    def forward(self, rows: slice, *, is_kept: bool = True) -> Stats:
        """Compute a chunk into the buffers and return its statistics on this rank.

        Args:
            rows: the chunk.
            is_kept: whether ``backward`` may follow.
        """

    def whole(self, stats: Stats, rows: slice) -> Stats:
        """Return the statistics over the whole vocabulary from those of ``forward``."""
        return merge(stats, self.problem, rows)

    @abstractmethod
    def backward(
        self, rows: slice, lse: Tensor, entropy: Tensor | None, g: Tensor | None, h: Tensor | None
    ) -> None:
        """Add the gradients of the chunk that the buffers hold.

        Args:
            rows: the chunk of the last ``forward``, or its first rows.
            lse: [C] over the whole vocabulary.
            entropy: [C], or None.
            g: gradient of the log-prob [C], or None for zero.
            h: gradient of the entropy [C], or None for zero.
        """

    def finish(self) -> None:
        """Add the ranks' parts of the gradient of the hidden states."""
        if self.problem.group is not None and self.d_hidden is not None:
            dist.all_reduce(self.d_hidden, group=self.problem.group)


def merge(stats: Stats, problem: Problem, rows: slice) -> Stats:
    """Merge the ranks' statistics exactly: the same sum in rank order on every rank.

    A target that no rank or more than one rank holds makes its log-prob NaN.
    """
    if problem.group is None:
        return stats
    local = problem.targets[rows] - problem.vocab_start
    is_owner = (local >= 0) & (local < problem.weight.shape[0])
    entropy = torch.zeros_like(stats.lse) if stats.entropy is None else stats.entropy
    own = torch.where(is_owner, stats.logprob, 0.0)
    mine = torch.stack([stats.lse, own, is_owner.to(own.dtype), entropy])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(problem.group))]
    dist.all_gather(everyone, mine, group=problem.group)
    parts = torch.stack(everyone)
    lse = torch.logsumexp(parts[:, 0], 0)
    share = parts[:, 0] - lse
    logprob = (parts[:, 2] * (parts[:, 1] + share)).sum(0)
    logprob = torch.where(parts[:, 2].sum(0) == 1, logprob, torch.nan)
    entropy = (share.exp() * (parts[:, 3] - share)).sum(0)
    return Stats(logprob, lse, None if stats.entropy is None else entropy)


def forward_walk(engine: Engine, *, is_kept: bool = True) -> Stats:
    """Return the statistics of all rows; ``is_kept`` says whether gradients of the last chunk may follow."""
    chunks = engine.problem.chunks()
    return join([engine.whole(engine.forward(rows, is_kept=is_kept), rows) for rows in chunks])


def join(parts: list[Stats]) -> Stats:
    """Put the statistics of chunks end to end."""
    if len(parts) == 1:
        return parts[0]
    entropies = [part.entropy for part in parts if part.entropy is not None]
    return Stats(
        torch.cat([part.logprob for part in parts]),
        torch.cat([part.lse for part in parts]),
        torch.cat(entropies) if entropies else None,
    )


def backward_walk(
    engine: Engine, lse: Tensor, entropy: Tensor | None, g: Tensor | None, h: Tensor | None
) -> None:
    """Add the gradients of all rows; logits that are no longer in the buffers are computed again."""
    for rows in engine.problem.chunks():
        if engine.fresh_rows != rows:
            engine.forward(rows)
        cut = [None if tensor is None else tensor[rows] for tensor in (entropy, g, h)]
        engine.backward(rows, lse[rows], *cut)
    engine.finish()
