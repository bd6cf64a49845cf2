"""Scripted policies against the published anchors, and the commands that play them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from cod_async.config.schema import EnvironmentConfig
from cod_async.envs import commands
from cod_async.envs.frozen_lake_obscure import SPEC
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.packs import plan_pack

NAME = "frozen_lake_obscure"


def means(answer: dict[str, Any]) -> list[float]:
    return [entry["mean"] for entry in answer["reward_by_position"]]


@pytest.mark.parametrize(("preset", "success", "shortest"), [("easy", 0.16, 2.86), ("hard", 0.10, 3.98)])
def test_floor_and_ceiling(preset: str, success: float, shortest: float) -> None:
    raw = commands.play(NAME, preset, 4, "random", 500, 42, solve_penalty=0.0)
    assert sum(means(raw)) / 4 == pytest.approx(success, abs=0.025)  # 2,000 tasks: 3 standard errors
    oracle = commands.play(NAME, preset, 4, "oracle", 250, 42)
    max_steps = SPEC.options(preset)["agent_max_steps"]
    assert sum(means(oracle)) / 4 == pytest.approx(1 - 0.1 * shortest / max_steps, abs=0.005)
    assert all(
        mean == 1.0 for mean in means(commands.play(NAME, preset, 2, "oracle", 50, 1, solve_penalty=0.0))
    )


@pytest.mark.parametrize(
    ("preset", "first", "success"), [("easy", 0.567, (0.55, 0.67)), ("hard", 0.574, (0.53, 0.66))]
)
def test_exact_planning_without_a_hint(preset: str, first: float, success: tuple[float, float]) -> None:
    answer = commands.play(NAME, preset, 1, "explorer", 400, 42)["reward_by_position"][0]
    assert answer["mean"] == pytest.approx(first, abs=3.5 * answer["sem"])
    raw = commands.play(NAME, preset, 1, "explorer", 400, 42, solve_penalty=0.0)["reward_by_position"][0]
    assert success[0] < raw["mean"] < success[1]


@pytest.mark.parametrize("preset", ["easy", "hard"])
def test_explorer_connects_the_dots(preset: str) -> None:
    curve = means(commands.play(NAME, preset, 6, "explorer", 100, 7))
    assert curve[0] < 0.7 and curve[1] > curve[0] + 0.15 and min(curve[4:]) > 0.94


def test_explorer_carries_nothing_when_there_is_nothing_to_carry() -> None:
    """With a fresh mapping per task, what it carries is wrong; it must go on without an exception."""
    curve = means(commands.play(NAME, "easy", 3, "explorer", 60, 7, options={"mapping_mode": "per_task"}))
    assert curve[2] < 0.7


def test_play_depends_on_its_seed_alone() -> None:
    first, second = (commands.play(NAME, "easy", 3, "random", 40, 5) for _ in range(2))
    assert first["reward_by_position"] == second["reward_by_position"]
    other = commands.play(NAME, "easy", 3, "random", 40, 6)
    assert other["reward_by_position"] != first["reward_by_position"]


def test_play_answers_what_the_command_prints() -> None:
    seen: list[tuple[int, int]] = []
    answer = commands.play(NAME, num_packs=3, on_progress=lambda done, total: seen.append((done, total)))
    assert set(answer) == {"reward_by_position", "episodes_per_s"} and answer["episodes_per_s"] > 0
    assert len(answer["reward_by_position"]) == 4  # the default pack size
    assert all(set(entry) == {"mean", "sem"} for entry in answer["reward_by_position"])
    assert seen == [(1, 3), (2, 3), (3, 3)]
    json.dumps(answer, allow_nan=False)
    assert commands.play(NAME, num_packs=1)["reward_by_position"][0]["sem"] == 0.0


def test_mean_and_standard_error() -> None:
    answer = commands.play(NAME, "easy", 1, "random", 50, 3, solve_penalty=0.0)["reward_by_position"][0]
    p = answer["mean"]  # of zeros and ones
    assert answer["sem"] == pytest.approx((p * (1 - p) / 49) ** 0.5, rel=1e-12)


def test_show_gives_the_vectors() -> None:
    answer = commands.show(NAME, "easy", 1, {"seed": 1, "size": 5, "p": 0.65}, 2, 4)
    assert answer == {
        "environment": NAME,
        "hidden": {"mapping": ["Left", "Down", "Up", "Right"]},
        "task": {"map": ["FHFSF", "FHGFF", "HFFHF", "FFFFF", "HFFHH"], "start": [0, 3], "goal": [1, 2]},
    }
    json.dumps(answer)
    assert commands.show(NAME)["task"]["map"]  # everything has a default


def test_list_names_presets_and_positions() -> None:
    listed = {entry["name"]: entry for entry in commands.list_environments()}
    assert listed[NAME] == {"name": NAME, "presets": ["easy", "hard"], "positions": 4, "hidden": SPEC.hidden}
    json.dumps(list(listed.values()))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: commands.show("lake"), "no environment 'lake'.*frozen_lake_obscure"),
        (lambda: commands.show(NAME, "medium"), "no preset 'medium'; presets are easy, hard"),
        (lambda: commands.show(NAME, pack_seed=-1), "pack seed is -1"),
        (lambda: commands.show(NAME, pack_seed=1 << 64), "pack seed is 18446744073709551616"),
        (lambda: commands.show(NAME, position=4), "positions 0 to 3"),
        (lambda: commands.show(NAME, pack_size=0), "pack size is 0"),
        (lambda: commands.show(NAME, record={"seed": 0}), "size is None"),
        (lambda: commands.show(NAME, options={"size": 3}), "unknown option size"),
        (lambda: commands.play(NAME, policy="best"), "policies are explorer, oracle, random"),
        (lambda: commands.play(NAME, num_packs=0), "number of packs is 0"),
        (lambda: commands.play(NAME, seed=-1), "seed is -1"),
        (lambda: commands.play(NAME, options={"size_min": 9}), "size_min is 9 but size_max is 5"),
        (lambda: commands.play(NAME, split="test"), "no split 'test'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_input_names_what_exists(call: Any, words: str) -> None:
    with pytest.raises(EnvironmentInputError, match=words):
        call()


def test_continuing_from_every_position_equals_the_uninterrupted_run() -> None:
    """State between tasks is what snapshot() returns: a fresh environment, restored, plays on identically."""
    plan = plan_pack([EnvironmentConfig(name=NAME, preset="easy")], 5, 3, 1)
    options = SPEC.options("easy")

    def run(start: int, state: bytes) -> list[tuple[list[str], bytes]]:
        environment = SPEC.make(options)
        environment.restore(state)
        played = []
        for task in plan.tasks()[start:]:
            texts = [environment.reset(task), environment.system_prompt()]
            for code in (1, 2, 3, 4, 1, 2, 3, 4):
                result = asyncio.run(environment.step(f"<answer>Direction {code}</answer>"))
                texts.append(result.observation)
                if result.is_done:
                    break
            played.append(([*texts, environment.feedback()], environment.snapshot()))
        return played

    whole = run(0, b"")
    for position in range(1, 5):
        assert run(position, whole[position - 1][1]) == whole[position:]
