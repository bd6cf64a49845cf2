"""Softmax without a maximum: exponentials relative to the target's own logit, so that the first matrix
product can end in them instead of in logits.

The exact target logit z_y costs one dot product per row and is taken first. Then every other token's
``E_v = exp(z_v - z_y) 2^-58`` can leave the product at once, in the dtype of the hidden states: bf16 has the
exponent of float32, so a fixed scale costs no precision, and terms below e^-47 of the target's probability,
which vanish, matter to nothing. The row's sum S of the unrounded E is all that is missing:

    log p_y = -log(1 + 2^58 S),        p_v = E_v / (2^-58 + S).

The gradient of the other tokens' logits, ``-g p_v / temperature``, is E scaled by one number per row,
``c = -g / (temperature (2^-58 + S))``, so E goes into the other two products as it is:
``d_hidden = c (E @ weight)`` and ``d_weight += E.T @ (c hidden)``. The target's own,
``d = g (1 - p_y) / temperature = -c S``, is a row of the head and a row of the hidden states, and is added in
float32 beside the products, where it is not rounded: it is often the largest part. No subtraction of
near-equal numbers is left anywhere.

Reach: S must stay below 2^92, a log-prob above -104 (:data:`LOWEST_LOGPROB`). That leaves c times a hidden
state 34 binary orders above the smallest normal bf16. A row beyond it is refused by name: its log-prob
becomes minus infinity, and a fault. A sampled token never gets there; a foreign or corrupted label may.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cod_kernels.dispatch import KernelInputError, first_index
from cod_kernels.faults import FAULTS, OUT_OF_REACH
from cod_kernels.linear_logprob.chunks import Engine, Problem, Stats
from cod_kernels.linear_logprob.memory import Buffers, allocate, forward_buffers, fused_buffers
from cod_kernels.linear_logprob.products import matmul_into

SHIFT_BITS = 58
"""Exponentials are scaled by 2^-58, about 40 nats, so that they reach far above the target and below it."""

REACH_BITS = 92
"""Sums of exponentials from 2^92 on are refused."""

LOWEST_LOGPROB = -(SHIFT_BITS + REACH_BITS) * math.log(2)
"""About -104: a row's log-prob is above it, or the row is refused."""

TWIN_TILE = 4096
"""Columns of the twin's tiles."""

_SCALE = 2.0**SHIFT_BITS


class Targets(NamedTuple):
    """Of a chunk's rows, [C] each in the compute dtype.

    Attributes:
        logit: tempered logit of the target; 0 where it is not among this rank's rows of the head.
        is_owned: 1 where it is, else 0.
        slope: of the soft-cap at the target; 1 without one.
    """

    logit: Tensor
    is_owned: Tensor
    slope: Tensor


def row_stats(target_logit: Tensor, sums: Tensor) -> Stats:
    """Return the statistics of rows from sums over the whole vocabulary.

    Args:
        target_logit: [C], tempered; NaN for a row without a target.
        sums: float64 [1 or 2, C]: sum of E; sum of E (z - z_y), for the entropy.

    Returns:
        Statistics in the dtype of ``target_logit``. The log-prob of a row whose logits are not finite is NaN,
        that of a row out of reach is minus infinity.
    """
    odds = sums[0] * _SCALE
    nats = torch.log1p(odds)
    logprob = torch.where(sums[0] >= 2.0**REACH_BITS, -torch.inf, -nats)
    logprob = torch.where(torch.isfinite(target_logit), logprob, torch.nan).to(target_logit.dtype)
    lse = (target_logit.double() + nats).to(target_logit.dtype)
    entropy = None
    if len(sums) == 2:
        entropy = (nats - sums[1] * _SCALE / (1 + odds)).to(target_logit.dtype)
    return Stats(logprob, lse, entropy)


class ExponentialEngine(Engine):
    """One chunk of exponentials. What makes them differs; statistics and gradients are here."""

    def __init__(self, problem: Problem, tile_vocab: int) -> None:
        super().__init__(problem)
        self._tile_vocab = tile_vocab
        self._buffers: dict[str, Tensor] = {}
        self._total = self._slope = self._columns = problem.hidden[:0, 0]

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Parts of several ranks are added in the compute dtype."""
        return self.problem.hidden.dtype if self.problem.group is None else self.problem.compute_dtype

    @abstractmethod
    def target_logits(self, rows: slice) -> Targets:
        """Return the logits of a chunk's targets on this rank."""

    @abstractmethod
    def exponentials(self, rows: slice, target_logit: Tensor, out: Tensor | None, partials: Tensor) -> None:
        """Compute E of a chunk: the first matrix product.

        Args:
            rows: the chunk.
            target_logit: [C] over all ranks.
            out: [C, V], rows padded; gets E times the soft-cap's slope, 0 at the target; None if not wanted.
            partials: [1 or 2, number of tiles, C]; gets sums of E and, for the entropy, of E (z - z_y).
        """

    @abstractmethod
    def add_rows(self, out: Tensor, columns: Tensor, rows: Tensor, factor: Tensor) -> None:
        """``out[columns[t]] += factor[t] * rows[t]`` in the order of t, for all columns but negative ones.

        Args:
            out: [V, W] in the compute dtype.
            columns: int64 [C].
            rows: [C, W].
            factor: [C] in the compute dtype.
        """

    def columns(self, rows: slice) -> Tensor:
        """Return each target's place in this rank's rows of the head, -1 where it is not there: int64 [C]."""
        local = self.problem.targets[rows].long() - self.problem.vocab_start
        return torch.where((local >= 0) & (local < self.problem.weight.shape[0]), local, -1)

    def table(self, rows: int, *, is_kept: bool) -> Buffers:
        """Return the buffers of a chunk of ``rows`` rows, all that the engine holds of that size."""
        problem = self.problem
        size, dtype = problem.weight.shape[0], problem.hidden.dtype
        more: dict[str, Any] = {"tile_vocab": self._tile_vocab, "has_entropy": problem.has_entropy}
        if not is_kept:
            return forward_buffers(rows, size, dtype, **more)
        return fused_buffers(rows, size, problem.hidden.shape[1], dtype, **more)

    def _room(self, *, is_kept: bool) -> dict[str, Tensor]:
        """Allocate what is needed and not there yet."""
        rows = min(self.problem.chunk_rows, self.problem.hidden.shape[0])
        table = self.table(rows, is_kept=is_kept)
        missing = {name: entry for name, entry in table.items() if name not in self._buffers}
        self._buffers |= allocate(missing, self.problem.hidden.device)
        return self._buffers

    def forward(self, rows: slice, *, is_kept: bool = True) -> Stats:
        """Make the exponentials of a chunk; statistics are those of the whole vocabulary already."""
        problem, count = self.problem, rows.stop - rows.start
        self.fresh_rows = None
        targets = self.target_logits(rows)
        logit = self._shared_logit(targets)
        room = self._room(is_kept=is_kept)
        partials = room["partials"][:, :, :count]
        out = room["exponentials"][:count, : problem.weight.shape[0]] if is_kept else None
        self.exponentials(rows, logit, out, partials)
        sums = self._sum_over_ranks(partials.sum(1, dtype=torch.float64))
        stats = row_stats(logit, sums)
        if logit.device.type == "cpu":
            self._refuse(rows, stats.logprob == -torch.inf)
        self._total, self._slope = sums[0], targets.slope
        if is_kept:
            self.fresh_rows = rows
            self._columns = self.columns(rows)
        return stats

    def whole(self, stats: Stats, rows: slice) -> Stats:
        """Return them as they are."""
        return stats

    def _shared_logit(self, targets: Targets) -> Tensor:
        """Return the targets' logits on every rank; NaN for a target that not exactly one rank holds."""
        if self.problem.group is None:
            return torch.where(targets.is_owned == 1, targets.logit, torch.nan)
        both = torch.stack([targets.logit, targets.is_owned])
        # One rank's number and zeros: the sum is exact in any order.
        dist.all_reduce(both, group=self.problem.group)
        return torch.where(both[1] == 1, both[0], torch.nan)

    def _sum_over_ranks(self, sums: Tensor) -> Tensor:
        """Return the sums over all ranks, added in rank order on every rank."""
        if self.problem.group is None:
            return sums
        everyone = [torch.empty_like(sums) for _ in range(dist.get_world_size(self.problem.group))]
        dist.all_gather(everyone, sums, group=self.problem.group)
        return torch.stack(everyone).sum(0)

    def _refuse(self, rows: slice, is_beyond: Tensor) -> None:
        """Raise for the first row whose log-prob is out of reach; on a device a note says the same later."""
        if bool(is_beyond.any()):
            raise KernelInputError(FAULTS[OUT_OF_REACH].format(rows.start + first_index(is_beyond)))

    def backward(
        self, rows: slice, lse: Tensor, entropy: Tensor | None, g: Tensor | None, h: Tensor | None
    ) -> None:
        """Add the chunk's gradients by two matrix products; the buffers stay as they are.

        The gradient of the entropy needs more than E; :mod:`op` takes the plain first product for it.
        """
        if h is not None:
            raise NotImplementedError("the fused first product has no gradient of the entropy")
        problem, room, count = self.problem, self._buffers, rows.stop - rows.start
        e = room["exponentials"][:count, : problem.weight.shape[0]]
        hidden, wide = problem.hidden[rows], problem.compute_dtype
        inverse = problem.inverse(rows)
        g = torch.zeros_like(lse) if g is None else g
        total, slope, columns = self._total[:count], self._slope[:count], self._columns[:count]
        precise = -g.double()[:, None] * inverse / (2.0**-SHIFT_BITS + total)[:, None]
        own = -precise * (total * slope)[:, None]  # gradient of the target's logit
        own = torch.where(columns[:, None] < 0, 0.0, own).to(wide)
        factor = precise.to(wide)
        scaled = room["scaled_hidden"][:count]
        if self.d_hidden is not None:
            product = matmul_into(room["products"][:count], e, problem.weight).mul_(factor)
            heads = torch.index_select(problem.weight, 0, columns.clamp(min=0), out=scaled)
            self.d_hidden[rows] = product.addcmul_(heads, own)
        if self.d_weight is not None:
            torch.mul(hidden, factor, out=scaled)
            matmul_into(self.d_weight, e.t(), scaled, is_added=True)
            self.add_rows(self.d_weight, columns, hidden, own[:, 0])
        if self.d_bias is not None:
            # In two parts, so that the factor keeps float32's precision through a 16-bit product.
            high = factor.to(e.dtype)
            both = torch.cat([high, (factor - high.to(wide)).to(e.dtype)], 1)
            found = torch.empty((e.shape[1], 2), dtype=wide, device=e.device)
            self.d_bias += matmul_into(found, e.t(), both).sum(1)
            self.add_rows(self.d_bias[:, None], columns, torch.ones_like(own), own[:, 0])


class TorchExponentials(ExponentialEngine):
    """The twin: the same scheme, sums and stored dtype, in torch and tile by tile."""

    def __init__(self, problem: Problem) -> None:
        if problem.hidden.dtype == torch.float16:
            raise KernelInputError(
                "linear_logprob: hidden is torch.float16, whose exponents are too few for "
                "first_product='fused'; pass first_product='plain'"
            )
        super().__init__(problem, TWIN_TILE)

    def _tempered(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Return (logits with soft-cap and temperature, slope of the soft-cap)."""
        cap, slope = self.problem.softcap, None
        if cap is not None:
            ratio = torch.tanh(logits / cap)
            logits, slope = cap * ratio, 1 - ratio.square()
        return logits * self.problem.inverse(rows), slope

    def add_rows(self, out: Tensor, columns: Tensor, rows: Tensor, factor: Tensor) -> None:
        """See :class:`ExponentialEngine`; a factor without a column is zero."""
        index, values = columns.clamp(min=0), rows.to(out.dtype) * factor[:, None]
        if out.device.type == "cpu":
            out.index_add_(0, index, values)
        else:  # sorts, where index_add_ would add in any order
            out.index_put_((index,), values, accumulate=True)

    def target_logits(self, rows: slice) -> Targets:
        """See :class:`ExponentialEngine`."""
        problem, wide = self.problem, self.problem.compute_dtype
        index, is_owner = problem.local_targets(rows)
        own = problem.weight[index[:, 0]].to(wide)
        logits = (problem.hidden[rows].to(wide) * own).sum(1, keepdim=True)
        if problem.bias is not None:
            logits += problem.bias[index].to(wide)
        logits, slope = self._tempered(logits, rows)
        slope = torch.ones_like(logits) if slope is None else slope
        owned = torch.ones_like(logits[:, 0]) if is_owner is None else is_owner.to(wide)
        return Targets(torch.where(owned == 1, logits[:, 0], 0.0), owned, slope[:, 0])

    def exponentials(self, rows: slice, target_logit: Tensor, out: Tensor | None, partials: Tensor) -> None:
        """See :class:`ExponentialEngine`."""
        problem, wide = self.problem, self.problem.compute_dtype
        hidden, size = problem.hidden[rows].to(wide), problem.weight.shape[0]
        target = problem.targets[rows].long() - problem.vocab_start
        for number, start in enumerate(range(0, size, TWIN_TILE)):
            columns = slice(start, min(start + TWIN_TILE, size))
            above = hidden.new_empty(hidden.shape[0], columns.stop - columns.start)
            matmul_into(above, hidden, problem.weight[columns].to(wide).t())
            if problem.bias is not None:
                above += problem.bias[columns].to(wide)
            above, slope = self._tempered(above, rows)
            above -= target_logit[:, None]
            e = torch.exp2(above * math.log2(math.e) - SHIFT_BITS)
            is_here = (target >= columns.start) & (target < columns.stop)
            place = (target - columns.start).clamp(0, columns.stop - columns.start - 1)[:, None]
            e.scatter_(1, place, torch.where(is_here[:, None], 0.0, e.gather(1, place)))
            torch.sum(e, 1, out=partials[0, number])
            if problem.has_entropy:
                partials[1, number] = torch.where(e > 0, e * above, 0.0).sum(1)
            if out is not None:
                out[:, columns] = e if slope is None else e.mul_(slope)
