"""hidden_buttons: worlds and splits, rules, scripted ceilings, documents that cannot drift."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cod_async.config.schema import LifecycleConfig
from cod_async.engines.base import Completion, EngineCounters, SamplingParams
from cod_async.envs.base import TaskSpec
from cod_async.envs.hidden_buttons import SPEC, HiddenButtons
from cod_async.envs.hidden_buttons.documents import (
    _solve,
    bootstrap_documents,
    skills,
    vocabulary,
)
from cod_async.envs.hidden_buttons.worlds import Options, held_out_worlds, mapping_of, world_of
from cod_async.envs.note_documents import MAX_FACTS
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.documents import Document
from cod_async.lifecycle.hint import prompts_for
from cod_async.lifecycle.rendering import Renderer, load_renderer
from cod_async.lifecycle.rollout import LifecycleSpec, play
from cod_async.lifecycle.segment import LifecycleState, Segment, Version, VersionSpan
from cod_async.models.tokenizers import write_word_tokenizer

CROSS, DOOR = SPEC.options("cross"), SPEC.options("door")


def task(preset: str = "cross", pack_seed: int = 0, record_seed: int = 0, **record: Any) -> TaskSpec:
    return TaskSpec("hidden_buttons", preset, {}, {"seed": record_seed} | record, pack_seed, 0, 4)


def started(options: dict[str, Any], pack_seed: int = 0) -> tuple[HiddenButtons, str, list[str]]:
    environment = HiddenButtons(options)
    environment.reset(task(pack_seed=pack_seed))
    return environment, environment.task_view()["goal"], environment.hidden()["mapping"]


# ----------------------------------------------------------------------------------------------------- worlds


def test_worlds_are_all_permutations() -> None:
    options = Options.of(CROSS)
    mappings = {mapping_of(options, world) for world in range(options.num_worlds)}
    assert mappings == set(itertools.permutations(("Up", "Down", "Left", "Right", "In")))
    doors = [mapping_of(Options.of(DOOR), world) for world in range(4)]
    assert doors[2] == ("Shut", "Shut", "In", "Shut") and len(set(doors)) == 4


def test_held_out_worlds_are_24_of_120_and_balanced() -> None:
    options = Options.of(CROSS)
    held_out = held_out_worlds(options)
    assert len(held_out) == options.num_held_out == 24
    pairs = Counter(pair for world in held_out for pair in enumerate(mapping_of(options, world)))
    assert len(pairs) == 25 and set(pairs.values()) <= {4, 5, 6}
    assert held_out_worlds(Options.of(DOOR)) == frozenset()
    assert len(held_out_worlds(Options.of(CROSS | {"num_buttons": 4}))) == 4
    assert Options.of(DOOR | {"num_buttons": 2, "held_out_frac": 0.9}).num_held_out == 1


def test_pack_seeds_belong_to_their_split_and_reach_every_world() -> None:
    options = Options.of(CROSS)
    held_out = held_out_worlds(options)
    train = {world_of(options, SPEC.pack_seed_for(CROSS, "train", seed)) for seed in range(1500)}
    tested = {world_of(options, SPEC.pack_seed_for(CROSS, "held_out", seed)) for seed in range(400)}
    assert tested == held_out and train == set(range(120)) - held_out
    seed = SPEC.pack_seed_for(CROSS, "train", 7)
    assert SPEC.pack_seed_for(CROSS, "train", seed) == seed
    assert SPEC.pack_seed_for(DOOR, "held_out", 11) == 11
    with pytest.raises(EnvironmentInputError, match="no split"):
        SPEC.pack_seed_for(CROSS, "test", 0)


def test_records_are_endless_reproducible_and_cover_all_goals() -> None:
    first = list(itertools.islice(SPEC.records(CROSS, "train", 3), 300))
    assert first == list(itertools.islice(SPEC.records(CROSS, "train", 3), 300))
    assert first != list(itertools.islice(SPEC.records(CROSS, "held_out", 3), 300))
    environment = HiddenButtons(CROSS)
    goals = Counter(environment.reset(task(record_seed=record["seed"])) for record in first)
    assert set(goals) == {f"Task goal {goal}" for goal in ("Up", "Down", "Left", "Right", "In")}
    assert min(goals.values()) > 35  # 60 expected, standard deviation 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_buttons": 1}, "2 to 9"),
        ({"num_buttons": 10}, "2 to 9"),
        ({"num_buttons": "5"}, "num_buttons"),
        ({"num_tries": 0}, "1 to 9"),
        ({"retry_reward": 1.5}, "0 to 1"),
        ({"held_out_frac": 1.0}, "0.9"),
        ({"world": "cave"}, "world"),
        ({"colour": 1}, "colour"),
    ],
)
def test_wrong_options_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EnvironmentInputError, match=message):
        HiddenButtons(CROSS | changes)


def test_all_wrong_options_are_listed() -> None:
    with pytest.raises(EnvironmentInputError) as caught:
        HiddenButtons(CROSS | {"num_buttons": "5", "num_tries": 1.5, "colour": 1})
    assert [p.split(": ")[1] for p in caught.value.problems] == ["num_buttons", "num_tries", "colour"]


@pytest.mark.parametrize("record", [{}, {"seed": "1"}, {"seed": True}, {"seed": 1, "goal": "Up"}])
def test_wrong_records_are_named(record: dict[str, Any]) -> None:
    with pytest.raises(EnvironmentInputError, match="record"):
        HiddenButtons(CROSS).reset(TaskSpec("hidden_buttons", "cross", {}, record, 0, 0, 4))


# ------------------------------------------------------------------------------------------------------ rules


def test_rewards_facts_and_ends_of_cross() -> None:
    for pack_seed in range(20):
        environment, goal, mapping = started(CROSS, pack_seed)
        right = mapping.index(goal) + 1
        wrong = right % 5 + 1
        result = environment.press(f"{goal} : {right}")
        assert (result.is_done, result.raw_reward, result.finish) == (True, 1.0, "success")
        assert result.observation == environment.feedback() == f"{right}={goal}"

        environment.reset(task(pack_seed=pack_seed))
        first = environment.press(f"{goal} : {wrong}")
        assert not first.is_done and first.observation == f"{wrong}={mapping[wrong - 1]}"
        second = environment.press(f"{goal} : {right}")
        assert (second.is_done, second.raw_reward, second.metrics) == (True, 0.5, {"is_first_try": 0.0})
        assert environment.trajectory([]) == f"Log goal {goal} ; {first.observation}"

        environment.reset(task(pack_seed=pack_seed))
        environment.press(f"{goal} : {wrong}")
        failed = environment.press(f"{goal} : {wrong}")
        assert (failed.is_done, failed.raw_reward, failed.finish) == (True, 0.0, "out_of_steps")


def test_door_has_one_try_and_reveals_the_button_that_leads_in() -> None:
    for pack_seed in range(12):
        environment, goal, mapping = started(DOOR, pack_seed)
        secret = mapping.index("In") + 1
        assert goal == "In"
        result = environment.press(f"In : {secret % 4 + 1}")
        assert (result.is_done, result.raw_reward, result.observation) == (True, 0.0, f"{secret}=In")
        environment.reset(task(pack_seed=pack_seed))
        assert environment.press(f"In : {secret}").raw_reward == 1.0
        assert environment.trajectory([]) == "Log goal In"


@pytest.mark.parametrize(
    "text", ["", "Up", "Up :", "Up : 6", "Up : 0", "Up : ²", "Up : ٣", "Up 3", "x : 3", "Up : 3 ."]
)
def test_anything_else_is_a_format_error(text: str) -> None:
    environment, _, _ = started(CROSS)
    result = environment.press(text)
    assert (result.is_done, result.raw_reward, result.finish) == (True, 0.0, "format_error")
    assert environment.feedback() == "bad"


@given(text=st.text() | st.lists(st.sampled_from(["Up", ":", "1", "5", "6", "In", "\n"])).map(" ".join))
def test_no_text_raises(text: str) -> None:
    environment, _, _ = started(CROSS)
    result = environment.press(text)
    assert result.is_done == (result.finish == "format_error" or result.raw_reward == 1.0)


def test_step_before_reset_is_named() -> None:
    with pytest.raises(EnvironmentInputError, match="reset"):
        HiddenButtons(CROSS).press("Up : 1")


def test_truth_hint_tells_the_whole_world() -> None:
    assert SPEC.truth_hint is not None
    hint = SPEC.truth_hint(HiddenButtons(CROSS), task(pack_seed=4))
    mapping = mapping_of(Options.of(CROSS), world_of(Options.of(CROSS), 4))
    assert hint == "Hints : " + " ".join(f"{i + 1}={direction}" for i, direction in enumerate(mapping))
    assert SPEC.truth_hint(HiddenButtons(DOOR), task(pack_seed=4)).endswith("=In")


# --------------------------------------------------------------------------------------------------- policies


def play_policy(preset: str, policy: str, num_packs: int) -> list[float]:
    """Mean reward by position over packs of four."""
    options = SPEC.options(preset)
    environment = HiddenButtons(options)
    totals = [0.0] * 4
    for pack in range(num_packs):
        act, memory = SPEC.policies[policy](pack), dict[str, Any]()
        pack_seed = SPEC.pack_seed_for(options, "train", pack)
        records = SPEC.records(options, "train", pack)
        for position in range(4):
            spec = TaskSpec("hidden_buttons", preset, {}, next(records), pack_seed, position, 4)
            observation, is_done = environment.reset(spec), False
            while not is_done:
                result = environment.press(act(environment, observation, memory))
                observation, is_done = result.observation, result.is_done
            totals[position] += result.raw_reward
    return [total / num_packs for total in totals]


@pytest.mark.parametrize(
    ("preset", "policy", "expected"),
    [
        ("cross", "oracle", [0.30, 0.66, 0.84, 0.93]),
        ("cross", "forgetful", [0.30] * 4),
        ("cross", "random", [0.28] * 4),  # 1/5 + 4/5 * 1/5 * 1/2
        ("door", "oracle", [0.25, 1, 1, 1]),
        ("door", "forgetful", [0.25] * 4),
        ("door", "random", [0.25] * 4),
    ],
)
def test_scripted_ceilings_and_floors(preset: str, policy: str, expected: list[float]) -> None:
    # 3000 packs: standard error at most .008; the bound is four of them and the rounding of the reference
    assert play_policy(preset, policy, 3000) == pytest.approx(expected, abs=0.037)


# -------------------------------------------------------------------------------------------------- documents


@pytest.fixture(scope="module")
def terse(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    path: Path = tmp_path_factory.mktemp("terse")
    write_word_tokenizer(path, vocabulary(CROSS), 64)
    return load_renderer(path)


class Replay:
    """An engine that answers with given texts, in order."""

    def __init__(self, renderer: Renderer, texts: Sequence[str]) -> None:
        self.counters = EngineCounters()
        self.renderer, self.texts = renderer, list(texts)
        self.version, self.max_context_tokens = Version(0, 0), 512

    @property
    def extra_counters(self) -> dict[str, float]:
        return {}

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        ids = [*self.renderer.tokenizer.encode(self.texts.pop(0)), self.renderer.end_of_turn_id]
        return Completion(ids, [-1.0] * len(ids), (VersionSpan(self.version, len(ids)),), "stop")

    async def close_session(self, session: str) -> None:
        return None

    async def update_weights(self, manifest: object) -> None:
        raise NotImplementedError

    def announce(self, manifest: object) -> None:
        return None

    async def aclose(self) -> None:
        return None


async def play_all(
    spec: LifecycleSpec, state: LifecycleState, engine: Replay, renderer: Renderer, config: LifecycleConfig
) -> list[Segment]:
    stream = play(
        spec,
        state,
        engine=engine,
        environment=HiddenButtons(CROSS),
        renderer=renderer,
        config=config,
        temperature=1.0,
        top_p=1.0,
        max_context_tokens=64,
    )
    return [segment async for segment in stream]


def row_and_actions(segment: Segment) -> tuple[list[int], list[bool]]:
    (row,) = segment.rows
    ids = row.token_ids.numpy().tolist()
    acts = [any(start <= i < stop for start, stop in row.action_spans) for i in range(len(ids))]
    return ids, acts


def test_solve_and_hint_documents_are_rows_of_the_rollout(terse: Renderer) -> None:
    config = LifecycleConfig(max_response_tokens=8, max_hint_tokens=10, solve_penalty=0.0)
    prompts = prompts_for("terse")
    for seed in range(25):
        environment = HiddenButtons(CROSS)
        tasks = tuple(TaskSpec("hidden_buttons", "cross", {}, {"seed": seed + p}, seed, p, 2) for p in (0, 1))
        hint = [prompts.initial, prompts.failed, "Hints : 3=Left 1=Up"][seed % 3]
        document, facts, reward = _solve(environment, tasks[0], hint, random.Random(seed))
        trajectory = environment.trajectory([]) or ""
        system, user = prompts.update_messages(hint, trajectory, reward, environment.feedback())
        replies = [piece.text for piece in document.pieces if piece.kind == "response"]
        spec = LifecycleSpec("run", 0, 0, 0, "a", tasks, 0)

        state = LifecycleState(next_ordinal=0, hint=hint)
        engine = Replay(terse, [*replies, "[ 1=Up ]", "x", "x"])
        solve, update, _ = asyncio.run(play_all(spec, state, engine, terse, config))
        ids, acts = row_and_actions(solve)
        encoded, mask = document.encode(terse)
        assert encoded == ids and solve.raw_reward == reward
        # what is learned: every sampled token, and the fact between two presses; no control token of the
        # template
        first_action = acts.index(True)
        facts_between = {i for fact in facts[:-1] for i in terse.tokenizer.encode(fact)}
        for t, (token, is_action, is_learned) in enumerate(zip(ids, acts, mask, strict=True)):
            assert is_learned == (is_action or (t > first_action and token in facts_between))
        assert row_and_actions(update)[0] == [
            *terse.open(system, user),
            *terse.tokenizer.encode("[ 1=Up ]"),
            terse.end_of_turn_id,
        ]


def by_category(documents: list[Document]) -> dict[str, list[Document]]:
    return {name: [d for d in documents if d.category == name] for name in ("solve", "hint", "qa")}


def test_documents_teach_what_is_written_and_nothing_else(terse: Renderer) -> None:
    documents = bootstrap_documents(CROSS, 0, 4000)
    parts = by_category(documents)
    assert len(documents) == 4000 and len(parts["qa"]) == 1000
    assert 1.2 < len(parts["solve"]) / len(parts["hint"]) < 1.5  # four solves to three updates
    unknown = terse.tokenizer.token_id("<unk>")
    for document in documents:
        ids, mask = document.encode(terse)
        assert unknown not in ids and len(ids) <= 32 and not mask[0] and any(mask)

    # hint: the old facts, then the new ones, each once, never empty, never too many
    for document in parts["hint"]:
        opening, response = document.pieces
        old = [word for word in opening.system.split() if "=" in word]
        new = [word for word in opening.text.split() if "=" in word]
        written = response.text.split()
        assert written[0] == "[" and written[-1] == "]"
        assert written[1:-1] == [*old, *(fact for fact in dict.fromkeys(new) if fact not in old)]
        assert 1 <= len(written) - 2 <= MAX_FACTS
    starts = Counter(document.pieces[0].system.split()[3] for document in parts["hint"])
    assert starts["null"] > 300 and starts["none"] > 10

    # qa: one answer token, which is right, and nothing else is learned
    for document in parts["qa"]:
        ids, mask = document.encode(terse)
        assert sum(mask) == 1 and mask[-1]
        words = terse.tokenizer.decode(ids).split()
        assert f"{words[-1]}={words[-3]}" in words


def test_document_presses_are_uniform_whatever_the_hint_or_the_feedback_says() -> None:
    informed, repeated = Counter[bool](), Counter[bool]()
    buttons = Counter[str]()
    for document in by_category(bootstrap_documents(CROSS, 0, 24_000))["solve"]:
        known = dict(reversed(w.split("=")) for w in document.pieces[0].system.split() if "=" in w)
        goal = document.pieces[0].text.split()[-1]
        presses = [piece.text.split() for piece in document.pieces if piece.kind == "response"]
        for restated, colon, button in presses:
            assert (restated, colon) == (goal, ":")
            buttons[button] += 1
            if goal in known:
                informed[button == known[goal]] += 1
        if len(presses) == 2:
            repeated[presses[0][2] == presses[1][2]] += 1
    shares = [count / buttons.total() for count in buttons.values()]
    shares += [informed[True] / informed.total(), repeated[True] / repeated.total()]
    # one fifth each; standard errors at most .005
    assert shares == pytest.approx([0.2] * 7, abs=0.02)


def test_documents_never_show_a_held_out_world() -> None:
    options = Options.of(CROSS)
    held_out = [mapping_of(options, world) for world in held_out_worlds(options)]
    for document in bootstrap_documents(CROSS, 1, 3000):
        text = " ".join(f"{piece.system} {piece.text}" for piece in document.pieces)
        facts = {word for word in text.split() if "=" in word}
        if len(facts) >= 4:  # four facts leave one world
            assert not any(
                facts <= {f"{i + 1}={direction}" for i, direction in enumerate(mapping)}
                for mapping in held_out
            )


def test_documents_are_reproducible_and_vary() -> None:
    assert bootstrap_documents(CROSS, 5, 50) == bootstrap_documents(CROSS, 5, 50)
    assert bootstrap_documents(CROSS, 5, 50) != bootstrap_documents(CROSS, 6, 50)
    assert by_category(bootstrap_documents(CROSS, 5, 50, qa_frac=0.0))["qa"] == []


def test_door_documents_have_no_reading_part(tmp_path: Path) -> None:
    documents = bootstrap_documents(DOOR, 0, 500)
    assert not by_category(documents)["qa"]
    assert write_word_tokenizer(tmp_path, vocabulary(DOOR), 64) < 50
    renderer = load_renderer(tmp_path)
    unknown = renderer.tokenizer.token_id("<unk>")
    assert all(unknown not in document.encode(renderer)[0] for document in documents)


def test_skills_name_the_use_of_hints_as_not_taught() -> None:
    taught = {skill: is_taught for skill, is_taught, _ in skills(CROSS)}
    assert taught["faithful note-taking"] and taught["world model"]
    assert not taught["using a hint when acting"] and not taught["using earlier feedback when acting"]
    assert not {skill: is_taught for skill, is_taught, _ in skills(DOOR)}["world model"]
