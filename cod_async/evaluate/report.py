"""What an evaluation reports: rewards by position with the pack as the unit of the error, and the CoD gap.

The lifecycles of a pack share one hidden world, so they are averaged before a standard error is taken;
treating them as independent would make the error too small. Seeds are pooled the same way: a pack is known by
its tasks and its world, so packs of different seeds are different packs (n grows with the seeds), and if a
suite makes all seeds play the same packs, their values are averaged inside the pack and n stays. The gap
(mean of the later positions minus the first) and the position-averaged reward are taken per pack, so their
errors are paired ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from cod_async.algo.statistics import mean_and_sem
from cod_async.evaluate.agenda import Cell
from cod_async.evaluate.results import LifecycleResult, ResultFile
from cod_async.evaluate.suite import Control


class Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Mean reward at one position: one line of ``cod eval``.

    Attributes:
        entry: name of the suite's entry.
        environment, preset, split, control: what was played.
        mode: ``cod``, ``ralph_sample``, ``ralph_full``, or ``none`` when nothing is carried.
        carry: what went from task to task.
        checkpoint: label of the weights; ``step`` is their optimiser step, None for a bare model.
        position: 0-based.
        mean: mean final task reward over packs; ``sem`` its standard error over the n packs.
        raw_mean: the same without penalties.
        format_error_frac, overflow_frac: tasks that ended because a response did not parse, or because the
            context was full, in [0, 1].
        well_formed_frac: updates after this position whose hint parsed; None if none was played.
    """

    entry: str
    environment: str
    preset: str
    split: str
    mode: str
    carry: str
    control: str
    checkpoint: str
    step: int | None
    position: int
    mean: float
    sem: float
    n: int
    raw_mean: float
    format_error_frac: float
    overflow_frac: float
    well_formed_frac: float | None


class Report(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One curve.

    Attributes:
        rows: one per position.
        entry, environment, preset, split, mode, carry, control, checkpoint, step: as in the rows.
        seeds: whose packs are pooled.
        gap, gap_sem: mean of positions 1.. minus position 0 and its standard error, paired by pack.
        mean, mean_sem: reward averaged over positions, and its standard error.
        well_formed_frac: fraction of update episodes whose hint parsed, in [0, 1]; 1 if none was played.
        steps_mean: mean policy responses per solve episode.
        hint_tokens_mean: mean generated tokens per update episode.
        num_packs, num_lifecycles, num_tokens: size of the curve.
        num_missing: lifecycles that could not be played; the curve is without them.
        by_seed: with several seeds ``[{seed, n, reward_by_position: [{mean, sem}]}]``.
    """

    rows: tuple[Row, ...]
    entry: str
    environment: str
    preset: str
    split: str
    mode: str
    carry: str
    control: str
    checkpoint: str
    step: int | None
    seeds: tuple[int, ...]
    gap: float
    gap_sem: float
    mean: float
    mean_sem: float
    well_formed_frac: float
    steps_mean: float
    hint_tokens_mean: float
    num_packs: int
    num_lifecycles: int
    num_missing: int
    num_tokens: int
    by_seed: tuple[dict[str, Any], ...] = ()


class _Curve:
    """Gathers the lifecycles of one curve, pack by pack."""

    def __init__(self) -> None:
        self.rewards: dict[str, list[tuple[float, ...]]] = {}
        self.raw_rewards: dict[str, list[tuple[float, ...]]] = {}
        self.finishes: list[tuple[str, ...]] = []
        self.updates: list[tuple[str | None, ...]] = []
        self.num_responses = self.num_hint_tokens = self.num_tokens = self.num_missing = 0

    def add(self, pack: str, result: LifecycleResult) -> None:
        """Take in a lifecycle of a pack."""
        self.rewards.setdefault(pack, []).append(result.rewards)
        self.raw_rewards.setdefault(pack, []).append(result.raw_rewards)
        self.finishes.append(result.finishes)
        self.updates.append(result.updates)
        self.num_responses += sum(result.num_responses)
        self.num_hint_tokens += result.num_hint_tokens
        self.num_tokens += result.num_tokens

    def points(self) -> list[dict[str, float]]:
        """Return ``[{mean, sem}]`` by position."""
        by_pack = pack_means(self.rewards.values())
        errors = [mean_and_sem(column) for column in zip(*by_pack, strict=True)]
        return [{"mean": mean, "sem": sem} for mean, sem in errors]


def build_reports(
    checkpoint: str, step: int | None, cells: Sequence[Cell], results: ResultFile
) -> tuple[list[Report], list[dict[str, str]]]:
    """Return the curves of one set of weights, and what could not be played.

    Args:
        checkpoint: label of the weights.
        step: their optimiser step, None for a bare model.
        cells: everything that was played, planned to the end.
        results: the lifecycles of these weights.

    Returns:
        One report per setting and control with at least one lifecycle, in the order of the cells; and
        ``[{entry, environment, preset, split, mode, control, reason}]``.
    """
    reports: list[Report] = []
    missing: list[dict[str, str]] = []
    by_setting: dict[int, list[Cell]] = {}
    for cell in cells:
        by_setting.setdefault(cell.index, []).append(cell)
    for group in by_setting.values():
        setting = group[0].setting
        told = {
            "entry": setting.label,
            "environment": setting.environment.name,
            "preset": setting.environment.preset,
            "split": setting.split,
            "mode": setting.mode,
        }
        reasons: dict[str, str] = dict(setting.unavailable)
        for control in setting.reported:
            for cell in group:
                if control in cell.unavailable:
                    reasons[control] = cell.unavailable[control]
            report = _report(control, checkpoint, step, group, results)
            reports += [] if report is None else [report]
        missing += [{**told, "control": control, "reason": reason} for control, reason in reasons.items()]
    return reports, missing


def _report(
    control: Control, checkpoint: str, step: int | None, cells: Sequence[Cell], results: ResultFile
) -> Report | None:
    curve, by_seed = _Curve(), []
    for cell in cells:
        own = _Curve()
        for pack in range(cell.num_packs):
            for member in range(cell.setting.lifecycles_per_pack):
                result = cell.result(results, control, pack, member)
                if result is None:
                    curve.num_missing += control not in cell.unavailable
                    continue
                for each in (curve, own):
                    each.add(cell.pack_digests[pack], result)
        if own.rewards and len(cells) > 1:
            by_seed.append({"seed": cell.seed, "n": len(own.rewards), "reward_by_position": own.points()})
    if not curve.rewards:
        return None
    setting = cells[0].setting
    environment = setting.environment
    by_pack = pack_means(curve.rewards.values())
    gap_mean, gap_sem = mean_and_sem([gap(pack) for pack in by_pack])
    mean, mean_sem = mean_and_sem([math.fsum(pack) / len(pack) for pack in by_pack])
    updates = [finish for ends in curve.updates for finish in ends if finish is not None]
    rows = _rows(control, checkpoint, step, cells[0], curve)
    return Report(
        rows=rows,
        entry=setting.label,
        environment=environment.name,
        preset=environment.preset,
        split=setting.split,
        mode=setting.mode,
        carry=setting.config.lifecycle.carry,
        control=control,
        checkpoint=checkpoint,
        step=step,
        seeds=tuple(cell.seed for cell in cells),
        gap=gap_mean,
        gap_sem=gap_sem,
        mean=mean,
        mean_sem=mean_sem,
        well_formed_frac=_share(updates, "success") if updates else 1.0,
        steps_mean=curve.num_responses / (len(curve.finishes) * len(rows)),
        hint_tokens_mean=curve.num_hint_tokens / max(1, len(updates)),
        num_packs=len(by_pack),
        num_lifecycles=len(curve.finishes),
        num_missing=curve.num_missing,
        num_tokens=curve.num_tokens,
        by_seed=tuple(by_seed),
    )


def _rows(control: Control, checkpoint: str, step: int | None, cell: Cell, curve: _Curve) -> tuple[Row, ...]:
    setting = cell.setting
    environment = setting.environment
    raw = [
        math.fsum(column) / len(column)
        for column in zip(*pack_means(curve.raw_rewards.values()), strict=True)
    ]
    rows = []
    for position, point in enumerate(curve.points()):
        finishes = [ends[position] for ends in curve.finishes]
        updates = [finish for ends in curve.updates if (finish := ends[position]) is not None]
        rows.append(
            Row(
                entry=setting.label,
                environment=environment.name,
                preset=environment.preset,
                split=setting.split,
                mode=setting.mode,
                carry=setting.config.lifecycle.carry,
                control=control,
                checkpoint=checkpoint,
                step=step,
                position=position,
                mean=point["mean"],
                sem=point["sem"],
                n=len(curve.rewards),
                raw_mean=raw[position],
                format_error_frac=_share(finishes, "format_error"),
                overflow_frac=_share(finishes, "context_overflow"),
                well_formed_frac=_share(updates, "success") if updates else None,
            )
        )
    return tuple(rows)


def _share(finishes: Sequence[str], wanted: str) -> float:
    return sum(finish == wanted for finish in finishes) / len(finishes)


def gap(means: Sequence[float]) -> float:
    """Return the CoD gap of a curve: mean of positions 1.. minus position 0; 0.0 for a single position."""
    if len(means) < 2:
        return 0.0
    return math.fsum(means[1:]) / (len(means) - 1) - means[0]


def pack_means(rewards: Iterable[Sequence[Sequence[float]]]) -> list[list[float]]:
    """Average rewards [pack][member][position] over members: [pack][position]."""
    return [[math.fsum(column) / len(pack) for column in zip(*pack, strict=True)] for pack in rewards]


def report_to_json(report: Report) -> dict[str, Any]:
    """Return a report as JSON-able values; adds ``reward_by_position`` (``[{mean, sem}]``)."""
    out: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(report))
    out["reward_by_position"] = [{"mean": row.mean, "sem": row.sem} for row in report.rows]
    return out


def answer_of(name: str, reports: Sequence[Report]) -> dict[str, Any]:
    """Return ``{suite, rows, reports}``: the core of what ``cod eval --json`` prints."""
    return {
        "suite": name,
        "rows": [msgspec.to_builtins(row) for report in reports for row in report.rows],
        "reports": [report_to_json(report) for report in reports],
    }
