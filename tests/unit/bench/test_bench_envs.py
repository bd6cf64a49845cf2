"""The environment benchmark's own arithmetic: quantiles, rows, choices, and the comparison of curves."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.envs.__main__ import Times, combinations, play_pack, play_round, quantile, show, summary
from bench.envs.curves import (
    _REFERENCES,
    MAX_PACKS,
    MIN_PACKS,
    Curve,
    Reference,
    compare,
    curve,
    half_unit,
    markdown,
    packs_needed,
)
from cod_async.envs import registry

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([], 0.5, None),
        ([7.0], 0.99, 7.0),
        ([3.0, 1.0, 2.0], 0.5, 2.0),
        ([4.0, 3.0, 2.0, 1.0], 0.5, 2.0),
        (list(range(100)), 0.99, 98),
        (list(range(101)), 0.99, 99),
        ([1.0, 2.0], 1.0, 2.0),
        ([1.0, 2.0], 0.0, 1.0),
    ],
)
def test_a_quantile_is_the_smallest_value_that_enough_do_not_exceed(
    values: list[float], share: float, expected: float | None
) -> None:
    assert quantile(values, share) == expected
    if values and expected is not None:
        assert sum(value <= expected for value in values) >= share * len(values)


def test_packs_are_played_and_counted() -> None:
    times = Times(registry.get("hidden_buttons"), "door", "random")
    asyncio.run(play_pack(times, 3, seed=1))
    asyncio.run(play_pack(times, 3, seed=1))
    assert (times.num_packs, times.num_episodes) == (2, 6)
    assert len(times.setup_ms) == 2 and len(times.reset_ms) == 4
    assert len(times.policy_ms) == 6  # one press a task
    assert len(times.first_step_ms) == 2 and len(times.step_ms) == 4
    assert len(times.rewards) == 6 and set(times.rewards) <= {0.0, 1.0}


def test_a_round_has_at_least_one_pack_and_the_summary_is_of_all_rounds() -> None:
    times = Times(registry.get("grid_navigation"), "eval", "random")
    for _ in range(2):
        play_round(times, 2, seed=3, seconds=0.0)
    assert times.num_packs == 2 and len(times.episodes_per_cpu_s) == 2
    row = summary(times)
    assert row["num_episodes"] == 4 and row["num_steps"] == len(times.policy_ms) == len(times.step_ms) + 2
    assert row["step_ms"]["median"] == pytest.approx(quantile(times.step_ms, 0.5), rel=1e-3)
    setups = [a + b for a, b in zip(times.setup_ms, times.first_step_ms, strict=True)]
    assert row["pack_setup_ms"]["max"] == pytest.approx(max(setups), rel=1e-3)
    assert 0 < row["state_bytes"] < 200
    json.dumps(row, allow_nan=False)


def test_what_misses_its_goal_is_red(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    times = Times(registry.get("hidden_buttons"), "door", "random")
    play_round(times, 2, seed=3, seconds=0.0)
    row: dict[str, Any] = summary(times)
    row["step_ms"]["p99"] = 77.7
    show([row])
    row["step_ms"]["p99"] = 0.777
    show([row])
    shown = capsys.readouterr()
    lines = [line for line in (shown.out + shown.err).splitlines() if "hidden_buttons" in line]
    assert len(lines) == 2
    assert "31m77.7" in lines[0] and "31m0.777" not in lines[1] and "0.777" in lines[1]


def test_all_combinations_or_every_unknown_name() -> None:
    found, problems = combinations(["grid_navigation", "hidden_buttons"], has_all_presets=True)
    assert problems == []
    assert {(one.spec.name, one.preset, one.policy) for one in found} == {
        (name, preset, policy)
        for name in ("grid_navigation", "hidden_buttons")
        for preset in registry.get(name).presets
        for policy in registry.get(name).policies
    }
    some, _ = combinations(["grid_navigation"], has_all_presets=False)
    assert {one.preset for one in some} == {registry.get("grid_navigation").default_preset}
    _, problems = combinations(["nothing", "hidden_buttons", "nowhere"], has_all_presets=False)
    assert len(problems) == 2 and "nothing" in problems[0] and "nowhere" in problems[1]


def test_the_command_refuses_an_unknown_environment_without_a_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.envs", "nothing"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "nothing" in done.stderr and "Traceback" not in done.stderr


def test_packs_for_a_standard_error() -> None:
    assert packs_needed(0.0, 100) == MIN_PACKS
    assert packs_needed(0.03, 100) == 900
    assert packs_needed(0.005, 100) == MIN_PACKS
    assert packs_needed(0.5, 100) == MAX_PACKS


def test_a_curve_is_as_precise_as_promised() -> None:
    found = curve("hidden_buttons", "door", "oracle")
    assert MIN_PACKS <= found.num_packs <= MAX_PACKS and len(found.means) == 4
    assert max(found.standard_errors) <= 0.011  # the pilot's spread is an estimate
    assert found.means[3] == pytest.approx(0.9)  # certain by then, less the penalty of one step of one


def a_curve(means: tuple[float, ...], sem: float, num_packs: int = 100) -> Curve:
    return Curve("e", "p", "q", False, num_packs, means, (sem,) * len(means))


def a_reference(values: str, first: int = 0, last: int | None = None, **fields: Any) -> Reference:
    return Reference("e", "p", "q", "theirs", values, 100, first, last, **fields)


def test_numbers_agree_within_two_errors_of_the_difference_and_the_rounding() -> None:
    # Equal numbers of tasks, so an error of .01 each: 2 * sqrt(2) * .01 = .0283, and .005 or .0005.
    ours = a_curve((0.5, 0.6), 0.01)
    for values, agrees in (
        ("0.53", True),
        ("0.54", False),
        ("0.528", True),
        ("0.529", False),
        (".472", True),
    ):
        (found,) = compare(a_reference(values, 0, 0), ours)
        assert (found.agrees, found.positions, found.mean) == (agrees, "0", 0.5), values
    (found,) = compare(a_reference("0.9", is_same=False), ours)
    assert found.agrees is None and found.positions == "all" and found.mean == 0.55
    by_position = compare(a_reference("0.50 0.90"), ours)
    assert [(one.positions, one.agrees) for one in by_position] == [("0", True), ("1", False)]
    (found,) = compare(a_reference("0.6", 1), ours)
    assert found.positions == "from 1" and found.mean == 0.6


def test_half_a_unit_of_the_last_decimal() -> None:
    assert [half_unit(text) for text in (".96", ".960", "0.5", ".000")] == pytest.approx(
        [0.005, 0.0005, 0.05, 0.0005]
    )


def test_references_name_what_exists() -> None:
    for one in _REFERENCES:
        spec = registry.get(one.environment)
        assert one.preset in spec.presets and one.policy in spec.policies
        assert all(0.0 <= float(text) <= 1.0 for text in one.values.split())


def test_the_page_tells_curves_and_agreement() -> None:
    ours = a_curve((0.5, 1.0), 0.01)
    comparisons = compare(a_reference("0.5", 0, 0), ours) + compare(a_reference("0.9", 0, 0), ours)
    comparisons += compare(a_reference("0.9", 0, 0, is_same=False), ours)
    page = markdown([ours], comparisons, "python -m bench.envs.curves")
    assert "| e | p | `q` | .500 1.000 | .010 | 100 |" in page
    assert "**1 of 2 agree.**" in page and page.count("**no**") == 1


def test_the_committed_baseline_is_of_every_environment() -> None:
    """The numbers are whatever they were; the file must be about what exists and name its goals."""
    document = json.loads((ROOT / "bench/baselines/amd-epyc/envs.json").read_text())
    assert document["goals"] == {"step_ms_p99": 5.0, "pack_setup_ms_median": 1500.0}
    assert {row["environment"] for row in document["results"]} <= set(registry.names())
    assert len(document["results"]) >= 30
