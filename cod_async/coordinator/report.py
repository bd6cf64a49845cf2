"""What a step and a second look like in ``metrics.jsonl``.

Rewards are those of the segments that the step trains on, by episode kind and position; lags are per action
token, in learner steps, measured when the segment is consumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cod_async.lifecycle.segment import Version
from cod_async.store.history import StepItem
from cod_async.store.lineage import LineageTree
from cod_async.store.segments import SegmentRow


def step_report(
    version: Version, rows: Sequence[SegmentRow], items: Sequence[StepItem], tree: LineageTree
) -> dict[str, Any]:
    """Return the JSON-able numbers of one step's selection."""
    lags: dict[int, int] = {}
    for row in rows:
        for span in row.versions:
            lag = max(0, version.step - tree.birth(span.version).step)
            lags[lag] = lags.get(lag, 0) + span.num_tokens
    num_action_tokens = sum(lags.values())
    updates = [row for row in rows if row.kind == "update"]
    mean_advantage = math.fsum(i.advantage * r.num_action_tokens for i, r in zip(items, rows, strict=True))
    return {
        "lineage": version.lineage,
        "step": version.step,
        "reward_by_position": _mean_reward_by_position([row for row in rows if row.kind == "solve"]),
        "update_reward_by_position": _mean_reward_by_position(updates),
        "well_formed_hint_frac": _mean([float(row.finish == "success") for row in updates]),
        "lag_mean": math.fsum(lag * n for lag, n in lags.items()) / max(1, num_action_tokens),
        "lag_max": max(lags, default=0),
        "lag_histogram": {str(lag): lags[lag] for lag in sorted(lags)},
        "advantage_token_mean": mean_advantage / max(1, num_action_tokens),
        "zero_advantage_frac": _mean([float(item.advantage == 0.0) for item in items]),
        "num_groups": len({row.key.group for row in rows}),
        "num_segments": len(rows),
        "num_tokens": sum(row.num_tokens for row in rows),
        "num_action_tokens": num_action_tokens,
    }


def reward_gap(reports: Sequence[dict[str, Any]]) -> float | None:
    """Return mean reward of positions 1.. minus that of position 0, each averaged over the reports.

    None when the lifecycles have one position only, or there is no report.
    """
    first = [report["reward_by_position"][0] for report in reports if report["reward_by_position"]]
    later = [value for report in reports for value in report["reward_by_position"][1:]]
    known_first = [value for value in first if value is not None]
    known_later = [value for value in later if value is not None]
    if not known_first or not known_later:
        return None
    return math.fsum(known_later) / len(known_later) - math.fsum(known_first) / len(known_first)


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _mean_reward_by_position(rows: Sequence[SegmentRow]) -> list[float | None]:
    num_positions = max((row.position for row in rows), default=-1) + 1
    return [
        _mean([row.reward for row in rows if row.position == position]) for position in range(num_positions)
    ]
