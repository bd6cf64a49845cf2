"""One record: a dialogue up to a patient's turn, and what the doctor did next.

``{"id", "messages", "decision", "facts", "diagnosis"?, "round"?}``: ``messages`` are ``{"role", "content"}``,
the last one by the patient; ``decision`` is ``continue`` (the doctor asked on) or ``stop``; ``facts`` are
``"field: value"`` strings that the doctor still asked for. Records are checked in the same way when a file is
read and when a task starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cod_async.envs.checks import is_int

ROLES = {"patient": "patient", "user": "patient", "doctor": "doctor", "assistant": "doctor"}
"""Accepted names of the two speakers, and what they mean."""
DECISIONS = ("continue", "stop")
FIELDS = ("symptom", "nature", "location", "severity", "trigger")
"""Fields of facts that the preparation looks for; records may hold others."""
MAX_MESSAGES = 200
MAX_FACTS = 100
MAX_MESSAGE_CHARS = 20_000
MAX_DIALOGUE_CHARS = 100_000
"""Longest dialogue in all; a longer one would fit no prompt."""
MAX_FACT_CHARS = 500
MAX_NAME_CHARS = 200
"""Longest id and diagnosis."""

_REQUIRED = ("messages", "decision", "facts")
_OPTIONAL = ("id", "diagnosis", "round")


def session_of(record_id: str) -> str:
    """Return the session that a record belongs to: its id up to the last slash (``s17/3`` -> ``s17``)."""
    return record_id.rpartition("/")[0] or record_id


def message_problems(messages: Any) -> list[str]:
    """List what is wrong with a list of messages; whose turn it ends with is not looked at."""
    if not isinstance(messages, list) or not 1 <= len(messages) <= MAX_MESSAGES:
        return [f"messages must be a list of 1 to {MAX_MESSAGES} {{role, content}}"]
    problems = []
    num_chars = 0
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            problems.append(f"messages[{index}] must hold role and content and nothing else")
            continue
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or role not in ROLES:
            problems.append(f"messages[{index}].role is {_shown(role)}; it must be one of {', '.join(ROLES)}")
        if not is_text(content, MAX_MESSAGE_CHARS, allow_blank=True):
            problems.append(
                f"messages[{index}].content must be valid text of at most {MAX_MESSAGE_CHARS} characters"
            )
        else:
            num_chars += len(content)
    if num_chars > MAX_DIALOGUE_CHARS:
        problems.append(f"messages have {num_chars} characters; at most {MAX_DIALOGUE_CHARS} are allowed")
    return problems


def record_problems(record: Any, *, has_id: bool = False) -> list[str]:
    """List everything that is wrong with a record, one sentence each.

    Args:
        record: a JSON value.
        has_id: whether ``id`` is required (in files, where it tells records apart).
    """
    if not isinstance(record, Mapping):
        return [f"is {_shown(record)}; it must be an object"]
    known = (*_REQUIRED, *_OPTIONAL)
    unknown = [key for key in record if key not in known]
    problems = [f"unknown field {_shown(key)}; fields are {', '.join(known)}" for key in unknown[:3]]
    missing = [key for key in (*_REQUIRED, *(("id",) if has_id else ())) if key not in record]
    if missing:
        problems.append(f"{', '.join(missing)} is missing")
    for key in ("id", "diagnosis"):
        if key in record and not is_text(record[key], MAX_NAME_CHARS):
            problems.append(
                f"{key} is {_shown(record[key])}; it must be text of 1 to {MAX_NAME_CHARS} characters"
            )
    if "round" in record and (not is_int(record["round"]) or not 0 <= record["round"] <= MAX_MESSAGES):
        problems.append(f"round is {_shown(record['round'])}; it must be an integer from 0 to {MAX_MESSAGES}")
    if "messages" in record:
        found = message_problems(record["messages"])
        if not found and ROLES[record["messages"][-1]["role"]] != "patient":
            found = ["messages must end with a turn of the patient, which the doctor answers"]
        problems += found
    if "decision" in record and record["decision"] not in DECISIONS:
        problems.append(f"decision is {_shown(record['decision'])}; it must be continue or stop")
    if "facts" in record:
        problems += _fact_problems(record["facts"], record.get("decision") == "continue")
    return problems


def _fact_problems(facts: Any, is_continue: bool) -> list[str]:
    if not isinstance(facts, list) or len(facts) > MAX_FACTS:
        return [f"facts must be a list of at most {MAX_FACTS} texts"]
    wrong = [index for index, fact in enumerate(facts) if not is_text(fact, MAX_FACT_CHARS)]
    if wrong:
        return [
            f"facts[{index}] is {_shown(facts[index])}; it must be text of 1 to {MAX_FACT_CHARS} characters"
            for index in wrong[:3]
        ]
    if is_continue and not facts:
        return ["facts is empty although decision is continue, so no question could be right; leave it out"]
    return []


def is_text(value: Any, max_chars: int, *, allow_blank: bool = False) -> bool:
    """Return whether a JSON value is text within a length that UTF-8 can express (no lone surrogates)."""
    if not isinstance(value, str) or len(value) > max_chars or not (allow_blank or value.strip()):
        return False
    return not any("\ud800" <= letter <= "\udfff" for letter in value) if not value.isascii() else True


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def speaker(message: Mapping[str, Any]) -> str:
    """Return ``patient`` or ``doctor`` for a checked message."""
    return ROLES[message["role"]]


def dialogue_lines(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a dialogue as ``role: text`` lines, one per message (line breaks inside become spaces)."""
    return [f"{speaker(message)}: {' '.join(message['content'].split())}" for message in messages]
