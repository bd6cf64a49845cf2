"""The generated sample: plausible consultations made from our own templates, reproducible by a seed.

Each diagnosis has five things a doctor wants to know. The patient opens with a complaint and tells some of
them unasked; the doctor asks for the others, sometimes for two at once, sometimes for one that the extraction
ignores, and ends when they are known. Sessions then go through the same preparation as a user's data, with
the facts known from the templates. Nobody's words and no medical advice are in it.

``python -m cod_async.envs.learn2ask.generate PATH`` writes the file again.
"""

from __future__ import annotations

import functools
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cod_async.envs.learn2ask.prepare import Prepared, prepare, write_records

NUM_SESSIONS = 82
"""Sessions of the shipped sample, so many that both splits have a prime number of records (239 and 83): packs
that walk through them again and again then bring every record to every position."""
MAX_TOLD = 3
"""Things that the patient tells unasked, at most."""


@functools.cache
def templates() -> dict[str, Any]:
    """Return the templates of the generator (``templates.json``)."""
    text = (Path(__file__).parent / "templates.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


@functools.cache
def _fact_of() -> dict[str, str]:
    """Return what each of the doctor's questions asks for; ignored questions are not in it."""
    return {slot["ask"]: slot["fact"] for item in templates()["diagnoses"] for slot in item["slots"]}


def known_facts(texts: Sequence[str]) -> list[list[str]]:
    """Extract facts from remaining chats of generated sessions, where every question is a template."""
    found = []
    for text in texts:
        asked = [line.removeprefix("doctor: ") for line in text.split("\n") if line.startswith("doctor: ")]
        # A turn may hold two questions; templates are no prefixes of each other.
        found.append([fact for turn in asked for ask, fact in _fact_of().items() if ask in turn])
    return found


def generate_session(generator: random.Random, session_id: str) -> dict[str, Any]:
    """Make one raw session ``{id, diagnosis, messages}``."""
    item = generator.choice(templates()["diagnoses"])
    slots = generator.sample(item["slots"], len(item["slots"]))
    num_told = generator.randint(0, MAX_TOLD)
    opening = [generator.choice(item["openings"]), *(generator.choice(s["tell"]) for s in slots[:num_told])]
    messages = [_said("patient", " ".join(opening[: 1 + num_told // 2]))]
    if len(opening) > 1 + num_told // 2:  # the rest comes as a second message in a row
        messages.append(_said("patient", " ".join(opening[1 + num_told // 2 :])))
    turns = [[slot] for slot in slots[num_told:]]
    if generator.random() < 0.25:
        turns[-2:] = [turns[-2] + turns[-1]]
    if generator.random() < 0.3:
        turns.append([generator.choice(templates()["ignored"])])
    for turn in turns:
        messages.append(_said("doctor", " ".join(slot["ask"] for slot in turn)))
        messages.append(_said("patient", " ".join(generator.choice(slot["tell"]) for slot in turn)))
    messages.append(_said("doctor", generator.choice(templates()["closings"])))
    if generator.random() < 0.1:
        messages.append(_said("patient", generator.choice(templates()["thanks"])))
    return {"id": session_id, "diagnosis": item["name"], "messages": messages}


def _said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def generate_sessions(num_sessions: int = NUM_SESSIONS, seed: int = 0) -> list[dict[str, Any]]:
    """Make raw sessions; equal arguments give equal sessions.

    Args:
        num_sessions: how many.
        seed: of the one generator they are drawn from.
    """
    generator = random.Random(f"learn2ask/sample/{seed}")
    return [generate_session(generator, f"s{index:05d}") for index in range(num_sessions)]


def generate(num_sessions: int = NUM_SESSIONS, seed: int = 0) -> Prepared:
    """Make sessions and prepare them with the facts that the templates know."""
    return prepare(generate_sessions(num_sessions, seed), known_facts, seed)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m cod_async.envs.learn2ask.generate PATH")
    write_records(Path(sys.argv[1]), generate().records)
