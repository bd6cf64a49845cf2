"""``python -m bench.staleness.mix``: is what is trained what was generated? Half a minute, no model.

The real coordinator under virtual time (:mod:`bench.staleness.simulation`), with lifecycles that take twelve
times a step of a learner that never waits, and spread widely. For every way to treat the lag bound: how far
the trained mix of positions and lengths is from the generated one, what share of the generated tokens expired
and for what reason, how old the trained tokens were, how much the learner waited.

- mix gap: largest relative difference of a position's share (0.05: it is trained 5 % more or less often than
  it was generated), and the total variation of lengths in powers of two;
- expired: action tokens dropped, or fenced before their episode ended, over all generated ones.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from bench.staleness.simulation import RUN, Account, Simulation, Timing
from cod_async.commands.output import console_for_people
from cod_async.config.schema import Config
from cod_async.store.ledger import ledger

MODES: dict[str, dict[str, dict[str, Any]]] = {
    "wait": {"staleness": {"on_bound": "wait"}},
    "expire, forecast": {"staleness": {"on_bound": "expire"}},
    "expire, capacity": {"staleness": {"on_bound": "expire", "admission": "capacity"}},
    "wait, quorum 7 of 8, late trained": {
        "staleness": {"on_bound": "wait"},
        "groups": {"close": "quorum", "quorum_members": 7, "after_s": 0.0},
    },
    "wait, quorum 7 of 8, late dropped": {
        "staleness": {"on_bound": "wait"},
        "groups": {"close": "quorum", "quorum_members": 7, "after_s": 0.0, "late": "drop"},
    },
}


def make_config(
    mode: dict[str, dict[str, Any]], *, max_lag: int, num_steps: int, groups_per_step: int, plan_ahead: int
) -> Config:
    """Return a configuration of eight lifecycles of four tasks per pack."""
    base: dict[str, dict[str, Any]] = {
        "run": {"name": RUN, "num_steps": num_steps},
        "lifecycle": {"pack_size": 4, "group_size": 8},
        "learner": {"groups_per_step": groups_per_step},
        "staleness": {"max_lag": max_lag, "plan_ahead_steps": plan_ahead},
        "groups": {"deadline_s": 100_000.0},
        "model": {"max_context_tokens": 1 << 16},
    }
    for name, section in mode.items():
        base[name] = {**base.get(name, {}), **section}
    environments = [{"name": "hidden_buttons", "preset": "door"}]
    return msgspec.convert({"environments": environments, **base}, Config)


def play(config: Config, timing: Timing, seed: int, until_s: float = float("inf")) -> dict[str, Any]:
    """Simulate a run and return its row of the table."""
    slots = 4 * config.learner.groups_per_step * config.lifecycle.group_size * (config.staleness.max_lag + 1)
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        simulation = Simulation(Path(folder), config, timing, slots, seed)
        try:
            account = simulation.run(until_s)
            running = {group for group, _, _ in simulation.store.work.untrained()}
            drops = ledger(Path(folder))["tokens"]["dropped"]
        finally:
            simulation.close()
    return row(account, running, drops)


def shares(segments: list[str]) -> dict[str, float]:
    """Return the share of each name among a list of names."""
    return {name: num / len(segments) for name, num in sorted(Counter(segments).items())}


def row(account: Account, running: set[int], drops: dict[str, int]) -> dict[str, Any]:
    """Return what one run did. Groups that are still under way at its end are left out of the mixes."""
    generated = [one for one in account.generated if one[0] not in running]
    before = shares([place for _, place, _ in generated])
    after = shares([place for _, place, _ in account.trained])
    lengths_before = shares([str(num.bit_length()) for _, _, num in generated])
    lengths_after = shares([str(num.bit_length()) for _, _, num in account.trained])
    num_generated = sum(num for _, _, num in generated) + account.cut_tokens
    num_lags = max(1, account.lags.total())
    span_s = account.step_at_s[-1] if account.step_at_s else 0.0
    return {
        "num_steps": len(account.step_at_s),
        "num_segments": len(generated),
        "generated_mix": before,
        "trained_mix": after,
        "position_gap_frac": max(abs(after.get(name, 0.0) / share - 1) for name, share in before.items()),
        "length_gap_frac": 0.5
        * sum(
            abs(lengths_before.get(name, 0.0) - lengths_after.get(name, 0.0))
            for name in lengths_before.keys() | lengths_after.keys()
        ),
        "expired_frac": (sum(drops.values()) + account.cut_tokens) / max(1, num_generated),
        "expired_tokens": {**drops, "cut": account.cut_tokens},
        "lag_mean": sum(lag * num for lag, num in account.lags.items()) / num_lags,
        "lag_max": max(account.lags, default=0),
        "steps_per_hour": 3600 * len(account.step_at_s) / span_s if span_s else 0.0,
        "wait_frac": account.wait_s / span_s if span_s else 0.0,
    }


def show(rows: dict[str, dict[str, Any]], title: str) -> None:
    """Print the table."""
    table = Table(title=title)
    for name in (
        "mode",
        "steps/h",
        "waits",
        "lag mean",
        "max",
        "position gap",
        "length gap",
        "expired",
        "of",
    ):
        table.add_column(name, justify="left" if name in ("mode", "of") else "right", overflow="fold")
    for name, found in rows.items():
        reasons = ", ".join(f"{reason} {num:,}" for reason, num in found["expired_tokens"].items() if num)
        table.add_row(
            name,
            f"{found['steps_per_hour']:.1f}",
            f"{found['wait_frac']:.0%}",
            f"{found['lag_mean']:.2f}",
            f"{found['lag_max']}",
            f"{found['position_gap_frac']:.2%}",
            f"{found['length_gap_frac']:.2%}",
            f"{found['expired_frac']:.2%}",
            reasons or "-",
        )
    console_for_people().print(table)


def main() -> int:
    """Simulate every mode, print the table, write JSON if asked."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.staleness.mix",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--max-lag", type=int, default=4)
    parser.add_argument("--plan-ahead", type=int, default=-1, help="steps; -1: half of the lag")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--groups-per-step", type=int, default=4)
    parser.add_argument("--times", type=float, default=12.0, help="mean lifecycle over the learner's step")
    parser.add_argument("--sigma", type=float, default=0.5, help="lognormal spread between lifecycles")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modes", nargs="*", choices=sorted(MODES), default=list(MODES))
    parser.add_argument("--json", type=Path, help="write the rows")
    arguments = parser.parse_args()
    if min(arguments.max_lag, arguments.seed) < 0 or min(arguments.steps, arguments.groups_per_step) < 1:
        parser.error("--max-lag and --seed must not be negative, --steps and --groups-per-step at least 1")
    if arguments.times <= 0 or arguments.sigma < 0:
        parser.error("--times must be above 0, --sigma not negative")
    timing = Timing(lifecycle_s=10.0 * arguments.times, sigma=arguments.sigma)
    rows = {}
    for name in arguments.modes:
        config = make_config(
            MODES[name],
            max_lag=arguments.max_lag,
            num_steps=arguments.steps,
            groups_per_step=arguments.groups_per_step,
            plan_ahead=arguments.plan_ahead,
        )
        rows[name] = play(config, timing, arguments.seed)
    show(
        rows,
        f"max_lag {arguments.max_lag}, lifecycles of {arguments.times:g} steps, sigma {arguments.sigma:g}",
    )
    if arguments.json is not None:
        settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "modes")}
        arguments.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
