"""The stand-in for the judge and for the fact extractor: rules on words, deterministic, no network.

They exist so that everything runs and can be tested anywhere; they cannot tell a good question from a lucky
one. A turn is cut into sentences; *format* counts questions and sentences, *content* is how much of a needed
fact's wording the questions share. Words are compared in lower case without plural s and without the most
frequent English function words; Chinese is compared by pairs of characters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

MAX_WORDS = 60
"""A longer turn scores nothing: a list of everything asks about nothing directly."""
DIRECT_FRAC = 0.5
"""Share of a fact's words that a question must contain to ask directly about it."""
MAX_CHARS = 8_000
"""Longer turns are not looked at beyond this; they have too many words anyway."""
MAX_VALUE_WORDS = 12
"""Words that an extracted fact keeps."""

_WORD = re.compile(r"[\u4e00-\u9fff]+|[^\W_\u4e00-\u9fff]+")
# A run of full stops is tried once, from its first to its last character: anything else takes quadratic time.
_SENTENCE = re.compile(
    r"(.*?)((?<![.!?])[.!?]++(?=\s|$)|[\u3002\uff01\uff1f]+|\n+|$)",
    re.DOTALL,
)
_QUESTION_MARKS = ("?", "\uff1f")
_FUNCTION_WORDS = (
    "a about after all also am an and any are as at be been before both but by can come could did do does "
    "down ever feel felt for from get had has have hear how i if in is it its just like many me more most "
    "much my neither no nor not notice of on only or other our out over please quite rather really see seen "
    "she should so some tell than that the their them then there these they thing this to too under up was "
    "we were what when where whether which while who will with would you your"
)
_STOP_WORDS = frozenset(_FUNCTION_WORDS.split())


class Scores(msgspec.Struct, frozen=True):
    """What a judge says on a question: ``format`` and ``content`` in {0, .5, 1}, and one sentence."""

    format: float
    content: float
    note: str = ""


def words(text: str) -> list[str]:
    """Return the words of a text that carry meaning, in order; see the module text."""
    found: list[str] = []
    for word in _WORD.findall(text.casefold()):
        if "\u4e00" <= word[0] <= "\u9fff":
            found += [word[i : i + 2] for i in range(max(1, len(word) - 1))]
            continue
        if word in _STOP_WORDS:
            continue
        found.append(word[:-1] if len(word) > 3 and word[-1] == "s" and word[-2] != "s" else word)
    return found


def sentences(text: str) -> list[tuple[str, bool]]:
    """Cut a text into sentences with at least one word; the flag says whether one is a question."""
    cut = []
    for match in _SENTENCE.finditer(text):
        body, end = match.groups()
        if _WORD.search(body):
            cut.append((body.strip(), any(mark in end for mark in _QUESTION_MARKS)))
    return cut


def fact_value(fact: str) -> str:
    """Return the value of a ``field: value`` fact, or the whole text if it names no field."""
    field, colon, value = fact.partition(":")
    return value.strip() if colon and len(field) <= 40 and value.strip() else fact.strip()


def judge_by_rules(response: str, facts: Sequence[str]) -> Scores:
    """Score a turn that asks on.

    Format: 1 for one sentence that is a question; .5 for two questions, or one question beside one other
    sentence; otherwise 0. Content: over all facts, the largest share of a fact's words that occur in the
    questions; 1 from ``DIRECT_FRAC`` on, .5 above zero, otherwise 0. Turns of more than 60 words get 0 for
    both.

    Args:
        response: the turn.
        facts: the facts that were needed, ``field: value``.
    """
    response = response[:MAX_CHARS]
    if len(_WORD.findall(response)) > MAX_WORDS or len(words(response)) > MAX_WORDS:
        return Scores(0.0, 0.0, "The turn is far too long for one short question.")
    cut = sentences(response)
    questions = [text for text, is_question in cut if is_question]
    if not questions:
        return Scores(0.0, 0.0, "The turn asks nothing.")
    format_score = 1.0 if len(cut) == 1 else 0.5 if len(cut) == 2 else 0.0
    asked = {word for question in questions for word in words(question)}
    best = 0.0
    for fact in facts:
        wanted = set(words(fact_value(fact))) or set(words(fact))
        if wanted:
            best = max(best, len(wanted & asked) / len(wanted))
    content = 1.0 if best >= DIRECT_FRAC else 0.5 if best > 0 else 0.0
    return Scores(format_score, content, _NOTES[content])


_NOTES = {
    1.0: "The question asks for something that was needed.",
    0.5: "The question comes close to something that was needed.",
    0.0: "The question misses what was needed.",
}

_IGNORED = re.compile(r"\b(?:allerg|chronic|diabet|disease|medic|pill|tablet|drug|blood pressure|surgery)")
_CUES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (field, re.compile(rf"\b(?:{cues})"))
    for field, cues in (
        (
            "trigger",
            r"worse|better|trigger|brings? it on|set it off|begin|began|start|meals?|after|before it|contact",
        ),
        ("location", r"where|which side|one side|locat|spread|radiat|left|right|upper|lower|outer|inner"),
        (
            "severity",
            r"how (?:bad|strong|severe|much|often|many|far|high)|sever|scale|number|per day|able|can you|"
            r"at night|manage|impossible|trouble",
        ),
        (
            "nature",
            r"what kind|what is it like|sharp|dull|burning|throbbing|watery|dry|clear|yellow|color|crack|"
            r"blister",
        ),
        ("symptom", r"do you|have you|is there|are there|are your|any|also"),
    )
)
"""The first field with a cue in the question wins; a question without any cue is about a symptom."""


def fact_of_question(question: str) -> str | None:
    """Guess the ``field: value`` that a question (English) asks for, or None for none of the five."""
    text = question.casefold()
    value = " ".join(dict.fromkeys(words(question)[:MAX_VALUE_WORDS]))
    if not value or _IGNORED.search(text):
        return None
    for field, cues in _CUES:
        if cues.search(text):
            return f"{field}: {value}"
    return f"symptom: {value}"


def facts_by_rules(texts: Sequence[str]) -> list[list[str]]:
    """Extract what the doctor asks for from remaining chats (``role: text`` lines, English).

    A crude stand-in for a model: the field is guessed from cue words, the value is the question's own words.

    Args:
        texts: one remaining chat each.
    """
    found = []
    for text in texts:
        facts: dict[str, None] = {}
        for line in text.splitlines():
            role, _, said = line.partition(": ")
            if role != "doctor":
                continue
            for sentence, is_question in sentences(said):
                fact = fact_of_question(sentence) if is_question else None
                if fact is not None:
                    facts[fact] = None
        found.append(list(facts))
    return found
