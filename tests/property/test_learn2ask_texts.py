"""Learn2Ask reads whatever policies, judges and users write: never an exception, never an undefined score."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cod_async.envs.base import TaskSpec
from cod_async.envs.learn2ask import SPEC
from cod_async.envs.learn2ask.dataset import held_out_diagnoses, parse_line
from cod_async.envs.learn2ask.judging import parse_facts, parse_scores, quoted
from cod_async.envs.learn2ask.prepare import merge_turns, split_session
from cod_async.envs.learn2ask.records import FIELDS, record_problems
from cod_async.envs.learn2ask.rules import facts_by_rules, judge_by_rules, sentences

TEXTS = st.text(st.characters(), max_size=60) | st.lists(
    st.sampled_from(
        ["<stop />", "?", "fever", ". ", "\n", "<advice>", "[", "]", '"', "symptom: ", "Output:"]
    ),
    max_size=12,
).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
KEYS = ("id", "messages", "decision", "facts", "diagnosis", "round")
ENVIRONMENT = SPEC.make(SPEC.options("default"))


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.sampled_from(["continue", "stop"]))
def test_any_response_is_scored(response: str, decision: str) -> None:
    record = {
        "messages": [{"role": "patient", "content": "Hi"}],
        "decision": decision,
        "facts": ["symptom: fever"] if decision == "continue" else [],
    }
    ENVIRONMENT.reset(TaskSpec("learn2ask", "default", {}, record, 0, 0, 1))
    result = asyncio.run(ENVIRONMENT.step(response))
    assert result.is_done and result.raw_reward in (0, 1, 1.5, 2, 2.5, 3, 3.5, 4)
    is_right = ("<stop />" in response) == (decision == "stop")
    assert (result.raw_reward > 0) == is_right
    assert ENVIRONMENT.feedback()


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_any_reply_is_read_or_refused(reply: str) -> None:
    scores = parse_scores(reply)
    assert scores is None or {scores.format, scores.content} <= {0.0, 0.5, 1.0}
    facts = parse_facts(reply)
    assert facts is None or all(fact.partition(": ")[0] in FIELDS for fact in facts)
    assert all(line.startswith("> ") for line in quoted(reply or "x").split("\n"))
    quoted(reply).encode("utf-8")


PLAIN_SENTENCE = re.compile(r"(.*?)([.!?]+(?=\s|$)|[\u3002\uff01\uff1f]+|\n+|$)", re.DOTALL)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab .!?\n\u3002\uff1f\u4e00", max_size=24))
def test_sentences_are_cut_as_by_the_plain_pattern(text: str) -> None:
    """The pattern in use only forbids retries; the plain one takes quadratic time for a run of full stops."""
    matches = [match.groups() for match in PLAIN_SENTENCE.finditer(text)]
    found = [(body.strip(), bool({"?", "\uff1f"} & set(end))) for body, end in matches]
    assert sentences(text) == [one for one in found if re.search(r"[ab\u4e00]", one[0])]


def test_a_run_of_full_stops_takes_linear_time() -> None:
    # With the plain pattern each of these takes minutes to hours.
    assert sentences("a" + "?!" * 200_000 + "b") == [("a" + "?!" * 200_000 + "b", False)]
    assert judge_by_rules("a " * 30 + "?" * 7_900 + "x", ["symptom: fever"]).content == 0.0
    assert facts_by_rules(["doctor: fever" + "." * 200_000 + "x"]) == [[]]


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=6), st.booleans())
def test_any_record_is_judged_without_an_exception(record: dict[str, Any], has_id: bool) -> None:
    problems = record_problems(record, has_id=has_id)
    assert problems  # none of these ends with a patient's turn by chance
    _, found = parse_line(json.dumps(record).encode())
    assert found


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40))
def test_any_line_is_judged_without_an_exception(raw: bytes) -> None:
    assert parse_line(raw)[1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=40), st.floats(0.01, 0.99))
def test_held_out_share_is_reached_with_the_fewest_of_the_order(names: list[str], frac: float) -> None:
    chosen = held_out_diagnoses(names, frac)
    num_moved = sum(name in chosen for name in names)
    assert num_moved >= frac * len(names)
    assert any(
        num_moved - names.count(name) < frac * len(names) for name in chosen
    )  # the last one was needed


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["patient", "doctor"]), st.sampled_from(["a", " ", "b c"])), max_size=8
    )
)
def test_rounds_add_up_to_the_session(turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": text} for role, text in turns]
    merged = merge_turns(messages)
    assert all(one["role"] != other["role"] for one, other in itertools.pairwise(merged))
    rounds = split_session(messages)
    assert len(rounds) == sum(message["role"] == "patient" for message in merged)
    for item in rounds:
        num_remaining = len(item.remaining.split("\n")) if item.remaining else 0
        assert len(item.messages) + num_remaining == len(merged)
        assert item.messages[-1]["role"] == "patient"
        later = [message["role"] for message in merged[len(item.messages) :]]
        assert (item.decision == "continue") == ("patient" in later)
