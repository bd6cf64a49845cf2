"""Learn2Ask: from raw sessions to records, on sessions worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cod_async.envs.learn2ask.generate import generate_sessions, known_facts, templates
from cod_async.envs.learn2ask.judging import parse_facts
from cod_async.envs.learn2ask.prepare import counts, prepare, read_sessions, split_session
from cod_async.envs.learn2ask.records import FIELDS
from cod_async.envs.learn2ask.rules import fact_of_question, facts_by_rules
from cod_async.errors import EnvironmentInputError


def said(*turns: str) -> list[dict[str, str]]:
    """``p: text`` and ``d: text`` as messages."""
    roles = {"p": "user", "d": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[3:]} for turn in turns]


EAR = said(
    "p: My ear hurts.",
    "p: Since yesterday.",
    "d: Left or right?",
    "p: Left.",
    "d: Any fever?",
    "d: Any cough?",
    "p: Only fever.",
    "d: Please come and see me.",
)


def test_rounds_of_a_session() -> None:
    rounds = split_session(EAR)
    assert [item.number for item in rounds] == [1, 2, 3]
    assert [item.decision for item in rounds] == ["continue", "continue", "stop"]
    assert list(rounds[0].messages) == [{"role": "patient", "content": "My ear hurts.\nSince yesterday."}]
    assert rounds[0].remaining.split("\n") == [
        "doctor: Left or right?",
        "patient: Left.",
        "doctor: Any fever? Any cough?",
        "patient: Only fever.",
        "doctor: Please come and see me.",
    ]
    assert rounds[2].remaining == "doctor: Please come and see me."
    assert [message["role"] for message in rounds[2].messages] == [
        "patient", "doctor", "patient", "doctor", "patient",
    ]  # fmt: skip


def test_patient_quoted_by_the_doctor_does_not_count_as_speaking() -> None:
    rounds = split_session(said("p: Hi", "d: So:\npatient: calm"))
    assert rounds[0].remaining == "doctor: So: patient: calm" and rounds[0].decision == "stop"


def test_records_and_named_drops() -> None:
    sessions = [
        {"id": "ear", "diagnosis": "otitis", "messages": EAR, "clinic": "further fields are ignored"},
        {"id": "thanks", "messages": said("p: Hi", "d: Any fever?", "p: No, thanks.")},
        {"id": "monologue", "messages": said("d: Hello?", "d: Anybody?")},
        {"id": "silent", "messages": said("p: Hi", "d:  ")},
        {"id": "pills", "messages": said("p: Hi", "d: Which tablets do you take?", "p: None.", "d: Good.")},
    ]
    seen: list[str] = []

    def extract(texts: Sequence[str]) -> list[list[str]]:
        seen.extend(texts)
        return [["symptom: fever"] if "fever" in text else [] for text in texts]

    prepared = prepare(sessions, extract)
    assert prepared.dropped == {
        "session_without_patient": 1,
        "session_ends_with_patient": 1,
        "empty_remaining": 1,
        "no_facts": 1,
    }
    records = {record["id"]: record for record in prepared.records}
    assert set(records) == {"ear/1", "ear/2", "ear/3", "pills/2"}
    assert records["ear/1"]["facts"] == records["ear/2"]["facts"] == ["symptom: fever"]
    assert records["ear/3"]["decision"] == "stop" and records["ear/3"]["facts"] == []
    assert records["ear/2"]["diagnosis"] == "otitis" and records["ear/2"]["round"] == 2
    assert "diagnosis" not in records["pills/2"]
    assert len(seen) == 3  # asked only where the doctor goes on
    assert counts(prepared.records) == {"continue": 2, "stop": 2}


def test_shuffle_depends_on_its_seed_alone() -> None:
    sessions = generate_sessions(20)
    orders = [[record["id"] for record in prepare(sessions, known_facts, seed).records] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_all_broken_sessions_are_listed() -> None:
    sessions: list[Any] = [
        {"id": "a", "messages": EAR},
        {"id": "a", "messages": EAR},
        7,
        {"messages": []},
        {"id": "b", "messages": [{"role": "nurse", "content": "Hi"}]},
    ]
    with pytest.raises(EnvironmentInputError) as caught:
        prepare(sessions)
    problems = caught.value.problems
    assert [problem.partition(":")[0] for problem in problems] == [f"session {k}" for k in (1, 2, 3, 4)]
    assert "'a' was used before" in problems[0] and "id is missing" in problems[2]
    with pytest.raises(EnvironmentInputError, match="30 more sessions are broken"):
        prepare([{}] * 50)


def test_extractor_must_answer_for_every_chat() -> None:
    with pytest.raises(EnvironmentInputError, match="gave 0 lists of facts for 2"):
        prepare([{"id": "ear", "messages": EAR}], lambda texts: [])


def test_sessions_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "sessions.jsonl"
    path.write_text(json.dumps({"id": "ear", "messages": EAR}) + "\n\n", encoding="utf-8")
    assert prepare(read_sessions(path)).records
    path.write_text("{}\n{\n[\n", encoding="utf-8")
    with pytest.raises(EnvironmentInputError) as caught:
        read_sessions(path)
    assert [problem.partition(": ")[0] for problem in caught.value.problems] == [f"{path}:2", f"{path}:3"]
    with pytest.raises(EnvironmentInputError, match="cannot be read"):
        read_sessions(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("question", "fact"),
    [
        ("Where does it hurt?", "location: hurt"),
        ("How severe is the cough?", "severity: severe cough"),
        ("Is the cough dry?", "nature: cough dry"),
        ("Is it worse after meals?", "trigger: worse meal"),
        ("Do you also have a fever?", "symptom: fever"),
        ("Which tablets do you take?", None),
        ("Any allergies?", None),
        ("And you?", None),
    ],
)
def test_stand_in_extraction(question: str, fact: str | None) -> None:
    assert fact_of_question(question) == fact


def test_stand_in_extraction_against_the_templates() -> None:
    """Rules are crude; they must find most fields and never take an ignored question for a fact."""
    slots = [slot for item in templates()["diagnoses"] for slot in item["slots"]]
    guessed = [(fact_of_question(slot["ask"]) or "").partition(":")[0] for slot in slots]
    right = sum(guess == slot["fact"].partition(":")[0] for guess, slot in zip(guessed, slots, strict=True))
    assert right >= 0.75 * len(slots) and set(guessed) == set(FIELDS)
    assert all(fact_of_question(slot["ask"]) is None for slot in templates()["ignored"])
    sessions = generate_sessions(40)
    by_rules, known = (prepare(sessions, extract) for extract in (facts_by_rules, known_facts))
    assert by_rules.dropped == known.dropped
    assert [record["id"] for record in by_rules.records] == [record["id"] for record in known.records]


@pytest.mark.parametrize(
    ("reply", "facts"),
    [
        ('So.\nOutput:\n["symptom: a", "Location:  left  ear"]', ["symptom: a", "location: left ear"]),
        ('Output: ["symptom: a"]\nI mean\nOutput: ["symptom: b"] done', ["symptom: b"]),
        ('output []', []),
        ('Output: ["nature: pain [sharp]"]', ["nature: pain [sharp]"]),
        ('Output: ["medication: pills", "symptom:", "symptom: a", "symptom: a"]', ["symptom: a"]),
        ('["symptom: a"]', None),
        ("Output: none", None),
        ("Output: [1]", None),
        ("Output: ['symptom: a']", None),
        ("Output: " + "[" * 100_000, None),
    ],
)  # fmt: skip
def test_replies_of_an_extracting_model(reply: str, facts: list[str] | None) -> None:
    assert parse_facts(reply) == facts
