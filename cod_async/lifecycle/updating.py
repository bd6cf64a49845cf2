"""Update-context episodes: rewrite the hint in one response.

The update has a prompt of its own, with the task's record in it; a record too long for the context is
shortened in its middle, then the previous hint gives way, each with a metric. In a transcript the record
is the conversation itself, and the update is one more turn of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from cod_async.errors import InputError
from cod_async.lifecycle.episodes import Episode, Player, RowBuilder, transcript_after
from cod_async.lifecycle.rewards import update_reward
from cod_async.lifecycle.segment import Finish, LifecycleState, PendingUpdate, Transcript
from cod_async.lifecycle.transcript import token_ids_of


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
    if player.config.carry == "transcript":
        return await _update_in_transcript(player, state, pending, ordinal, session)
    opening = _update_opening(player, state, pending)
    row = RowBuilder(opening.token_ids)
    hint, reward = await _write_hint(player, row, ordinal, session)
    carried = prompts.failed if hint is None else hint
    metrics = _hint_metrics(player, row, hint) | {
        "num_trajectory_chars_cut": opening.num_cut_chars,
        "is_hint_dropped": opening.is_hint_dropped,
    }
    finish: Finish = "format_error" if hint is None else "success"
    return Episode(row.seal(), reward, reward, finish, _after_update(state, ordinal, carried, None), metrics)


async def _update_in_transcript(
    player: Player, state: LifecycleState, pending: PendingUpdate, ordinal: int, session: str
) -> Episode:
    """Ask for the hint block as a turn of the conversation; it stays there and is shown nowhere else."""
    prompts, transcript = player.prompts, state.transcript
    assert transcript is not None  # noqa: S101  (a solve episode has been before)
    text = prompts.transcript_update(
        prompts.outcome(pending.reward, pending.feedback), player.config.length_notice_tokens
    )
    delta = player.renderer.next_turn(text, transcript.is_stopped)
    row = RowBuilder([*token_ids_of(state), *delta], transcript.mark)
    if len(row.token_ids) >= player.max_context_tokens:
        state_after = _after_update(state, ordinal, state.hint, transcript_after(player, state, None, "", ""))
        return Episode(None, 0.0, 0.0, "context_overflow", state_after, {"is_context_overflow": 1.0})
    hint, reward = await _write_hint(player, row, ordinal, session)
    sealed = row.seal()
    after = transcript_after(player, state, sealed, "", "")
    state_after = _after_update(state, ordinal, prompts.failed if hint is None else hint, after)
    finish: Finish = "format_error" if hint is None else "success"
    return Episode(sealed, reward, reward, finish, state_after, _hint_metrics(player, row, hint))


async def _write_hint(
    player: Player, row: RowBuilder, ordinal: int, session: str
) -> tuple[str | None, float]:
    """Generate one response into the row; return the carried hint that it holds, or None, and the reward."""
    params = player.params(player.config.max_hint_tokens, len(row.token_ids), ordinal, 0)
    completion = await player.generate(row.token_ids, params, session)
    row.append(completion)
    hint = player.update_prompts.parse(player.renderer.decode_response(completion.token_ids))
    return hint, update_reward(hint is not None, len(completion.token_ids), player.config)


def _hint_metrics(player: Player, row: RowBuilder, hint: str | None) -> dict[str, float]:
    """Return the metrics of a written hint, or of the placeholder that takes its place."""
    carried = player.update_prompts.failed if hint is None else hint
    stop = row.spans[-1][1]
    return {
        "num_steps": 1,
        "num_response_tokens": len(row.logprobs),
        "num_cut_responses": row.token_ids[stop - 1] not in player.renderer.stop_ids,
        "is_format_error": hint is None,
        "hint_num_tokens": len(player.renderer.tokenizer.encode(carried)),
        "hint_num_facts": player.update_prompts.num_facts(carried),
    }


def _after_update(
    state: LifecycleState, ordinal: int, carried: str, transcript: Transcript | None
) -> LifecycleState:
    return LifecycleState(
        next_ordinal=ordinal + 1,
        hint=carried,
        task_rewards=state.task_rewards,
        environment_state=state.environment_state,
        transcript=transcript,
    )
