"""Scripted policies of Alchemy-Random, and whole packs played by them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from cod_async.config.schema import EnvironmentConfig
from cod_async.envs import commands, registry
from cod_async.envs.alchemy_random import SPEC
from cod_async.envs.alchemy_random.oracle import oracle_policy
from cod_async.envs.base import TaskSpec
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.hint import prompts_for
from cod_async.lifecycle.packs import plan_pack

NAME = "alchemy_random"


def means(answer: dict[str, Any]) -> list[float]:
    return [entry["mean"] for entry in answer["reward_by_position"]]


@pytest.mark.parametrize(("preset", "success"), [("easy", 0.38), ("hard", 0.26)])
def test_floor(preset: str, success: float) -> None:
    """Measured over 1,000 packs and more; 1,200 tasks here: 4 standard errors."""
    raw = commands.play(NAME, preset, 4, "random", 300, 42, solve_penalty=0.0)
    assert sum(means(raw)) / 4 == pytest.approx(success, abs=0.06)


def test_ceiling() -> None:
    """The oracle always succeeds, in the published mean number of rounds on easy (1.75)."""
    for preset in ("easy", "hard"):
        raw = commands.play(NAME, preset, 8, "oracle", 60, 42, solve_penalty=0.0)
        assert means(raw) == [1.0] * 8
    easy = commands.play(NAME, "easy", 4, "oracle", 400, 42)
    rounds = 1 * 0.54 + 2 * 0.22 + 3 * 0.19 + 4 * 0.05
    assert sum(means(easy)) / 4 == pytest.approx(1 - 0.1 * rounds / 8, abs=0.003)


def test_oracle_fails_on_short_supplies_of_the_reference() -> None:
    raw = commands.play(NAME, "hard", 8, "oracle", 150, 42, options={"parity": True}, solve_penalty=0.0)
    assert 0.93 < sum(means(raw)) / 8 < 0.995


@pytest.mark.parametrize(
    ("preset", "first", "last"), [("easy", (0.7, 0.9), (0.99, 1.0)), ("hard", (0.25, 0.5), (0.7, 0.95))]
)
def test_explorer_connects_the_dots(
    preset: str, first: tuple[float, float], last: tuple[float, float]
) -> None:
    curve = means(commands.play(NAME, preset, 8, "explorer", 120, 7, solve_penalty=0.0))
    assert first[0] < curve[0] < first[1]
    assert last[0] <= sum(curve[6:]) / 2 <= last[1]
    assert curve[1] > curve[0] + 0.05


def test_explorer_with_distinct_targets_still_connects_the_dots() -> None:
    options = {"has_distinct_targets": True}
    curve = means(commands.play(NAME, "easy", 4, "explorer", 150, 7, options=options))
    assert curve[0] < 0.8 and curve[3] > 0.93


def test_ralph_packs_repeat_one_target() -> None:
    plan = plan_pack([EnvironmentConfig(name=NAME, preset="easy")], 4, 7, 1, strategy="ralph_sample")
    environment = SPEC.make(SPEC.options("easy"))
    seen = set()
    for task in plan.tasks():
        environment.reset(task)
        seen.add(environment.task_view()["target"])
    assert len(seen) == 1
    curve = means(
        commands.play(NAME, "easy", 4, "explorer", 80, 7, strategy="ralph_sample", solve_penalty=0.0)
    )
    assert curve[0] < 0.95 and curve[2] == curve[3] == 1.0


def test_play_depends_on_its_seed_alone() -> None:
    for policy in ("random", "explorer"):
        first, second = (commands.play(NAME, "hard", 3, policy, 20, 7) for _ in range(2))
        assert first["reward_by_position"] == second["reward_by_position"]
        assert (
            commands.play(NAME, "hard", 3, policy, 20, 42)["reward_by_position"]
            != first["reward_by_position"]
        )


def test_show_gives_the_vector() -> None:
    answer = commands.show(NAME, "easy", 0, {"seed": 919213}, 1, 4)
    assert answer == {
        "environment": NAME,
        "hidden": {
            "tiers": [["zjxf", "htq", "znsp", "isx"], ["iojiq", "zmw"], ["bxxc"], ["suqp"]],
            "recipes": [
                ["htq", "zjxf", "iojiq"],
                ["htq", "htq", "zmw"],
                ["iojiq", "zmw", "bxxc"],
                ["bxxc", "bxxc", "suqp"],
            ],
        },
        "task": {"target": "suqp"},
    }
    json.dumps(answer)
    assert commands.show(NAME, "hard")["task"]["target"]


def test_list_names_presets_and_positions() -> None:
    listed = {entry["name"]: entry for entry in commands.list_environments()}
    assert listed[NAME] == {"name": NAME, "presets": ["easy", "hard"], "positions": 4, "hidden": SPEC.hidden}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: commands.show(NAME, "medium"), "no preset 'medium'; presets are easy, hard"),
        (lambda: commands.show(NAME, record={"seed": "0"}), "seed is '0'"),
        (lambda: commands.show(NAME, options={"rounds": 3}), "unknown option rounds"),
        (
            lambda: commands.show(NAME, options={"has_distinct_targets": True}, pack_size=5),
            "at most 4 elements",
        ),
        (lambda: commands.play(NAME, policy="best"), "policies are explorer, oracle, random"),
        (lambda: commands.play(NAME, options={"num_base_min": 9}), "num_base_min is 9 but num_base_max is 4"),
    ],
)
def test_wrong_input_names_what_exists(call: Any, words: str) -> None:
    with pytest.raises(EnvironmentInputError, match=words):
        call()


def test_policies_refuse_other_games() -> None:
    lake = registry.get("frozen_lake_obscure")
    environment = lake.make(lake.options("easy"))
    with pytest.raises(TypeError, match="plays alchemy_random, not FrozenLakeObscure"):
        oracle_policy(0)(environment, "", {})


def test_truth_hint_tells_every_recipe() -> None:
    environment = SPEC.make(SPEC.options("easy"))
    task = TaskSpec(NAME, "easy", {}, {"seed": 0}, 0, 2, 4)
    assert SPEC.truth_hint is not None
    hint = SPEC.truth_hint(environment, task)
    assert hint.startswith(prompts_for("full").label)
    assert hint.splitlines()[1:] == [
        "- htq + zjxf = iojiq",
        "- htq + htq = zmw",
        "- iojiq + zmw = bxxc",
        "- bxxc + bxxc = suqp",
    ]


def test_continuing_from_every_position_equals_the_uninterrupted_run() -> None:
    """Nothing but the pack's seed lies between two tasks: a fresh environment plays on identically."""
    plan = plan_pack([EnvironmentConfig(name=NAME, preset="hard")], 5, 7, 1)
    options = SPEC.options("hard")

    def run(start: int, state: bytes) -> list[tuple[list[str], bytes]]:
        environment = SPEC.make(options)
        environment.restore(state)
        played = []
        for task in plan.tasks()[start:]:
            act = SPEC.policies["random"](task.position)
            texts = [environment.reset(task), environment.system_prompt()]
            is_done = False
            while not is_done:
                result = asyncio.run(environment.step(act(environment, texts[-1], {})))
                texts.append(result.observation)
                is_done = result.is_done
            played.append(([*texts, environment.feedback()], environment.snapshot()))
        return played

    whole = run(0, b"")
    for position in range(1, 5):
        assert run(position, whole[position - 1][1]) == whole[position:]
