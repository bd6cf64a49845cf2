"""The two kinds of episodes: solve a task over several turns, and rewrite the hint in one response.

Token ids go in and come out; turn k+1 of an episode is turn k's ids, the sampled ids, and the ids of the
template's delta, so an episode is one row with several action spans and nothing that was sampled is ever
tokenised again. What a tiny context cannot hold is handled in the open: a conversation that outgrows it ends
with ``context_overflow``, a long trajectory is shortened in its middle, a hint that leaves no room gives way
to the placeholder, each with a metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from cod_async.config.schema import LifecycleConfig
from cod_async.engines.base import Completion, Engine, SamplingParams
from cod_async.envs.base import Environment, StepResult, TaskSpec
from cod_async.errors import EngineError, InfrastructureError, InputError
from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.hint import HintPrompts
from cod_async.lifecycle.rendering import Renderer
from cod_async.lifecycle.seeds import derived_seed
from cod_async.lifecycle.segment import (
    Finish,
    LifecycleState,
    PendingUpdate,
    Row,
    VersionSpan,
    num_episodes,
)

ShownHint = Callable[[int, str], str]
"""(position, carried hint) -> the hint that the solver is shown instead; the carried one stays as it is."""


@dataclass(frozen=True)
class LifecycleSpec:
    """One lifecycle to play: who it is, and its tasks.

    Attributes:
        run, group, member, lease_epoch, actor: identity, copied into every segment.
        tasks: the pack, one task per position (all of one environment, preset and pack seed).
        sampling_seed: the seed of every turn is derived from this, the ordinal and the turn (0 .. 2^63-1).
    """

    run: str
    group: int
    member: int
    lease_epoch: int
    actor: str
    tasks: tuple[TaskSpec, ...]
    sampling_seed: int


@dataclass(frozen=True)
class Player:
    """What all episodes of one lifecycle share."""

    spec: LifecycleSpec
    engine: Engine
    environment: Environment
    renderer: Renderer
    config: LifecycleConfig
    prompts: HintPrompts
    update_prompts: HintPrompts
    temperature: float
    top_p: float
    max_context_tokens: int
    shown_hint: ShownHint | None

    def params(self, max_tokens: int, num_row_tokens: int, ordinal: int, turn: int) -> SamplingParams:
        """Return sampling parameters that leave the completion inside the context."""
        return SamplingParams(
            max_tokens=min(max_tokens, self.max_context_tokens - num_row_tokens),
            stop_ids=self.renderer.stop_ids,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=derived_seed(self.spec.sampling_seed, ordinal, turn),
        )

    async def generate(self, ids: Sequence[int], params: SamplingParams, session: str) -> Completion:
        """Generate; whatever the engine fails with becomes an infrastructure error."""
        try:
            completion = await self.engine.generate(ids, params, session=session)
        except EngineError as error:
            raise InfrastructureError(f"engine failed in session {session}: {error}") from error
        num_tokens = len(completion.token_ids)
        num_versioned = sum(span.num_tokens for span in completion.versions)
        if num_tokens == 0 or num_tokens != len(completion.logprobs) or num_tokens != num_versioned:
            raise InfrastructureError(
                f"engine answered session {session} with {num_tokens} tokens, "
                f"{len(completion.logprobs)} log-probs, versions for {num_versioned}"
            )
        return completion


@dataclass
class RowBuilder:
    """A row as it grows; context that no action follows is left off when it is sealed."""

    token_ids: list[int]
    spans: list[tuple[int, int]] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[VersionSpan] = field(default_factory=list)

    def append(self, completion: Completion) -> None:
        """Add sampled tokens."""
        start = len(self.token_ids)
        self.token_ids += completion.token_ids
        if self.spans and self.spans[-1][1] == start:
            self.spans[-1] = (self.spans[-1][0], len(self.token_ids))
        else:
            self.spans.append((start, len(self.token_ids)))
        self.logprobs += completion.logprobs
        for span in completion.versions:
            if self.versions and self.versions[-1].version == span.version:
                span = VersionSpan(span.version, self.versions.pop().num_tokens + span.num_tokens)
            self.versions.append(span)

    def seal(self) -> Row:
        """Return the row, ending with its last action token."""
        return Row(
            token_ids=Array.of(self.token_ids[: self.spans[-1][1]], "<i4"),
            action_spans=tuple(self.spans),
            behavior_logprobs=Array.of(self.logprobs, "<f4"),
            versions=tuple(self.versions),
        )


@dataclass(frozen=True)
class Episode:
    """What an episode came to, before it is sealed."""

    row: Row
    reward: float
    raw_reward: float
    finish: Finish
    state_after: LifecycleState
    metrics: dict[str, float]


@contextmanager
def environment_errors(name: str) -> Iterator[None]:
    """Turn anything an environment raises into an infrastructure error; wrong input stays wrong input."""
    try:
        yield
    except (InputError, InfrastructureError):
        raise
    except Exception as error:
        raise InfrastructureError(f"environment {name} failed: {type(error).__name__}: {error}") from error


def _ramp(length: int, free: int, full: int) -> float:
    """Return how far a length lies on the way from ``free`` to ``full``, in [0, 1]; 0 without a ramp."""
    return min(1.0, max(0.0, (length - free) / (full - free))) if full > free else 0.0


def penalized_reward(
    raw_reward: float,
    response_tokens: Sequence[int],
    max_steps: int,
    config: LifecycleConfig,
) -> float:
    """Return the reward that is trained on: ``max(0, r0 - c (p + T / T_max))`` for r0 > 0, else r0.

    p is the mean over responses of ``clip((n_t - L0) / (L1 - L0), 0, 1)``.

    Args:
        raw_reward: r0, the environment's outcome.
        response_tokens: n_t, generated tokens of each of the episode's T responses.
        max_steps: T_max, most responses the task allows.
        config: c = ``solve_penalty``, L0 = ``solve_length_free_tokens``, L1 = ``solve_length_full_tokens``.

    Source: the paper's penalties on successes (arXiv 2606.20002); failures are never penalised.
    """
    if raw_reward <= 0:
        return raw_reward
    free, full = config.solve_length_free_tokens, config.solve_length_full_tokens
    num_responses = len(response_tokens)
    length = sum(_ramp(length, free, full) for length in response_tokens) / max(1, num_responses)
    steps = num_responses / max(1, max_steps)
    return max(0.0, raw_reward - config.solve_penalty * (length + steps))


def update_reward(is_well_formed: bool, num_tokens: int, config: LifecycleConfig) -> float:
    """Return the reward of an update episode, in [-``hint_penalty``, 0].

    Args:
        is_well_formed: whether a hint was parsed; without one the reward is -c.
        num_tokens: n, generated tokens.
        config: c = ``hint_penalty``; M0, M1 = ``hint_length_free_tokens``, ``hint_length_full_tokens``:
            between them the reward falls from 0 to -c; n < ``hint_min_tokens`` gives -c.

    Source: the paper's format and length reward (arXiv 2606.20002).
    """
    full = config.hint_length_full_tokens
    if not is_well_formed:
        return -config.hint_penalty
    if not full:
        return 0.0
    if num_tokens < config.hint_min_tokens:
        return -config.hint_penalty
    return 0.0 - config.hint_penalty * _ramp(num_tokens, config.hint_length_free_tokens, full)


def _solve_opening(player: Player, system: str, user: str, hint: str) -> tuple[list[int], bool]:
    """Render the first prompt; a hint too long for the context gives way to the placeholder for a failed one.

    Raises:
        InputError: even so no token could be generated.
    """
    limit, notice = player.max_context_tokens, player.config.length_notice_tokens
    ids: list[int] = []
    for is_dropped, shown in enumerate((hint, player.prompts.failed)):
        ids = player.renderer.open(player.prompts.solve_system(system, shown, notice), user)
        if len(ids) < limit:
            return ids, bool(is_dropped)
    raise InputError(
        f"the first prompt of {player.environment.name} has {len(ids)} tokens without any hint and leaves "
        f"no room in max_context_tokens = {limit}; raise model.max_context_tokens"
    )


async def solve(player: Player, state: LifecycleState, ordinal: int, session: str) -> Episode:
    """Play one solve-task episode."""
    environment, config = player.environment, player.config
    position = ordinal // 2
    with environment_errors(environment.name):
        if state.environment_state:
            environment.restore(state.environment_state)
        user = environment.reset(player.spec.tasks[position])
        system, max_steps = environment.system_prompt(), environment.max_steps
    hint = player.shown_hint(position, state.hint) if player.shown_hint else state.hint
    opening, is_hint_dropped = _solve_opening(player, system, user, hint)
    row, messages = RowBuilder(opening), [("user", user)]
    num_cut = 0
    response_tokens: list[int] = []
    env_metrics: dict[str, float] = {}
    result: StepResult | None = None
    while result is None:
        params = player.params(config.max_response_tokens, len(row.token_ids), ordinal, len(response_tokens))
        completion = await player.generate(row.token_ids, params, session)
        row.append(completion)
        response_tokens.append(len(completion.token_ids))
        num_cut += completion.finish == "length"
        response = player.renderer.decode_response(completion.token_ids)
        messages.append(("assistant", response))
        with environment_errors(environment.name):
            environment.is_response_cut = completion.finish == "length"
            step = await environment.step(response)
        env_metrics.update(step.metrics)
        if step.is_done:
            result = step
            break
        if len(response_tokens) >= max_steps:
            raise InfrastructureError(
                f"environment {environment.name} did not end after its {max_steps} steps"
            )
        messages.append(("user", step.observation))
        is_stopped = completion.token_ids[-1] == player.renderer.end_of_turn_id
        row.token_ids += player.renderer.next_turn(step.observation, is_stopped)
        if len(row.token_ids) >= player.max_context_tokens:
            result = StepResult(observation="", is_done=True, raw_reward=0.0, finish="context_overflow")
    reward = result.raw_reward
    if environment.is_step_penalized:
        reward = penalized_reward(reward, response_tokens, max_steps, config)
    metrics = env_metrics | {
        "num_steps": len(response_tokens),
        "num_response_tokens": sum(response_tokens),
        "num_cut_responses": num_cut,
        "is_success": result.finish == "success",
        "is_format_error": result.finish == "format_error",
        "is_context_overflow": result.finish == "context_overflow",
        "is_hint_dropped": is_hint_dropped,
    }
    state_after = _after_solve(player, state, ordinal, system, messages, reward, result.finish)
    return Episode(row.seal(), reward, result.raw_reward, result.finish, state_after, metrics)


def _after_solve(
    player: Player,
    state: LifecycleState,
    ordinal: int,
    system: str,
    messages: list[tuple[str, str]],
    reward: float,
    finish: Finish,
) -> LifecycleState:
    """Return the state after a solve episode, with what the update will need if one follows."""
    environment, prompts = player.environment, player.prompts
    is_last = ordinal + 1 >= num_episodes(len(player.spec.tasks))
    has_update = player.config.carry == "hint" and not is_last
    pending = None
    with environment_errors(environment.name):
        if has_update:
            trajectory = environment.trajectory(messages)
            if trajectory is None:
                trajectory = prompts.trajectory(system, messages)
            is_overflow = finish == "context_overflow"
            feedback = prompts.overflow_feedback if is_overflow else environment.feedback()
            pending = PendingUpdate(trajectory=trajectory, reward=reward, feedback=feedback)
        snapshot = environment.snapshot()
    return LifecycleState(
        next_ordinal=ordinal + 1 if has_update or is_last else ordinal + 2,
        hint=state.hint,
        task_rewards=(*state.task_rewards, reward),
        pending=pending,
        environment_state=snapshot,
    )


@dataclass(frozen=True)
class _UpdateOpening:
    """The update prompt, and what was left out of it to make it fit."""

    token_ids: list[int]
    num_cut_chars: int
    is_hint_dropped: bool


def _update_opening(player: Player, state: LifecycleState, pending: PendingUpdate) -> _UpdateOpening:
    """Render the update prompt so that a hint fits behind it.

    What is too long is shortened in this order: the middle of the trajectory, then the previous hint.

    Raises:
        InputError: the prompt does not fit even so.
    """
    text, limit = pending.trajectory, player.max_context_tokens
    num_tokens = 0
    for is_dropped, hint in enumerate((state.hint, player.prompts.failed)):
        ids = _render_update(player, hint, pending, len(text))
        if len(ids) + player.config.max_hint_tokens <= limit:
            return _UpdateOpening(ids, 0, bool(is_dropped))
        low, high = 0, len(text)  # keeping `low` characters may fit, keeping `high` is known not to
        while high - low > 1:
            middle = (low + high) // 2
            ids = _render_update(player, hint, pending, middle)
            has_room = len(ids) + player.config.max_hint_tokens <= limit
            low, high = (middle, high) if has_room else (low, middle)
        ids = _render_update(player, hint, pending, low)
        if len(ids) < limit:  # at worst with less room for the hint than was asked for
            return _UpdateOpening(ids, len(text) - low, bool(is_dropped))
        num_tokens = len(ids)
    raise InputError(
        f"the update prompt of {player.environment.name} has {num_tokens} tokens without any record "
        f"of the task and leaves no room in max_context_tokens = {limit}; raise model.max_context_tokens"
    )


def _render_update(player: Player, hint: str, pending: PendingUpdate, num_kept: int) -> list[int]:
    """Render the update prompt with ``num_kept`` characters of the trajectory, half from each end."""
    prompts, shown = player.update_prompts, pending.trajectory
    if num_kept < len(shown):
        head = num_kept // 2
        shown = shown[:head] + prompts.cut_marker + shown[len(shown) - (num_kept - head) :]
    notice = player.config.length_notice_tokens
    messages = prompts.update_messages(hint, shown, pending.reward, pending.feedback, notice)
    return player.renderer.open(*messages)


async def update(player: Player, state: LifecycleState, ordinal: int, session: str) -> Episode:
    """Play one update-context episode: one response, from which the next hint is parsed."""
    prompts, pending = player.update_prompts, state.pending
    if pending is None:
        raise InputError(f"ordinal {ordinal} is an update, but the lifecycle's state holds no finished task")
    opening = _update_opening(player, state, pending)
    row = RowBuilder(opening.token_ids)
    params = player.params(player.config.max_hint_tokens, len(opening.token_ids), ordinal, 0)
    completion = await player.generate(opening.token_ids, params, session)
    row.append(completion)
    hint = prompts.parse(player.renderer.decode_response(completion.token_ids))
    reward = update_reward(hint is not None, len(completion.token_ids), player.config)
    carried = prompts.failed if hint is None else hint
    metrics: dict[str, float] = {
        "num_steps": 1,
        "num_response_tokens": len(completion.token_ids),
        "num_cut_responses": completion.finish == "length",
        "is_format_error": hint is None,
        "hint_num_tokens": len(player.renderer.tokenizer.encode(carried)),
        "hint_num_facts": prompts.num_facts(carried),
        "num_trajectory_chars_cut": opening.num_cut_chars,
        "is_hint_dropped": opening.is_hint_dropped,
    }
    state_after = LifecycleState(
        next_ordinal=ordinal + 1,
        hint=carried,
        task_rewards=state.task_rewards,
        environment_state=state.environment_state,
    )
    finish: Finish = "format_error" if hint is None else "success"
    return Episode(row.seal(), reward, reward, finish, state_after, metrics)
