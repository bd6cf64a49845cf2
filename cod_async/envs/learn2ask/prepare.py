"""From raw sessions to records: split into rounds, decide, extract facts, drop, shuffle.

A session is ``{"id", "diagnosis", "messages"}``. Round k is the dialogue up to the patient's k-th turn; what
follows is its remaining chat. The doctor went on if the patient speaks again in it, and the facts of the
round are what the doctor still asks for there. There is no command for this, because where sessions come from
differs; a few lines do it::

    from pathlib import Path
    from cod_async.envs.learn2ask.prepare import prepare, read_sessions, write_records

    prepared = prepare(read_sessions(Path("sessions.jsonl")))
    write_records(Path("records.jsonl"), prepared.records)
    print(prepared.dropped)

By default facts are guessed by rules (English only). For real data give ``extract=facts_by_endpoint(...)``
from ``judging.py``, which asks a model.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from cod_async.durable import write_atomic
from cod_async.envs.learn2ask.records import (
    DECISIONS,
    MAX_FACT_CHARS,
    MAX_FACTS,
    MAX_NAME_CHARS,
    dialogue_lines,
    is_text,
    message_problems,
    record_problems,
    speaker,
)
from cod_async.envs.learn2ask.rules import facts_by_rules
from cod_async.errors import EnvironmentInputError

Extractor = Callable[[Sequence[str]], Sequence[Sequence[str]]]
"""Remaining chats (``role: text`` lines) -> what the doctor asks for in each, as ``field: value``."""

DROP_REASONS = ("session_without_patient", "session_ends_with_patient", "empty_remaining", "no_facts")
"""Why sessions (the first two) and rounds (the others) are left out."""
MAX_SHOWN_PROBLEMS = 20


class Round(msgspec.Struct, frozen=True):
    """One round of a session.

    Attributes:
        number: 1 for the patient's first turn.
        messages: the dialogue up to and with that turn, consecutive turns of one speaker joined.
        remaining: what follows, one ``role: text`` line per turn; empty if nothing does.
    """

    number: int
    messages: tuple[dict[str, str], ...]
    remaining: str

    @property
    def decision(self) -> Literal["continue", "stop"]:
        """``continue`` if the patient speaks again in the remaining chat, otherwise ``stop``."""
        has_more = any(line.startswith("patient: ") for line in self.remaining.split("\n"))
        return "continue" if has_more else "stop"


class Prepared(msgspec.Struct, frozen=True):
    """Records in shuffled order, and how many sessions and rounds were dropped, by reason."""

    records: tuple[dict[str, Any], ...]
    dropped: dict[str, int]


def merge_turns(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Join consecutive turns of one speaker with line breaks; blank messages are left out.

    Roles become ``patient`` and ``doctor``.
    """
    merged: list[dict[str, str]] = []
    for message in messages:
        role, text = speaker(message), message["content"].strip()
        if not text:
            continue
        if merged and merged[-1]["role"] == role:
            merged[-1] = {"role": role, "content": f"{merged[-1]['content']}\n{text}"}
        else:
            merged.append({"role": role, "content": text})
    return merged


def split_session(messages: Iterable[Mapping[str, Any]]) -> list[Round]:
    """Split a session into rounds, one per (joined) turn of the patient.

    Args:
        messages: ``{role, content}`` in order.
    """
    merged = merge_turns(messages)
    ends = [index for index, message in enumerate(merged) if message["role"] == "patient"]
    return [
        Round(number, tuple(merged[: end + 1]), "\n".join(dialogue_lines(merged[end + 1 :])))
        for number, end in enumerate(ends, start=1)
    ]


def session_problems(session: Any) -> list[str]:
    """List what is wrong with a raw session, one sentence each."""
    if not isinstance(session, Mapping):
        return ["is no object"]
    problems = [f"{key} is missing" for key in ("id", "messages") if key not in session]
    for key in ("id", "diagnosis"):
        if key in session and not is_text(session[key], MAX_NAME_CHARS - 10):
            problems.append(f"{key} must be text of 1 to {MAX_NAME_CHARS - 10} characters")
    return problems + (message_problems(session["messages"]) if "messages" in session else [])


def _check_sessions(sessions: Sequence[Mapping[str, Any]]) -> None:
    problems: list[str] = []
    num_broken = 0
    seen: set[str] = set()
    for index, session in enumerate(sessions):
        found = session_problems(session)
        if not found and session["id"] in seen:
            found = [f"id {session['id']!r} was used before"]
        if found:
            num_broken += 1
            if num_broken <= MAX_SHOWN_PROBLEMS:
                problems.append(f"session {index}: {'; '.join(found)}")
            continue
        seen.add(session["id"])
    if num_broken > MAX_SHOWN_PROBLEMS:
        problems.append(f"{num_broken - MAX_SHOWN_PROBLEMS} more sessions are broken")
    if problems:
        raise EnvironmentInputError(problems)


def prepare(
    sessions: Sequence[Mapping[str, Any]], extract: Extractor = facts_by_rules, seed: int = 0
) -> Prepared:
    """Turn raw sessions into records.

    Dropped and counted: sessions in which no patient speaks, sessions that end with the patient, rounds with
    nothing behind them, rounds that go on but for which no fact is found. The last one is a bias (questions
    on other things, such as medicine, never occur as tasks), and so the paper's authors say of theirs.

    Args:
        sessions: ``{id, messages, diagnosis?}``; further fields are ignored.
        extract: called once with the remaining chats of all rounds that go on.
        seed: of the shuffle of the records. Without it the rounds of a session would follow each other, and
            one task of a pack would tell the answers of the one before.

    Returns:
        Records with id ``<session>/<round>``.

    Raises:
        EnvironmentInputError: sessions are broken or share ids; all are listed, up to 20 one by one.
    """
    _check_sessions(sessions)
    dropped = dict.fromkeys(DROP_REASONS, 0)
    kept: list[tuple[Mapping[str, Any], Round]] = []
    for session in sessions:
        rounds = split_session(session["messages"])
        if not rounds:
            dropped["session_without_patient"] += 1
        elif speaker(session["messages"][-1]) == "patient":
            dropped["session_ends_with_patient"] += 1
        else:
            dropped["empty_remaining"] += sum(not item.remaining for item in rounds)
            kept += [(session, item) for item in rounds if item.remaining]
    going_on = [item.remaining for _, item in kept if item.decision == "continue"]
    answers = extract(going_on)
    if len(answers) != len(going_on):
        raise EnvironmentInputError(
            f"the extractor gave {len(answers)} lists of facts for {len(going_on)} remaining chats"
        )
    remaining_answers = iter(answers)
    records = []
    for session, item in kept:
        facts = list(next(remaining_answers)) if item.decision == "continue" else []
        if item.decision == "continue" and not facts:
            dropped["no_facts"] += 1
            continue
        records.append(_record(session, item, facts))
    random.Random(seed).shuffle(records)
    return Prepared(tuple(records), dropped)


def _record(session: Mapping[str, Any], item: Round, facts: list[str]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "id": f"{session['id']}/{item.number}",
        "messages": [dict(message) for message in item.messages],
        "decision": item.decision,
        "facts": [fact[:MAX_FACT_CHARS] for fact in facts[:MAX_FACTS]],
        "round": item.number,
    }
    if "diagnosis" in session:
        record["diagnosis"] = session["diagnosis"]
    problems = record_problems(record, has_id=True)
    if problems:  # joined turns may pass a limit that single ones kept
        raise EnvironmentInputError([f"session {session['id']!r}: {problem}" for problem in problems])
    return record


def read_sessions(path: Path) -> list[dict[str, Any]]:
    """Read raw sessions, one JSON object per line.

    Raises:
        EnvironmentInputError: the file cannot be read, or a line is no JSON; all such lines are named.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise EnvironmentInputError(f"{path}: cannot be read, {error.strerror or error}") from error
    sessions, problems = [], []
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        try:
            sessions.append(json.loads(raw.decode("utf-8-sig")))
        except (ValueError, RecursionError) as error:
            problems.append(f"{path}:{number}: is no JSON in UTF-8, {type(error).__name__}")
    if problems:
        more = len(problems) - MAX_SHOWN_PROBLEMS
        shown = problems[:MAX_SHOWN_PROBLEMS]
        raise EnvironmentInputError([*shown, f"{path}: {more} more lines are broken"] if more > 0 else shown)
    return sessions


def records_text(records: Iterable[Mapping[str, Any]]) -> str:
    """Return records as JSON lines, fields in the order of the record format."""
    order = ("id", "diagnosis", "round", "decision", "facts", "messages")
    lines = (
        json.dumps({key: record[key] for key in order if key in record}, ensure_ascii=False)
        for record in records
    )
    return "".join(f"{line}\n" for line in lines)


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records as JSON lines, atomically."""
    write_atomic(path, records_text(records).encode("utf-8"))


def counts(records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Count records by decision."""
    found = dict.fromkeys(DECISIONS, 0)
    for record in records:
        found[record["decision"]] += 1
    return found
