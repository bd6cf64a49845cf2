"""What a segment claims, checked before it is written: nothing that would poison a training step gets into
the database.

The codec guarantees types; this module guarantees sense: log-probs are log-probabilities, spans lie inside
their row, every generated token has a version, the key fits the kind and the position. Each refusal has a
stable code that the coordinator counts and that the ledger shows as the reason of the drop.
"""

from __future__ import annotations

import math
import re

import numpy as np
from msgspec import UNSET

from cod_async.errors import WireError
from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.segment import LifecycleState, Row, Segment, Version, kind_and_position, num_episodes
from cod_async.lifecycle.transcript import mark_after

MAX_INT = 1 << 62
MAX_REWARD = 1e9
"""Largest magnitude of a reward: sums of squares over a group stay far from overflow, also in float32."""
_UINT32, _FLOAT32 = np.dtype("<u4"), np.dtype("<f4")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def validate_segment(
    segment: Segment,
    *,
    run: str,
    pack_size: int,
    group_size: int | None = None,
    vocab_size: int | None = None,
    max_context_tokens: int | None = None,
    max_rows: int = 1024,
    max_metrics: int = 256,
    newest: Version | None = None,
    logprob_epsilon: float = 1e-6,
    is_transcript: bool = False,
    is_distilled: bool = False,
) -> None:
    """Check one segment's claims; return nothing if it may be trained on.

    Args:
        segment: as decoded.
        run: id of this run.
        pack_size: tasks per lifecycle.
        group_size: lifecycles per group, to bound ``key.member``; None leaves it unbounded.
        vocab_size: token ids must be below it; None checks only that they are not negative.
        max_context_tokens: longest row; None leaves it unbounded.
        max_rows: most rows in one segment.
        max_metrics: most entries in ``metrics``.
        newest: newest policy version that was published; a token from a later one is refused.
        logprob_epsilon: a log-prob may exceed 0 by this much (rounding in the engine), in nats.
        is_transcript: whether segments are deltas of a growing conversation (carry ``transcript``).
        is_distilled: whether the run distills, so that every row has log-probs of a teacher, and none else.

    Raises:
        WireError: with one of the codes ``wrong_run``, ``bad_name``, ``bad_key``, ``bad_kind``,
            ``bad_position``, ``bad_state``, ``bad_is_last``, ``bad_reward``, ``bad_metrics``, ``bad_rows``,
            ``bad_dtype``, ``bad_spans``, ``bad_logprobs``, ``bad_token_ids``, ``bad_versions``,
            ``bad_planes``, ``bad_teacher``, ``bad_transcript``, ``row_too_long``, ``future_version``,
            ``no_action_tokens``.
    """
    if segment.run != run:
        raise WireError("wrong_run", f"segment of run {segment.run!r}, this is run {run!r}")
    _check_identity(segment, pack_size, group_size)
    _check_state(segment, segment.state_after, pack_size)
    _check_numbers(segment, max_metrics)
    if len(segment.rows) > max_rows:
        raise WireError("bad_rows", f"{len(segment.rows)} rows, at most {max_rows} are allowed")
    for row in segment.rows:
        _check_row(row, vocab_size, max_context_tokens)
        _check_logprobs(row.behavior_logprobs, "bad_logprobs", logprob_epsilon)
        _check_teacher(row, logprob_epsilon, is_distilled)
        _check_versions(row, newest)
    _check_transcript(segment, is_transcript)
    # An episode whose first prompt does not fit the context generates nothing; every other one must.
    if segment.num_action_tokens == 0 and segment.finish != "context_overflow":
        raise WireError("no_action_tokens", f"{segment.key} generated nothing")


def _check_identity(segment: Segment, pack_size: int, group_size: int | None) -> None:
    for what in ("actor", "environment", "preset"):
        if not _NAME.fullmatch(getattr(segment, what)):
            raise WireError("bad_name", f"{what} {getattr(segment, what)[:200]!r}")
    if segment.adapter is not None and not _NAME.fullmatch(segment.adapter):
        raise WireError("bad_name", f"adapter {segment.adapter[:200]!r}")
    key = segment.key
    if not (0 <= key.group <= MAX_INT and 0 <= segment.lease_epoch <= MAX_INT):
        raise WireError("bad_key", f"group {key.group}, lease epoch {segment.lease_epoch}")
    if not 0 <= key.member < (MAX_INT if group_size is None else group_size):
        raise WireError("bad_key", f"member {key.member} of a group of {group_size}")
    if not 0 <= key.ordinal < num_episodes(pack_size):
        raise WireError(
            "bad_key", f"ordinal {key.ordinal}, a lifecycle has {num_episodes(pack_size)} episodes"
        )
    if not 0 <= segment.pack_seed < 1 << 64:
        raise WireError("bad_key", f"pack seed {segment.pack_seed}")
    kind, position = kind_and_position(key.ordinal)
    if segment.kind != kind:
        raise WireError("bad_kind", f"{segment.kind} at ordinal {key.ordinal}, which is a {kind}")
    if segment.position != position:
        raise WireError(
            "bad_position", f"position {segment.position} at ordinal {key.ordinal}, must be {position}"
        )


def _check_state(segment: Segment, state: LifecycleState, pack_size: int) -> None:
    """The state after an episode points past it, and agrees with ``is_last``."""
    total = num_episodes(pack_size)
    if not segment.key.ordinal < state.next_ordinal <= total:
        raise WireError("bad_state", f"next ordinal {state.next_ordinal} after ordinal {segment.key.ordinal}")
    if segment.is_last != (state.next_ordinal == total):
        raise WireError(
            "bad_is_last", f"is_last {segment.is_last}, next ordinal {state.next_ordinal} of {total}"
        )
    if len(state.task_rewards) != segment.position + 1:
        raise WireError(
            "bad_state", f"{len(state.task_rewards)} task rewards after position {segment.position}"
        )
    needs_pending = not segment.is_last and state.next_ordinal % 2 == 1
    if needs_pending != (state.pending is not None):
        raise WireError("bad_state", f"pending update {'missing' if needs_pending else 'left over'}")
    rewards = (*state.task_rewards, state.pending.reward if state.pending is not None else 0.0)
    if not all(math.isfinite(reward) for reward in rewards):
        raise WireError("bad_state", "a task reward is not finite")


def _check_numbers(segment: Segment, max_metrics: int) -> None:
    for what, value in (("reward", segment.reward), ("raw_reward", segment.raw_reward)):
        if not abs(value) <= MAX_REWARD:  # NaN is not, either
            raise WireError("bad_reward", f"{what} is {value}, must be within {MAX_REWARD:g} of 0")
    if not (math.isfinite(segment.wall_s) and segment.wall_s >= 0):
        raise WireError("bad_metrics", f"wall_s is {segment.wall_s}")
    if len(segment.metrics) > max_metrics:
        raise WireError("bad_metrics", f"{len(segment.metrics)} metrics, at most {max_metrics} are allowed")
    for name, value in segment.metrics.items():
        if not math.isfinite(value) or len(name) > 128:
            raise WireError("bad_metrics", f"{name[:128]!r} is {value}")


def _check_row(row: Row, vocab_size: int | None, max_context_tokens: int | None) -> None:
    if row.token_ids.dtype != "<i4" or row.behavior_logprobs.dtype != "<f4":
        raise WireError(
            "bad_dtype", f"token ids {row.token_ids.dtype}, log-probs {row.behavior_logprobs.dtype}"
        )
    num_tokens = row.num_tokens
    if num_tokens == 0:
        raise WireError("bad_rows", "a row without tokens")
    num_before = 0 if row.parent is None else row.parent.num_tokens
    if max_context_tokens is not None and num_before + num_tokens > max_context_tokens:
        raise WireError(
            "row_too_long",
            f"row of {num_before + num_tokens} tokens, at most {max_context_tokens} are allowed",
        )
    # As unsigned, a negative id is a huge one: one comparison finds both.
    highest = int(np.frombuffer(row.token_ids.data, _UINT32).max())
    if highest >= (1 << 31 if vocab_size is None else vocab_size):
        raise WireError(
            "bad_token_ids",
            f"token id {highest if highest < 1 << 31 else highest - (1 << 32)}, vocabulary of {vocab_size}",
        )
    previous, total = 0, 0
    for start, stop in row.action_spans:
        if not previous <= start < stop <= num_tokens:
            raise WireError("bad_spans", f"span [{start}, {stop}) after {previous} in a row of {num_tokens}")
        previous, total = stop, total + stop - start
    if total != row.num_action_tokens:
        raise WireError("bad_spans", f"spans hold {total} tokens, {row.num_action_tokens} log-probs")
    for name, plane in row.planes.items():
        if plane.dtype != "|u1" or plane.length % num_tokens or not _NAME.fullmatch(name):
            raise WireError(
                "bad_planes", f"{name[:128]!r}: {plane.length} x {plane.dtype} for {num_tokens} tokens"
            )


def _check_transcript(segment: Segment, is_transcript: bool) -> None:
    """A delta says what it extends, and the state after it says what came of that; nothing else does."""
    after = segment.state_after.transcript
    if not is_transcript:
        if after is not None or any(row.parent is not None for row in segment.rows):
            raise WireError("bad_transcript", "a delta of a transcript, in a run that carries none")
        return
    if after is None or after.token_ids is not None or len(segment.rows) > 1:
        raise WireError(
            "bad_transcript", "a segment of a transcript is one delta, and only its mark is sent on"
        )
    for row in segment.rows:
        if row.parent is None or row.parent.num_tokens < 0 or mark_after(row) != after.mark:
            raise WireError("bad_transcript", f"its delta does not lead to the state's mark {after.mark}")


def _check_teacher(row: Row, epsilon: float, is_distilled: bool) -> None:
    """A run that distills has a teacher's log-prob of every action token, any other run has none."""
    teacher = row.teacher_logprobs
    if teacher is UNSET:
        if is_distilled:
            raise WireError("bad_teacher", "a row without its teacher's log-probs, in a run that distills")
        return
    if not is_distilled:
        raise WireError("bad_teacher", "a teacher's log-probs, in a run that distills nothing")
    if teacher.dtype != "<f4" or teacher.length != row.num_action_tokens:
        raise WireError(
            "bad_teacher",
            f"{teacher.length} x {teacher.dtype} of a teacher for {row.num_action_tokens} action tokens",
        )
    _check_logprobs(teacher, "bad_teacher", epsilon)


def _check_logprobs(array: Array, code: str, epsilon: float) -> None:
    if array.length == 0:
        return
    logprobs = np.frombuffer(array.data, _FLOAT32)
    # NaN fails every comparison, so that one pass over the extremes covers NaN, both infinities and positive
    # values.
    if not (logprobs.min() > -math.inf and logprobs.max() <= epsilon):
        worst = logprobs[~np.isfinite(logprobs) | (logprobs > epsilon)][0]
        raise WireError(code, f"log-prob {worst}, must be finite and at most {epsilon}")


def _check_versions(row: Row, newest: Version | None) -> None:
    total = 0
    for span in row.versions:
        version = span.version
        if span.num_tokens <= 0 or not (0 <= version.lineage <= MAX_INT and 0 <= version.step <= MAX_INT):
            raise WireError("bad_versions", f"{span.num_tokens} tokens of version {version}")
        if newest is not None and version > newest:
            raise WireError("future_version", f"token of version {version}, the newest is {newest}")
        total += span.num_tokens
    if total != row.num_action_tokens:
        raise WireError("bad_versions", f"versions of {total} tokens, {row.num_action_tokens} log-probs")
