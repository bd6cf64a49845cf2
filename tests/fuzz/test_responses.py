"""The short form of the response fuzz, for every day, and proof that it would notice.

``python -m tests.fuzz.responses`` does it at length; its report lies in ``docs/reports/response_fuzz.md``.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from cod_async.envs import registry
from cod_async.envs.base import StepResult
from cod_async.envs.hidden_buttons.env import HiddenButtons

from . import parsing
from .answers import ANSWERS
from .mutations import MAX_CHARS, MUTATIONS, mutate
from .playing import REWARDS, BrokenRuleError, check_result, replay
from .responses import (
    broken_by,
    make_target,
    markdown,
    minimised,
    row_of,
    shrink,
    targets,
    write_failure,
)

COUNTS = {"parser": 150, "pde_discovery": 40}
NAMES = sorted(targets())


@pytest.mark.parametrize("name", NAMES)
def test_hostile_responses_break_nothing(name: str) -> None:
    count = COUNTS.get(name.partition("/")[0], 80)
    target = make_target(name, 11, None)
    assert target.run(count) is None
    assert target.tally.num_bad >= count


def test_every_environment_and_preset_is_a_target() -> None:
    environments = {f"{name}/{preset}" for name in registry.names() for preset in registry.get(name).presets}
    assert {name for name in NAMES if not name.startswith("parser/")} == environments
    assert sum(targets().values()) == pytest.approx(1.0)
    assert set(REWARDS) | set(ANSWERS) <= set(registry.names())


@pytest.mark.parametrize("name", ["parser/actions", "terminal/default"])
def test_a_seed_gives_the_same_responses_and_results(name: str) -> None:
    first, second, other = make_target(name, 3, None), make_target(name, 3, None), make_target(name, 4, None)
    for target in (first, second, other):
        assert target.run(40) is None
    assert row_of(name, first.tally)["digest"] == row_of(name, second.tally)["digest"]
    assert row_of(name, first.tally)["digest"] != row_of(name, other.tally)["digest"]


def test_mutations_stay_bounded_and_change_most_texts() -> None:
    rng = random.Random(5)
    huge = "<answer>" + "9" * MAX_CHARS + "</answer>"
    answer = "<answer><controller>clip(x-1.5, -1, 1)</controller></answer>"
    for name, mutation in MUTATIONS.items():
        assert len(mutation(rng, huge)) <= 3 * MAX_CHARS, name  # cut to size by mutate()
        assert any(mutation(rng, answer) != answer for _ in range(20)), name
        mutation(rng, "")
    assert len(mutate(rng, huge)[0]) <= MAX_CHARS


def test_what_breaks_an_environment_is_found_made_smaller_and_played_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = HiddenButtons.press

    def fragile(self: HiddenButtons, response: str) -> StepResult:
        if "<a>" in response:
            raise ValueError("no tags please")
        return real(self, response)

    monkeypatch.setattr(HiddenButtons, "press", fragile)
    failure = make_target("hidden_buttons/door", 1, None).run(5_000)
    assert failure is not None and failure.problem == "ValueError: no tags please"
    smaller = minimised(failure)
    assert smaller.responses[-1] == ("<a>",) and not any(smaller.responses[:-1])
    path = write_failure(tmp_path, smaller)
    saved = json.loads(path.read_text())
    responses = tuple(map(tuple, saved["responses"]))
    assert broken_by(saved["target"], saved["plan"], responses) == failure.problem
    monkeypatch.undo()
    assert broken_by(saved["target"], saved["plan"], responses) == ""


def test_rewards_out_of_range_and_bad_texts_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    check_result("learn2ask", StepResult("", True, 4.0))
    for result in (
        StepResult("", True, 4.0),
        StepResult("", True, float("nan")),
        StepResult("", False, 1.0),
        StepResult("\ud800", False),
        StepResult("x" * 100_000, False),
        StepResult("", True, metrics={"loss": float("inf")}),
    ):
        with pytest.raises(BrokenRuleError):
            check_result("hidden_buttons", result)

    def cheating(self: HiddenButtons, response: str) -> StepResult:
        self._mapping = self._mapping[::-1]
        return StepResult("ok", True)

    monkeypatch.setattr(HiddenButtons, "press", cheating)
    failure = make_target("hidden_buttons/cross", 1, None).run(50)
    assert failure is not None and "hidden world" in failure.problem
    assert "hidden world" in replay(failure.plan, failure.responses, None)


def test_what_breaks_a_parser_is_found_and_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    def fragile(text: str) -> None:
        if "=" in text and "<" in text:
            raise RecursionError("too deep")

    monkeypatch.setitem(parsing.PARSERS, "hints", (fragile, lambda rng: "a <answer x='1'> of some length"))
    failure = make_target("parser/hints", 1, None).run(100)
    assert failure is not None
    assert sorted(minimised(failure).responses[0][0]) == ["<", "="]


def test_texts_shrink_within_their_tries() -> None:
    calls = 0

    def is_broken(text: str) -> bool:
        nonlocal calls
        calls += 1
        return "x" in text

    assert shrink("a" * 500 + "x" + "b" * 500, is_broken) == "x"
    calls = 0
    shrink("x" * 10_000, is_broken, num_tries=7)
    assert calls == 7


def test_the_report_has_a_line_for_every_target() -> None:
    target = make_target("parser/hints", 2, None)
    assert target.run(30) is None
    row = row_of("parser/hints", target.tally) | {"rss_growth_mib": 0.0, "problems": []}
    assert row["num_mutated"] + row["num_hostile"] == 30 and len(target.tally.step_ms) == 30
    report = {"command": "x", "python": "3", "seed": 2, "num_mutated": 20, "num_hostile": 10, "num_valid": 0}
    page = markdown(report | {"problems": [], "targets": [row, row]})
    assert page.count("| parser/hints |") == 2
