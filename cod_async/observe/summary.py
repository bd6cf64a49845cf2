"""``summary.json``: what a run came to, for scripts, and the table that is printed at its end.

The curves come from the evaluation reports of the run, the lag and the policy versions from its metrics, the
ledger from its database. For the quickstart's environment the summary also says which acceptance bars were
met.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from cod_async.config import config_digest
from cod_async.config.schema import Config
from cod_async.durable import write_atomic
from cod_async.envs import registry
from cod_async.observe.metrics import History, lag_statistics, position_gap
from cod_async.observe.progress import format_duration

SUMMARY_NAME = "summary.json"
EVALUATION_DIR = "evaluation"
IN_TRAINING_NAME = "in_training.json"
"""What was evaluated beside training, inside :data:`EVALUATION_DIR`."""
CURVES: tuple[tuple[str, str, str, str], ...] = (
    ("before", "before", "train", "normal"),
    ("after", "after", "train", "normal"),
    ("held_out", "after", "held_out", "normal"),
    ("hint_blanked", "after", "train", "blanked"),
    ("hint_swapped", "after", "train", "swapped"),
    ("held_out_before", "before", "held_out", "normal"),
    ("held_out_hint_blanked", "after", "held_out", "blanked"),
    ("held_out_hint_swapped", "after", "held_out", "swapped"),
)
"""Curve name -> (evaluation, split, control)."""
LABELS = {
    "before": "before training",
    "after": "after training",
    "held_out": "after, held-out packs",
    "hint_blanked": "after, hint blanked",
    "hint_swapped": "after, hint of another world",
    "held_out_before": "before, held-out packs",
    "held_out_hint_blanked": "held-out packs, hint blanked",
    "held_out_hint_swapped": "held-out packs, other hint",
}
TAUGHT_TITLE = "what the starting model was taught, and what it was not"
FLAT = 0.10
"""A gap of at most this size counts as flat."""
MAX_TRAINING_S = 300.0
"""Bootstrap and training of the quickstart together."""


def labels_for(config: Config) -> dict[str, str]:
    """Return curve name -> label; held-out packs are called worlds never trained on only where they are.

    With plain pack seeds they never are: the seed of a world is then a function of row numbers alone, and
    both splits count their rows from 0.
    """
    specs = [(registry.get(env.name), env) for env in config.environments]
    has_held_out_worlds = not config.lifecycle.has_plain_pack_seeds and all(
        spec.has_held_out_worlds is not None
        and spec.has_held_out_worlds(spec.options(env.preset, env.options))
        for spec, env in specs
    )
    if not has_held_out_worlds:
        return dict(LABELS)
    return {name: text.replace("held-out packs", "worlds never trained on") for name, text in LABELS.items()}


def write_evaluation(run_dir: Path, name: str, values: Mapping[str, Any]) -> None:
    """Keep the reports of one evaluation (``before`` or ``after``) in the run folder."""
    folder = run_dir / EVALUATION_DIR
    folder.mkdir(exist_ok=True)
    write_atomic(folder / f"{name}.json", json.dumps(values, indent=1).encode() + b"\n")


def read_evaluation(run_dir: Path, name: str) -> dict[str, Any] | None:
    """Return what :func:`write_evaluation` kept, or None."""
    try:
        values = json.loads((run_dir / EVALUATION_DIR / f"{name}.json").read_text())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def read_in_training(run_dir: Path) -> dict[str, Any]:
    """Return what was evaluated beside training.

    Returns:
        ``{suite, num_skipped, num_failed, points: [{version, lineage, step, wall_s, rows, reports}]}`` with
        the points by step, of the surviving history; no points if there were none.
    """
    try:
        values = json.loads((run_dir / EVALUATION_DIR / IN_TRAINING_NAME).read_text())
        points = sorted(values["points"], key=lambda point: point["step"])
        return {
            "suite": values["suite"],
            "num_skipped": values["num_skipped"],
            "num_failed": values["num_failed"],
            "points": points,
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {"suite": "", "num_skipped": 0, "num_failed": 0, "points": []}


def curves(evaluations: Mapping[str, Any], config: Config) -> dict[str, list[dict[str, float]]]:
    """Return curve name -> ``[{mean, sem}]`` by position, over the mixture of environments by weight.

    Args:
        evaluations: ``before`` and ``after`` as kept by :func:`write_evaluation`; missing ones give no
            curves.
        config: supplies the weights of the environments.
    """
    weights = {(env.name, env.preset): env.weight for env in config.environments}
    found = {}
    for name, when, split, control in CURVES:
        reports = [
            report
            for report in (evaluations.get(when) or {}).get("reports", [])
            if report["split"] == split and report["control"] == control
        ]
        if reports:
            shares = [
                weights.get((r["rows"][0]["environment"], r["rows"][0]["preset"]), 1.0) for r in reports
            ]
            found[name] = _mix([report["reward_by_position"] for report in reports], shares)
    return found


def _mix(parts: Sequence[Sequence[Mapping[str, float]]], shares: Sequence[float]) -> list[dict[str, float]]:
    total = math.fsum(shares)
    mixed = []
    for points in zip(*parts, strict=False):
        mean = math.fsum(share * point["mean"] for share, point in zip(shares, points, strict=True)) / total
        variance = math.fsum((share * point["sem"]) ** 2 for share, point in zip(shares, points, strict=True))
        mixed.append({"mean": mean, "sem": math.sqrt(variance) / total})
    return mixed


def gaps(by_curve: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, float | None]:
    """Return curve name -> mean reward of positions 1.. minus position 0."""
    return {name: position_gap([point["mean"] for point in points]) for name, points in by_curve.items()}


def is_quickstart(config: Config) -> bool:
    """Whether the acceptance bars of the quickstart apply to this configuration."""
    return [(env.name, env.preset) for env in config.environments] == [("hidden_buttons", "cross")]


def bars(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the quickstart's acceptance bars, ``[{bar, value, wanted, is_met}]``; an unknown value is not
    met.
    """
    gap = summary["gap"]

    def bar(name: str, value: float | None, wanted: str, is_met: bool) -> dict[str, Any]:
        return {"bar": name, "value": value, "wanted": wanted, "is_met": value is not None and is_met}

    rows = []
    for name, curve, least in (
        ("gap, trained worlds", "after", 0.20),
        ("gap, held-out worlds", "held_out", 0.12),
    ):
        value = gap.get(curve)
        rows.append(bar(name, value, f">= {least:.2f}", value is not None and value >= least))
    for curve in ("before", "hint_blanked", "hint_swapped", "held_out_hint_blanked", "held_out_hint_swapped"):
        value = gap.get(curve)
        rows.append(
            bar(
                f"gap, {summary['labels'][curve]}",
                value,
                f"|gap| <= {FLAT:.2f}",
                value is not None and abs(value) <= FLAT,
            )
        )
    lag = summary["lag"]["mean"]
    rows.append(bar("mean lag, steps", lag, ">= 1", lag >= 1))
    spent = summary["seconds"]["bootstrap"] + summary["seconds"]["training"]
    rows.append(bar("bootstrap and training, s", spent, f"<= {MAX_TRAINING_S:.0f}", spent <= MAX_TRAINING_S))
    return rows


def build_summary(
    *,
    status: str,
    config: Config,
    history: History,
    evaluations: Mapping[str, Any],
    ledger: Mapping[str, Any] | None,
    processes: Sequence[Mapping[str, Any]],
    seconds: Mapping[str, float],
    versions: Mapping[str, Any],
    num_policy_versions: int,
    in_training: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Assemble the summary.

    Args:
        status: ``finished``, ``interrupted`` or ``failed``.
        config: the run's configuration.
        history: the run's metrics.
        evaluations: see :func:`curves`.
        ledger: what ``cod ledger`` answers, None if there is no database.
        processes: ``[{role, pid, restarts}]``.
        seconds: wall seconds by phase (bootstrap, evaluation_before, training, evaluation_after), over all
            launches.
        versions: libraries and commit.
        num_policy_versions: versions published over all lineages, the starting weights included.
        in_training: what :func:`read_in_training` returns.
    """
    by_curve = curves(evaluations, config)
    steps = history.steps
    summary: dict[str, Any] = {
        "status": status,
        "name": config.run.name,
        "wall_s": math.fsum(seconds.values()),
        "seconds": {phase: seconds.get(phase, 0.0) for phase in ("bootstrap", "training")} | dict(seconds),
        "num_steps": steps[-1]["step"] + 1 if steps else 0,
        "reward_by_position": by_curve,
        "gap": gaps(by_curve),
        "labels": labels_for(config),
        "lag": lag_statistics(steps),
        "policy_versions": num_policy_versions,
        "well_formed_hint_frac": _well_formed(evaluations),
        "ledger": ledger,
        "processes": list(processes),
        "config_digest": config_digest(config),
        "versions": dict(versions),
    }
    if in_training is not None and in_training["points"]:
        keep = ("version", "lineage", "step", "wall_s", "rows")
        points = [{name: point[name] for name in keep} for point in in_training["points"]]
        summary["evaluation_in_training"] = {**in_training, "points": points}
    if is_quickstart(config) and config.evaluation.is_enabled:
        summary["bars"] = bars(summary)
    return summary


def _well_formed(evaluations: Mapping[str, Any]) -> float | None:
    for report in (evaluations.get("after") or {}).get("reports", []):
        if report["split"] == "train" and report["control"] == "normal":
            return float(report["well_formed_frac"])
    return None


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> Path:
    """Write ``summary.json`` atomically and return its path."""
    path = run_dir / SUMMARY_NAME
    write_atomic(path, json.dumps(summary, indent=2).encode() + b"\n")
    return path


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """Return an earlier summary, or None."""
    try:
        values = json.loads((run_dir / SUMMARY_NAME).read_text())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def curve_table(summary: Mapping[str, Any]) -> Table:
    """Return the table of reward by position, one row per curve."""
    by_curve = summary["reward_by_position"]
    width = max((len(points) for points in by_curve.values()), default=0)
    table = Table(title="mean reward by position in the lifecycle (± standard error)", title_justify="left")
    table.add_column("")
    for position in range(width):
        table.add_column(f"task {position}", justify="right")
    table.add_column("gap", justify="right")
    for name, points in by_curve.items():
        cells = [f"{point['mean']:.2f} ±{point['sem']:.2f}" for point in points]
        gap = summary["gap"].get(name)
        label = summary.get("labels", LABELS).get(name, name)
        table.add_row(label, *cells, "-" if gap is None else f"{gap:+.2f}")
    return table


def bar_table(summary: Mapping[str, Any]) -> Table | None:
    """Return the table of acceptance bars, or None if the run has none."""
    if not summary.get("bars"):
        return None
    table = Table(title="acceptance bars", title_justify="left")
    for head in ("bar", "measured", "wanted", ""):
        table.add_column(head, justify="right" if head == "measured" else "left")
    for row in summary["bars"]:
        value = "-" if row["value"] is None else f"{row['value']:.2f}"
        table.add_row(row["bar"], value, row["wanted"], "met" if row["is_met"] else "NOT met")
    return table


def taught_table(run_dir: Path) -> Table | None:
    """Return what the bootstrap taught the starting model and what it did not, or None for a model from
    elsewhere.

    A result can only be judged beside what its starting point already knew.
    """
    try:
        report = json.loads((run_dir / "model" / "bootstrap.json").read_text())
    except (OSError, ValueError):
        return None
    table = Table(title=TAUGHT_TITLE, title_justify="left")
    for head in ("skill", "taught", "note"):
        table.add_column(head)
    for row in report.get("taught", []):
        table.add_row(str(row["skill"]), "yes" if row["is_taught"] else "no", str(row["note"]))
    return table


def headline(summary: Mapping[str, Any]) -> str:
    """Return one line on status, length, lag and ledger."""
    ledger = summary.get("ledger") or {}
    balance = {True: "balanced", False: "NOT balanced"}.get(bool(ledger["balanced"])) if ledger else "unknown"
    lag = summary["lag"]
    return (
        f"{summary['status']}: {summary['num_steps']} steps in "
        f"{format_duration(summary['seconds']['training'])}, "
        f"lag mean {lag['mean']:.1f} max {lag['max']:.0f}, ledger {balance}"
    )
