"""Gymnasium environments as environments: text in, text out, one seed for the hidden world or for the task.

:func:`gymnasium_spec` turns anything with Gymnasium's interface into an :class:`EnvironmentSpec` that a
package can register. Gymnasium itself is not needed here: what counts is ``reset(seed=, options=)`` returning
``(observation, info)``, ``step(action)`` returning ``(observation, reward, terminated, truncated, info)``, an
``action_space`` and ``close``. Its environments are other people's code, so they are played under limits, in
worker processes, unless the configuration says otherwise.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, SupportsFloat

from cod_async.envs.base import Environment, EnvironmentSpec, Policy, StepResult, TaskSpec
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.parsing import extract_between
from cod_async.lifecycle.seeds import hash64

FORMAT = b"\x01"
"""First byte of a snapshot: the version of its format. The rest is what ``get_state`` returned."""
ANSWER = ("<answer>", "</answer>")
_SEED_MASK = (1 << 31) - 1
"""Every Gymnasium environment takes seeds of 31 bits, not every one longer ones."""


class GymnasiumEnv(Protocol):
    """The part of ``gymnasium.Env`` that is used."""

    action_space: Any

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        ...

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Take an action."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


@dataclass(frozen=True)
class _Adapter:
    """What :func:`gymnasium_spec` was told."""

    make: Callable[[Mapping[str, Any], int], GymnasiumEnv]
    system_prompt: str
    max_steps: int
    actions: tuple[str, ...]
    parse: Callable[[str], Any] | None
    render: Callable[[Any, Mapping[str, Any]], str] | None
    is_success: Callable[[float, Mapping[str, Any]], bool]
    reward: Literal["sum", "last"]
    seed_from: Literal["pack", "record"]
    hidden_view: Callable[[GymnasiumEnv], dict[str, Any]] | None
    get_state: Callable[[GymnasiumEnv], bytes] | None
    set_state: Callable[[GymnasiumEnv, bytes], None] | None


class GymnasiumEnvironment(Environment):
    """One lifecycle of a Gymnasium environment; its subclasses are made by :func:`gymnasium_spec`.

    The Gymnasium object is made with the first task, because only then the pack seed is known.
    """

    adapter: ClassVar[_Adapter]

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._env: GymnasiumEnv | None = None
        self._state = b""
        self._seed = 0
        self._first = self._last = ""
        self._total = 0.0
        self._num_steps = 0
        self._outcome = "was not finished"

    @property
    def max_steps(self) -> int:
        """Most responses to a task."""
        return self.adapter.max_steps

    def reset(self, task: TaskSpec) -> str:
        """Start a task: the seed is that of the pack or of the record, by ``seed_from``.

        Raises:
            EnvironmentInputError: ``seed_from`` is ``record`` and the record has no seed.
        """
        adapter = self.adapter
        if self._env is None:
            self._env = adapter.make(self._options, task.pack_seed)
        if self._state and adapter.set_state is not None:
            adapter.set_state(self._env, self._state)
        self._state = b""
        self._seed = (task.pack_seed if adapter.seed_from == "pack" else self._record_seed(task)) & _SEED_MASK
        options = dict(task.record) if adapter.seed_from == "pack" else None
        observation, info = self._env.reset(seed=self._seed, options=options)
        self._total, self._num_steps, self._outcome = 0.0, 0, "was not finished"
        self._first = self._last = self._text(observation, info)
        return self._first

    def _record_seed(self, task: TaskSpec) -> int:
        seed = task.record.get("seed")
        if type(seed) is not int or seed < 0:
            raise EnvironmentInputError(
                f"{self.name}: the record's seed is {seed!r}; it must be an integer >= 0"
            )
        return seed

    def system_prompt(self) -> str:
        """Return the rules."""
        return self.adapter.system_prompt

    async def step(self, response: str) -> StepResult:
        """Take the action that the response names; one that cannot be read is a format error."""
        env = self._playing()
        action = self._action(env, response)
        if action is None:
            self._outcome = "ended with an answer that could not be read"
            return StepResult(observation=self._last, is_done=True, finish="format_error")
        observation, reward, terminated, truncated, info = env.step(action)
        self._num_steps += 1
        self._total = float(reward) + (self._total if self.adapter.reward == "sum" else 0.0)
        self._last = self._text(observation, info)
        is_last = self._num_steps >= self.adapter.max_steps
        if not (terminated or truncated or is_last):
            return StepResult(observation=self._last, is_done=False)
        if terminated and self.adapter.is_success(self._total, info):
            self._outcome = "ended with success"
            return StepResult(observation=self._last, is_done=True, raw_reward=self._total, finish="success")
        self._outcome = "ended without success" if terminated else "ended because its steps were used up"
        return StepResult(
            observation=self._last,
            is_done=True,
            raw_reward=self._total,
            finish="failure" if terminated else "out_of_steps",
        )

    def _action(self, env: GymnasiumEnv, response: str) -> Any:
        """Return the action that a response names, or None."""
        if self.adapter.parse is not None:
            action = self.adapter.parse(response)
        else:
            answer = extract_between(response, *ANSWER)
            action = None if answer is None else self._named(env, answer.strip())
        return action if action is not None and env.action_space.contains(action) else None

    def _named(self, env: GymnasiumEnv, answer: str) -> Any:
        """Return the action of a text: of a list of names, of a Discrete space by number, else the text."""
        space, names = env.action_space, self.adapter.actions
        if names:
            found = [index for index, name in enumerate(names) if name.casefold() == answer.casefold()]
            return int(getattr(space, "start", 0)) + found[0] if found else None
        if hasattr(space, "n"):
            is_number = answer.isascii() and answer.isdecimal() and len(answer) <= 9
            return int(answer) if is_number else None
        return answer

    def _text(self, observation: Any, info: Mapping[str, Any]) -> str:
        if self.adapter.render is not None:
            return self.adapter.render(observation, info)
        if not isinstance(observation, str):
            raise TypeError(
                f"{self.name}: its observation is a {type(observation).__name__}; give gymnasium_spec a "
                "`render` that turns it into text"
            )
        return observation

    def feedback(self) -> str:
        """Return how the task ended, and the last observation, which no message has shown."""
        return f"The task {self._outcome}. Reward: {self._total:g}. Last observation: {self._last}"

    def snapshot(self) -> bytes:
        """Return what ``get_state`` says; nothing before the first task or without that hook."""
        if self.adapter.get_state is None:
            return b""
        if self._env is None:
            return FORMAT + self._state if self._state else b""
        return FORMAT + self.adapter.get_state(self._env)

    def restore(self, state: bytes) -> None:
        """Keep a state for the next reset.

        Raises:
            EnvironmentInputError: not a snapshot of this format.
        """
        if state[:1] != FORMAT:
            raise EnvironmentInputError(f"{self.name}: a snapshot begins with {state[:1]!r}, not {FORMAT!r}")
        self._state = state[1:]

    def hidden(self) -> dict[str, Any]:
        """Return what ``hidden_view`` shows of the world."""
        view = self.adapter.hidden_view
        return {} if view is None else view(self._playing())

    def task_view(self) -> dict[str, Any]:
        """Return the seed and the first observation."""
        return {"seed": self._seed, "observation": self._first}

    async def close(self) -> None:
        """Close the Gymnasium object."""
        if self._env is not None:
            self._env.close()
            self._env = None

    def _playing(self) -> GymnasiumEnv:
        if self._env is None:
            raise EnvironmentInputError(f"{self.name}: reset must start a task first")
        return self._env


def gymnasium_spec(
    name: str,
    make: Callable[[Mapping[str, Any], int], GymnasiumEnv],
    *,
    hidden: str,
    system_prompt: str,
    max_steps: int,
    oracle: Callable[[int], Policy],
    random_policy: Callable[[int], Policy] | None = None,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    default_pack_size: int = 8,
    actions: Sequence[str] = (),
    parse: Callable[[str], Any] | None = None,
    render: Callable[[Any, Mapping[str, Any]], str] | None = None,
    is_success: Callable[[float, Mapping[str, Any]], bool] | None = None,
    reward: Literal["sum", "last"] = "sum",
    is_step_penalized: bool = True,
    seed_from: Literal["pack", "record"] = "pack",
    records: Callable[[Mapping[str, Any], str, int], Iterator[dict[str, Any]]] | None = None,
    hidden_view: Callable[[GymnasiumEnv], dict[str, Any]] | None = None,
    truth_hint: Callable[[Environment, TaskSpec], str] | None = None,
    is_reset_complete: bool = False,
    get_state: Callable[[GymnasiumEnv], bytes] | None = None,
    set_state: Callable[[GymnasiumEnv, bytes], None] | None = None,
) -> EnvironmentSpec:
    """Make an environment of Gymnasium environments.

    Args:
        name: registry name.
        make: (options, pack seed) -> a Gymnasium environment that serves one lifecycle. What tasks of a pack
            share may come from the pack seed here, or from the seed of ``reset``.
        hidden: one sentence on what is hidden.
        system_prompt: the rules, and how to answer; by default an action is read from
            ``<answer>...</answer>``.
        max_steps: most responses to a task.
        oracle: the policy that knows the hidden world.
        random_policy: the floor; None draws from ``actions``.
        presets: preset name -> options; the first is the default. None: one without options.
        default_pack_size: tasks in a pack when the user names none.
        actions: names of the actions of a Discrete space, in order. Without them a Discrete action is its
            number, and that of any other space is the text.
        parse: response -> action or None, in place of reading the answer tags. Whatever it returns must lie
            in the action space, else it is a format error.
        render: (observation, info) -> text; needed unless observations are texts.
        is_success: (reward, info) -> whether a terminated task was solved; None: its reward is above 0.
        reward: of a task: the sum over its steps, or that of the last one. Keep successes at 1.
        is_step_penalized: whether successes lose reward for the steps that they took.
        seed_from: ``pack``: every task of a pack is reset with the pack's seed and gets its record as
            ``options``; ``record``: with the record's own seed.
        records: the data; None: endless records ``{"seed": n}``.
        hidden_view: the world as JSON-able values, for ``cod env show`` and the oracle.
        truth_hint: for the evaluation control ``truth``.
        is_reset_complete: ``reset`` forgets all that was before, so a lifecycle can go on in a fresh object.
        get_state: what survives a reset, as bytes. Without it, and unless ``is_reset_complete``, lifecycles
            cannot be resumed.
        set_state: gives that to another object, right before its reset.

    Raises:
        EnvironmentInputError: arguments that contradict each other.
    """
    problems = []
    if (get_state is None) != (set_state is None):
        problems.append(f"{name}: get_state and set_state need each other")
    if random_policy is None and not actions:
        problems.append(f"{name}: without names of actions a random_policy must be given")
    if max_steps < 1:
        problems.append(f"{name}: max_steps is {max_steps}; it must be at least 1")
    if problems:
        raise EnvironmentInputError(problems)
    adapter = _Adapter(
        make, system_prompt, max_steps, tuple(actions), parse, render,
        is_success or (lambda total, info: total > 0.0), reward, seed_from, hidden_view, get_state, set_state,
    )  # fmt: skip
    members = {
        "name": name,
        "adapter": adapter,
        "is_resumable": is_reset_complete or get_state is not None,
        "is_step_penalized": is_step_penalized,
        "__doc__": f"Lifecycles of {name}.",
    }
    kind: type[GymnasiumEnvironment] = type(f"Gymnasium_{name}", (GymnasiumEnvironment,), members)
    presets = {"default": {}} if presets is None else presets
    return EnvironmentSpec(
        name=name,
        presets=presets,
        hidden=hidden,
        default_preset=next(iter(presets)),
        default_pack_size=default_pack_size,
        make=kind,
        records=records or (lambda options, split, seed: _seeds(name, split, seed)),
        pack_seed_for=lambda options, split, seed: _pack_seed(name, split, seed),
        policies={"random": random_policy or (lambda seed: _drawing(actions, seed)), "oracle": oracle},
        truth_hint=truth_hint,
        needs_limits=True,
    )


def _seeds(name: str, split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Yield endless records; those of the two splits have seeds of their own."""
    for row in itertools.count():
        yield {"seed": _of_split(hash64(f"{name}/{split}/{seed}/{row}"), split)}


def _pack_seed(name: str, split: str, seed: int) -> int:
    return _of_split(hash64(f"{name}/{split}/{seed}"), split)


def _of_split(seed: int, split: str) -> int:
    """Return an even seed for training and an odd one for held-out worlds, so that none belongs to both."""
    return seed & ~1 | (split != "train")


def _drawing(actions: Sequence[str], seed: int) -> Policy:
    generator = random.Random(seed)
    start, end = ANSWER
    return lambda environment, observation, memory: f"{start}{generator.choice(actions)}{end}"
