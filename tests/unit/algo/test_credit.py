"""Returns, baselines, RED and the credit file against hand-worked values and brute force."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cod_async.algo.advantages import GroupBaseline
from cod_async.algo.credit import (
    MemberRewards,
    SelectedEpisode,
    credit_file,
    credit_group,
    credit_member,
    weigh_selection,
)
from cod_async.algo.red import red_temperature, reweight
from cod_async.algo.returns import lifecycle_returns
from cod_async.config.schema import CreditAssignmentConfig
from cod_async.errors import InputError

MEAN = CreditAssignmentConfig()


def _payload(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "style": "mean",
        "window": None,
        "gamma": None,
        "baseline": "group_mean",
        "std": "none",
        "red": "off",
        "red_level": "batch",
        "parity": False,
        "lifecycles": [
            {
                "pack": 0,
                "lifecycle": i,
                "taskset": 0,
                "task_rewards": rewards,
                "update_rewards": [0.0, -0.1, 0.0],
                "solve_tokens": [10, 11, 12, 13],
                "update_tokens": [20, 21, 22],
            }
            for i, rewards in enumerate([[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
        ],
    }
    return base | changes


def _brute(row: dict[str, Any], kind: str, j: int, payload: dict[str, Any]) -> float:
    tasks, updates = row["task_rewards"], row["update_rewards"]
    if payload["baseline"] == "non_causal":
        return tasks[-1]
    listed = tasks[j:] if kind == "solve" else [updates[j], *tasks[j + 1 :]]
    if payload["style"] == "mean":
        return float(np.mean(listed))
    if payload["style"] == "sliding_window_mean":
        return float(np.mean(listed[: payload["window"]]))
    return float(sum(payload["gamma"] ** i * w for i, w in enumerate(listed)))


def test_worked_example_of_the_paper_reward_to_go() -> None:
    returns = lifecycle_returns((0, 0, 1, 1), (0, -0.1, 0), 4, MEAN)
    assert [returns["solve", j] for j in range(4)] == pytest.approx([0.5, 2 / 3, 1, 1])
    assert [returns["update", j] for j in range(3)] == pytest.approx([0.5, 1.9 / 3, 0.5])


def test_windowed_and_discounted_by_hand() -> None:
    window = CreditAssignmentConfig(style="sliding_window_mean", window=2)
    returns = lifecycle_returns((0, 1, 0, 1), (-1, -1, -1), 4, window)
    assert [returns["solve", j] for j in range(4)] == [0.5, 0.5, 0.5, 1]
    assert [returns["update", j] for j in range(3)] == [0, -0.5, 0]
    discounted = CreditAssignmentConfig(style="discounted", gamma=0.5)
    returns = lifecycle_returns((0, 1, 0, 1), (-1, -1, -1), 4, discounted)
    assert [returns["solve", j] for j in range(4)] == [0.625, 1.25, 0.5, 1]
    assert [returns["update", j] for j in range(3)] == [-0.375, -0.75, -0.5]


def test_returns_close_only_when_no_later_reward_can_change_them() -> None:
    assert lifecycle_returns((0, 1), (0, 0), 4, MEAN) == {}
    assert lifecycle_returns((0, 1), (0, 0), 4, CreditAssignmentConfig(style="discounted", gamma=0.0)) == {}
    window = CreditAssignmentConfig(style="sliding_window_mean", window=2)
    assert set(lifecycle_returns((0, 1, 0), (0, 0, 0), 5, window)) == {
        ("solve", 0),
        ("update", 0),
        ("solve", 1),
        ("update", 1),
    }
    short = lifecycle_returns((0, 1, 0), (0, 0, 0), 5, window)
    whole = lifecycle_returns((0, 1, 0, 1, 1), (0, 0, 0, 0), 5, window)
    assert all(whole[place] == value for place, value in short.items())
    non_causal = CreditAssignmentConfig(style="sliding_window_mean", window=1, baseline="non_causal")
    assert lifecycle_returns((0, 1, 0), (0, 0, 0), 5, non_causal) == {}


@pytest.mark.parametrize(
    ("advantages", "tokens", "temperature", "weighted"),
    [
        ((0.5, -0.5), (100, 110), 10.5359, (0.5243, -0.4768)),
        ((0.5, -0.5), (100, 400), 0.8484, (0.9014, -0.2774)),
        ((0.5, -0.5), (110, 100), None, (0.5, -0.5)),
    ],
)
def test_red_parity_vectors(
    advantages: tuple[float, ...],
    tokens: tuple[int, ...],
    temperature: float | None,
    weighted: tuple[float, ...],
) -> None:
    found = red_temperature(advantages, tokens, parity=True)
    assert found == (None if temperature is None else pytest.approx(temperature, abs=5e-5))
    assert [reweight(a, found) for a in advantages] == pytest.approx(weighted, abs=5e-5)


def test_red_exact_root_of_two_episodes_is_closed_form() -> None:
    # L1 e^{1/2T} = L2 e^{-1/2T}  =>  T = 1 / ln(L2 / L1)
    assert red_temperature((0.5, -0.5), (100, 110)) == pytest.approx(1 / math.log(1.1), rel=1e-12)
    assert red_temperature((0.5, -0.5), (1000, 1001)) == pytest.approx(1 / math.log(1.001), rel=1e-9)
    assert red_temperature((0.5, -0.5), (100, 400)) == 0.8
    assert red_temperature((-0.5, -0.1), (1, 1)) == 0.8
    assert red_temperature((0.0, 0.0), (3, 4)) is None
    assert red_temperature((), ()) is None
    assert red_temperature((0.1, 0.2, -0.3), (10, 10, 10)) is None  # -5.6e-16 by rounding alone


def test_red_takes_advantages_beyond_the_exponential_range() -> None:
    temperature = red_temperature((2000.0, -2001.0), (1, 1))
    assert temperature is not None
    assert 2000 * math.exp(2000 / temperature) == pytest.approx(
        2001 * math.exp(-2001 / temperature), rel=1e-9
    )


_EPISODES = st.lists(
    st.tuples(st.floats(-1, 1, allow_nan=False), st.integers(0, 5000)), min_size=1, max_size=40
)


@given(_EPISODES)
@settings(max_examples=150, deadline=None)
def test_red_balances_or_sits_at_its_floor(episodes: list[tuple[float, int]]) -> None:
    advantages, tokens = [a for a, _ in episodes], [n for _, n in episodes]
    total = math.fsum(n * a for a, n in episodes)
    size = math.fsum(n * abs(a) for a, n in episodes)
    temperature = red_temperature(advantages, tokens)
    if temperature is None:
        assert total >= -1e-11 * size
        return
    balance = math.fsum(n * reweight(a, temperature) for a, n in episodes)
    assert temperature >= 0.8
    assert balance <= 1e-9 * size
    if temperature > 0.8:
        assert balance == pytest.approx(0, abs=1e-9 * size)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"style": "sliding_window_mean", "window": 2},
        {"style": "sliding_window_mean", "window": 9},
        {"style": "discounted", "gamma": 0.7},
        {"style": "discounted", "gamma": 0},
        {"baseline": "leave_one_out"},
        {"baseline": "non_causal"},
        {"std": "group"},
        {"std": "batch"},
        {"baseline": "non_causal", "std": "group"},
        {"baseline": "non_causal", "std": "batch"},
        {"baseline": "leave_one_out", "std": "group"},
    ],
)
def test_credit_file_equals_brute_force(changes: dict[str, Any]) -> None:
    payload = _payload(**changes)
    rows = payload["lifecycles"]
    places = [
        ("solve", 0),
        ("update", 0),
        ("solve", 1),
        ("update", 1),
        ("solve", 2),
        ("update", 2),
        ("solve", 3),
    ]
    returns = {(r["lifecycle"], *p): _brute(r, *p, payload) for r in rows for p in places}
    pool = (
        [r["task_rewards"][-1] for r in rows]
        if payload["baseline"] == "non_causal"
        else list(returns.values())
    )
    answer = credit_file(payload)
    assert [(e["lifecycle"], e["kind"], e["position"]) for e in answer["episodes"]] == list(returns)
    for episode in answer["episodes"]:
        place = (episode["kind"], episode["position"])
        own = returns[(episode["lifecycle"], *place)]
        group = [returns[(r["lifecycle"], *place)] for r in rows]
        others = [returns[(r["lifecycle"], *place)] for r in rows if r["lifecycle"] != episode["lifecycle"]]
        baseline = statistics.fmean(others if payload["baseline"] == "leave_one_out" else group)
        scale = {
            "none": 1.0,
            "group": statistics.stdev(group) + 1e-6,
            "batch": statistics.stdev(pool) + 1e-6,
        }[payload["std"]]
        assert episode["return"] == pytest.approx(own, abs=1e-12)
        assert episode["baseline"] == pytest.approx(baseline, abs=1e-12)
        assert episode["advantage"] == pytest.approx((own - baseline) / scale, abs=1e-9)
        assert episode["weighted_advantage"] == episode["advantage"]
    assert answer["red_temperatures"] == []


@pytest.mark.parametrize("level", ["batch", "pack", "taskset"])
def test_credit_file_red_levels(level: str) -> None:
    payload = _payload(red="bisection", red_level=level)
    payload["lifecycles"] = [
        {
            "pack": f"p{i // 2}",
            "lifecycle": i,
            "taskset": i // 4,
            "task_rewards": [float(i % 2)],
            "update_rewards": [],
            "solve_tokens": [100 if i % 2 else 100 + 20 * i],
            "update_tokens": [],
        }
        for i in range(8)
    ]
    answer = credit_file(payload)
    names = {
        "batch": lambda e: "batch",
        "pack": lambda e: e["pack"],
        "taskset": lambda e: e["lifecycle"] // 4,
    }
    temperatures = {entry["set"]: entry["temperature"] for entry in answer["red_temperatures"]}
    assert (
        list(temperatures)
        == {
            "batch": ["batch"],
            "pack": ["p0", "p1", "p2", "p3"],
            "taskset": [0, 1],
        }[level]
    )
    for name, temperature in temperatures.items():
        members = [e for e in answer["episodes"] if names[level](e) == name]
        tokens = [payload["lifecycles"][e["lifecycle"]]["solve_tokens"][0] for e in members]
        if temperature is None:
            assert [e["weighted_advantage"] for e in members] == [e["advantage"] for e in members]
            continue
        for e in members:
            assert e["weighted_advantage"] == e["advantage"] * math.exp(e["advantage"] / temperature)
        if temperature > 0.8:
            total = sum(n * e["weighted_advantage"] for n, e in zip(tokens, members, strict=True))
            assert total == pytest.approx(0, abs=1e-8)


def test_groups_without_signal_are_named_and_have_advantage_zero() -> None:
    alone = credit_group([MemberRewards(0, (0.3, 0.7), (0.0,))], 2, MEAN)
    assert set(alone.degenerate.values()) == {"singleton"}
    for baseline in ("group_mean", "leave_one_out"):
        for std in ("none", "group"):
            config = CreditAssignmentConfig(baseline=baseline, std=std)
            group = credit_group([MemberRewards(i, (0.1, 0.7), (0.1,)) for i in range(3)], 2, config)
            assert set(group.degenerate.values()) == {"equal_returns"}
            assert all(e.advantage == 0 for e in group.episodes)
            single = credit_group([MemberRewards(0, (0.3, 0.7), (0.0,))], 2, config)
            assert all(e.advantage == 0 for e in single.episodes)


def test_late_member_is_measured_against_the_frozen_baseline() -> None:
    config = CreditAssignmentConfig(baseline="leave_one_out")
    group = credit_group([MemberRewards(0, (0.0,), ()), MemberRewards(1, (1.0,), ())], 1, config)
    (late,) = credit_member(MemberRewards(2, (1.0,), ()), 1, group.baselines, config)
    assert (late.baseline, late.advantage) == (0.5, 0.5)
    assert [e.advantage for e in group.episodes] == [-1, 1]


def test_given_up_member_shrinks_the_groups_it_did_not_reach() -> None:
    config = CreditAssignmentConfig(style="sliding_window_mean", window=1)
    members = [MemberRewards(0, (0.0, 1.0), (0.0,)), MemberRewards(1, (1.0,), (-0.5,))]
    group = credit_group(members, 2, config)
    assert group.baselines["solve", 0].num_members == 2
    assert group.baselines["solve", 1].degenerate == "singleton"
    assert group.baselines["update", 0].total == -0.5


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=16))
@settings(max_examples=100, deadline=None)
def test_group_mean_advantages_sum_to_zero(returns: list[float]) -> None:
    baseline = GroupBaseline.of(returns)
    assert math.fsum(baseline.advantage(r, MEAN) for r in returns) == pytest.approx(0, abs=1e-12)


def test_selection_does_not_depend_on_order() -> None:
    config = CreditAssignmentConfig(red="bisection", std="batch")
    rng = np.random.default_rng(0)
    items = [
        SelectedEpisode(float(a), float(a), int(n), 0, 0, i)
        for i, (a, n) in enumerate(zip(rng.normal(-0.1, 0.3, 50), rng.integers(1, 90, 50), strict=True))
    ]
    forward = weigh_selection(items, config)
    backward = weigh_selection(items[::-1], config)
    assert forward.weighted_advantages == backward.weighted_advantages[::-1]
    assert forward.red_temperatures == backward.red_temperatures


def test_credit_file_lists_every_problem() -> None:
    payload = _payload(style="median", gamma=2, window=0, parity="yes", surprise=1)
    payload["lifecycles"][0]["task_rewards"] = [0.0, math.nan, 1.0, True]
    payload["lifecycles"][1]["update_tokens"] = [1]
    payload["lifecycles"][2]["solve_tokens"][0] = -1
    payload["lifecycles"].append("nonsense")
    with pytest.raises(InputError) as error:
        credit_file(payload)
    text = "\n".join(error.value.problems)
    for part in (
        "surprise: unknown key",
        "style: 'median'",
        "gamma: 2",
        "window: 0",
        "parity: 'yes'",
        "lifecycles[0].task_rewards[1]: nan",
        "lifecycles[0].task_rewards[3]: True",
        "lifecycles[1].update_tokens: has 1 entries; 4 tasks need 3",
        "lifecycles[2].solve_tokens[0]: -1",
        "lifecycles[3]: must be an object",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("payload", "part"),
    [
        ([], "one JSON object"),
        ({}, "lifecycles: must be a list"),
        (_payload(style="discounted"), "needs a factor"),
        (_payload(style="sliding_window_mean"), "needs a window"),
        (_payload(lifecycles=_payload()["lifecycles"] * 2), "was given before"),
    ],
)
def test_credit_file_refuses(payload: Any, part: str) -> None:
    with pytest.raises(InputError, match=part):
        credit_file(payload)


def test_packs_of_different_sizes_are_refused_inside_one_pack() -> None:
    payload = _payload()
    payload["lifecycles"][1] |= {
        "task_rewards": [1.0],
        "update_rewards": [],
        "solve_tokens": [1],
        "update_tokens": [],
    }
    with pytest.raises(InputError, match="pack 0 has 4 tasks"):
        credit_file(payload)


def test_algo_loads_no_torch() -> None:
    code = "import sys, cod_async.algo.credit; sys.exit('torch' in sys.modules or 'zmq' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_numbers_beyond_a_double_are_a_problem_not_a_crash() -> None:
    lifecycle = {
        "pack": 0, "lifecycle": 0, "task_rewards": [10**400], "update_rewards": [],
        "solve_tokens": [10**400], "update_tokens": [],
    }  # fmt: skip
    with pytest.raises(InputError) as caught:
        credit_file({"gamma": 10**400, "lifecycles": [lifecycle]})
    starts = [problem.partition(":")[0] for problem in caught.value.problems]
    assert starts == ["gamma", "lifecycles[0].task_rewards[0]", "lifecycles[0].solve_tokens[0]"]
    assert max(map(len, caught.value.problems)) < 200


def test_equal_returns_are_no_scale_for_a_late_member() -> None:
    for returns in ((0.3, 0.3), (0.3, 0.1 + 0.2)):  # the second pair differs by a rounding
        config = CreditAssignmentConfig(std="group")
        group = credit_group([MemberRewards(i, (r,), ()) for i, r in enumerate(returns)], 1, config)
        (late,) = credit_member(MemberRewards(2, (1.0,), ()), 1, group.baselines, config)
        assert late.advantage == pytest.approx(0.7)
