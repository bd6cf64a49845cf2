"""Prompts of both styles: what must be in them, what must not."""

from __future__ import annotations

import pytest

from cod_async.lifecycle.hint import FullPrompts, TersePrompts, prompts_for, terse_number

FULL, TERSE = FullPrompts(), TersePrompts()


def test_styles_are_found_by_name() -> None:
    assert isinstance(prompts_for("full"), FullPrompts)
    assert isinstance(prompts_for("terse"), TersePrompts)


@pytest.mark.parametrize("prompts", [FULL, TERSE])
def test_placeholders_are_labelled_different_and_hold_no_fact(prompts: FullPrompts | TersePrompts) -> None:
    assert prompts.initial != prompts.failed
    for placeholder in (prompts.initial, prompts.failed):
        assert placeholder.startswith(prompts.label + " ")
        assert prompts.num_facts(placeholder) == 0


def test_full_solver_prompt_has_rules_then_hint_then_length() -> None:
    text = FULL.solve_system("RULES\n", "Hints: - go left {num_tokens}", 123)
    places = [
        text.index(part) for part in ("RULES", "Hints: - go left {num_tokens}", "no more than 123 tokens")
    ]
    assert places == sorted(places) and text.count("\n## ") == 2
    assert "## " not in FULL.solve_system("RULES", "", 0)
    assert FULL.solve_system("RULES", FULL.initial).endswith(FULL.initial)


def test_full_updater_prompt_has_everything_exactly_once() -> None:
    hint, record, feedback = "Hints: OLD {trajectory}", "TRAJ {reward}", "FB {feedback}"
    system, user = FULL.update_messages(hint, record, 0.98765, feedback, 77)
    assert system.count(FULL.start) == 1 and system.count(FULL.end) == 1
    assert system.index(FULL.start) < system.index(FULL.end)
    assert "no more than 77 tokens" in system
    for part in ("Hints: OLD {trajectory}", "TRAJ {reward}", "Reward: 0.988\n", "Feedback: FB {feedback}\n"):
        assert user.count(part) == 1
    assert user.index("OLD") < user.index("TRAJ") < user.index("0.988") < user.index("FB")
    assert "tokens" not in FULL.update_messages("Hints: x", "t", 0.0, "f")[0]
    assert "0.250; the most that can be reached is 1.0" in FULL.update_messages("Hints: x", "t", 0.25, " ")[1]


def test_full_trajectory_has_rules_and_one_block_per_step() -> None:
    messages = [("user", "see 1"), ("assistant", "do 1"), ("assistant", "do 1b"), ("user", "see 2")]
    blocks = FULL.trajectory("RULES", messages).split("\n\n")
    assert blocks == [
        "Rules given to the solver:\nRULES",
        "Step 1\nObservation: see 1\nAction: do 1b",
        "Step 2\nObservation: see 2\nAction: (none was taken)",
    ]


def test_full_hints_count_bullets() -> None:
    assert FULL.num_facts("Hints: - a\n* b\n  + c\ntext") == 3
    assert FULL.num_facts("Hints: just a sentence") == 1


def test_full_parse_keeps_the_inner_text_and_ignores_the_rest() -> None:
    text = f"I think.\n{FULL.start}\n- a\n\n### x\n- b\n{FULL.end}\nbye"
    assert FULL.parse(text) == "Hints: - a\n\n### x\n- b"
    assert FULL.parse(f"{FULL.start}\n \n{FULL.end}") is None
    assert FULL.parse(f"{FULL.start} in my words {text}") is None


def test_terse_prompts_are_the_documented_words() -> None:
    assert TERSE.solve_system("", "Hints : 3=Left 1=Up", 99) == "Hints : 3=Left 1=Up ."
    assert TERSE.solve_system("R", TERSE.initial) == "R Hints : null ."
    assert TERSE.solve_system("R", "") == "R"
    written = TERSE.update_messages("Hints : null", "Log goal Up ; 3=Left", 0.5, "1=Up")
    assert written == ("Write Hints : null .", "Log goal Up ; 3=Left ; 1=Up reward .5 .")
    assert TERSE.update_messages(TERSE.failed, "Log", 0.0, "")[1] == "Log reward 0 ."
    assert TERSE.parse("[  3=Left\n1=Up ] x") == "Hints : 3=Left 1=Up"
    assert TERSE.num_facts("Hints : 3=Left 1=Up") == 2
    assert TERSE.trajectory("", [("user", "a"), ("assistant", "b")]) == "Log a ; b"


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (0, "0"),
        (0.04, "0"),
        (0.05, ".1"),
        (0.5, ".5"),
        (0.949, ".9"),
        (0.95, "1"),
        (-0.1, "-.1"),
        (1.25, "1.3"),
    ],
)
def test_terse_numbers(value: float, word: str) -> None:
    assert terse_number(value) == word
