"""Rows of similar length side by side, padded on the right: the layout of a CPU.

On a CPU a causal attention over ragged packed rows is many times slower than over a rectangle, so rows are
bucketed by length. The cut into rectangles minimises padded tokens plus a fixed cost per rectangle (dynamic
programme over the distinct lengths).
"""

from __future__ import annotations

import numpy as np

from cod_async.learner.rows.flat import IntArray

RECTANGLE_OVERHEAD_TOKENS = 192
"""Cost of one more rectangle, in token equivalents; measured with the quickstart's model on one core."""

MAX_BUCKET_TOKENS = 2048
"""On a CPU a rectangle is cut further when its activations would no longer fit into the cache."""

_MAX_DISTINCT_LENGTHS = 256


def rectangles(
    lengths: IntArray, max_tokens: int, overhead_tokens: int = RECTANGLE_OVERHEAD_TOKENS
) -> list[IntArray]:
    """Cut rows into rectangles.

    Args:
        lengths: tokens of each row.
        max_tokens: budget of a rectangle, padding included; a longer row gets a rectangle of its own.
        overhead_tokens: fixed cost of a rectangle in tokens.

    Returns:
        Row indices of each rectangle, ascending by length, ties by index; every row is in exactly one.
    """
    if lengths.size == 0:
        return []
    order = np.argsort(lengths, kind="stable")
    sizes = lengths[order]
    distinct = np.unique(sizes)
    if distinct.size > _MAX_DISTINCT_LENGTHS:  # coarser cut candidates bound the programme for very long rows
        picks = np.linspace(0, distinct.size - 1, _MAX_DISTINCT_LENGTHS).round().astype(np.int64)
        distinct = distinct[picks]
    below = np.concatenate([[0], np.searchsorted(sizes, distinct, side="right")])
    best = np.zeros(distinct.size + 1)
    origin = np.zeros(distinct.size + 1, dtype=np.int64)
    for j in range(1, distinct.size + 1):
        width = distinct[j - 1]
        num_rows = below[j] - below[:j]
        num_rectangles = -(-num_rows // max(1, max_tokens // width))
        costs = best[:j] + width * num_rows + overhead_tokens * num_rectangles
        origin[j] = int(np.argmin(costs))
        best[j] = costs[origin[j]]
    cuts = [distinct.size]
    while cuts[-1] > 0:
        cuts.append(int(origin[cuts[-1]]))
    result: list[IntArray] = []
    for low, high in zip(cuts[:0:-1], cuts[-2::-1], strict=True):
        bucket = order[below[low] : below[high]]
        rows_each = max(1, max_tokens // int(distinct[high - 1]))
        result += np.array_split(bucket, -(-bucket.size // rows_each))
    return result
