"""The summary: curves, gaps, bars and what a script may rely on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cod_async.config import Config, load_config
from cod_async.observe.metrics import read_history
from cod_async.observe.summary import (
    bar_table,
    build_summary,
    curve_table,
    curves,
    headline,
    read_evaluation,
    read_summary,
    taught_table,
    write_summary,
)


@pytest.fixture
def summary(run_dir: Path, config: Config) -> dict[str, Any]:
    return build_summary(
        status="finished",
        config=config,
        history=read_history(run_dir),
        evaluations={name: read_evaluation(run_dir, name) for name in ("before", "after")},
        ledger={"balanced": True},
        processes=[{"role": "learner", "name": "learner", "pid": 1, "restarts": 0}],
        seconds={"bootstrap": 30.0, "training": 90.0, "evaluation_before": 5.0},
        versions={"python": "3.11"},
        num_policy_versions=61,
    )


def test_summary_answers_what_the_documents_promise(summary: dict[str, Any]) -> None:
    assert summary["status"] == "finished"
    assert summary["wall_s"] == 125.0
    assert summary["num_steps"] == 60
    assert summary["policy_versions"] == 61
    assert summary["lag"] == {"mean": 1.5, "max": 2.0}
    assert summary["processes"][0]["role"] == "learner"
    assert len(summary["config_digest"]) == 64
    for curve in ("before", "after", "held_out", "hint_blanked", "hint_swapped"):
        assert len(summary["reward_by_position"][curve]) == 4
        assert set(summary["reward_by_position"][curve][0]) == {"mean", "sem"}
    assert summary["gap"]["after"] == pytest.approx((0.5 + 0.6 + 0.65) / 3 - 0.25)
    assert summary["gap"]["hint_blanked"] == pytest.approx(0.0)


def test_bars_of_the_quickstart(summary: dict[str, Any]) -> None:
    assert all(bar["is_met"] for bar in summary["bars"])
    assert len(summary["bars"]) == 9
    assert bar_table(summary) is not None


def test_a_missed_or_unknown_bar_is_not_met(run_dir: Path, config: Config, summary: dict[str, Any]) -> None:
    poor = build_summary(
        status="interrupted", config=config, history=read_history(run_dir), evaluations={}, ledger=None,
        processes=[], seconds={"training": 400.0}, versions={}, num_policy_versions=1,
    )  # fmt: skip
    met = {bar["bar"]: bar["is_met"] for bar in poor["bars"]}
    assert met == {**dict.fromkeys(met, False), "mean lag, steps": True}


def test_other_environments_have_no_bars(run_dir: Path, tmp_path: Path) -> None:
    door = load_config([], ['environments=[{name="hidden_buttons", preset="door"}]'])
    found = build_summary(
        status="finished", config=door, history=read_history(run_dir), evaluations={}, ledger=None,
        processes=[], seconds={}, versions={}, num_policy_versions=1,
    )  # fmt: skip
    assert "bars" not in found
    assert bar_table(found) is None
    assert curve_table(found).row_count == 0


def test_mixtures_are_averaged_by_weight(run_dir: Path) -> None:
    mixture = load_config(
        [],
        ['environments=[{name="a", preset="cross", weight=3.0}, {name="b", preset="cross", weight=1.0}]'],
    )

    def one(environment: str, mean: float, sem: float) -> dict[str, Any]:
        return {
            "split": "train", "control": "normal", "rows": [{"environment": environment, "preset": "cross"}],
            "reward_by_position": [{"mean": mean, "sem": sem}],
        }  # fmt: skip

    found = curves({"before": {"reports": [one("a", 1.0, 0.1), one("b", 0.0, 0.3)]}}, mixture)
    assert found["before"][0]["mean"] == pytest.approx(0.75)
    assert found["before"][0]["sem"] == pytest.approx((0.3**2 + 0.3**2) ** 0.5 / 4)


def test_files_and_headline(run_dir: Path, summary: dict[str, Any]) -> None:
    assert read_summary(run_dir) is None
    write_summary(run_dir, summary)
    again = read_summary(run_dir)
    assert again is not None and again["gap"] == summary["gap"]
    assert "60 steps" in headline(summary) and "ledger balanced" in headline(summary)
    assert "ledger unknown" in headline({**summary, "ledger": None})
    assert taught_table(run_dir) is None
    (run_dir / "model").mkdir()
    (run_dir / "model" / "bootstrap.json").write_text(
        '{"taught": [{"skill": "s", "is_taught": true, "note": "n"}]}'
    )
    table = taught_table(run_dir)
    assert table is not None and table.row_count == 1
