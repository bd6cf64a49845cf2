"""What a step and a second look like in ``metrics.jsonl``.

Rewards and counts are those of the segments that the step trains on for the first time, by episode kind and
position; lags are per action token, replayed ones included, in learner steps, measured when the segment is
consumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from cod_async.coordinator.mix import MixCounts, Place
from cod_async.lifecycle.segment import Version
from cod_async.store.history import StepItem
from cod_async.store.lineage import LineageTree
from cod_async.store.segments import SegmentRow


class PlannedItem(NamedTuple):
    """A segment of a step's plan: its row and what the plan says of it."""

    row: SegmentRow
    item: StepItem


def step_report(
    version: Version,
    planned: Sequence[PlannedItem],
    tree: LineageTree,
    dropped_tokens: Mapping[str, int],
    dropped_mix: MixCounts,
) -> dict[str, Any]:
    """Return the JSON-able numbers of one step's selection.

    Args:
        version: of the step.
        planned: its segments.
        tree: the lineages, for the lag of every token.
        dropped_tokens: action tokens dropped since the last plan, by reason.
        dropped_mix: committed segments dropped since the last plan; the trained ones are added to it.
    """
    lag_of = _lags(version, planned, tree)
    lags: dict[int, int] = {}
    for found in lag_of:
        for lag, num_tokens in found.items():
            lags[lag] = lags.get(lag, 0) + num_tokens
    num_action_tokens = sum(lags.values())
    fresh = [one for one in planned if not one.item.is_replay]
    rows = [one.row for one in fresh]
    updates = [row for row in rows if row.kind == "update"]
    weighted = math.fsum(one.item.advantage * one.row.num_action_tokens for one in planned)
    dropped_mix.count([Place(row.kind, row.position, row.num_action_tokens) for row in rows], is_trained=True)
    return {
        "lineage": version.lineage,
        "step": version.step,
        "reward_by_position": _by_position(fresh, "solve", lambda one: one.row.reward),
        "update_reward_by_position": _by_position(fresh, "update", lambda one: one.row.reward),
        "well_formed_hint_frac": _mean([float(row.finish == "success") for row in updates]),
        "lag_mean": math.fsum(lag * n for lag, n in lags.items()) / max(1, num_action_tokens),
        "lag_max": max(lags, default=0),
        "lag_histogram": {str(lag): lags[lag] for lag in sorted(lags)},
        **_lag_by_position(planned, lag_of),
        "version_spread_max_steps": max((max(found) - min(found) for found in lag_of if found), default=0),
        "advantage_token_mean": weighted / max(1, num_action_tokens),
        "zero_advantage_frac": _mean([float(one.item.advantage == 0.0) for one in planned]),
        "num_groups": len({row.key.group for row in rows if not row.is_late}),
        "num_segments": len(rows),
        "num_tokens": sum(row.num_tokens for row in rows),
        "num_action_tokens": sum(row.num_action_tokens for row in rows),
        **_late(fresh),
        "num_replayed_segments": len(planned) - len(fresh),
        "num_replayed_action_tokens": num_action_tokens - sum(row.num_action_tokens for row in rows),
        "dropped_action_tokens": dict(dropped_tokens),
        "mix": msgspec.to_builtins(dropped_mix),
    }


def _lags(version: Version, planned: Sequence[PlannedItem], tree: LineageTree) -> list[dict[int, int]]:
    """Return for each segment its action tokens by lag, in steps."""
    found = []
    for one in planned:
        lags: dict[int, int] = {}
        for span in one.row.versions:
            lag = max(0, version.step - tree.birth(span.version).step)
            lags[lag] = lags.get(lag, 0) + span.num_tokens
        found.append(lags)
    return found


def _lag_by_position(planned: Sequence[PlannedItem], lag_of: Sequence[dict[int, int]]) -> dict[str, Any]:
    """Return the mean lag of the action tokens at each position, for solves and for updates."""
    out: dict[str, Any] = {}
    for kind, name in (("solve", "lag_mean_by_position"), ("update", "update_lag_mean_by_position")):
        totals: dict[int, tuple[int, int]] = {}
        for one, lags in zip(planned, lag_of, strict=True):
            if one.row.kind == kind:
                steps, tokens = totals.get(one.row.position, (0, 0))
                steps += sum(lag * num for lag, num in lags.items())
                totals[one.row.position] = steps, tokens + sum(lags.values())
        width = max(totals, default=-1) + 1
        found = [totals.get(position, (0, 0)) for position in range(width)]
        out[name] = [steps / tokens if tokens else None for steps, tokens in found]
    return out


def _late(fresh: Sequence[PlannedItem]) -> dict[str, Any]:
    """Return what quorum does to the data: mean advantage, before RED, of members in time and of late ones.

    Where late members differ from the others, dropping them would have biased the step by as much.
    """
    late = [one for one in fresh if one.row.is_late]
    out: dict[str, Any] = {"num_late_segments": len(late)}
    if late:
        in_time = [one for one in fresh if not one.row.is_late]
        for name, some in (("in_time", in_time), ("late", late)):
            for kind, prefix in (("solve", ""), ("update", "update_")):
                key = f"{prefix}advantage_{name}_by_position"
                out[key] = _by_position(some, kind, lambda one: one.row.advantage or 0.0)
    return out


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


def _by_position(
    planned: Sequence[PlannedItem], kind: str, value: Callable[[PlannedItem], float]
) -> list[float | None]:
    """Return the mean of a number over the segments of a kind, by position; None where there are none."""
    found: dict[int, list[float]] = {}
    for one in planned:
        if one.row.kind == kind:
            found.setdefault(one.row.position, []).append(value(one))
    return [_mean(found.get(position, [])) for position in range(max(found, default=-1) + 1)]
