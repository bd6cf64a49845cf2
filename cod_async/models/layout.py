"""How the rows of a micro-batch lie in the tensors that a model computes on.

A model sees ``input_ids`` [B, T] and a :class:`Layout`. Everything but attention (and recurrent layers)
treats tokens one by one and needs no more. Attention reads the layout, explicitly passed from the model's
``forward`` down to :func:`cod_async.models.attention.attend`, never from a global: recomputation in a
backward pass runs on another thread.

- *rectangle*: B rows side by side, padded on the right; positions count from 0 in each.
- *packed*: B = 1; rows end to end without padding, each with positions from 0.
- *tree*: B = 1; as packed, but a row may continue another one (its parent) and sees the parent's tokens, and
  the parent's parent's, before its own. What several rows share is computed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

LayoutKind = Literal["rectangle", "packed", "tree"]


@dataclass(frozen=True)
class SequenceShard:
    """This rank's part of a packed micro-batch whose tokens several ranks share.

    Attributes:
        group: process group of the ranks that share rows.
        rank: of this process in the group.
        size: ranks in the group.
        mode: how attention crosses ranks.
        num_tokens: tokens of the whole micro-batch, with padding to a multiple of what the mode needs.
        places: int64 [T], which of the micro-batch's tokens this rank has, in the order it has them. Rank r
            of n has the r-th contiguous n-th with ``ulysses``; with ``ring`` the r-th and the (2n-1-r)-th of
            2n parts.
    """

    group: Any
    rank: int
    size: int
    mode: Literal["ulysses", "ring"]
    num_tokens: int
    places: Tensor


@dataclass(frozen=True)
class Layout:
    """Where rows begin and end, what continues what, and which rank has what.

    Attributes:
        kind: rectangle, packed or tree.
        lengths: tokens of each row of the whole micro-batch (of a tree: of each node), on the host. With
            *packed* they add up to the tokens of the micro-batch: padding is a row of its own at the end.
        position_ids: int64 [B, T] of this rank's tokens; None for a rectangle, whose positions are
            0 .. T - 1.
        parents: of a tree: index of each node's parent, -1 for a root; parents come before children.
        sequence: this rank's part, None if it has all tokens.
    """

    kind: LayoutKind
    lengths: tuple[int, ...]
    position_ids: Tensor | None = None
    parents: tuple[int, ...] = ()
    sequence: SequenceShard | None = None


RECTANGLE = Layout("rectangle", ())
"""The layout of a plain [B, T] batch."""
