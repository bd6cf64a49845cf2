"""Prefix merging: rows that continue each other are computed as one row.

Some agents record an episode as one row per turn, each with the whole history in front. Where turn k+1's row
begins with all of turn k's, ids compared one by one, the longer row holds everything the shorter one needs:
under a causal model the states behind the shared ids are the same. So only the longest row of such a chain is
computed, and the action tokens of all of them find their predictors in it, each with the log-prob, lag and
advantage it was recorded with. Rows whose history was edited differ somewhere and stay rows of their own.
(What the built-in rollout records needs none of this: an episode is one row with a span per turn already.)

Rows are compared within a lifecycle, so conversations that go on over several segments merge too, and
``minibatches_per_step`` can still cut between lifecycles.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from cod_async.learner.rows.flat import FlatRows, IntArray, row_bytes


def merge_rows(flat: FlatRows) -> FlatRows:
    """Return the step with every row left out that another row of its lifecycle begins with.

    Action tokens keep their order and every number; their rows change, their positions do not. In the
    lexicographic order of a lifecycle's rows, a row that is the beginning of any other is the beginning of
    the next one, so one pass finds every chain, whatever order the rows were recorded in.
    """
    count = flat.num_rows
    followers = np.arange(count)  # the row that each row is computed in
    keys = row_bytes(flat, _candidates(flat))
    life = flat.row_lifecycles.tolist()
    order = sorted(keys, key=lambda row: (life[row], keys[row], row))
    for before, row in list(itertools.pairwise(order))[::-1]:  # the next row's own follower is known
        if life[before] == life[row] and keys[row].startswith(keys[before]):
            followers[before] = followers[row]
    is_kept = followers == np.arange(count)
    return replace(
        flat,
        starts=flat.starts[is_kept],
        lengths=flat.lengths[is_kept],
        action_rows=(np.cumsum(is_kept) - 1)[followers[flat.action_rows]],
        row_lifecycles=flat.row_lifecycles[is_kept],
        num_recorded_rows=count,
        num_recorded_tokens=flat.num_tokens,
    )


def _candidates(flat: FlatRows) -> IntArray:
    """Return the rows with action tokens (others are not computed) that another such row of their lifecycle
    shares its first id with.
    """
    rows = np.unique(flat.action_rows)
    first = (flat.row_lifecycles[rows] << 32) + flat.tokens[flat.starts[rows]]
    _, kind, counts = np.unique(first, return_inverse=True, return_counts=True)
    found: IntArray = rows[counts[kind] > 1]
    return found


def merging_metrics(flat: FlatRows) -> dict[str, float]:
    """Return how well turns share rows.

    Returns:
        ``merge_rate``: of the turns (unbroken runs of a segment's action tokens) that are not the first of
        their segment, the share whose row holds an earlier turn of it too; left out when every segment has
        one turn. It is 1 when histories are only ever appended to, and falls when something rewrites them.
        ``merged_rows_frac``: share of the recorded rows that others took in.
        ``merged_tokens_frac``: share of the recorded forward tokens that this saved.
    """
    numbers: dict[str, float] = {}
    rows, items, offsets = flat.action_rows, flat.action_items, flat.action_offsets
    same_row = (rows[1:] == rows[:-1]) & (items[1:] == items[:-1])
    begins = np.ones(rows.size, dtype=np.bool_)
    begins[1:] = ~(same_row & (offsets[1:] == offsets[:-1] + 1))
    turn_items = items[begins]
    num_later = turn_items.size - np.unique(turn_items).size
    if num_later:
        num_places = np.unique(turn_items * flat.num_rows + rows[begins]).size
        numbers["merge_rate"] = (turn_items.size - num_places) / num_later
    if flat.num_recorded_rows and flat.num_recorded_tokens:
        numbers["merged_rows_frac"] = 1 - flat.num_rows / flat.num_recorded_rows
        numbers["merged_tokens_frac"] = 1 - flat.num_tokens / flat.num_recorded_tokens
    return numbers
