"""Learn2Ask: floor and ceiling against what the sample's shares say, Ralph packs, and going on elsewhere."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cod_async.config.schema import EnvironmentConfig
from cod_async.envs import commands
from cod_async.envs.learn2ask import SPEC
from cod_async.envs.learn2ask.oracle import QUESTIONS, question_for
from cod_async.envs.learn2ask.rules import judge_by_rules
from cod_async.lifecycle.packs import plan_pack

MIXTURE = [EnvironmentConfig(name="learn2ask", preset="default")]


def means(answer: dict[str, Any]) -> list[float]:
    return [entry["mean"] for entry in answer["reward_by_position"]]


def test_ceiling_is_exact_on_both_splits() -> None:
    for split in ("train", "held_out"):
        assert means(commands.play("learn2ask", policy="oracle", num_packs=60, split=split)) == [4.0] * 4
    normalized = commands.play(
        "learn2ask", policy="oracle", num_packs=5, options={"is_reward_normalized": True}
    )
    assert means(normalized) == [1.0] * 4


def test_floor_is_what_the_records_say() -> None:
    """The expected reward of the random policy, enumerated over all records and questions."""
    assert SPEC.record_at is not None and SPEC.num_records is not None
    options = SPEC.options("default")
    num = SPEC.num_records(options, "train")
    ask = stop = 0.0
    for row in range(num):
        record = SPEC.record_at(options, "train", 0, row)
        if record["decision"] == "stop":
            stop += 4.0 / num
            continue
        for question in QUESTIONS:
            scores = judge_by_rules(question, record["facts"])
            ask += (1 + 2 * scores.content + scores.format) / len(QUESTIONS) / num
    # num packs of 4 walk through the rows 4 times; 3 standard errors of about 1,000 tasks
    floor = commands.play("learn2ask", policy="random", num_packs=num, seed=3)
    assert sum(means(floor)) / 4 == pytest.approx((ask + stop) / 2, abs=0.15)
    asking = commands.play("learn2ask", policy="always_ask", num_packs=num, seed=3)
    assert sum(means(asking)) / 4 == pytest.approx(ask, abs=0.12)
    assert 0.5 < stop < 1.5 < ask < 2.0


@pytest.mark.parametrize(
    "fact",
    [
        "location: left ear",
        "severity: how bad is it? 8 of 10. Really",
        "note without a field",
        "symptom: " + "very long value with many different words " * 10,
        "\u75c7\u72b6: \u53d1\u70e7",
        "nature: pain: sharp",
    ],
)
def test_oracle_asks_well_for_any_fact(fact: str) -> None:
    scores = judge_by_rules(question_for(fact), [fact, "symptom: other"])
    assert (scores.format, scores.content) == (1.0, 1.0)


@pytest.mark.parametrize("strategy", ["cod", "ralph_sample", "ralph_full"])
def test_packs_of_every_strategy(strategy: Any) -> None:
    plan = plan_pack(MIXTURE, 4, 0, 6, strategy=strategy)
    assert len({record["id"] for record in plan.records}) == (4 if strategy == "cod" else 1)
    environment = SPEC.make(SPEC.options("default"))
    oracle = SPEC.policies["oracle"](0)
    for task in plan.tasks():
        observation = environment.reset(task)
        assert asyncio.run(environment.step(oracle(environment, observation, {}))).raw_reward == 4.0


def test_rewards_are_not_penalized_for_steps() -> None:
    full = commands.play("learn2ask", policy="oracle", num_packs=2, solve_penalty=0.5)
    assert means(full) == [4.0] * 4


def test_continuing_from_every_position_equals_the_uninterrupted_run() -> None:
    plan = plan_pack(MIXTURE, 5, 3, 1)
    responses = [*QUESTIONS[:3], "<stop />", "Please rest."]

    def run(start: int, state: bytes) -> list[Any]:
        environment = SPEC.make(SPEC.options("default"))
        environment.restore(state)
        told = []
        for task in plan.tasks()[start:]:
            first = environment.reset(task)
            result = asyncio.run(environment.step(responses[task.position]))
            told.append((first, result, environment.feedback(), environment.snapshot()))
        return told

    whole = run(0, b"")
    for position in range(1, 5):
        assert run(position, whole[position - 1][3]) == whole[position:]
