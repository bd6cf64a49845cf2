"""FrozenLake-Obscure: data set, maps, mappings and options against the reference's published vectors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from cod_async.envs.frozen_lake_obscure import SPEC
from cod_async.envs.frozen_lake_obscure.mapgen import (
    MAPPINGS,
    LakeMap,
    distances_to_goal,
    is_accepted,
    make_map,
    mapping_for_seed,
)
from cod_async.errors import EnvironmentInputError

EASY, HARD = SPEC.options("easy"), SPEC.options("hard")


def rounded(record: dict[str, Any]) -> tuple[int, int, float]:
    return record["seed"], record["size"], round(record["p"], 6)


def test_data_set_of_the_reference() -> None:
    train = [rounded(record) for record in itertools.islice(SPEC.records(EASY, "train", 42), 3)]
    assert train == [(15795, 4, 0.678069), (860, 4, 0.663695), (76820, 5, 0.609840)]
    assert SPEC.num_records is not None
    assert [SPEC.num_records(EASY, split) for split in ("train", "held_out")] == [50_000, 4_000]
    assert rounded(next(SPEC.records(EASY, "held_out", 42))) == (85779, 5, 0.677281)
    assert next(SPEC.records(HARD, "train", 42))["seed"] == 15795  # the seed columns of both presets coincide


def test_duplicate_seeds_as_in_the_reference() -> None:
    train = [record["seed"] for record in itertools.islice(SPEC.records(EASY, "train", 42), 50_000)]
    held_out = [record["seed"] for record in itertools.islice(SPEC.records(EASY, "held_out", 42), 4_000)]
    assert len(train) - len(set(train)) == 10_698
    known = set(train)
    assert sum(seed in known for seed in held_out) == 1_586


def test_records_start_over_and_are_reached_directly() -> None:
    assert SPEC.record_at is not None
    stream = list(itertools.islice(SPEC.records(EASY, "held_out", 42), 4_002))
    assert stream[4_000:] == stream[:2]
    assert SPEC.record_at(EASY, "held_out", 42, 4_001) == stream[1]
    assert SPEC.record_at(EASY, "held_out", 42, 10**15 * 4_000 + 3_999) == stream[3_999]


def test_records_follow_options_and_seed() -> None:
    options = SPEC.options("easy", {"size_min": 3, "size_max": 4, "p_min": 0.9, "p_max": 0.95})
    rows = list(itertools.islice(SPEC.records(options, "train", 1 << 40), 500))
    assert {row["size"] for row in rows} == {3, 4}
    assert all(0.9 <= row["p"] < 0.95 for row in rows)
    assert rows[0] != next(SPEC.records(options, "train", 0))


@pytest.mark.parametrize(("split", "seed", "words"), [("test", 0, "splits are"), ("train", -1, "negative")])
def test_bad_data_arguments(split: str, seed: int, words: str) -> None:
    with pytest.raises(EnvironmentInputError, match=words):
        SPEC.records(EASY, split, seed)
    with pytest.raises(EnvironmentInputError, match="splits are"):
        SPEC.pack_seed_for(EASY, "test", 0)


@pytest.mark.parametrize(
    ("size", "p", "seed", "cap", "rows", "start", "goal"),
    [
        (4, 0.65, 0, 6, "FFGS/HHFH/FHHF/HFHF", (0, 3), (0, 2)),
        (5, 0.65, 1, 6, "FHFSF/FHGFF/HFFHF/FFFFF/HFFHH", (0, 3), (1, 2)),
    ],
)
def test_maps_of_the_reference(
    size: int, p: float, seed: int, cap: int, rows: str, start: tuple[int, int], goal: tuple[int, int]
) -> None:
    assert make_map(seed, size, p, cap) == LakeMap(rows=tuple(rows.split("/")), start=start, goal=goal)


def test_mappings_of_the_reference() -> None:
    assert mapping_for_seed(0) == ("Up", "Down", "Right", "Left")
    assert mapping_for_seed(1) == ("Left", "Down", "Up", "Right")
    assert mapping_for_seed(2) == ("Right", "Up", "Left", "Down")
    assert MAPPINGS[0] == ("Down", "Right", "Up", "Left")
    assert MAPPINGS[1] == ("Down", "Right", "Left", "Up")
    assert len(set(MAPPINGS)) == 24
    assert {mapping_for_seed((1 << 64) - 1 - k) for k in range(500)} == set(MAPPINGS)


def lake(*rows: str) -> LakeMap:
    cells = {letter: (r, c) for r, row in enumerate(rows) for c, letter in enumerate(row) if letter in "SG"}
    return LakeMap(rows=rows, start=cells["S"], goal=cells["G"])


def test_reachability_allows_one_step_more_than_the_cap() -> None:
    corridor = lake("SFFFG", "HHHHH", "HHHHH", "HHHHH", "HHHHH")
    assert distances_to_goal(corridor)[corridor.start] == 4
    assert is_accepted(corridor, 3)
    assert not is_accepted(corridor, 2)


def test_reachability_keeps_the_depth_first_quirk() -> None:
    """Left goes first: the cell above S is popped at length 3 by a detour; the way on is over the cap."""
    quirky = lake("HHG", "FFF", "FSH")
    assert distances_to_goal(quirky)[quirky.start] == 3
    assert not is_accepted(quirky, 3)
    assert is_accepted(quirky, 4)


@pytest.mark.parametrize(
    ("preset", "shares", "mean"),
    [
        ("easy", (0.22, 0.27, 0.20, 0.15, 0.10, 0.04, 0.02), 2.86),
        ("hard", (0.13, 0.17, 0.16, 0.16, 0.14, 0.10, 0.08, 0.04, 0.03), 3.98),
    ],
)
def test_shares_of_shortest_paths(preset: str, shares: tuple[float, ...], mean: float) -> None:
    """The published shares by path length, 1 first (4,000 rows: standard error below 0.007)."""
    options = SPEC.options(preset)
    counts: dict[int, int] = {}
    for row in itertools.islice(SPEC.records(options, "held_out", 42), 4_000):
        made = make_map(row["seed"], row["size"], row["p"], options["env_max_steps"])
        steps = distances_to_goal(made)[made.start]
        counts[steps] = counts.get(steps, 0) + 1
    for steps, share in enumerate(shares, start=1):
        assert counts[steps] / 4_000 == pytest.approx(share, abs=0.03)
    assert max(counts) == len(shares) == options["env_max_steps"] + 1
    assert sum(steps * count for steps, count in counts.items()) / 4_000 == pytest.approx(mean, abs=0.1)


def test_presets_of_the_paper() -> None:
    table = {"easy": (4, 5, 6, 8), "hard": (6, 7, 8, 10)}
    for preset, (size_min, size_max, env_max_steps, agent_max_steps) in table.items():
        options = SPEC.options(preset)
        assert (options["size_min"], options["size_max"]) == (size_min, size_max)
        assert (options["env_max_steps"], options["agent_max_steps"]) == (env_max_steps, agent_max_steps)
        assert (options["p_min"], options["p_max"], options["mapping_mode"]) == (0.6, 0.7, "per_pack")


def test_all_option_problems_are_listed_at_once() -> None:
    bad = {
        "size_min": 1,
        "size_max": "5",
        "p_min": -0.1,
        "p_max": float("nan"),
        "env_max_steps": True,
        "agent_max_steps": 0,
        "mapping_mode": "per_world",
        "mapping_index": 24,
        "is_last_move_told": 1,
        "num_held_out_mappings": 24,
        "grid": 3,
    }
    with pytest.raises(EnvironmentInputError) as caught:
        SPEC.make(bad)
    assert len(caught.value.problems) == len(bad)
    for key in bad:
        assert sum(f" {key} " in problem or f" {key};" in problem for problem in caught.value.problems) >= 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"size_min": 5, "size_max": 4}, "size_min is 5 but size_max is 4"),
        ({"p_min": 0.8}, "p_min is 0.8 but p_max is 0.7"),
        ({"num_held_out_mappings": 4, "mapping_mode": "global"}, "mapping_mode is global"),
    ],
)
def test_contradictory_options(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(EnvironmentInputError, match=words):
        SPEC.make(SPEC.options("easy", overrides))


def test_splits_share_no_pack_seed_and_by_default_all_mappings() -> None:
    seeds = {
        split: [SPEC.pack_seed_for(EASY, split, k) for k in range(500)] for split in ("train", "held_out")
    }
    assert not set(seeds["train"]) & set(seeds["held_out"])
    assert SPEC.has_held_out_worlds is not None and not SPEC.has_held_out_worlds(EASY)
    for values in seeds.values():
        assert {mapping_for_seed(seed) for seed in values} == set(MAPPINGS)


@pytest.mark.parametrize("count", [1, 6, 23])
def test_held_out_mappings_never_occur_in_training(count: int) -> None:
    options = SPEC.options("easy", {"num_held_out_mappings": count})
    met = {
        split: {mapping_for_seed(SPEC.pack_seed_for(options, split, seed)) for seed in range(600)}
        for split in ("train", "held_out")
    }
    assert len(met["held_out"]) == count and len(met["train"]) == 24 - count
    assert not met["train"] & met["held_out"]
    assert SPEC.has_held_out_worlds is not None and SPEC.has_held_out_worlds(options)
