"""What an evaluation reports: rewards by position with the pack as the unit of the error, and the CoD gap.

The lifecycles of a pack share one hidden world, so they are averaged before a standard error is taken;
treating them as independent would make the error too small. The gap (mean of the later positions minus the
first) is taken per pack, so its error is a paired one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec


class Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Mean reward at one position: one line of ``cod eval``.

    Attributes:
        mode: ``cod``, or ``none`` when nothing is carried.
        mean: mean final task reward over packs.
        sem: standard error of the mean over the n packs.
        n: packs.
    """

    environment: str
    preset: str
    split: str
    mode: str
    control: str
    checkpoint: str
    position: int
    mean: float
    sem: float
    n: int


class Report(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one pass found.

    Attributes:
        rows: one per position.
        gap, gap_sem: mean of positions 1.. minus position 0 and its standard error, paired by pack.
        well_formed_frac: fraction of update episodes whose hint parsed, in [0, 1].
        steps_mean: mean policy responses per solve episode.
        hint_tokens_mean: mean generated tokens per update episode.
        num_lifecycles, num_tokens, wall_s: size and cost of the pass.
    """

    rows: tuple[Row, ...]
    split: str
    control: str
    gap: float
    gap_sem: float
    well_formed_frac: float
    steps_mean: float
    hint_tokens_mean: float
    num_lifecycles: int
    num_tokens: int
    wall_s: float


def gap(means: Sequence[float]) -> float:
    """Return the CoD gap of a curve: mean of positions 1.. minus position 0; 0.0 for a single position."""
    if len(means) < 2:
        return 0.0
    return math.fsum(means[1:]) / (len(means) - 1) - means[0]


def pack_means(rewards: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """Average rewards [pack][member][position] over members: [pack][position]."""
    return [[math.fsum(column) / len(pack) for column in zip(*pack, strict=True)] for pack in rewards]


def report_to_json(report: Report) -> dict[str, Any]:
    """Return a report as JSON-able values; adds ``mode`` and ``reward_by_position`` (``[{mean, sem}]``)."""
    out: dict[str, Any] = msgspec.to_builtins(report)
    out["mode"] = report.rows[0].mode
    out["reward_by_position"] = [{"mean": row.mean, "sem": row.sem} for row in report.rows]
    return out


def suite(name: str, reports: Sequence[Report]) -> dict[str, Any]:
    """Return ``{suite, rows}``: what ``cod eval --json`` prints."""
    return {"suite": name, "rows": [msgspec.to_builtins(row) for report in reports for row in report.rows]}
