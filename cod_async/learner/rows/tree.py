"""Prefix trees: rows that begin with the same ids compute their common beginning once.

The lifecycles of a group open with the same prompt, and what a causal model computes behind equal ids is
equal, so a micro-batch can be a trie instead of a list of rows: nodes are runs of ids, cut where rows part.
Every row is a path from a root. An action token of a row is predicted by the state of the token before it on
its path; where that lies in a shared node, several rows read the same state, each with its own target,
log-prob and advantage, and the gradients that meet there add up: exactly those of the rows computed one by
one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from cod_async.learner.rows.flat import FlatRows, IntArray, RowOrder

MIN_SHARED_TOKENS = 16
"""Shortest run of ids worth a node of its own: every node is one more piece for attention to cut at, and a
tile of its kernels has 16 tokens at least, so a shorter shared run saves next to nothing."""


@dataclass(frozen=True)
class Tree:
    """A trie over the rows of a micro-batch; n nodes, parents before children.

    Attributes:
        starts: int64 [n], where each node's ids begin in the step's tokens (in one of its rows).
        lengths: int64 [n], tokens of each, at least 1.
        depths: int64 [n], position of each node's first token in its rows.
        parents: int64 [n], -1 for a root.
        rows: int64 [m], the rows, as indices of the step's, ascending.
        paths: the nodes of each of these rows, root first.
    """

    starts: IntArray
    lengths: IntArray
    depths: IntArray
    parents: IntArray
    rows: IntArray
    paths: tuple[tuple[int, ...], ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed."""
        return int(self.lengths.sum())

    def places(self, rows: IntArray, positions: IntArray) -> IntArray:
        """Return where tokens of rows lie among the tree's tokens, nodes end to end.

        Args:
            rows: [k], indices into ``self.rows``.
            positions: [k], of the token in its row.
        """
        path_nodes = np.array([node for path in self.paths for node in path], dtype=np.int64)
        path_rows = np.repeat(np.arange(len(self.paths)), [len(path) for path in self.paths])
        width = int((self.depths + self.lengths).max(initial=0)) + 1
        found = np.searchsorted(
            path_rows * width + self.depths[path_nodes], rows * width + positions, "right"
        )
        nodes = path_nodes[found - 1]
        firsts = np.cumsum(self.lengths) - self.lengths
        places: IntArray = firsts[nodes] + positions - self.depths[nodes]
        return places


def build_tree(flat: FlatRows, order: RowOrder, low: int, high: int) -> Tree:
    """Build the trie of the rows ``order.rows[low:high]``.

    Rows part where their ids do, except that what two rows share beyond a cut counts only from
    ``MIN_SHARED_TOKENS`` on.
    """
    starts: list[int] = []
    lengths: list[int] = []
    depths: list[int] = []
    parents: list[int] = []
    paths: dict[int, tuple[int, ...]] = {}
    # Runs of rows that share their first `depth` ids, and the path of nodes that holds these.
    stack: list[tuple[int, int, int, tuple[int, ...]]] = _runs(order, low, high, 0, ())
    while stack:
        first, last, depth, path = stack.pop()
        row = int(order.rows[first])
        is_single = last - first == 1
        end = int(flat.lengths[row]) if is_single else int(order.shared[first + 1 : last].min())
        if end > depth:
            starts.append(int(flat.starts[row]) + depth)
            lengths.append(end - depth)
            depths.append(depth)
            parents.append(path[-1] if path else -1)
            path = (*path, len(starts) - 1)
        if is_single:
            paths[row] = path
        else:
            stack += _runs(order, first, last, end, path)
    rows = np.sort(order.rows[low:high])
    return Tree(
        starts=np.array(starts, dtype=np.int64),
        lengths=np.array(lengths, dtype=np.int64),
        depths=np.array(depths, dtype=np.int64),
        parents=np.array(parents, dtype=np.int64),
        rows=rows,
        paths=tuple(paths[row] for row in rows.tolist()),
    )


def _runs(
    order: RowOrder, low: int, high: int, depth: int, path: tuple[int, ...]
) -> list[tuple[int, int, int, tuple[int, ...]]]:
    """Cut rows that share ``depth`` ids into runs that share enough more; the first run comes last."""
    parts = np.flatnonzero(order.shared[low + 1 : high] < depth + MIN_SHARED_TOKENS) + low + 1
    edges = [low, *parts.tolist(), high]
    return [(a, b, depth, path) for a, b in itertools.pairwise(edges)][::-1]


def plan_trees(flat: FlatRows, rows: IntArray, max_tokens: int) -> list[Tree]:
    """Cut rows into tries of at most ``max_tokens`` tokens each.

    Rows come in the order of their ids, so that those which share most stand together; a trie is cut where
    its share of all tokens is reached. A row longer than the budget gets a trie of its own.
    """
    order = RowOrder(flat, rows)
    shared = np.where(order.shared >= MIN_SHARED_TOKENS, order.shared, 0)
    added = flat.lengths[order.rows] - shared
    count = -(-int(added.sum()) // max_tokens)
    goal = added.sum() / max(count, 1)
    found: list[Tree] = []
    low, total = 0, 0
    for index in range(order.rows.size):
        if index > low and (total >= goal or total + added[index] > max_tokens):
            found += _within(flat, order, low, index, max_tokens)
            low, total = index, 0
        total += int(added[index] if index > low else flat.lengths[order.rows[index]])
    return found + _within(flat, order, low, order.rows.size, max_tokens)


def _within(flat: FlatRows, order: RowOrder, low: int, high: int, max_tokens: int) -> list[Tree]:
    """Return the trie of some rows, halved until each is within the budget: what is too short for a node of
    its own adds to what was counted.
    """
    found: list[Tree] = []
    stack = [(low, high)] if high > low else []
    while stack:
        first, last = stack.pop()
        tree = build_tree(flat, order, first, last)
        if tree.num_tokens > max_tokens and last - first > 1:
            middle = (first + last) // 2
            stack += [(middle, last), (first, middle)]
        else:
            found.append(tree)
    return found
