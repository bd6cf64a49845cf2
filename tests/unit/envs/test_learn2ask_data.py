"""Learn2Ask: the shipped sample, files of users with everything that can be wrong in them, and the splits."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from cod_async.config.check import check
from cod_async.config.schema import Config, EnvironmentConfig, LifecycleConfig
from cod_async.envs.learn2ask import SPEC
from cod_async.envs.learn2ask.dataset import SAMPLE, held_out_diagnoses
from cod_async.envs.learn2ask.generate import generate, templates
from cod_async.envs.learn2ask.prepare import records_text, write_records
from cod_async.envs.learn2ask.records import FIELDS, record_problems, session_of
from cod_async.envs.learn2ask.rules import judge_by_rules
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.packs import plan_pack

DEFAULT = SPEC.options("default")


def record(name: str, decision: str = "continue", **fields: Any) -> dict[str, Any]:
    return {
        "id": name,
        "messages": [{"role": "patient", "content": "My ear hurts."}],
        "decision": decision,
        "facts": ["symptom: fever"] if decision == "continue" else [],
        "diagnosis": "otitis",
        **fields,
    }


def options_for(path: Path, **overrides: Any) -> dict[str, Any]:
    return SPEC.options("default", {"path": str(path), **overrides})


def write_lines(path: Path, *lines: Any) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def problems_of(options: dict[str, Any], split: str = "train") -> list[str]:
    with pytest.raises(EnvironmentInputError) as caught:
        SPEC.records(options, split, 0)
    return list(caught.value.problems)


def test_sample_is_what_the_generator_makes() -> None:
    prepared = generate()
    assert SAMPLE.read_bytes() == records_text(prepared.records).encode()
    assert SAMPLE.stat().st_size <= 200_000
    assert generate(seed=1).records != prepared.records
    assert prepared.dropped["no_facts"] > 0 and prepared.dropped["session_ends_with_patient"] > 0


def test_every_record_of_the_sample_comes_to_every_position() -> None:
    """Rows are taken in order, so a common factor with the pack size would tie records to positions."""
    assert SPEC.num_records is not None
    for split in ("train", "held_out"):
        num = SPEC.num_records(DEFAULT, split)
        assert all(math.gcd(num, pack_size) == 1 for pack_size in range(2, 17))


def test_sample_is_well_formed_and_plausible() -> None:
    records = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    assert [record_problems(entry, has_id=True) for entry in records] == [[]] * len(records)
    assert len({entry["id"] for entry in records}) == len(records) > 300
    share = sum(entry["decision"] == "stop" for entry in records) / len(records)
    assert 0.2 < share < 0.4
    assert {entry["diagnosis"] for entry in records} == {item["name"] for item in templates()["diagnoses"]}
    facts = [fact for entry in records for fact in entry["facts"]]
    assert {fact.partition(":")[0] for fact in facts} == set(FIELDS)
    for entry in records:  # nothing is asked for that the dialogue has already been asked for
        said = " ".join(message["content"] for message in entry["messages"])
        slots = next(item["slots"] for item in templates()["diagnoses"] if item["name"] == entry["diagnosis"])
        asked = {slot["fact"] for slot in slots if slot["ask"] in said}
        assert not asked & set(entry["facts"])


def test_every_question_of_the_templates_is_a_good_one() -> None:
    slots = [slot for item in templates()["diagnoses"] for slot in item["slots"]]
    for slot in slots:
        scores = judge_by_rules(slot["ask"], [slot["fact"]])
        assert (scores.format, scores.content) == (1.0, 1.0), slot["ask"]
    assert len({slot["ask"] for slot in slots}) == len(slots)


def test_rows_come_in_file_order_and_start_over(tmp_path: Path) -> None:
    assert SPEC.record_at is not None and SPEC.num_records is not None
    names = [f"s{index}/1" for index in range(40)]
    path = write_lines(tmp_path / "data.jsonl", *(record(name) for name in names))
    options = options_for(path, held_out_by="session")
    train, held_out = (
        [
            entry["id"]
            for entry in itertools.islice(SPEC.records(options, split, 7), SPEC.num_records(options, split))
        ]
        for split in ("train", "held_out")
    )
    assert sorted([*train, *held_out], key=names.index) == names
    assert train == [name for name in names if name in train] and held_out
    assert SPEC.record_at(options, "train", 3, len(train) * 10**12 + 1)["id"] == train[1]
    stream = itertools.islice(SPEC.records(options, "held_out", 0), 2 * len(held_out))
    assert [entry["id"] for entry in stream] == held_out * 2
    plan = plan_pack([EnvironmentConfig(name="learn2ask", preset="default", options=options)], 4, 5, 1)
    assert [entry["id"] for entry in plan.records] == train[4:8]


def test_whole_diagnoses_are_held_out() -> None:
    records = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    order = sorted({entry["diagnosis"] for entry in records})
    random.Random(42).shuffle(order)
    moved: list[dict[str, Any]] = []
    for name in order:  # by hand: move whole diagnoses until a fifth of the records is reached
        if len(moved) >= 0.2 * len(records):
            break
        moved += [entry for entry in records if entry["diagnosis"] == name]
    assert SPEC.num_records is not None
    held_out = list(
        itertools.islice(SPEC.records(DEFAULT, "held_out", 0), SPEC.num_records(DEFAULT, "held_out"))
    )
    train = list(itertools.islice(SPEC.records(DEFAULT, "train", 0), SPEC.num_records(DEFAULT, "train")))
    assert sorted(entry["id"] for entry in held_out) == sorted(entry["id"] for entry in moved)
    assert len(train) + len(held_out) == len(records)
    assert not {entry["diagnosis"] for entry in train} & {entry["diagnosis"] for entry in held_out}


def test_split_does_not_depend_on_the_order_of_records() -> None:
    names = ["a"] * 5 + ["b"] * 30 + ["c"] * 7 + ["d"] * 2
    shuffled = random.Random(1).sample(names, len(names))
    assert held_out_diagnoses(names, 0.3) == held_out_diagnoses(shuffled, 0.3)


def test_sessions_stay_whole_when_they_are_held_out(tmp_path: Path) -> None:
    entries = [record(f"s{k}/{r}") for k in range(60) for r in (1, 2, 3)]
    options = options_for(write_lines(tmp_path / "data.jsonl", *entries), held_out_by="session")
    assert SPEC.num_records is not None
    sessions = {
        split: {
            session_of(entry["id"])
            for entry in itertools.islice(SPEC.records(options, split, 0), SPEC.num_records(options, split))
        }
        for split in ("train", "held_out")
    }
    assert not sessions["train"] & sessions["held_out"]
    assert len(sessions["train"] | sessions["held_out"]) == 60
    assert 3 <= len(sessions["held_out"]) <= 24  # a fifth, give or take four standard deviations


def test_second_file_is_the_held_out_split(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", record("s1/1"), record("s2/1", "stop"))
    second = write_lines(tmp_path / "b.jsonl", record("s3/1"))
    options = options_for(first, held_out_path=str(second))
    assert [next(SPEC.records(options, split, 0))["id"] for split in ("train", "held_out")] == [
        "s1/1",
        "s3/1",
    ]
    write_lines(second, record("s3/1"), record("s2/2"))
    (problem,) = problems_of(options)
    assert "share 1 sessions" in problem and "'s2'" in problem


def test_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", record("s1/1"), record("s2/1", diagnosis="flu"))
    options = options_for(path)
    assert next(SPEC.records(options, "train", 0))["id"] in ("s1/1", "s2/1")
    write_lines(path, record("s3/1"), record("s4/1", diagnosis="flu"))
    assert next(SPEC.records(options, "train", 0))["id"] in ("s3/1", "s4/1")


def test_every_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines: list[bytes] = [
        b"\xef\xbb\xbf" + json.dumps(record("s1/1")).encode() + b"\r",
        b"",
        b"{",
        b"[1]",
        b'"text"',
        b"\xff\xfe",
        b'{"id": NaN}',
        b"[" * 100_000,
        b'{"round": ' + b"9" * 6_000 + b"}",
        json.dumps(record("s1/1")).encode(),
        json.dumps(record("s3/1", facts=[])).encode(),
        json.dumps({**record("s4/1"), "note": 1, "decision": "ask"}).encode(),
        b'{"id": "' + b"x" * (1 << 20) + b'"}',
        json.dumps(record("s5/1", messages=[{"role": "doctor", "content": "Hi"}])).encode(),
        json.dumps(record("s6/1", messages=[{"role": "nurse", "content": 3}])).encode(),
        json.dumps(record("s7/1", messages=[{"role": "user", "content": "\ud800"}])).encode(),
        json.dumps({key: value for key, value in record("").items() if key != "id"}).encode(),
    ]
    path.write_bytes(b"\n".join(lines))
    problems = problems_of(options_for(path))
    expected = {
        3: "is not JSON",
        4: "must be an object",
        5: "must be an object",
        6: "is not UTF-8",
        7: "NaN",
        8: "nested too deeply",
        9: "is not JSON",
        10: "id 's1/1' was used in line 1",
        11: "facts is empty although decision is continue",
        12: "unknown field 'note'",
        13: "at most 1048576 are allowed",
        14: "must end with a turn of the patient",
        15: "messages[0].role is 'nurse'",
        16: "messages[0].content",
        17: "id is missing",
    }
    assert len(problems) == len(expected)
    for problem, (number, words) in zip(problems, expected.items(), strict=True):
        assert f"data.jsonl:{number}: " in problem and words in problem
    assert "decision is 'ask'" in problems[9]  # all problems of a line, not only the first


def test_list_of_broken_lines_is_capped(tmp_path: Path) -> None:
    problems = problems_of(options_for(write_lines(tmp_path / "data.jsonl", *["{"] * 1_000)))
    assert len(problems) == 21 and "980 more lines" in problems[-1]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot be read" in problems_of(options_for(tmp_path / "none.jsonl"))[0]
    assert "no regular file" in problems_of(options_for(tmp_path))[0]
    assert "cannot be read" in problems_of(SPEC.options("default", {"path": "a\ud800"}))[0]
    assert "holds no record" in problems_of(options_for(write_lines(tmp_path / "empty.jsonl", "", "  ")))[0]


def test_splits_that_cannot_be_made(tmp_path: Path) -> None:
    one = write_lines(tmp_path / "one.jsonl", record("s1/1"), record("s2/1"))
    assert "leaves no record for train" in problems_of(options_for(one))[0]
    unnamed = record("s3/1")
    del unnamed["diagnosis"]
    without = write_lines(tmp_path / "without.jsonl", record("s1/1"), unnamed)
    (problem,) = problems_of(options_for(without))
    assert "1 records have no diagnosis (line 2 is the first)" in problem and "held_out_by" in problem


def test_file_smaller_than_the_pack_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", *(record(f"s{k}/1", diagnosis=f"d{k}") for k in range(5)))
    environment = EnvironmentConfig(name="learn2ask", preset="default", options={"path": str(path)})
    with pytest.raises(EnvironmentInputError, match="train data has 4 records, the pack needs 5"):
        plan_pack([environment], 5, 0, 0)
    ralph = plan_pack([environment], 5, 0, 1, strategy="ralph_full")
    assert len({entry["id"] for entry in ralph.records}) == 1
    config = Config(environments=(environment,), lifecycle=LifecycleConfig(pack_size=5))
    found = [problem for problem in check(config) if problem.startswith("environments.0")]
    assert len(found) == 2 and "train data has 4 records, a pack needs 5" in found[0]


def test_configuration_is_checked_with_the_file(tmp_path: Path) -> None:
    """Before any process starts: a broken line is a problem of the configuration."""
    path = write_lines(tmp_path / "data.jsonl", record("s1/1"), "{")
    environment = EnvironmentConfig(name="learn2ask", preset="default", options={"path": str(path)})
    found = check(Config(environments=(environment,)))
    assert any(problem.startswith("environments.0: ") and "data.jsonl:2: " in problem for problem in found)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"id": ""}, "id is ''"),
        ({"id": 3}, "id is 3"),
        ({"diagnosis": "x" * 201}, "diagnosis is"),
        ({"round": True}, "round is True"),
        ({"round": -1}, "round is -1"),
        ({"decision": ["stop"]}, "decision is ['stop']"),
        ({"facts": "fever"}, "facts must be a list"),
        ({"facts": ["fever", " "]}, "facts[1] is ' '"),
        ({"facts": ["f"] * 101}, "at most 100"),
        ({"messages": []}, "list of 1 to 200"),
        ({"messages": ["Hi"]}, "messages[0] must hold role and content"),
        ({"messages": [{"role": ["patient"], "content": "Hi"}]}, "messages[0].role is ['patient']"),
        ({"messages": [{"role": "patient", "content": "x" * 20_001}]}, "messages[0].content"),
        ({"messages": [{"role": "patient", "content": "x" * 20_000}] * 6}, "120000 characters"),
    ],
)
def test_bad_records(changes: dict[str, Any], words: str) -> None:
    found = record_problems({**record("s1/1"), **changes})
    assert len(found) == 1 and words in found[0]


def test_pack_seeds_and_splits() -> None:
    seeds = {
        split: {SPEC.pack_seed_for(DEFAULT, split, k) for k in range(200)} for split in ("train", "held_out")
    }
    assert len(seeds["train"] | seeds["held_out"]) == 400
    for function in (SPEC.pack_seed_for, SPEC.records):
        with pytest.raises(EnvironmentInputError, match="splits are train, held_out"):
            function(DEFAULT, "test", 0)


def test_written_records_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "again.jsonl"
    write_records(path, generate(30, seed=3).records)
    options = options_for(path, held_out_by="session")
    known = {entry["id"]: entry for entry in generate(30, seed=3).records}
    first = next(SPEC.records(options, "train", 0))
    assert first == known[first["id"]]
