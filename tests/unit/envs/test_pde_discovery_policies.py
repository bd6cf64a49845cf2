"""PDE Discovery: floor, ceiling and honest learners, and packs that go on from a snapshot."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from cod_async.config.schema import EnvironmentConfig
from cod_async.envs import commands
from cod_async.envs.hidden_buttons import SPEC as OTHER
from cod_async.envs.pde_discovery import SPEC
from cod_async.envs.pde_discovery.basis import TERMS, evaluate, features
from cod_async.envs.pde_discovery.dataset import BENCHMARK_SEED
from cod_async.envs.pde_discovery.oracle import most_likely_support, run_regression
from cod_async.lifecycle.packs import plan_pack

NAME = "pde_discovery"


def means(policy: str, num_packs: int, preset: str = "train", size: int = 4, seed: int = 42) -> list[float]:
    split = "held_out" if preset == "eval" else "train"
    answer = commands.play(NAME, preset, size, policy, num_packs, seed, split=split)  # type: ignore[arg-type]
    return [entry["mean"] for entry in answer["reward_by_position"]]


def test_floor() -> None:
    assert 0.15 < float(np.mean(means("random", 8))) < 0.38


def test_ceiling() -> None:
    curve = means("oracle", 6)
    assert curve[0] > 0.93 and min(curve[1:]) > 0.97


def test_explorer_connects_the_dots() -> None:
    """An independent implementation of such a selection reached .82 .96 .985 .995 (25 to 40 packs)."""
    curve = means("explorer", 10)
    assert 0.6 < curve[0] < curve[2] and min(curve[2:]) > 0.93


def test_the_instrument_alone_is_not_enough_for_three_terms() -> None:
    """An independent implementation: .33 .43 .38 .38 ... by the instrument, .66 .80 .93 .97 ... by noise."""
    trusting = means("tool_top", 5, "eval", 8, BENCHMARK_SEED)
    careful = means("explorer", 5, "eval", 8, BENCHMARK_SEED)
    assert float(np.mean(trusting)) < 0.7 < 0.85 < float(np.mean(careful[2:]))


def test_selection_by_evidence_finds_the_terms() -> None:
    generator = np.random.default_rng(3)
    for equation in ({"u": 0.61, "u**4": -1.35}, {"u**5": -1.88, "sin(u)": 1.35}, {"tanh(u)": -1.1}):
        u = generator.uniform(0.1, 2.6, 40)
        y = evaluate(equation, u) + generator.normal(0, 0.0005, 40)
        chosen = most_likely_support(u + generator.normal(0, 0.002, 40), y, 3)
        assert tuple(TERMS[k] for k in chosen) == tuple(equation)
    assert features(np.zeros(2)).shape == (2, 15)


def test_policies_refuse_another_game() -> None:
    other = OTHER.make(OTHER.options(OTHER.default_preset))
    for name, make in SPEC.policies.items():
        with pytest.raises(TypeError, match="plays pde_discovery"):
            make(0)(other, name, {})


@pytest.mark.parametrize("preset", ["train", "eval"])
def test_continuing_from_every_position_equals_the_uninterrupted_run(preset: str) -> None:
    """A restored environment computes its solutions again and measures the same numbers."""
    size = 4
    plan = plan_pack([EnvironmentConfig(name=NAME, preset=preset)], size, 3, 1)
    options = SPEC.options(preset)
    begin = SPEC.make(options).snapshot()

    def run(start: int, state: bytes) -> list[tuple[list[str], Any, bytes]]:
        environment = SPEC.make(options)
        environment.restore(state)
        act, memory = SPEC.policies["explorer"](0), dict[str, Any]()
        played = []
        for task in plan.tasks()[start:]:
            texts = [environment.reset(task), environment.system_prompt()]
            while True:
                # A summary first, so that earlier commits show.
                summary = "<answer><summarize_pack_evidence/></answer>"
                response = summary if len(texts) == 2 else act(environment, texts[-1], memory)
                result = asyncio.run(environment.step(response))
                texts.append(result.observation)
                if result.is_done:
                    break
            played.append(([*texts, environment.feedback()], result, environment.snapshot()))
        return played

    whole = run(0, begin)
    assert all(result.finish in ("success", "failure") for _, result, _ in whole)
    for position in range(1, size):
        assert run(position, whole[position - 1][2]) == whole[position:]


def test_show_gives_world_and_task() -> None:
    answer = commands.show(NAME, "train", 1234, {"seed": 5}, 3, 4)
    assert answer["hidden"]["equation"] == {"u**5": -1.07, "u**2/(1+u**2)": 1.88}
    assert answer["task"] == {"trajectory": 3}
    assert commands.show(NAME, "eval", 7, {"seed": 5}, 0, 8)["hidden"]["equation"]
    assert "merged_all" not in run_regression()
