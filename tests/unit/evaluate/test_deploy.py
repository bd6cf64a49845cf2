"""Whole evaluations against engines whose answers are known: curves, controls and their pairing, modes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
from evaluation_world import ScriptedEngine, ask, config_for, entry

from cod_async.envs import registry
from cod_async.envs.base import StepResult, TaskSpec
from cod_async.envs.hidden_buttons import SPEC, HiddenButtons
from cod_async.errors import InputError, WorkError
from cod_async.evaluate.results import FolderLock
from cod_async.evaluate.suite import Suite, SuiteEntry, resolve


def curve(report: dict[str, Any]) -> list[float]:
    return [point["mean"] for point in report["reward_by_position"]]


ALL = ("normal", "blanked", "swapped", "truth")


def test_a_player_that_reads_hints_shows_the_effect_and_its_controls(
    model_dirs: dict[str, Path], scripted: list[ScriptedEngine], tmp_path: Path
) -> None:
    asked = entry(controls=ALL, num_packs=24, lifecycles_per_pack=1)
    answer = ask(model_dirs["door"], tmp_path, asked)
    normal, blanked, swapped, truth = answer["reports"]
    first = curve(normal)[0]
    # Button 1 is right in some worlds; after one press the note names the right one.
    assert 0 < first < 0.6
    assert curve(normal)[1:] == [1.0, 1.0, 1.0]
    assert normal["gap"] == pytest.approx(1 - first)
    assert normal["mean"] == pytest.approx((first + 3) / 4)
    assert curve(blanked) == [first] * 4 and blanked["gap"] == 0.0
    # Another pack's note names another button, always a wrong one.
    assert curve(swapped) == [first, 0.0, 0.0, 0.0]
    assert curve(truth) == [1.0] * 4
    for report in (normal, blanked, swapped, truth):
        assert report["well_formed_frac"] == 1.0
        assert report["steps_mean"] == 1.0
    assert {row["n"] for row in answer["rows"]} == {24}
    assert {row["format_error_frac"] for row in answer["rows"]} == {0.0}
    assert [row["well_formed_frac"] for row in answer["rows"][:4]] == [1.0, 1.0, 1.0, None]
    assert scripted[0].is_closed
    assert answer["num_played"] == 4 * 24 and answer["failures"] == [] and answer["not_available"] == []
    assert json.loads((tmp_path / "answer.json").read_text()) == answer


def test_the_writer_keeps_its_own_history(
    model_dirs: dict[str, Path], scripted: list[ScriptedEngine], tmp_path: Path
) -> None:
    ask(model_dirs["door"], tmp_path, entry(controls=("blanked",)))
    solves = [prompt for prompt in scripted[0].prompts if "Write" not in prompt]
    updates = [prompt for prompt in scripted[0].prompts if "Write" in prompt]
    assert all("null" in prompt.split("goal")[0] for prompt in solves)
    # updates 1 and 2 of every lifecycle still see the fact noted before
    assert sum("=" in prompt.split("Log")[0] for prompt in updates) == len(updates) * 2 // 3


def test_swapped_alone_plays_the_normal_lifecycles_but_reports_itself_only(
    model_dirs: dict[str, Path], scripted: list[ScriptedEngine], tmp_path: Path
) -> None:
    asked = entry("cross", controls=("swapped",))
    answer = ask(model_dirs["cross"], tmp_path, asked, config=config_for("cross"))
    assert [report["control"] for report in answer["reports"]] == ["swapped"]
    assert answer["reports"][0]["num_lifecycles"] == 12 and answer["num_played"] == 24


def test_ralph_packs_repeat_one_task_and_its_notes_help_at_once(
    model_dirs: dict[str, Path], scripted: list[ScriptedEngine], tmp_path: Path
) -> None:
    asked = entry("cross", strategies=("ralph_sample", "ralph_full"), num_packs=12, lifecycles_per_pack=1)
    answer = ask(model_dirs["cross"], tmp_path, asked, config=config_for("cross"))
    assert [report["mode"] for report in answer["reports"]] == ["ralph_sample", "ralph_full"]
    goals = [prompt.split("goal ")[1].split()[0] for prompt in scripted[0].prompts if "Write" not in prompt]
    assert len(set(goals)) > 1
    for report in answer["reports"]:
        points = curve(report)
        # One goal, and another button at every task until the right one is found, which then is pressed at
        # once: a lifecycle's reward never falls.
        assert points == sorted(points) and points[0] < points[-1]


def test_without_carry_there_are_no_updates(
    model_dirs: dict[str, Path], scripted: list[ScriptedEngine], tmp_path: Path
) -> None:
    answer = ask(model_dirs["door"], tmp_path, entry(carry="none"))
    assert {(row["mode"], row["carry"]) for row in answer["rows"]} == {("none", "none")}
    assert len(set(curve(answer["reports"][0]))) == 1
    assert {row["well_formed_frac"] for row in answer["rows"]} == {None}
    assert not any("Write" in prompt for prompt in scripted[0].prompts)


def test_a_transcript_carries_the_conversation(
    model_dirs: dict[str, Path], scripted: list[ScriptedEngine], tmp_path: Path
) -> None:
    answer = ask(model_dirs["door"], tmp_path, entry(carry="transcript", pack_size=2))
    assert {(row["mode"], row["carry"]) for row in answer["rows"]} == {("cod", "transcript")}
    later = [prompt for prompt in scripted[0].prompts if prompt.count("goal") == 2]
    assert len(later) == 12


def test_seeds_pool_their_packs(
    model_dirs: dict[str, Path], scripted: list[ScriptedEngine], tmp_path: Path
) -> None:
    asked = entry(num_packs=5)
    (own,) = ask(model_dirs["door"], tmp_path / "own", asked, seeds=(1, 2, 3))["reports"]
    assert own["num_packs"] == 15 and own["num_lifecycles"] == 30
    assert [(part["seed"], part["n"]) for part in own["by_seed"]] == [(1, 5), (2, 5), (3, 5)]
    # The mean over seeds of equal size is the pooled one, and one seed alone gives that seed's curve.
    means = [part["reward_by_position"][0]["mean"] for part in own["by_seed"]]
    assert own["reward_by_position"][0]["mean"] == pytest.approx(sum(means) / 3)
    (alone,) = ask(model_dirs["door"], tmp_path / "alone", asked, seeds=(2,))["reports"]
    assert alone["reward_by_position"] == own["by_seed"][1]["reward_by_position"] and alone["by_seed"] == []
    # Seeds that play the same packs add samples to the packs, not packs.
    (same,) = ask(model_dirs["door"], tmp_path / "same", asked, seeds=(1, 2, 3), data_seed=1)["reports"]
    assert same["num_packs"] == 5 and same["num_lifecycles"] == 30
    (first,) = ask(model_dirs["door"], tmp_path / "first", asked, seeds=(1,))["reports"]
    assert same["reward_by_position"] == first["reward_by_position"]  # this player draws nothing


def test_only_what_changed_is_played_again(
    model_dirs: dict[str, Path], scripted: list[ScriptedEngine], tmp_path: Path
) -> None:
    def counts(*entries: SuiteEntry, model: str = "door", **how: Any) -> tuple[int, int]:
        answer = ask(model_dirs[model], tmp_path, *entries, **how)
        return answer["num_played"], answer["num_kept"]

    assert counts(entry()) == (12, 0)
    assert counts(entry()) == (0, 12)
    assert len(scripted) == 1  # nothing to play, no model opened
    assert counts(entry(num_packs=8)) == (4, 12)
    assert counts(entry(num_packs=8, lifecycles_per_pack=3)) == (8, 16)
    assert counts(entry(controls=("normal", "blanked"))) == (12, 12)
    assert counts(entry(), entry(name="more", strategies=("ralph_full",))) == (12, 12)
    assert counts(entry(max_hint_tokens=11)) == (12, 0)
    assert counts(entry(), seeds=(1, 2)) == (12, 12)
    assert counts(entry("cross"), model="cross", config=config_for("cross")) == (12, 0)
    assert counts(entry(name="another name", controls=("normal", "blanked"))) == (0, 24)


def test_controls_that_cannot_be_played_are_listed(
    model_dirs: dict[str, Path],
    scripted: list[ScriptedEngine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One hidden world for all packs, and nobody who could tell it.
    bare = msgspec.structs.replace(SPEC, truth_hint=None, pack_seed_for=lambda options, split, seed: 0)
    monkeypatch.setattr(registry, "get", lambda name: bare)
    answer = ask(model_dirs["door"], tmp_path, entry(controls=ALL))
    assert [report["control"] for report in answer["reports"]] == ["normal", "blanked"]
    reasons = {missing["control"]: missing["reason"] for missing in answer["not_available"]}
    assert set(reasons) == {"truth", "swapped"}
    assert "no hint that tells" in reasons["truth"] and "all 6 packs" in reasons["swapped"]
    assert answer["failures"] == [] and answer["num_played"] == 24


@pytest.mark.parametrize("carry", ["none", "transcript"])
def test_controls_without_a_hint_are_refused_by_name(carry: str) -> None:
    _, problems = resolve(Suite(name="t", entries=(entry(carry=carry, controls=ALL),)), config_for())
    assert [problem.split()[2] for problem in problems] == ["blanked", "swapped", "truth"]
    assert all(f'"{carry}"' in problem for problem in problems)


def test_progress_ends_at_the_total(
    model_dirs: dict[str, Path], scripted: list[ScriptedEngine], tmp_path: Path
) -> None:
    told: list[dict[str, Any]] = []
    ask(model_dirs["door"], tmp_path, entry(), on_progress=told.append)
    assert (told[-1]["done"], told[-1]["total"], told[-1]["num_kept"]) == (12, 12, 0)
    assert told[-1]["per_s"] > 0 and told[-1]["left_s"] == 0
    ask(model_dirs["door"], tmp_path, entry(num_packs=7), on_progress=told.append)
    assert (told[-1]["done"], told[-1]["total"], told[-1]["num_kept"]) == (14, 14, 12)


def test_the_real_engine_and_separate_processes_agree(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    asked = entry(controls=("normal", "swapped"), splits=("train", "held_out"), num_packs=4)
    here = ask(model_dirs["door"], tmp_path / "here", asked)
    there = ask(model_dirs["door"], tmp_path / "there", asked, num_processes=2)
    assert here["rows"] == there["rows"] and here["reports"] == there["reports"]
    with pytest.raises(InputError, match="nowhere"):
        ask(tmp_path / "nowhere", tmp_path / "out", asked)


def test_a_worker_passes_on_what_is_wrong(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model_dirs["door"].iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="config"):
        ask(broken, tmp_path / "out", entry(), num_processes=2)


def test_a_folder_is_used_by_one_evaluation_at_a_time(
    model_dirs: dict[str, Path], scripted: list[ScriptedEngine], tmp_path: Path
) -> None:
    lock = FolderLock(tmp_path)
    with pytest.raises(InputError, match="another evaluation is at work"):
        ask(model_dirs["door"], tmp_path, entry())
    lock.release()
    assert ask(model_dirs["door"], tmp_path, entry())["num_played"] == 12


class Flaky(HiddenButtons):
    """Fails as infrastructure: where button 1 is right always, elsewhere once in every pack."""

    failed: ClassVar[set[int]] = set()

    def reset(self, task: TaskSpec) -> str:
        self._task = task
        return super().reset(task)

    async def step(self, response: str) -> StepResult:
        is_first = self._task.position == 2 and self._task.pack_seed not in Flaky.failed
        if is_first or self.hidden()["mapping"][0] == "In":
            Flaky.failed.add(self._task.pack_seed)
            raise RuntimeError("the simulator is gone")
        return await super().step(response)


def test_what_fails_as_infrastructure_is_played_again_and_never_scored(
    model_dirs: dict[str, Path],
    scripted: list[ScriptedEngine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = entry(num_packs=12, lifecycles_per_pack=1)
    (right,) = ask(model_dirs["door"], tmp_path / "sound", asked)["reports"]
    Flaky.failed.clear()
    monkeypatch.setattr(registry, "get", lambda name: msgspec.structs.replace(SPEC, make=Flaky))
    answer = ask(model_dirs["door"], tmp_path / "flaky", asked)
    (report,) = answer["reports"]
    # The player presses button 1 first, so the worlds that fail are those where it was right at once.
    num_lost = round(12 * right["reward_by_position"][0]["mean"])
    assert 0 < num_lost < 12 and len(answer["failures"]) == num_lost
    assert "the simulator is gone" in answer["failures"][0]
    assert (report["num_missing"], report["num_packs"]) == (num_lost, 12 - num_lost)
    assert curve(report) == [0.0, 1.0, 1.0, 1.0]
    lines = next((tmp_path / "flaky" / "results").iterdir()).read_text().splitlines()
    kept = [json.loads(line.split(" ", 1)[1]) for line in lines]
    assert [result["num_retries"] for result in kept] == [1] * (12 - num_lost)
    # Failures are not kept: the same command tries them again, and only them.
    monkeypatch.setattr(registry, "get", lambda name: SPEC)
    again = ask(model_dirs["door"], tmp_path / "flaky", asked)
    assert again["num_played"] == num_lost and again["failures"] == []
    assert again["reports"][0]["reward_by_position"] == right["reward_by_position"]


def test_an_environment_that_always_fails_ends_the_evaluation(
    model_dirs: dict[str, Path],
    scripted: list[ScriptedEngine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Flaky, "step", lambda self, response: 1 / 0)
    monkeypatch.setattr(registry, "get", lambda name: msgspec.structs.replace(SPEC, make=Flaky))
    with pytest.raises(WorkError, match="no lifecycle could be played"):
        ask(model_dirs["door"], tmp_path / "few", entry(num_packs=2))
    with pytest.raises(WorkError, match="more than 20 lifecycles"):
        ask(model_dirs["door"], tmp_path / "many", entry(num_packs=40))
