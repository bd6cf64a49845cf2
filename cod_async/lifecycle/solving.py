"""Solve-task episodes: a task over several turns.

What a context cannot hold is handled in the open, each with a metric: a conversation that outgrows it ends
with ``context_overflow``, a hint that leaves no room gives way to the placeholder, and when a transcript is
full its remaining tasks are lost without a token.
"""

from __future__ import annotations

from cod_async.envs.base import StepResult, environment_errors
from cod_async.errors import InfrastructureError, InputError
from cod_async.lifecycle.episodes import Episode, Player, RowBuilder, transcript_after
from cod_async.lifecycle.rewards import penalized_reward
from cod_async.lifecycle.segment import Finish, LifecycleState, PendingUpdate, Row, num_episodes
from cod_async.lifecycle.transcript import NO_PARENT, system_digest, token_ids_of


def _opening(
    player: Player, state: LifecycleState, position: int, system: str, user: str
) -> tuple[RowBuilder, bool] | None:
    """Return the row with the episode's first prompt, and whether the hint had to be left out of it.

    None: the conversation of a transcript has no room for another task.
    """
    if player.config.carry == "transcript":
        row = _transcript_opening(player, state, system, user)
        return None if len(row.token_ids) >= player.max_context_tokens else (row, False)
    hint = player.shown_hint(position, state.hint) if player.shown_hint else state.hint
    ids, is_hint_dropped = _solve_opening(player, system, user, hint)
    return RowBuilder(ids), is_hint_dropped


def _transcript_opening(player: Player, state: LifecycleState, system: str, user: str) -> RowBuilder:
    """Append the task to the conversation, or begin the conversation with it."""
    transcript = state.transcript
    if transcript is None or transcript.mark.num_tokens == 0:
        rules = player.prompts.solve_system(system, "", player.config.length_notice_tokens)
        return RowBuilder(player.renderer.open(rules, user), NO_PARENT)
    new_rules = "" if system_digest(system) == transcript.system_digest else system
    text = player.prompts.next_task(transcript.outcome, new_rules, user)
    delta = player.renderer.next_turn(text, transcript.is_stopped)
    return RowBuilder([*token_ids_of(state), *delta], transcript.mark)


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
        start = await environment.start(player.spec.tasks[position], state.environment_state)
    user, system, max_steps = start.observation, start.system_prompt, start.max_steps
    overflow = StepResult(observation="", is_done=True, raw_reward=0.0, finish="context_overflow")
    opening = _opening(player, state, position, system, user)
    if opening is None:
        state_after = await _after_solve(player, state, ordinal, (system, []), None, 0.0, overflow.finish)
        return Episode(None, 0.0, 0.0, overflow.finish, state_after, {"is_context_overflow": 1.0})
    row, is_hint_dropped = opening
    messages = [("user", user)]
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
            result = overflow
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
    sealed = row.seal()
    state_after = await _after_solve(
        player, state, ordinal, (system, messages), sealed, reward, result.finish
    )
    return Episode(sealed, reward, result.raw_reward, result.finish, state_after, metrics)


async def _after_solve(
    player: Player,
    state: LifecycleState,
    ordinal: int,
    told: tuple[str, list[tuple[str, str]]],
    row: Row | None,
    reward: float,
    finish: Finish,
) -> LifecycleState:
    """Return the state after a solve episode, with what the next episode will need of it.

    ``told`` is the system prompt and the messages of the episode; ``row`` is None if it has no row.
    """
    environment, prompts = player.environment, player.prompts
    is_last = ordinal + 1 >= num_episodes(len(player.spec.tasks))
    has_update = player.config.has_updates and not is_last
    is_transcript = player.config.carry == "transcript"
    is_overflow = finish == "context_overflow"
    system, messages = told
    with environment_errors(environment.name):
        closing = await environment.finish(
            messages if has_update and not is_transcript else None,
            has_feedback=not is_overflow and (has_update or is_transcript),
        )
    feedback = prompts.overflow_feedback if is_overflow else closing.feedback
    pending = None
    outcome = ""
    if has_update:
        trajectory = closing.trajectory
        if trajectory is None:
            trajectory = "" if is_transcript else prompts.trajectory(system, messages)
        pending = PendingUpdate(trajectory=trajectory, reward=reward, feedback=feedback)
    elif is_transcript:
        outcome = prompts.outcome(reward, feedback)
    return LifecycleState(
        next_ordinal=ordinal + 1 if has_update or is_last else ordinal + 2,
        hint=state.hint,
        task_rewards=(*state.task_rewards, reward),
        pending=pending,
        environment_state=closing.snapshot,
        transcript=transcript_after(player, state, row, system, outcome),
    )
