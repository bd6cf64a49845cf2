"""The simulated coordinator: nothing expires under wait, little under expire, and a hung lifecycle holds up
nobody. Counts and shares only; all time is virtual.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from coordinator_world import MEMORY_FOLDER

from bench.staleness.mix import MODES, main, make_config, play
from bench.staleness.simulation import Account, Simulation, Timing
from cod_async.store.ledger import ledger

SMALL = {"max_lag": 4, "num_steps": 24, "groups_per_step": 1, "plan_ahead": -1}


def played(mode: str, sigma: float = 0.5, **changes: Any) -> dict[str, Any]:
    config = make_config(MODES[mode], **{**SMALL, **changes})
    return play(config, Timing(lifecycle_s=120.0, sigma=sigma), seed=1)


def test_wait_trains_everything_it_generates() -> None:
    row = played("wait")
    assert row["num_steps"] == 24 and row["lag_max"] <= 4
    assert row["expired_frac"] == 0 and row["position_gap_frac"] == 0
    assert sorted(row["trained_mix"]) == [
        *(f"solve/{k}" for k in range(4)),
        *(f"update/{k}" for k in range(3)),
    ]


def test_expire_loses_little_and_trains_the_mix_that_was_generated() -> None:
    row = played("expire, forecast", num_steps=40)
    assert row["num_steps"] == 40 and row["lag_max"] <= 4
    assert row["expired_frac"] <= 0.05 and row["position_gap_frac"] <= 0.05


def test_the_forecast_saves_what_a_full_pipeline_would_let_expire() -> None:
    by_forecast, by_capacity = (
        played(mode, plan_ahead=4, num_steps=40, groups_per_step=2, sigma=0.6)
        for mode in ("expire, forecast", "expire, capacity")
    )
    assert by_forecast["expired_frac"] < by_capacity["expired_frac"] / 2


def test_late_members_are_trained_and_dropping_them_is_a_bias() -> None:
    trained, dropped = (played(f"wait, quorum 7 of 8, late {what}") for what in ("trained", "dropped"))
    assert trained["expired_frac"] < 0.05 < dropped["expired_frac"]
    assert trained["length_gap_frac"] < dropped["length_gap_frac"]


def simulated(
    mode: dict[str, dict[str, Any]], timing: Timing, num_steps: int = 16
) -> tuple[Account, dict[str, Any]]:
    config = make_config(mode, max_lag=4, num_steps=num_steps, groups_per_step=1, plan_ahead=-1)
    with tempfile.TemporaryDirectory(dir=MEMORY_FOLDER) as folder:
        simulation = Simulation(Path(folder), config, timing, num_slots=200)
        account = simulation.run()
        drops = ledger(Path(folder))["segments"]["dropped"]
        simulation.close()
    return account, drops


HUNG = (3, 5)
USUAL = Timing(sigma=0.3)
WITH_HUNG = Timing(sigma=0.3, hung=(HUNG,))


@pytest.mark.parametrize(
    "mode",
    [
        {"staleness": {"on_bound": "expire", "admission": "capacity"}},
        {"groups": {"close": "quorum", "quorum_members": 7, "deadline_s": 900.0, "after_s": 150.0}},
    ],
    ids=["expire", "quorum"],
)
def test_a_lifecycle_that_hangs_delays_no_other_group(mode: dict[str, dict[str, Any]]) -> None:
    account, drops = simulated(mode, WITH_HUNG)
    usual, _ = simulated(mode, USUAL)
    assert len(account.step_at_s) == len(usual.step_at_s) == 16
    waits = [b - a for a, b in zip(account.step_at_s[:-1], account.step_at_s[1:], strict=True)]
    usually = [b - a for a, b in zip(usual.step_at_s[:-1], usual.step_at_s[1:], strict=True)]
    assert max(waits) <= 2 * max(usually)  # far less than the deadline, and nothing waits for the hung one
    assert set(range(16)) - {HUNG[0]} <= set(account.trained_at_s) | {14, 15}
    assert HUNG[0] in account.trained_at_s  # its group is trained too
    assert {group for group, _, _ in account.trained} >= {HUNG[0]}
    assert sum(drops.values()) < 8  # the episodes of the hung one, of 7 x 8 in its group


@pytest.mark.parametrize(("overdue_factor", "limit_s"), [(0.0, 700.0), (2.0, 450.0)])
def test_where_the_learner_waits_the_deadline_or_the_forecast_releases_it(
    overdue_factor: float, limit_s: float
) -> None:
    mode = {"groups": {"close": "all", "deadline_s": 600.0, "overdue_factor": overdue_factor}}
    account, drops = simulated(mode, WITH_HUNG)
    usual, _ = simulated(mode, USUAL)
    reason = "overdue" if overdue_factor else "deadline"
    assert drops.keys() == {reason} and drops[reason] <= 3
    assert len(account.step_at_s) == 16 and max(account.lags) <= 4
    assert HUNG[0] in account.trained_at_s
    delays = [late - on_time for late, on_time in zip(account.step_at_s, usual.step_at_s, strict=True)]
    assert max(delays) <= limit_s


def test_equal_seeds_give_equal_runs() -> None:
    first, second = (played("expire, forecast", num_steps=8) for _ in range(2))
    assert first == second


def test_the_command_prints_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    out = tmp_path / "mix.json"
    argv = ["mix", "--steps", "4", "--groups-per-step", "1", "--modes", "wait", "--json", str(out)]
    monkeypatch.setattr("sys.argv", argv)
    assert main() == 0
    assert '"expired_frac": 0.0' in out.read_text()
