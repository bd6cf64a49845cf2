"""Real environments under a mix of valid, mutated and hostile answers, and what must hold after each of them.

A *target* is an environment with a preset. It is played lifecycle by lifecycle; everything in a lifecycle
(options, pack, policies, responses) is drawn from one generator named by (seed, target, lifecycle), so each
can be played again alone. After every response the result is checked, after every task the feedback, the
hidden world and the snapshot, and after every lifecycle a clean one is played, which must go as it went
before anything hostile was said.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import math
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, get_args

from cod_async.config.schema import EnvironmentConfig
from cod_async.envs import registry
from cod_async.envs.base import Environment, StepResult, TaskSpec, canonical_json
from cod_async.lifecycle.packs import PackPlan, plan_pack
from cod_async.lifecycle.segment import Finish

from .answers import hostile_answer
from .mutations import mutate

REWARDS: dict[str, tuple[float, float]] = {"learn2ask": (0.0, 4.0), "optimal_control": (-0.1, 1.0)}
"""Lowest and highest raw reward, as documented; all other environments: 0 to 1."""
MAX_OBSERVATION_CHARS = 16_000
MAX_SNAPSHOT_BYTES = 32_000
PACK_SIZE = 4
NUM_SLOW_PACKS = 4
"""Packs of environments whose worlds are slow to make; they take turns."""
SLOW_WORLDS = frozenset({"pde_discovery"})
MOODS = ((0.1, 0.6), (0.4, 0.6), (0.7, 0.6), (1.0, 0.6), (1.0, 0.0))
"""Share of responses that are not valid, and of mutations among these. Only the last mood goes deep where a
response that cannot be read ends a task: it has none."""
CLEAN_EVERY = 50
"""Lifecycles between two clean ones."""


class BrokenRuleError(Exception):
    """Something that must hold does not; the message says what."""


class RunawayError(BaseException):
    """One call took more than :data:`RUNAWAY_S`. No ``Exception``, so that nothing under test catches it."""


RUNAWAY_S = 20.0
"""CPU seconds after which a call is cut off."""


@contextmanager
def watched(is_on: bool) -> Iterator[None]:
    """Cut a call off after :data:`RUNAWAY_S` of CPU time; main thread only."""
    if not is_on:
        yield
        return
    signal.setitimer(signal.ITIMER_PROF, RUNAWAY_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)


def raise_runaway(number: int, frame: FrameType | None) -> None:
    """Handle SIGPROF."""
    raise RunawayError(f"a call took more than {RUNAWAY_S:g} s of CPU time")


def check(is_right: bool, problem: str) -> None:
    """Raise if something that must hold does not."""
    if not is_right:
        raise BrokenRuleError(problem)


@dataclass
class Tally:
    """What a target has seen so far.

    Attributes:
        num_valid, num_mutated, num_hostile: responses by origin.
        num_lifecycles, num_tasks: played.
        num_policy_errors: scripted policies that had no answer after hostile moves; another one was asked.
        finishes: how often each task ended how.
        step_ms: CPU milliseconds of every call under test.
        slowest: the longest call: milliseconds and the response's first characters.
        longest: characters of the longest observation or feedback, and bytes of the largest snapshot.
        digest: of all responses and results, to compare two runs.
    """

    num_valid: int = 0
    num_mutated: int = 0
    num_hostile: int = 0
    num_lifecycles: int = 0
    num_tasks: int = 0
    num_policy_errors: int = 0
    finishes: dict[str, int] = field(default_factory=dict)
    step_ms: list[float] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    longest: dict[str, int] = field(default_factory=lambda: {"observation": 0, "feedback": 0, "snapshot": 0})
    digest: Any = field(default_factory=hashlib.sha256)

    @property
    def num_bad(self) -> int:
        """Responses that no scripted policy gave."""
        return self.num_mutated + self.num_hostile

    def timed(self, began: float, response: str) -> float:
        """Note the CPU time since ``began`` and return it in seconds."""
        took_ms = (time.thread_time() - began) * 1e3
        self.step_ms.append(took_ms)
        if took_ms > self.slowest[0]:
            self.slowest = (took_ms, ascii(response[:200]))
        return took_ms / 1e3

    def saw(self, what: str, size: int) -> None:
        """Note a size."""
        self.longest[what] = max(self.longest[what], size)


@dataclass(frozen=True)
class Failure:
    """What broke, and all that is needed to see it again.

    Attributes:
        problem: what broke.
        target: which target.
        plan: the pack, as JSON-able values; empty for parsers.
        responses: all responses of the lifecycle by task; the last one of the last task broke it.
        seed: seed and lifecycle, for the record.
    """

    problem: str
    target: str
    plan: dict[str, Any]
    responses: tuple[tuple[str, ...], ...]
    seed: str


def check_result(environment: str, result: StepResult) -> None:
    """Check that a result is one: types, lengths, finite numbers, a reward within the documented range."""
    check(isinstance(result, StepResult), f"step returned {type(result).__name__}")
    check_text("observation", result.observation)
    check(result.finish in get_args(Finish), f"finish is {result.finish!r}")
    low, high = REWARDS.get(environment, (0.0, 1.0))
    reward = result.raw_reward
    check(type(reward) in (int, float) and low <= reward <= high, f"the reward is {reward!r}")
    check(result.is_done or reward == 0.0, f"a running task has the reward {reward!r}")
    for name, value in result.metrics.items():
        check(type(value) in (int, float) and math.isfinite(value), f"metric {name} is {value!r}")


def check_text(what: str, text: str) -> None:
    """Check that a text for the policy can be sent and is not too long."""
    check(isinstance(text, str), f"{what} is no text")
    check(len(text) <= MAX_OBSERVATION_CHARS, f"{what} has {len(text)} characters")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BrokenRuleError(f"{what} is not valid text: {error}") from None


class Session:
    """One lifecycle of one environment under checks.

    Args:
        plan: its pack.
        tally: where to count.
        slow_s: CPU seconds beyond which a call is a finding; None: times are only recorded.
    """

    def __init__(self, plan: PackPlan, tally: Tally, slow_s: float | None) -> None:
        self._spec = registry.get(plan.environment)
        self._plan = plan
        self._options = self._spec.options(plan.preset, plan.options)
        self._tally = tally
        self._slow_s = slow_s
        self.environment = self._fresh()
        self.responses: list[list[str]] = []
        self._hidden = ""

    def _fresh(self) -> Environment:
        return self._spec.make(self._options)

    def reset(self, task: TaskSpec) -> str:
        """Start a task."""
        observation = self.environment.reset(task)
        check_text("first observation", observation)
        check_text("rules", self.environment.system_prompt())
        self._hidden = canonical_json([self.environment.hidden(), self.environment.task_view()])
        self.responses.append([])
        return observation

    async def step(self, response: str, is_cut: bool = False) -> StepResult:
        """Give a response and check what comes of it."""
        self.responses[-1].append(response)
        self.environment.is_response_cut = is_cut
        began = time.thread_time()  # that of the process only advances by ticks while a timer runs
        with watched(self._slow_s is not None):
            result = await self.environment.step(response)
        took_s = self._tally.timed(began, response)
        check_result(self._plan.environment, result)
        check(self._slow_s is None or took_s <= self._slow_s, f"the step took {took_s:.1f} s of CPU time")
        check(len(self.responses[-1]) <= self.environment.max_steps, "the task goes on beyond max_steps")
        self._tally.saw("observation", len(result.observation))
        self._tally.digest.update(response.encode("utf-8", "surrogatepass"))
        told = f"{result.observation}{result.raw_reward!r}{result.finish}"
        self._tally.digest.update(told.encode())
        return result

    def end_task(self, result: StepResult, messages: list[tuple[str, str]]) -> str:
        """Check what is left of a task, go on with a restored copy, and return the feedback."""
        self._tally.num_tasks += 1
        self._tally.finishes[result.finish] = self._tally.finishes.get(result.finish, 0) + 1
        feedback = self.environment.feedback()
        check_text("feedback", feedback)
        self._tally.saw("feedback", len(feedback))
        trajectory = self.environment.trajectory(messages)
        check(trajectory is None or isinstance(trajectory, str), "trajectory is no text")
        world = canonical_json([self.environment.hidden(), self.environment.task_view()])
        check(world == self._hidden, "the responses changed the hidden world or the task")
        state = self.environment.snapshot()
        check(len(state) <= MAX_SNAPSHOT_BYTES, f"a snapshot has {len(state)} bytes")
        self._tally.saw("snapshot", len(state))
        other = self._fresh()
        if state:
            other.restore(state)
        check(other.snapshot() == state, "a restored snapshot is another one")
        self.environment = other
        return feedback


def _response(
    rng: random.Random, environment: str, valid: Callable[[], str], mood: tuple[float, float], tally: Tally
) -> str:
    """Draw a response: what a scripted policy says, a mutation of it, or a hostile answer.

    Args:
        rng: draws.
        environment: whose hostile answers.
        valid: what a scripted policy says.
        mood: share of responses that are not valid, and share of mutations among these.
        tally: where to count.
    """
    if rng.random() >= mood[0]:
        tally.num_valid += 1
        return valid()
    hostile = None if rng.random() < mood[1] else hostile_answer(rng, environment)
    if hostile is None:
        tally.num_mutated += 1
        return mutate(rng, valid())[0]
    tally.num_hostile += 1
    return mutate(rng, hostile)[0] if rng.random() < mood[1] / 4 else hostile


class EnvironmentTarget:
    """An environment with a preset.

    Args:
        environment, preset: registry names.
        seed: of everything.
        slow_s: see :class:`Session`.
    """

    def __init__(self, environment: str, preset: str, seed: int, slow_s: float | None) -> None:
        self.name = f"{environment}/{preset}"
        self._spec = registry.get(environment)
        self._preset = preset
        self._seed = seed
        self._slow_s = slow_s
        self.tally = Tally()
        self._clean: list[float] | None = None

    def plan(self, lifecycle: int, options: dict[str, Any]) -> PackPlan:
        """Return the pack of a lifecycle."""
        group = lifecycle % NUM_SLOW_PACKS if self._spec.name in SLOW_WORLDS else lifecycle
        mixture = [EnvironmentConfig(name=self._spec.name, preset=self._preset, options=options)]
        return plan_pack(mixture, PACK_SIZE, self._seed, group, "train" if group % 3 else "held_out")

    def run(self, num_bad: int) -> Failure | None:
        """Play until ``num_bad`` mutated or hostile responses are done; return what broke, if anything."""
        while self.tally.num_bad < num_bad:
            if self.tally.num_lifecycles % CLEAN_EVERY == 0 and (failure := self._check_clean()) is not None:
                return failure
            failure = self._one_lifecycle(self.tally.num_lifecycles, num_bad)
            if failure is not None:
                return failure
            self.tally.num_lifecycles += 1
        return self._check_clean()

    def _one_lifecycle(self, lifecycle: int, num_bad: int) -> Failure | None:
        rng = random.Random(f"{self._seed}/{self.name}/{lifecycle}")
        has_parity = "parity" in self._spec.presets[self._preset]
        options: dict[str, Any] = {"parity": True} if has_parity and rng.random() < 0.25 else {}
        plan = self.plan(lifecycle, options)
        session = Session(plan, self.tally, self._slow_s)
        try:
            asyncio.run(self._play(session, plan, rng, num_bad))
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        except RunawayError as error:
            problem = str(error)
        else:
            return None
        responses = tuple(map(tuple, session.responses))
        return Failure(
            problem, self.name, plan_fields(plan), responses, f"{self._seed}, lifecycle {lifecycle}"
        )

    async def _play(self, session: Session, plan: PackPlan, rng: random.Random, num_bad: int) -> None:
        names = sorted(self._spec.policies)
        memory: dict[str, Any] = {}
        policy = self._spec.policies[rng.choice(names)](rng.randrange(1 << 32))
        fallback = self._spec.policies["random"](rng.randrange(1 << 32))
        for task in plan.tasks():
            if self.tally.num_bad >= num_bad:
                return
            observation, mood = session.reset(task), rng.choice(MOODS)
            messages = [("user", observation)]

            def valid(said: str) -> str:
                for act, remembered in ((policy, memory), (fallback, {})):
                    try:
                        return act(session.environment, said, remembered)
                    except Exception:  # a planner may find no way on after hostile moves: its own affair
                        self.tally.num_policy_errors += 1
                        memory.clear()
                return "<answer>0,0</answer>"

            while True:
                response = _response(
                    rng, self._spec.name, functools.partial(valid, observation), mood, self.tally
                )
                result = await session.step(response, is_cut=rng.random() < 0.1)
                messages += [("assistant", response), ("user", result.observation)]
                if result.is_done:
                    break
                observation = result.observation
            memory["feedback"] = session.end_task(result, messages[:-1])

    def _check_clean(self) -> Failure | None:
        """Play a lifecycle with the oracle alone; it must earn what it earned at first."""
        plan = self.plan(0, {})
        session = Session(plan, Tally(), None)
        try:
            rewards = asyncio.run(self._play_clean(session, plan))
            if self._clean is None:
                self._clean = rewards
            check(rewards == self._clean, f"a clean lifecycle earned {rewards}, at first {self._clean}")
        except Exception as error:
            problem = f"a clean lifecycle failed: {type(error).__name__}: {error}"
            responses = tuple(map(tuple, session.responses))
            return Failure(problem, self.name, plan_fields(plan), responses, f"{self._seed}, clean")
        return None

    async def _play_clean(self, session: Session, plan: PackPlan) -> list[float]:
        memory: dict[str, Any] = {}
        policy, rewards = self._spec.policies["oracle"](self._seed), []
        for task in plan.tasks():
            observation = session.reset(task)
            while True:
                result = await session.step(policy(session.environment, observation, memory))
                if result.is_done:
                    break
                observation = result.observation
            rewards.append(result.raw_reward)
            memory["feedback"] = session.end_task(result, [])
        return rewards


def plan_fields(plan: PackPlan) -> dict[str, Any]:
    """Return a plan as JSON-able values."""
    return {
        "environment": plan.environment,
        "preset": plan.preset,
        "options": plan.options,
        "records": list(plan.records),
        "pack_seed": plan.pack_seed,
    }


def replay(plan: dict[str, Any], responses: tuple[tuple[str, ...], ...], slow_s: float | None) -> str:
    """Give recorded responses to a fresh environment; return what breaks, or nothing."""
    pack = PackPlan(**{**plan, "records": tuple(plan["records"])})
    session = Session(pack, Tally(), slow_s)

    async def play() -> None:
        for task, said in zip(pack.tasks(), responses, strict=False):
            session.reset(task)
            for response in said:
                result = await session.step(response)
                if result.is_done:
                    session.end_task(result, [("user", ""), ("assistant", response)])
                    break

    try:
        asyncio.run(play())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    except RunawayError as error:
        return str(error)
    return ""
