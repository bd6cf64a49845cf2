"""Who sees whom in packed rows and in trees, as passes of segments.

Packed rows are one causal pass. In a tree a token sees its own node causally and its ancestors' nodes fully.
Nodes with a single child are joined with it, because a causal row of both says the same. For what remains,
each node with children is the keys of one full segment whose queries are all tokens below it; nodes of equal
depth share a pass. So a tree of n branching nodes takes n full segments, not one for each pair of descendant
and ancestor.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from cod_async.models.attention.places import Indices, Pass, Segment


def packed_passes(lengths: tuple[int, ...]) -> tuple[Pass, ...]:
    """Return the causal pass over rows that lie end to end.

    Args:
        lengths: tokens per row; rows without tokens are left out.
    """
    return (_causal(_spans(lengths)),)


def tree_passes(lengths: tuple[int, ...], parents: tuple[int, ...]) -> tuple[Pass, ...]:
    """Return the passes of a forest of nodes that lie end to end.

    Args:
        lengths: tokens per node.
        parents: index of each node's parent, -1 for a root; parents come before children.

    Raises:
        ValueError: not one parent per node, or a parent that does not come before its child.
    """
    check_parents(lengths, parents)
    spans = _spans(lengths)
    children: list[list[int]] = [[] for _ in lengths]
    for node, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(node)
    joined: list[Indices] = []  # tokens of a run of only children
    ends: list[int] = []  # its last node, whose children are those of the run
    for node, parent in enumerate(parents):
        if parent >= 0 and len(children[parent]) == 1:
            continue  # joined with its parent
        run = [node]
        while len(children[run[-1]]) == 1:
            run.append(children[run[-1]][0])
        joined.append(np.concatenate([spans[member] for member in run]))
        ends.append(run[-1])
    below = _tokens_below(spans, parents, children)
    levels: dict[int, list[Segment]] = {}
    depths = _branching_depths(parents, children)
    for tokens, end in zip(joined, ends, strict=True):
        if len(below[end]) and len(tokens):
            levels.setdefault(depths[end], []).append(Segment(below[end], tokens))
    full = tuple(Pass(tuple(segments), False) for _, segments in sorted(levels.items()))
    return (_causal(joined), *full)


def check_parents(lengths: tuple[int, ...], parents: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless every node has a parent before it, or -1."""
    if len(parents) != len(lengths):
        raise ValueError(f"a tree of {len(lengths)} nodes has {len(parents)} parents: give one per node")
    for node, parent in enumerate(parents):
        if not -1 <= parent < node:
            raise ValueError(f"node {node} has parent {parent}: parents come before children, roots have -1")


@lru_cache(maxsize=256)
def longest_row(lengths: tuple[int, ...], parents: tuple[int, ...]) -> int:
    """Return how many positions the rows need: the longest row, in a tree the longest path."""
    if not parents:
        return max(lengths, default=0)
    ends: list[int] = []
    for length, parent in zip(lengths, parents, strict=True):
        ends.append(length + (ends[parent] if parent >= 0 else 0))
    return max(ends, default=0)


def _spans(lengths: tuple[int, ...]) -> list[Indices]:
    ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
    return [np.arange(end - length, end) for end, length in zip(ends.tolist(), lengths, strict=True)]


def _causal(rows: list[Indices]) -> Pass:
    return Pass(tuple(Segment(row, row) for row in rows if len(row)), True)


def _tokens_below(
    spans: list[Indices], parents: tuple[int, ...], children: list[list[int]]
) -> dict[int, Indices]:
    """Return the tokens below each node that has no child or several, in the order of the tensor."""
    sizes = [1] * len(parents)
    for node in range(len(parents) - 1, -1, -1):
        if parents[node] >= 0:
            sizes[parents[node]] += sizes[node]
    preorder = np.empty(len(parents), dtype=np.int64)
    places: list[int] = []
    free = 0  # where the next root goes; below, where each node's next child goes
    next_child: list[int] = []
    for node, parent in enumerate(parents):
        if parent < 0:
            place, free = free, free + sizes[node]
        else:
            place = next_child[parent]
            next_child[parent] += sizes[node]
        places.append(place)
        next_child.append(place + 1)
        preorder[place] = node
    below: dict[int, Indices] = {}
    for node in range(len(parents)):
        if len(children[node]) != 1:
            members = np.sort(preorder[places[node] + 1 : places[node] + sizes[node]])
            tokens = [spans[member] for member in members.tolist()]
            below[node] = np.concatenate(tokens) if tokens else np.empty(0, dtype=np.int64)
    return below


def _branching_depths(parents: tuple[int, ...], children: list[list[int]]) -> list[int]:
    """Return how many ancestors of each node have several children."""
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + (len(children[parent]) > 1))
    return depths
