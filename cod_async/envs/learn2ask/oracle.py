"""Scripted policies: the floor and the ceiling of a learning curve.

``random`` stops or asks one of a few questions that fit any complaint, by a coin. ``oracle`` is told the
record: it stops when that is right, and otherwise asks for a listed fact with three answers to choose from.
``always_ask`` never stops: what can be had without ever deciding.
"""

from __future__ import annotations

import random
from typing import Any

from cod_async.envs.base import Environment, Policy
from cod_async.envs.learn2ask.judging import STOP_TAG
from cod_async.envs.learn2ask.rules import fact_value, sentences, words

QUESTIONS = (
    "Is it sharp, dull or burning?",
    "Where is it: on the left, on the right, or on both sides?",
    "Is it worse at night, after meals, or at any time?",
    "Do you have a fever, nausea, or neither?",
    "How strong is it: mild, moderate or severe?",
    "Did it begin suddenly or slowly?",
)
"""Questions that fit any complaint."""
MAX_QUOTED_WORDS = 20
"""A fact with more words is asked for by its first ones."""


def random_policy(seed: int) -> Policy:
    """Return the policy that stops or asks a random question, each with probability 1/2."""
    generator = random.Random(seed)

    def act(environment: Environment, observation: str, memory: Any) -> str:
        return STOP_TAG if generator.random() < 0.5 else generator.choice(QUESTIONS)

    return act


def always_ask_policy(seed: int) -> Policy:
    """Return the policy that always asks a random question."""
    generator = random.Random(seed)
    return lambda environment, observation, memory: generator.choice(QUESTIONS)


def question_for(fact: str) -> str:
    """Return one short question that asks directly for a fact, with three answers."""
    value = fact_value(fact)
    is_plain = len(sentences(value)) == 1 and len(value.split()) <= MAX_QUOTED_WORDS
    wanted = value.rstrip(".!?\u3002\uff01\uff1f ") if is_plain else " ".join(words(value)[:MAX_QUOTED_WORDS])
    return f"What about {wanted}: yes, no, or not sure?"


def oracle_policy(seed: int) -> Policy:
    """Return the policy that knows the record; the seed has no effect."""

    def act(environment: Environment, observation: str, memory: Any) -> str:
        task = environment.task_view()
        if task["decision"] == "stop":
            return STOP_TAG
        return question_for(min(task["facts"], key=lambda fact: (len(words(fact_value(fact))), fact)))

    return act
