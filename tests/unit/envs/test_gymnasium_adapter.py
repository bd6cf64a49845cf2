"""Gymnasium environments as environments: a small one of the same interface, and some of the real package."""

from __future__ import annotations

import asyncio
import importlib
import random
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from third_party import put_on_path, write_package

from cod_async.envs import commands, registry
from cod_async.envs.base import Environment, EnvironmentSpec, Policy, TaskSpec
from cod_async.envs.gymnasium_adapter import gymnasium_spec
from cod_async.envs.worker import WorkerPool, make_environment
from cod_async.errors import EnvironmentInputError

SOURCE = '''
import random
import sys

from cod_async.envs.gymnasium_adapter import gymnasium_spec


class Words:
    """The interface of ``gymnasium.spaces.Text``, with its default characters."""

    max_length = 8

    def contains(self, x):
        return isinstance(x, str) and 1 <= len(x) <= self.max_length and x.isascii() and x.isalnum()


class Lock:
    """A door opens to a word; a wrong word tells how many letters are right. Counts its knocks for ever."""

    action_space = Words()

    def __init__(self, options, pack_seed):
        self.length, self.num_knocks, self.closed = options["length"], 0, False
        self.word = "".join(random.Random(pack_seed).choices("ab", k=self.length))

    def reset(self, *, seed=None, options=None):
        self.seed, self.left = seed, 3
        return f"A door, {options['color'] if options else 'gray'}. {self.num_knocks} knocks so far.", {}

    def step(self, action):
        self.num_knocks += 1
        self.left -= 1
        right = sum(a == b for a, b in zip(action, self.word))
        is_open = action == self.word
        return f"{right} letters", float(is_open), is_open, self.left == 0, {"right": right}

    def close(self):
        self.closed = True


def oracle(seed):
    return lambda environment, observation, memory: f"<answer>{environment.hidden()['word']}</answer>"


def guess(seed):
    generator = random.Random(seed)
    word = lambda: "".join(generator.choices("ab", k=2))
    return lambda environment, observation, memory: f"<answer>{word()}</answer>"


def records(options, split, seed):
    generator = random.Random(f"{split}/{seed}")
    while True:
        yield {"color": generator.choice(["red", "blue"])}


def restore(lock, state):
    lock.num_knocks = int(state)


ARGUMENTS = {
    "hidden": "the word of all doors",
    "system_prompt": "Say the word in <answer> tags.",
    "max_steps": 4,
    "oracle": oracle,
    "random_policy": guess,
    "presets": {"short": {"length": 2}, "long": {"length": 5}},
    "records": records,
    "hidden_view": lambda lock: {"word": lock.word},
}
SPEC = gymnasium_spec(
    "locks",
    Lock,
    get_state=lambda lock: str(lock.num_knocks).encode(),
    set_state=restore,
    **ARGUMENTS,
)
'''


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module above, registered."""
    write_package(tmp_path / "site", "locks", "locks_of_somebody", SOURCE)
    put_on_path(tmp_path / "site", monkeypatch)
    yield importlib.import_module("locks_of_somebody")
    registry.forget()
    monkeypatch.delitem(sys.modules, "locks_of_somebody")


def task(seed: int = 5, **record: Any) -> TaskSpec:
    return TaskSpec("locks", "short", {}, record or {"color": "red"}, seed, 0, 3)


def answer(word: str) -> str:
    return f"Hm. <answer> {word} </answer>"


def results(environment: Environment, *responses: str) -> list[tuple[str, bool, float, str]]:
    async def play() -> list[tuple[str, bool, float, str]]:
        found = [await environment.step(response) for response in responses]
        return [(r.observation, r.is_done, r.raw_reward, r.finish if r.is_done else "") for r in found]

    return asyncio.run(play())


def test_a_task_from_reset_to_every_end(locks: Any) -> None:
    environment = locks.SPEC.make({"length": 2})
    assert environment.reset(task()) == "A door, red. 0 knocks so far."
    assert environment.system_prompt().startswith("Say the word") and environment.max_steps == 4
    word = environment.hidden()["word"]
    wrong = word.replace("a", "x").replace("b", "a")
    assert results(environment, answer(wrong), answer(word)) == [
        ("0 letters", False, 0.0, ""),
        ("2 letters", True, 1.0, "success"),
    ]
    assert environment.feedback() == "The task ended with success. Reward: 1. Last observation: 2 letters"
    environment.reset(task(color="blue"))
    assert environment.task_view() == {"seed": 5, "observation": "A door, blue. 2 knocks so far."}
    assert environment.hidden()["word"] == word  # of the pack, not of the task
    assert results(environment, *[answer(wrong)] * 3)[-1] == ("0 letters", True, 0.0, "out_of_steps")
    assert "its steps were used up" in environment.feedback()
    for rubbish in (
        "ab",
        "<answer>ab</answer><answer>ab</answer>",
        answer("a-b"),
        answer(""),
        answer("a" * 9),
    ):
        environment.reset(task())
        ((_, *end),) = results(environment, rubbish)
        assert end == [True, 0.0, "format_error"]
        assert "could not be read" in environment.feedback()


def test_state_goes_to_another_object_right_before_its_reset(locks: Any) -> None:
    one, two = (locks.SPEC.make({"length": 2}) for _ in range(2))
    assert one.snapshot() == b"" and one.is_resumable
    one.reset(task())
    results(one, answer("xx"), answer("xx"))
    assert one.snapshot() == b"\x012"
    two.restore(one.snapshot())
    assert two.snapshot() == b"\x012"
    assert two.reset(task()) == one.reset(task()) == "A door, red. 2 knocks so far."
    with pytest.raises(EnvironmentInputError, match="snapshot begins with b'7'"):
        two.restore(b"7")


def test_what_cannot_be_carried_is_said(locks: Any) -> None:
    plain = gymnasium_spec("locks", locks.Lock, **locks.ARGUMENTS).make({"length": 2})
    assert not plain.is_resumable and plain.snapshot() == b""
    complete = gymnasium_spec("locks", locks.Lock, is_reset_complete=True, **locks.ARGUMENTS)
    assert complete.make({"length": 2}).is_resumable


def test_worlds_of_the_splits_are_apart(locks: Any) -> None:
    spec: EnvironmentSpec = locks.SPEC
    seeds = {split: {spec.pack_seed_for({}, split, n) for n in range(200)} for split in ("train", "held_out")}
    assert all(len(found) == 200 for found in seeds.values())
    for split, parity in (("train", 0), ("held_out", 1)):
        assert {seed & 0x7FFFFFFF & 1 for seed in seeds[split]} == {parity}


def test_it_is_listed_shown_and_played(locks: Any) -> None:
    assert commands.show("locks", "long", 4, {"color": "red"})["hidden"]["word"] in {
        "".join(word) for word in product("ab", repeat=5)
    }
    ceiling = commands.play("locks", "short", 3, "oracle", 10, solve_penalty=0.0)["reward_by_position"]
    assert [entry["mean"] for entry in ceiling] == [1.0] * 3
    floor = commands.play("locks", "short", 3, "random", 400, solve_penalty=0.0)["reward_by_position"]
    for entry in floor:  # three guesses of four words
        assert abs(entry["mean"] - (1 - 0.75**3)) < 4 * 0.5 / 20


def test_it_is_played_under_limits(locks: Any) -> None:
    async def play() -> None:
        pool = WorkerPool()
        try:
            assert registry.get("locks").needs_limits
            environment = await make_environment(task(), (), pool)
            opening = await environment.start(task(), b"\x017")
            assert opening.observation == "A door, red. 7 knocks so far." and len(pool.pids()) == 1
            assert (await environment.step("nothing")).finish == "format_error"
            assert (await environment.finish(None, False)).snapshot == b"\x017"
        finally:
            await pool.aclose()

    asyncio.run(play())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"get_state": lambda env: b""}, "need each other"),
        ({"random_policy": None}, "a random_policy must be given"),
        ({"max_steps": 0}, "max_steps is 0"),
    ],
)
def test_contradictions_are_refused(locks: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(EnvironmentInputError, match=words):
        gymnasium_spec("locks", locks.Lock, **{**locks.ARGUMENTS, **changes})


# ------------------------------------------------------------------------------------------ the real package


def frozen_lake(**changes: Any) -> EnvironmentSpec:
    gymnasium = pytest.importorskip("gymnasium")

    def oracle(seed: int) -> Policy:
        moves = iter(["down", "down", "right", "right", "down", "right"])
        return lambda environment, observation, memory: f"<answer>{next(moves)}</answer>"

    arguments: dict[str, Any] = {
        "hidden": "nothing",
        "system_prompt": "Reach the goal.",
        "max_steps": 20,
        "actions": ("left", "down", "right", "up"),
        "oracle": oracle,
        "render": lambda observation, info: f"You are on square {observation}.",
        "seed_from": "record",
        "is_reset_complete": True,
    }
    return gymnasium_spec(
        "gym_lake",
        lambda options, pack_seed: gymnasium.make("FrozenLake-v1", is_slippery=False),
        **arguments | changes,
    )


def lake_task(record: dict[str, Any]) -> TaskSpec:
    return TaskSpec("gym_lake", "default", {}, record, 1, 0, 1)


def test_frozen_lake_of_gymnasium() -> None:
    spec = frozen_lake()
    environment = spec.make({})
    record = next(spec.records({}, "train", 0))
    assert environment.reset(lake_task(record)) == "You are on square 0."
    moves = ["down", "down", "right", "right", "down", "right"]
    path = results(environment, *map(answer, moves))
    assert [observation.split()[-1] for observation, *_ in path] == ["4.", "8.", "9.", "10.", "14.", "15."]
    assert path[-1][1:] == (True, 1.0, "success")
    environment.reset(lake_task(record))
    assert results(environment, answer("Right"), answer("DOWN"))[-1][1:] == (True, 0.0, "failure")  # a hole
    environment.reset(lake_task(record))
    assert results(environment, *[answer("left")] * 20)[-1][1:] == (True, 0.0, "out_of_steps")
    environment.reset(lake_task(record))
    assert results(environment, answer("north"))[-1][3] == "format_error"
    asyncio.run(environment.close())


def test_discrete_actions_by_number_and_observations_that_are_no_text() -> None:
    spec = frozen_lake(actions=(), random_policy=lambda seed: lambda e, o, m: answer("0"))
    environment = spec.make({})
    environment.reset(lake_task({"seed": 3}))
    assert results(environment, answer("1"))[0][0] == "You are on square 4."
    for wrong in ("4", "-1", "1.0", "٣", "9" * 30):
        environment.reset(lake_task({"seed": 3}))
        assert results(environment, answer(wrong))[0][3] == "format_error"
    with pytest.raises(TypeError, match="give gymnasium_spec a `render`"):
        frozen_lake(render=None).make({}).reset(lake_task({"seed": 3}))
    with pytest.raises(EnvironmentInputError, match="the record's seed is None"):
        environment.reset(lake_task({}))


def test_text_spaces_of_gymnasium() -> None:
    gymnasium = pytest.importorskip("gymnasium")
    assert issubclass(gymnasium.spaces.Text, gymnasium.spaces.Space)

    class Echo(gymnasium.Env[str, str]):  # type: ignore[misc, name-defined]
        observation_space = gymnasium.spaces.Text(20)
        action_space = gymnasium.spaces.Text(5)

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
            super().reset(seed=seed)
            self.secret = str(self.np_random.integers(10))
            return "say", {}

        def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
            return "heard", float(action == self.secret), True, False, {}

    spec = gymnasium_spec(
        "echo",
        lambda options, pack_seed: Echo(),
        hidden="a digit",
        system_prompt="?",
        max_steps=1,
        oracle=lambda seed: lambda environment, observation, memory: answer(environment.hidden()["digit"]),
        random_policy=lambda seed: lambda e, o, m: answer(str(random.Random(seed).randrange(10))),
        hidden_view=lambda env: {"digit": env.secret},  # type: ignore[attr-defined]
    )
    environment = spec.make({})
    digits = []
    for seed in (8, 8, 10):
        environment.reset(TaskSpec("echo", "default", {}, {}, seed, 0, 1))
        digits.append(environment.hidden()["digit"])
        assert results(environment, spec.policies["oracle"](0)(environment, "", {})) == [
            ("heard", True, 1.0, "success")
        ]
    assert digits[0] == digits[1]  # the seed of the pack is that of the world
    environment.reset(TaskSpec("echo", "default", {}, {}, 8, 0, 1))
    assert results(environment, answer("a b"))[0][3] == "format_error"
