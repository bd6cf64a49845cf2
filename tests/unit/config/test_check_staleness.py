"""Contradictions in the sections on staleness, late members, replay and the autopilot."""

from __future__ import annotations

import pytest
from coordinator_world import make_config

from cod_async.config.check_staleness import staleness_problems

REPLAY = {"max_uses": 2, "groups_per_step": 1}


@pytest.mark.parametrize(
    ("sections", "path", "advice"),
    [
        ({"staleness": {"window_groups": 1}}, "staleness.window_groups", "or 0"),
        ({"staleness": {"max_version_spread": 3}}, "staleness.max_version_spread", "remove it"),
        ({"groups": {"late": "drop"}}, "groups.late", "remove it"),
        ({"groups": {"overdue_factor": 0.5}}, "groups.overdue_factor", "at least 1"),
        ({"replay": {"max_uses": 2}}, "replay.max_uses", "set both"),
        ({"replay": {"groups_per_step": 2}}, "replay.max_uses", "set both"),
        ({"replay": REPLAY, "staleness": {"max_lag": 0}}, "replay.max_uses", "raise max_lag"),
        ({"autopilot": {"is_enabled": True, "min_lag": 2}}, "autopilot.min_lag", "lower it"),
        (
            {"autopilot": {"is_enabled": True}, "weights": {"publish_every_steps": 2}},
            "autopilot.min_lag",
            "at least 1",
        ),
        (
            {"autopilot": {"is_enabled": True, "min_ess_frac": 0.95}},
            "autopilot.ess_margin_frac",
            "never reached",
        ),
    ],
)
def test_contradiction(sections: dict[str, dict[str, object]], path: str, advice: str) -> None:
    problems = list(staleness_problems(make_config(**sections)))
    assert len(problems) == 1, problems
    assert problems[0].startswith(f"{path}: ") and advice in problems[0]


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"staleness": {"window_groups": 2, "max_version_spread": 1}},
        {"groups": {"close": "quorum", "late": "drop", "quorum_members": 2, "overdue_factor": 4.0}},
        {"replay": REPLAY},
        {"autopilot": {"is_enabled": True, "min_lag": 1}, "weights": {"publish_every_steps": 2}},
    ],
)
def test_no_contradiction(sections: dict[str, dict[str, object]]) -> None:
    assert list(staleness_problems(make_config(**sections))) == []
