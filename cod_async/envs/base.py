"""The interface an environment author learns in five minutes.

An environment is a hidden world plus tasks in it. One :class:`Environment` object serves one lifecycle:
``reset`` starts the task at one position, ``step`` takes the policy's text, ``feedback`` tells the update
episode what came of it. State that outlives a task lives in the object and travels with every sealed segment
(``snapshot`` and ``restore``); nothing may live in module globals. Environments are pure: they load neither
torch nor zmq, never see tokens, and never evaluate the policy's text.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import msgspec

from cod_async.errors import EnvironmentInputError, InfrastructureError, InputError
from cod_async.lifecycle.segment import Finish

if TYPE_CHECKING:
    from cod_async.lifecycle.hint import HintPrompts

PromptStyle = Literal["full", "terse"]
"""``full``: English prompts for instruction-tuned models. ``terse``: a few words, for the tiny model."""


class TaskSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One task of a pack, exactly as the coordinator leased it.

    Attributes:
        environment, preset: registry name and preset.
        options: preset overrides given in the config, as JSON-able values.
        record: one line of the environment's data set.
        pack_seed: seed of the hidden world, equal for every task and every lifecycle of the pack (0 ..
            2^64-1).
        position: task index in the pack, 0-based. Every task of a Ralph pack is the same task and has the
            same position, so an environment must not take position 0 for the start of a lifecycle: a fresh
            object is the start.
        pack_size: number of tasks in the pack.
    """

    environment: str
    preset: str
    options: dict[str, Any]
    record: dict[str, Any]
    pack_seed: int
    position: int
    pack_size: int


class StepResult(msgspec.Struct, frozen=True):
    """What one policy response led to.

    Attributes:
        observation: the next user message (also set on the last step; the updater may want it).
        is_done: whether the episode is over.
        raw_reward: reward before penalties; meaningful when ``is_done``.
        finish: why the episode ended; meaningful when ``is_done``.
        metrics: finite numbers to add to the segment's metrics.
    """

    observation: str
    is_done: bool
    raw_reward: float = 0.0
    finish: Finish = "failure"
    metrics: dict[str, float] = {}


class Opening(msgspec.Struct, frozen=True):
    """How a task begins.

    Attributes:
        observation: the first user message.
        system_prompt: the rules of the task, without hints and without length requests.
        max_steps: most policy responses in its solve episode.
    """

    observation: str
    system_prompt: str
    max_steps: int


class Closing(msgspec.Struct, frozen=True):
    """What is left of a finished task.

    Attributes:
        trajectory: the environment's own text of the episode for the updater; None: the generic one, or not
            asked for.
        feedback: the sentence for the update episode; empty if it was not asked for.
        snapshot: the state that survives until the next task.
    """

    trajectory: str | None
    feedback: str
    snapshot: bytes


class Environment(ABC):
    """One lifecycle's view of a hidden world. See the module text; an example is ``envs/hidden_buttons``."""

    name: ClassVar[str]
    prompt_style: ClassVar[PromptStyle] = "full"
    is_resumable: ClassVar[bool] = True
    is_step_penalized: ClassVar[bool] = True
    """Whether successes lose ``lifecycle.solve_penalty * T / T_max``; False: the raw reward is trained on."""
    is_response_cut: bool = False
    """Set by the rollout before each :meth:`step`: whether the response was cut by its token limit."""

    @abstractmethod
    def reset(self, task: TaskSpec) -> str:
        """Start a task and return the first user message.

        Raises:
            EnvironmentInputError: the record, preset or options are wrong, with the field named.
        """

    @abstractmethod
    def system_prompt(self) -> str:
        """Return the rules of the current task, without hints and without length requests."""

    @abstractmethod
    async def step(self, response: str) -> StepResult:
        """Apply the policy's text; a text that does not parse is a ``format_error``, never an exception."""

    @abstractmethod
    def feedback(self) -> str:
        """Return the sentence on the finished episode that the update episode is shown."""

    @property
    @abstractmethod
    def max_steps(self) -> int:
        """Most policy responses in one solve episode of the current task."""

    def trajectory(self, messages: list[tuple[str, str]]) -> str | None:
        """Return the environment's own trajectory text for the updater, or None for the generic one.

        Args:
            messages: alternating ``("user", text)`` and ``("assistant", text)`` of the finished episode.
        """
        return None

    def update_prompts(self) -> HintPrompts | None:
        """Return prompts for update episodes, or None for those of :attr:`prompt_style`.

        Asked of a fresh object too (an update may be played by another actor than its task), so the answer
        depends on the options alone.
        """
        return None

    def snapshot(self) -> bytes:
        """Return the state that must survive between two tasks of the lifecycle."""
        return b""

    def restore(self, state: bytes) -> None:  # noqa: B027 - stateless environments need none
        """Take back what :meth:`snapshot` returned; called before ``reset`` of the next task."""

    @abstractmethod
    def hidden(self) -> dict[str, Any]:
        """Return the hidden world of the current task as JSON-able values (``cod env show``, oracles)."""

    @abstractmethod
    def task_view(self) -> dict[str, Any]:
        """Return the visible facts of the current task as JSON-able values (for ``cod env show``)."""

    # What a rollout calls besides :meth:`step`. The defaults are made of the methods above; override one only
    # if setting up, scoring or closing a task has to wait for something (a simulator, a network).

    async def start(self, task: TaskSpec, state: bytes) -> Opening:
        """Take back the state of the task before, if there is any, and start a task."""
        if state:
            self.restore(state)
        observation = self.reset(task)
        return Opening(observation, self.system_prompt(), self.max_steps)

    async def finish(self, messages: list[tuple[str, str]] | None, has_feedback: bool) -> Closing:
        """End a task, also one that the context length ended before it was done.

        Args:
            messages: of the episode, as for :meth:`trajectory`; None if nobody will read a trajectory.
            has_feedback: whether the feedback is wanted.
        """
        trajectory = None if messages is None else self.trajectory(messages)
        feedback = self.feedback() if has_feedback else ""
        return Closing(trajectory, feedback, self.snapshot())

    async def close(self) -> None:  # noqa: B027 - most environments hold nothing
        """Release what the object holds (processes, files, connections); nothing is called after it."""


class Playable(Protocol):
    """What a rollout needs of an environment: an :class:`Environment`, or one in ``envs/worker``."""

    is_response_cut: bool

    @property
    def name(self) -> str:
        """See :attr:`Environment.name`."""

    @property
    def prompt_style(self) -> PromptStyle:
        """See :attr:`Environment.prompt_style`."""

    @property
    def is_resumable(self) -> bool:
        """See :attr:`Environment.is_resumable`."""

    @property
    def is_step_penalized(self) -> bool:
        """See :attr:`Environment.is_step_penalized`."""

    def update_prompts(self) -> HintPrompts | None:
        """See :meth:`Environment.update_prompts`."""

    def snapshot(self) -> bytes:
        """Return the state after the newest finished task, or of the fresh object."""

    async def start(self, task: TaskSpec, state: bytes) -> Opening:
        """See :meth:`Environment.start`."""

    async def step(self, response: str) -> StepResult:
        """See :meth:`Environment.step`."""

    async def finish(self, messages: list[tuple[str, str]] | None, has_feedback: bool) -> Closing:
        """See :meth:`Environment.finish`."""

    async def close(self) -> None:
        """See :meth:`Environment.close`."""


@contextmanager
def environment_errors(name: str) -> Iterator[None]:
    """Turn anything an environment raises into an infrastructure error; wrong input stays wrong input.

    ``SystemExit`` counts as well: an environment that calls ``sys.exit`` must not end the actor.
    """
    try:
        yield
    except (InputError, InfrastructureError):
        raise
    except (Exception, SystemExit) as error:
        raise InfrastructureError(f"environment {name} failed: {type(error).__name__}: {error}") from error


Policy = Callable[[Environment, str, Any], str]
"""A scripted policy: (environment, last observation, its own memory across the pack) -> response text."""


class EnvironmentSpec(msgspec.Struct, frozen=True):
    """How an environment registers itself (entry point group ``cod_async.environments``).

    Attributes:
        name: registry name.
        presets: preset name -> options with their values; options in a config override these.
        hidden: one sentence on what is hidden.
        default_preset: used when the user names none.
        default_pack_size: tasks in a pack when the user names none.
        make: (options) -> environment. Raises EnvironmentInputError on unknown or contradictory options.
        records: (options, split, seed) -> endless iterator of data records; ``split`` is ``train`` or
            ``held_out``.
        pack_seed_for: (options, split, seed) -> a pack seed whose hidden world belongs to the split.
        policies: scripted policies by name; ``random`` and ``oracle`` are required.
        record_at: (options, split, seed, row) -> row ``row`` >= 0 of ``records``, in constant time. For
            environments whose data set has an order that packs should follow (row numbers past its end start
            over); None: packs draw from ``records`` with a seed of their own.
        num_records: (options, split) -> rows of the data set before it starts over; None: endless. A pack
            needs as many different ones as it has tasks.
        truth_hint: (fresh environment, task) -> the hint, label included, that tells the task's hidden world
            in plain words; shown by the evaluation control ``truth`` (use of a hint as opposed to its
            discovery). None: no such control.
        has_held_out_worlds: (options) -> whether held-out packs only have worlds that training never meets;
            None: never, held-out packs are merely other packs.
        needs_limits: whether its code is played in worker processes, under time and memory limits, unless the
            configuration says otherwise (``isolation``). None: True for environments of other packages, False
            for those of this one.
        needs_network: (options) -> whether steps ask something outside (a judge); such an environment is not
            played to plan a run. None: never.
        bootstrap_module: module that makes a tiny starting model for this environment, with
            ``vocabulary(options)``, ``bootstrap_documents(options, seed, num, pack_size=)`` and
            ``skills(options)``; empty: there is none, and ``cod bootstrap`` makes random weights.
    """

    name: str
    presets: Mapping[str, Mapping[str, Any]]
    hidden: str
    default_preset: str
    default_pack_size: int
    make: Callable[[Mapping[str, Any]], Environment]
    records: Callable[[Mapping[str, Any], str, int], Iterator[dict[str, Any]]]
    pack_seed_for: Callable[[Mapping[str, Any], str, int], int]
    policies: Mapping[str, Callable[[int], Policy]]
    record_at: Callable[[Mapping[str, Any], str, int, int], dict[str, Any]] | None = None
    num_records: Callable[[Mapping[str, Any], str], int] | None = None
    truth_hint: Callable[[Environment, TaskSpec], str] | None = None
    has_held_out_worlds: Callable[[Mapping[str, Any]], bool] | None = None
    needs_network: Callable[[Mapping[str, Any]], bool] | None = None
    needs_limits: bool | None = None
    bootstrap_module: str = ""

    def options(self, preset: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Merge a preset with overrides.

        Raises:
            EnvironmentInputError: unknown preset or unknown option, naming those that exist.
        """
        if preset not in self.presets:
            known = ", ".join(sorted(self.presets))
            raise EnvironmentInputError(f"environment {self.name}: no preset {preset!r}; presets are {known}")
        merged = dict(self.presets[preset])
        unknown = sorted(set(overrides or {}) - set(merged))
        if unknown:
            raise EnvironmentInputError(
                f"environment {self.name}: unknown option {', '.join(unknown)}; "
                f"options are {', '.join(sorted(merged))}"
            )
        merged.update(overrides or {})
        return merged


def canonical_json(value: Any) -> str:
    """Serialise records and options the same way everywhere (sorted keys, no spaces)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
