"""What a turn is worth: the decision by comparison, the question by a judge, the reward by a formula.

The judge is asked only where it has something to say: about a question, where a question was due. A judge
that fails or answers in another form raises; it never becomes a reward of 0.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from cod_async.envs.learn2ask.endpoint import ChatEndpoint
from cod_async.envs.learn2ask.options import Fusion, Learn2AskOptions, TrainMode
from cod_async.envs.learn2ask.prepare import Extractor
from cod_async.envs.learn2ask.records import FIELDS, MAX_FACT_CHARS, MAX_FACTS, dialogue_lines
from cod_async.envs.learn2ask.rules import Scores, fact_value, judge_by_rules
from cod_async.lifecycle.parsing import extract_between
from cod_async.lifecycle.texts import fill, prompt_text

STOP_TAG = "<stop />"
"""What ends the inquiry."""
MAX_JUDGED_CHARS = 4_000
"""A longer turn is shown to the judge by its beginning and its end."""
MAX_NOTE_CHARS = 500
"""Longest advice of a judge that is passed on."""
NUM_EXTRACTION_TRIES = 4
"""Rounds of retries of the fact extraction."""

_PROMPTS = Path(__file__).parent / "prompts"
_SCORES = {"0": 0.0, "0.0": 0.0, "0.5": 0.5, ".5": 0.5, "1": 1.0, "1.0": 1.0}
_CUT = "\n[...]\n"
_MAX_BRACKETS = 50
"""Opening brackets that are tried as the begin of a list, from the last one backwards."""


def _prompt(name: str) -> str:
    return prompt_text(_PROMPTS, f"{name}.txt")


class Verdict(msgspec.Struct, frozen=True):
    """The scores of one turn.

    Attributes:
        action: 1 if going on or stopping was right, else 0.
        content: 0, .5 or 1; 0 after a wrong decision.
        format: 0, .5 or 1; 0 after a wrong decision.
        note: the judge's sentence; may be empty.
        num_tries: requests to the judge; 0 if none was needed.
    """

    action: float
    content: float
    format: float
    note: str = ""
    num_tries: int = 0


def max_reward(train_mode: TrainMode, fusion: Fusion) -> float:
    """Return the reward of a perfect turn: 3 or 4."""
    return reward_of(Verdict(1.0, 1.0, 1.0), train_mode, fusion)


def reward_of(verdict: Verdict, train_mode: TrainMode, fusion: Fusion) -> float:
    """Return the reward.

    ``Ra+Rs``: ``action * (1 + 2 * content) + format`` (0 .. 4), or with ``sum`` fusion
    ``action + content + format`` (0 .. 3). ``Ra``: ``2 * content + format`` (0 .. 3). ``Rs``:
    ``3 * action + format`` (0 .. 4).

    Source: the Learn2Ask environment of the paper's reference implementation.
    """
    if train_mode == "Ra":
        return 2.0 * verdict.content + verdict.format
    if train_mode == "Rs":
        return 3.0 * verdict.action + verdict.format
    if fusion == "sum":
        return verdict.action + verdict.content + verdict.format
    return verdict.action * (1.0 + 2.0 * verdict.content) + verdict.format


async def judge(response: str, record: Mapping[str, Any], options: Learn2AskOptions) -> Verdict:
    """Score one turn against its record.

    Args:
        response: any text; it stops if the stop tag occurs anywhere in it.
        record: a checked record.
        options: which judge.

    Raises:
        InfrastructureError: the judge gave no usable answer.
    """
    has_stopped = STOP_TAG in response
    if has_stopped != (record["decision"] == "stop"):
        return Verdict(0.0, 0.0, 0.0)
    if has_stopped:
        return Verdict(1.0, 1.0, float(response.strip() == STOP_TAG))
    if not response.strip():  # asks nothing: the rubric gives 0 for both without a judge
        return Verdict(1.0, 0.0, 0.0)
    facts: list[str] = record["facts"]
    if options.judge == "rules":
        scores, num_tries = judge_by_rules(response, facts), 0
    else:
        user = fill(
            _prompt("judge_user"),
            dialogue="\n".join(dialogue_lines(record["messages"])),
            facts="\n".join(f"- {' '.join(fact.split())}" for fact in facts),
            response=quoted(response),
        )
        endpoint = ChatEndpoint.of(options)
        scores, num_tries = await endpoint.ask(_prompt("judge_system"), user, parse_scores)
    told = "\n".join([response, *(message["content"] for message in record["messages"])])
    note = "" if is_leaking(scores.note, facts, told) else scores.note
    return Verdict(1.0, scores.content, scores.format, note, num_tries)


def quoted(response: str) -> str:
    """Return a turn as a quotation that it cannot leave: valid text, bounded, every line after ``> ``."""
    if len(response) > MAX_JUDGED_CHARS:
        half = MAX_JUDGED_CHARS // 2
        response = response[:half] + _CUT + response[-half:]
    text = response.encode("utf-8", "replace").decode("utf-8")
    lines = ("".join(c if c.isprintable() else " " for c in line) for line in text.splitlines())
    return "\n".join(f"> {line}" for line in lines)


def parse_scores(reply: str) -> Scores | None:
    """Read a judge's reply, or None: each score exactly once, as 0, .5 or 1; the advice may be missing."""
    scores = [
        _SCORES.get((extract_between(reply, f"<{name}_score>", f"</{name}_score>") or "").strip())
        for name in ("format", "content")
    ]
    if scores[0] is None or scores[1] is None:
        return None
    advice = extract_between(reply, "<advice>", "</advice>") or ""
    return Scores(scores[0], scores[1], " ".join(advice.split())[:MAX_NOTE_CHARS])


def is_leaking(note: str, facts: Sequence[str], told: str) -> bool:
    """Return whether a note repeats a needed fact that neither the dialogue nor the turn holds.

    In a Ralph pack the same task comes again, so a note that names what was needed would be the answer.
    """
    note, told = note.casefold(), told.casefold()
    values = (fact_value(fact).casefold() for fact in facts)
    return any(value in note and value not in told for value in values)


def parse_facts(reply: str) -> list[str] | None:
    """Read an extraction's reply, or None: the last JSON list of texts after the last ``Output`` mark.

    Items that are not ``field: value`` with one of the five fields are left out.
    """
    mark = reply.casefold().rfind("output")
    after = reply[mark:] if mark >= 0 else ""
    items = _last_list(after)
    if items is None:
        return None
    facts: dict[str, None] = {}
    for item in items:
        field, _, value = item.partition(":")
        if field.strip().casefold() in FIELDS and value.strip():
            clean = f"{field.strip().casefold()}: {' '.join(value.split())}"[:MAX_FACT_CHARS]
            facts[clean.encode("utf-8", "replace").decode("utf-8")] = None
    return list(facts)[:MAX_FACTS]


def _last_list(text: str) -> list[str] | None:
    """Return the last JSON list of texts; brackets inside of its texts do not begin one."""
    end = len(text)
    for _ in range(_MAX_BRACKETS):
        end = text.rfind("[", 0, end)
        if end < 0:
            return None
        try:
            items, _ = json.JSONDecoder().raw_decode(text, end)
        except (ValueError, RecursionError):
            continue
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            return items
    return None


def facts_by_endpoint(endpoint: ChatEndpoint, num_parallel: int = 16) -> Extractor:
    """Return an extractor for :func:`~.prepare.prepare` that asks a model (in up to four tries per chat).

    Args:
        endpoint: whom to ask; its ``num_tries`` is replaced by 4.
        num_parallel: requests under way at once, >= 1.

    Returns:
        A blocking function; it raises InfrastructureError if a chat gets no usable answer.
    """
    asked = msgspec.structs.replace(endpoint, num_tries=NUM_EXTRACTION_TRIES)

    async def extract_all(texts: Sequence[str]) -> list[list[str]]:
        gate = asyncio.Semaphore(num_parallel)

        async def one(text: str) -> list[str]:
            async with gate:
                user = fill(_prompt("extract_user"), remaining=text)
                facts, _ = await asked.ask(_prompt("extract_system"), user, parse_facts)
                return facts

        return list(await asyncio.gather(*(one(text) for text in texts)))

    return lambda texts: asyncio.run(extract_all(texts))
