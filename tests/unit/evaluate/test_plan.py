"""Which packs are played, and what identifies a lifecycle."""

from __future__ import annotations

from typing import Any

import pytest
from evaluation_world import config_for
from hypothesis import given, settings
from hypothesis import strategies as st

from cod_async.config.schema import EnvironmentConfig
from cod_async.evaluate.plan import Packs, donors, lifecycle_key, pack_digest, sampling_seed, setting_digest
from cod_async.evaluate.suite import Setting, Suite, SuiteEntry, resolve
from cod_async.lifecycle.packs import plan_pack
from cod_async.lifecycle.seeds import hash64


def setting(environment: str, preset: str, **changes: Any) -> Setting:
    settings: dict[str, Any] = {"num_packs": 4, "pack_size": 4, "splits": ("train",)}
    entry = SuiteEntry(environment=environment, preset=preset, **(settings | changes))
    (made,), problems = resolve(Suite(name="t", entries=(entry,)), config_for(max_response_tokens=8))
    assert problems == []
    return made


@pytest.mark.parametrize("strategy", ["cod", "ralph_sample", "ralph_full"])
def test_a_data_set_is_cut_into_the_packs_that_training_would_plan(strategy: str) -> None:
    made = setting("learn2ask", "default", strategies=(strategy,), num_packs=20)
    packs = Packs(made, 3)
    mixture = (EnvironmentConfig(name="learn2ask", preset="default"),)
    run_seed = hash64("evaluation/train/3") >> 8
    for group in range(20):
        wanted = plan_pack(mixture, 4, run_seed, group, "train", strategy=strategy)  # type: ignore[arg-type]
        assert packs.plan(group) == wanted


def test_held_out_rows_are_those_of_the_data_seed() -> None:
    """FrozenLake's first test row, as published; and none of a run's own training rows."""
    packs = Packs(setting("frozen_lake_obscure", "easy", splits=("held_out",), num_packs=0), 42)
    assert packs.num_packs == 1_000
    first = packs.plan(0).records[0]
    assert (first["seed"], first["size"]) == (85779, 5)
    packs = Packs(setting("terminal", "default", splits=("held_out",), num_packs=0), 7)
    held_out = {record["seed"] for index in range(1_000) for record in packs.plan(index).records}
    mixture = (EnvironmentConfig(name="terminal", preset="default"),)
    trained = {
        record["seed"] for group in range(12_500) for record in plan_pack(mixture, 4, 7, group).records
    }
    assert len(held_out) == 4_000 and len(trained) == 50_000 and not held_out & trained


def test_an_entry_may_have_a_data_seed_of_its_own() -> None:
    assert setting("pde_discovery", "eval", pack_size=8, data_seed=5).data_seed == 5
    assert setting("pde_discovery", "eval", pack_size=8).data_seed is None


def test_the_whole_data_set() -> None:
    # 83 held-out records: 20 packs of 4 and one that is filled up, or 83 packs of one task each.
    num_packs = {
        strategy: Packs(
            setting("learn2ask", "default", strategies=(strategy,), splits=("held_out",), num_packs=0), 0
        ).num_packs
        for strategy in ("cod", "ralph_sample", "ralph_full")
    }
    assert num_packs == {"cod": 21, "ralph_sample": 21, "ralph_full": 83}
    packs = Packs(setting("learn2ask", "default", splits=("held_out",), num_packs=0), 0)
    records = [str(record) for index in range(21) for record in packs.plan(index).records]
    assert len(set(records)) == 83 and records[83] == records[0]


def test_rows_are_shuffled_by_the_seed() -> None:
    def rows(data_seed: int, is_shuffled: bool) -> list[str]:
        made = setting("learn2ask", "default", num_packs=0, is_shuffled=is_shuffled)
        packs = Packs(made, data_seed)
        return [str(record) for index in range(60) for record in packs.plan(index).records]

    plain, first, second = rows(0, False), rows(0, True), rows(1, True)
    assert set(plain) == set(first) == set(second) and len(set(plain)) == 239
    assert plain != first != second
    assert rows(0, True) == first


def test_a_used_up_data_set_starts_over_with_new_worlds() -> None:
    packs = Packs(setting("learn2ask", "default", splits=("held_out",), num_packs=22), 0)
    first, again = packs.plan(0), packs.plan(21)
    assert first.records == again.records and first.pack_seed != again.pack_seed


def test_ralph_packs_repeat_one_task() -> None:
    for strategy in ("ralph_sample", "ralph_full"):
        packs = Packs(setting("alchemy_random", "easy", strategies=(strategy,), num_packs=5), 0)
        for group in range(5):
            tasks = packs.plan(group).tasks()
            assert len({str(task.record) for task in tasks}) == 1
            assert {task.position for task in tasks} == {0 if strategy == "ralph_sample" else group % 4}


def test_splits_and_seeds_have_packs_of_their_own() -> None:
    seen = {
        (split, seed): {
            Packs(setting("hidden_buttons", "cross", splits=(split,)), seed).plan(index).pack_seed
            for index in range(20)
        }
        for split in ("train", "held_out")
        for seed in (0, 1)
    }
    worlds = list(seen.values())
    assert all(not a & b for i, a in enumerate(worlds) for b in worlds[:i])
    again = Packs(setting("hidden_buttons", "cross"), 0)
    assert {again.plan(index).pack_seed for index in range(20)} == seen["train", 0]


def test_digests_tell_packs_and_settings_apart() -> None:
    made = setting("hidden_buttons", "cross")
    packs = Packs(made, 0)
    digests = [pack_digest(packs.plan(index)) for index in range(4)]
    assert len(set(digests)) == 4 and pack_digest(packs.plan(0)) == digests[0]
    of = setting_digest(made)
    keys = [
        lifecycle_key(of, digests[0], 1, 0, "normal", None),
        lifecycle_key(of, digests[1], 1, 0, "normal", None),
        lifecycle_key(of, digests[0], 2, 0, "normal", None),
        lifecycle_key(of, digests[0], 1, 1, "normal", None),
        lifecycle_key(of, digests[0], 1, 0, "blanked", None),
        lifecycle_key(of, digests[0], 1, 0, "swapped", ["a", "b"]),
        lifecycle_key(of, digests[0], 1, 0, "swapped", ["ab", ""]),
        lifecycle_key(of[::-1], digests[0], 1, 0, "normal", None),
    ]
    assert len(set(keys)) == len(keys) and all(len(bytes.fromhex(key)) == 16 for key in keys)


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
def test_donors_differ_in_world_and_are_the_nearest(worlds: list[str]) -> None:
    chosen = donors(worlds)
    if len(set(worlds)) == 1:
        assert chosen is None
        return
    assert chosen is not None
    for i, donor in enumerate(chosen):
        assert worlds[donor] != worlds[i]
        distance = (donor - i) % len(worlds)
        assert all(worlds[(i + k) % len(worlds)] == worlds[i] for k in range(distance))


def test_sampling_seeds_are_stable_and_distinct() -> None:
    seeds = {sampling_seed(3, pack, member) for pack in range(50) for member in range(4)}
    assert len(seeds) == 200
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert sampling_seed(0, 0, 0) == sampling_seed(0, 0, 0) != sampling_seed(1, 0, 0)
