"""Alchemy-Random: data set, worlds, targets, supplies and options against the reference's vectors."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest

from cod_async.envs.alchemy_random import SPEC
from cod_async.envs.alchemy_random.options import parse_options
from cod_async.envs.alchemy_random.planning import shortest_plan
from cod_async.envs.alchemy_random.world import (
    World,
    draw_world,
    exact_need,
    reachable_from,
    reference_need,
    supply,
    world_for_pack,
)
from cod_async.errors import EnvironmentInputError

EASY, HARD = SPEC.options("easy"), SPEC.options("hard")


def test_data_set_of_the_reference() -> None:
    train = [record["seed"] for record in itertools.islice(SPEC.records(EASY, "train", 42), 50_000)]
    held_out = [record["seed"] for record in itertools.islice(SPEC.records(HARD, "held_out", 42), 4_000)]
    assert train[:3] == [919213, 9467153, 6585777] and held_out[0] == 6377374
    assert len({*train, *held_out}) == 54_000 and max(*train, *held_out) < 10_000_000


def test_records_start_over_and_are_reached_directly() -> None:
    assert SPEC.record_at is not None and SPEC.num_records is not None
    assert (SPEC.num_records(EASY, "train"), SPEC.num_records(EASY, "held_out")) == (50_000, 4_000)
    stream = list(itertools.islice(SPEC.records(EASY, "held_out", 42), 4_002))
    assert stream[4_000:] == stream[:2]
    assert SPEC.record_at(EASY, "held_out", 42, 4_001) == stream[1]
    assert SPEC.record_at(EASY, "held_out", 42, 10**15 * 4_000 + 3_999) == stream[3_999]


@pytest.mark.parametrize(("split", "seed", "words"), [("test", 0, "splits are"), ("train", -1, "negative")])
def test_bad_data_arguments(split: str, seed: int, words: str) -> None:
    with pytest.raises(EnvironmentInputError, match=words):
        SPEC.records(EASY, split, seed)
    with pytest.raises(EnvironmentInputError, match="splits are"):
        SPEC.pack_seed_for(EASY, "test", 0)


def test_splits_share_no_world() -> None:
    seeds = {
        split: {SPEC.pack_seed_for(EASY, split, k) for k in range(300)} for split in ("train", "held_out")
    }
    assert len(seeds["train"]) == len(seeds["held_out"]) == 300
    assert not seeds["train"] & seeds["held_out"]
    names = {
        split: {draw_world(parse_options(EASY), seed, 4).tiers for seed in seeds[split]} for split in seeds
    }
    assert len(names["train"] | names["held_out"]) == 600


def test_world_of_the_reference() -> None:
    world = draw_world(parse_options(EASY), 0, 4)
    assert world == World(
        tiers=(("zjxf", "htq", "znsp", "isx"), ("iojiq", "zmw"), ("bxxc",), ("suqp",)),
        recipes={
            ("htq", "zjxf"): "iojiq",
            ("htq", "htq"): "zmw",
            ("iojiq", "zmw"): "bxxc",
            ("bxxc", "bxxc"): "suqp",
        },
        targets=("bxxc", "suqp", "iojiq", "zmw"),
    )
    assert len(draw_world(parse_options(EASY), 0, 8).targets) == 4  # there are only four elements to make
    assert len(draw_world(parse_options(EASY), 0, 2).targets) == 2
    assert world.tier_of("suqp") == 3 and world.tier_of("isx") == 0


def test_structure_of_easy_packs() -> None:
    """The published shares, over 1,500 packs of four tasks (standard errors below .013)."""
    options, num = parse_options(EASY), 1_500
    distinct: Counter[int] = Counter()
    tiers: Counter[int] = Counter()
    rounds: Counter[int] = Counter()
    for seed in range(num):
        world = draw_world(options, seed, 4)
        distinct[len(world.targets)] += 1
        base = dict.fromkeys(world.tiers[0], 1)
        for position in range(4):
            target = world.targets[position % len(world.targets)]
            tiers[world.tier_of(target)] += 1
            plan = shortest_plan(world.recipes, world.tiers, base, target, is_limited=False, max_rounds=8)
            assert plan is not None
            rounds[len(plan)] += 1
    for counts, total, shares in (
        (distinct, num, {2: 0.13, 3: 0.49, 4: 0.38}),
        (tiers, 4 * num, {1: 0.54, 2: 0.32, 3: 0.13}),
        (rounds, 4 * num, {1: 0.54, 2: 0.22, 3: 0.19, 4: 0.05}),
    ):
        assert set(counts) == set(shares)
        for key, share in shares.items():
            assert counts[key] / total == pytest.approx(share, abs=0.045)


def test_structure_of_hard_packs() -> None:
    options = parse_options(HARD)
    worlds = [draw_world(options, seed, 8) for seed in range(1_000)]
    assert sum(len(world.targets) for world in worlds) / 1_000 == pytest.approx(5.4, abs=0.2)
    for world in worlds:
        targets = set(world.targets)
        for tier, names in enumerate(world.tiers[1:]):
            below = set(world.tiers[tier])
            for pair, product in world.recipes.items():
                assert product not in names or below.issuperset(pair)  # a gap of 1: no cross-tier recipes
        assert targets <= reachable_from(world.tiers[0], world.recipes)


def test_limited_supply_of_the_reference_can_be_short_and_ours_is_not() -> None:
    ours, theirs = parse_options(HARD), parse_options({**HARD, "parity": True})
    num_short = num_tasks = 0
    for seed in range(600):
        world = draw_world(ours, seed, 8)
        assert world == draw_world(theirs, seed, 8)
        for position in range(8):
            target = world.targets[position % len(world.targets)]
            row_seed = 8 * seed + position
            need = exact_need(world, target)
            short = supply(theirs, world, target, row_seed)
            assert supply(ours, world, target, row_seed) == max(short, need)
            assert reference_need(world, target) <= need
            num_short += short < need
            num_tasks += 1
    assert num_short / num_tasks == pytest.approx(0.07, abs=0.02)


def test_supply_worked_by_hand() -> None:
    """s = m + m and m = a + b: four raw copies are used up, two of each; the reference counts m as raw."""
    world = World(
        tiers=(("a", "b"), ("m",), ("s",), ("t",)),
        recipes={("a", "b"): "m", ("m", "m"): "s", ("s", "s"): "t"},
        targets=("t",),
    )
    assert [exact_need(world, name) for name in ("m", "s", "t")] == [1, 2, 4]
    assert [reference_need(world, name) for name in ("m", "s", "t")] == [1, 1, 1]
    options = parse_options({**HARD, "material_mult_min": 3.2, "material_mult_max": 3.2})
    assert supply(options, world, "m", 0) == 3
    assert supply(options, world, "t", 0) == 4
    parity = parse_options({**HARD, "parity": True})
    # Multipliers are below 2, so int(1 * mult + .5) is 2 however they are drawn.
    assert {supply(parity, world, "t", seed) for seed in range(20)} == {2}
    assert supply(parse_options(EASY), world, "t", 0) == 1


def crowded(**changes: Any) -> dict[str, Any]:
    """Two elements a tier that both want three recipes of three pairs: often one of them gets none."""
    return {
        **EASY,
        "num_tiers_min": 4,
        "num_base_min": 2,
        "num_base_max": 2,
        "shrink_min": 1.0,
        "shrink_max": 1.0,
        "num_recipes_min": 3,
        "num_recipes_max": 3,
        **changes,
    }


def test_targets_that_nothing_makes_are_left_out() -> None:
    ours, theirs = parse_options(crowded()), parse_options(crowded(parity=True))
    num_dropped = 0
    for seed in range(50):
        mine, reference = draw_world(ours, seed, 6), draw_world(theirs, seed, 6)
        assert (mine.tiers, mine.recipes) == (reference.tiers, reference.recipes)
        reachable = reachable_from(mine.tiers[0], mine.recipes)
        assert mine.targets == tuple(name for name in reference.targets if name in reachable)
        num_dropped += len(reference.targets) - len(mine.targets)
    assert num_dropped > 0


def test_a_pack_whose_only_target_nothing_makes_gets_another() -> None:
    worlds = [draw_world(parse_options(crowded()), seed, 1) for seed in range(200)]
    drawn = [draw_world(parse_options(crowded(parity=True)), seed, 1) for seed in range(200)]
    assert any(mine.targets != reference.targets for mine, reference in zip(worlds, drawn, strict=True))
    for world in worlds:
        assert set(world.targets) <= reachable_from(world.tiers[0], world.recipes)


def test_distinct_targets() -> None:
    options = parse_options({**EASY, "has_distinct_targets": True})
    plain = parse_options(EASY)
    num_kept = 0
    for seed in range(60):
        world = world_for_pack(options, seed, 4)
        assert len(set(world.targets)) == 4
        num_kept += world == draw_world(plain, seed, 4)
        if len(draw_world(plain, seed, 4).targets) == 4:
            assert world == draw_world(plain, seed, 4)  # a world that does already is not drawn again
    assert 0 < num_kept < 60
    with pytest.raises(EnvironmentInputError, match=r"at most 4 elements to make.*a pack of 8 tasks"):
        world_for_pack(options, 0, 8)


def test_presets_of_the_paper() -> None:
    assert (EASY["max_rounds"], EASY["material_mode"], EASY["noise_ratio_max"]) == (8, "unlimited", 0.0)
    assert (HARD["max_rounds"], HARD["material_mode"], HARD["noise_ratio_max"]) == (15, "limited", 0.3)
    table = {
        "num_tiers": ((3, 4), (3, 4)),
        "num_base": ((3, 4), (4, 6)),
        "shrink": ((0.4, 0.6), (0.4, 0.8)),
        "num_recipes": ((1, 1), (1, 2)),
        "cross_tier_prob": ((0, 0.1), (0, 0.05)),
        "material_mult": ((1.5, 2), (1.5, 2)),
    }
    for key, (easy, hard) in table.items():
        assert (EASY[f"{key}_min"], EASY[f"{key}_max"]) == easy
        assert (HARD[f"{key}_min"], HARD[f"{key}_max"]) == hard
    for preset in (EASY, HARD):
        assert (preset["max_tier_gap"], preset["num_noise_rounds"]) == (1, 2)
        switches = ("has_distinct_targets", "has_attempt_lists", "is_last_result_told", "parity")
        assert not any(preset[key] for key in switches)


def test_all_option_problems_are_listed_at_once() -> None:
    bad = {
        "max_rounds": 0,
        "material_mode": "scarce",
        "num_tiers_min": 1,
        "num_tiers_max": 7,
        "num_base_min": "3",
        "num_base_max": 65,
        "shrink_min": -0.1,
        "shrink_max": float("nan"),
        "num_recipes_min": 0,
        "num_recipes_max": 2.0,
        "max_tier_gap": True,
        "cross_tier_prob_min": None,
        "cross_tier_prob_max": 1.1,
        "noise_ratio_min": float("-inf"),
        "noise_ratio_max": 2.5,
        "num_noise_rounds": -1,
        "material_mult_min": 0.5,
        "material_mult_max": 101,
        "has_distinct_targets": 1,
        "has_attempt_lists": "yes",
        "is_last_result_told": None,
        "parity": 0,
        "tiers": 3,
    }
    assert set(bad) - {"tiers"} == set(EASY)
    with pytest.raises(EnvironmentInputError) as caught:
        SPEC.make(bad)
    assert len(caught.value.problems) == len(bad)
    for key in bad:
        assert sum(f" {key} is" in problem or f" {key};" in problem for problem in caught.value.problems) == 1


def test_contradictory_options() -> None:
    swapped = {key.removesuffix("_min") + "_max": 1 for key in EASY if key.endswith("_min")}
    mins = dict.fromkeys(("num_base_min", "num_recipes_min", "material_mult_min", "noise_ratio_min"), 2)
    with pytest.raises(EnvironmentInputError) as caught:
        SPEC.make({**EASY, **swapped, **mins, "num_tiers_max": 2})
    assert [problem.split(": ")[1] for problem in caught.value.problems] == [
        "num_tiers_min is 3 but num_tiers_max is 2; num_tiers_min must not be larger",
        "num_base_min is 2 but num_base_max is 1; num_base_min must not be larger",
        "num_recipes_min is 2 but num_recipes_max is 1; num_recipes_min must not be larger",
        "noise_ratio_min is 2 but noise_ratio_max is 1; noise_ratio_min must not be larger",
        "material_mult_min is 2 but material_mult_max is 1; material_mult_min must not be larger",
    ]
