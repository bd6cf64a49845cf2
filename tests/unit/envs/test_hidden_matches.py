"""hidden_matches: worlds and splits, words, rules, ceilings, documents that teach no use of a hint."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cod_async.envs import commands
from cod_async.envs.base import TaskSpec
from cod_async.envs.hidden_buttons import SPEC as BUTTONS
from cod_async.envs.hidden_buttons.documents import vocabulary as buttons_vocabulary
from cod_async.envs.hidden_matches import SPEC, HiddenMatches
from cod_async.envs.hidden_matches.documents import bootstrap_documents, skills, vocabulary
from cod_async.envs.hidden_matches.worlds import THEMES, Options, goal_of, mapping_of
from cod_async.envs.note_documents import MAX_FACTS, frame_words
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.documents import Document
from cod_async.lifecycle.rendering import load_renderer
from cod_async.models.tokenizers import write_word_tokenizer

ROOMS, MACHINES = SPEC.options("rooms"), SPEC.options("machines")
FAMILIES = pytest.mark.parametrize("preset", ["rooms", "machines"])


def task(preset: str = "rooms", pack_seed: int = 0, record_seed: int = 0, **record: Any) -> TaskSpec:
    return TaskSpec("hidden_matches", preset, {}, {"seed": record_seed} | record, pack_seed, 0, 4)


def started(preset: str = "rooms", pack_seed: int = 0) -> tuple[HiddenMatches, str, dict[str, str]]:
    environment = HiddenMatches(SPEC.options(preset))
    environment.reset(task(preset, pack_seed))
    return environment, environment.task_view()["goal"], environment.hidden()["mapping"]


# ------------------------------------------------------------------------------------------- words and worlds


def test_families_share_the_frame_and_no_other_word() -> None:
    frame = set(frame_words())
    own = [set(vocabulary(options)) - frame for options in (ROOMS, MACHINES)]
    own.append(set(buttons_vocabulary(BUTTONS.options("cross"))) - frame)
    # the button 1 is a word of the frame, where it is a reward
    assert [len(words) for words in own] == [1 + 5 + 5 + 25] * 2 + [4 + 5 + 25]
    assert all(not first & second for first, second in itertools.combinations(own, 2))
    assert all(len(theme.items) == len(theme.places) == 6 for theme in THEMES.values())


def test_families_can_open_a_task_with_the_same_words() -> None:
    shared = SPEC.options("machines", {"has_own_noun": False})
    environment = HiddenMatches(shared)
    assert environment.reset(task("machines")).startswith("Task goal ")
    assert environment.trajectory([]) == f"Log goal {environment.task_view()['goal']}"
    assert set(vocabulary(MACHINES)) - set(vocabulary(shared)) == {"machine"}


@FAMILIES
def test_worlds_are_the_permutations_of_hidden_buttons(preset: str) -> None:
    options = Options.of(SPEC.options(preset))
    buttons = BUTTONS.make(BUTTONS.options("cross"))
    names = dict(zip(("Up", "Down", "Left", "Right", "In"), options.places, strict=True))
    for pack_seed in range(40):
        buttons.reset(TaskSpec("hidden_buttons", "cross", {}, {"seed": 0}, pack_seed, 0, 4))
        mapping = mapping_of(options, pack_seed)
        assert tuple(mapping) == options.items
        assert list(mapping.values()) == [names[direction] for direction in buttons.hidden()["mapping"]]


@FAMILIES
def test_pack_seeds_belong_to_their_split_and_reach_every_world(preset: str) -> None:
    options = SPEC.options(preset)

    def worlds(split: str, num: int) -> set[tuple[str, ...]]:
        seeds = (SPEC.pack_seed_for(options, split, seed) for seed in range(num))
        return {tuple(mapping_of(Options.of(options), seed).values()) for seed in seeds}

    train, held_out = worlds("train", 1500), worlds("held_out", 400)
    assert (len(train), len(held_out)) == (96, 24) and not train & held_out
    everything = SPEC.options(preset, {"held_out_frac": 0.0})
    assert SPEC.pack_seed_for(everything, "held_out", 11) == 11
    with pytest.raises(EnvironmentInputError, match="no split"):
        SPEC.pack_seed_for(options, "test", 0)


def test_records_are_endless_reproducible_and_cover_all_goals() -> None:
    first = list(itertools.islice(SPEC.records(ROOMS, "train", 3), 300))
    assert first == list(itertools.islice(SPEC.records(ROOMS, "train", 3), 300))
    assert first != list(itertools.islice(SPEC.records(ROOMS, "held_out", 3), 300))
    assert first != list(itertools.islice(SPEC.records(MACHINES, "train", 3), 300))
    goals = Counter(goal_of(Options.of(ROOMS), record) for record in first)
    assert set(goals) == set(THEMES["rooms"].places[:5]) and min(goals.values()) > 35  # 60 expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_items": 1}, "2 to 6"),
        ({"num_items": 7}, "2 to 6"),
        ({"num_items": True}, "num_items"),
        ({"num_tries": 0}, "1 to 9"),
        ({"retry_reward": -0.5}, "0 to 1"),
        ({"held_out_frac": 1.0}, "0.9"),
        ({"theme": "ships"}, "ships"),
        ({"color": 1}, "color"),
    ],
)
def test_wrong_options_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EnvironmentInputError, match=message):
        HiddenMatches(ROOMS | changes)


def test_all_wrong_options_are_listed() -> None:
    with pytest.raises(EnvironmentInputError) as caught:
        HiddenMatches(ROOMS | {"num_items": "5", "num_tries": 1.5, "color": 1})
    assert len(caught.value.problems) == 3
    with pytest.raises(EnvironmentInputError) as caught:
        HiddenMatches(ROOMS | {"num_items": 9, "num_tries": 0})
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("record", [{}, {"seed": "1"}, {"seed": True}, {"seed": 1, "goal": "Hall"}])
def test_wrong_records_are_named(record: dict[str, Any]) -> None:
    with pytest.raises(EnvironmentInputError, match="record"):
        HiddenMatches(ROOMS).reset(TaskSpec("hidden_matches", "rooms", {}, record, 0, 0, 4))


# ------------------------------------------------------------------------------------------------------ rules


@FAMILIES
def test_rewards_facts_and_ends(preset: str) -> None:
    noun = {"rooms": "room", "machines": "machine"}[preset]
    for pack_seed in range(20):
        environment, goal, mapping = started(preset, pack_seed)
        right = next(item for item, place in mapping.items() if place == goal)
        wrong = next(item for item in mapping if item != right)
        result = environment.press(f"{goal} : {right}")
        assert (result.is_done, result.raw_reward, result.finish) == (True, 1.0, "success")
        assert result.observation == environment.feedback() == f"{right}={goal}"

        assert environment.reset(task(preset, pack_seed)) == f"Task {noun} {goal}"
        first = environment.press(f"{goal} : {wrong}")
        assert not first.is_done and first.observation == f"{wrong}={mapping[wrong]}"
        second = environment.press(f"{goal} : {right}")
        assert (second.is_done, second.raw_reward, second.metrics) == (True, 0.5, {"is_first_try": 0.0})
        assert environment.trajectory([]) == f"Log {noun} {goal} ; {first.observation}"

        environment.reset(task(preset, pack_seed))
        environment.press(f"{goal} : {wrong}")
        failed = environment.press(f"{goal} : {wrong}")
        assert (failed.is_done, failed.raw_reward, failed.finish) == (True, 0.0, "out_of_steps")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hall",
        "Hall :",
        "Hall : pink",
        "Hall : wrench",
        "Pump : red",
        "Tower : red",
        "Hall red",
        "Hall : red .",
    ],
)
def test_anything_else_is_a_format_error(text: str) -> None:
    environment, _, _ = started()
    result = environment.press(text)
    assert (result.is_done, result.raw_reward, result.finish) == (True, 0.0, "format_error")
    assert environment.feedback() == "bad"


@given(text=st.text() | st.lists(st.sampled_from(["Hall", ":", "red", "saw", "\n"])).map(" ".join))
def test_no_text_raises(text: str) -> None:
    environment, _, _ = started()
    result = environment.press(text)
    assert result.is_done == (result.finish == "format_error" or result.raw_reward == 1.0)


def test_step_before_reset_is_named() -> None:
    with pytest.raises(EnvironmentInputError, match="reset"):
        HiddenMatches(ROOMS).press("Hall : red")


def test_truth_hint_tells_the_whole_world() -> None:
    assert SPEC.truth_hint is not None
    hint = SPEC.truth_hint(HiddenMatches(MACHINES), task("machines", pack_seed=4))
    facts = (f"{item}={place}" for item, place in mapping_of(Options.of(MACHINES), 4).items())
    assert hint == "Hints : " + " ".join(facts)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("oracle", [0.30, 0.66, 0.84, 0.93]),
        ("forgetful", [0.30] * 4),
        ("random", [0.28] * 4),  # 1/5 + 4/5 * 1/5 * 1/2
    ],
)
@FAMILIES
def test_scripted_ceilings_and_floors(preset: str, policy: str, expected: list[float]) -> None:
    # the values of hidden_buttons; 2000 packs: standard error at most .009, the bound is four of them
    played = commands.play("hidden_matches", preset, None, policy, 2000, solve_penalty=0.0)
    assert [point["mean"] for point in played["reward_by_position"]] == pytest.approx(expected, abs=0.037)


# -------------------------------------------------------------------------------------------------- documents


def by_category(documents: Sequence[Document]) -> dict[str, list[Document]]:
    return {name: [d for d in documents if d.category == name] for name in ("solve", "hint", "qa")}


@FAMILIES
def test_documents_teach_what_is_written_and_nothing_else(preset: str, tmp_path: Path) -> None:
    options = SPEC.options(preset)
    write_word_tokenizer(tmp_path, vocabulary(options), 64)
    renderer = load_renderer(tmp_path)
    parts = by_category(bootstrap_documents(options, 0, 2000))
    assert sum(map(len, parts.values())) == 2000 and len(parts["qa"]) == 500
    unknown = renderer.tokenizer.token_id("<unk>")
    for document in itertools.chain(*parts.values()):
        ids, mask = document.encode(renderer)
        assert unknown not in ids and len(ids) <= 32 and not mask[0] and any(mask)
    for document in parts["hint"]:
        opening, response = document.pieces
        old = [word for word in opening.system.split() if "=" in word]
        new = [word for word in opening.text.split() if "=" in word]
        written = response.text.split()
        assert (written[0], written[-1]) == ("[", "]") and 1 <= len(written) - 2 <= MAX_FACTS
        assert written[1:-1] == [*old, *(fact for fact in dict.fromkeys(new) if fact not in old)]
    for document in parts["qa"]:
        words = renderer.tokenizer.decode(document.encode(renderer)[0]).split()
        assert sum(document.encode(renderer)[1]) == 1 and f"{words[-1]}={words[-3]}" in words


@FAMILIES
def test_tries_are_uniform_whatever_the_hint_or_the_feedback_says(preset: str) -> None:
    informed, repeated, items = Counter[bool](), Counter[bool](), Counter[str]()
    for document in by_category(bootstrap_documents(SPEC.options(preset), 0, 24_000))["solve"]:
        facts = [word.split("=") for word in document.pieces[0].system.split() if "=" in word]
        known = {place: item for item, place in facts}
        goal = document.pieces[0].text.split()[-1]
        tries = [piece.text.split() for piece in document.pieces if piece.kind == "response"]
        for restated, colon, item in tries:
            assert (restated, colon) == (goal, ":")
            items[item] += 1
            if goal in known:
                informed[item == known[goal]] += 1
        if len(tries) == 2:
            repeated[tries[0][2] == tries[1][2]] += 1
    shares = [count / items.total() for count in items.values()]
    shares += [informed[True] / informed.total(), repeated[True] / repeated.total()]
    # one fifth each; standard errors at most .005
    assert shares == pytest.approx([0.2] * 7, abs=0.02)


def test_documents_never_show_a_held_out_world_and_are_reproducible() -> None:
    options = Options.of(ROOMS)
    seeds = [SPEC.pack_seed_for(ROOMS, "held_out", seed) for seed in range(400)]
    held_out = {frozenset(f"{i}={p}" for i, p in mapping_of(options, seed).items()) for seed in seeds}
    documents = bootstrap_documents(ROOMS, 1, 3000)
    num_checked = 0
    for document in documents:
        text = " ".join(f"{piece.system} {piece.text}" for piece in document.pieces)
        facts = {word for word in text.split() if "=" in word}
        if len(facts) >= 4:  # four facts leave one world
            num_checked += 1
            assert not any(facts <= world for world in held_out)
    assert num_checked > 300
    assert documents == bootstrap_documents(ROOMS, 1, 3000) != bootstrap_documents(ROOMS, 2, 3000)


def test_skills_say_what_is_taught() -> None:
    table = {skill: is_taught for skill, is_taught, _ in skills(ROOMS)}
    assert table["looking up a fact"] and table["faithful note-taking"] and table["world model"]
    assert not table["using a hint when acting"] and not table["using earlier feedback when acting"]
    assert not {skill: known for skill, known, _ in skills(ROOMS | {"num_tries": 1})}["world model"]
