"""Packs: the reference's seed vector, pure planning, mixtures, and splits that keep apart."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import pytest

from cod_async.config.schema import EnvironmentConfig
from cod_async.envs import registry
from cod_async.envs.base import EnvironmentSpec
from cod_async.envs.frozen_lake_obscure import SPEC
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.packs import (
    PackPlan,
    cut_packs,
    plan_pack,
    stable_pack_seed,
    told_position,
)
from cod_async.lifecycle.seeds import derived_seed, hash64, stable_seed

LAKE = EnvironmentConfig(name="frozen_lake_obscure", preset="easy")
HARD_LAKE = EnvironmentConfig(name="frozen_lake_obscure", preset="hard", weight=3.0)


def test_stable_pack_seed_of_the_reference() -> None:
    pairs = [(0, 0), (0, 1), (0, 2), (0, 3)]
    for order in itertools.permutations(pairs):
        assert stable_pack_seed(order) == 15069623396018555611


def test_stable_pack_seed_is_of_a_multiset() -> None:
    assert stable_pack_seed([(0, 0), (0, 0)]) != stable_pack_seed([(0, 0)])
    assert 0 <= stable_pack_seed([]) < 1 << 64


def test_stable_seed_tells_its_parts_apart() -> None:
    seeds = {stable_seed(*parts) for parts in [(1, 23), (12, 3), ("1", 23), (1, 2, 3), ("1,23",), ()]}
    assert len(seeds) == 6


def test_plans_are_pure() -> None:
    code = (
        "from cod_async.config.schema import EnvironmentConfig as E; "
        "from cod_async.lifecycle.packs import plan_pack; "
        "print(plan_pack([E(name='frozen_lake_obscure', preset='easy')], 4, 7, 123456789))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(plan_pack([LAKE], 4, 7, 123456789))


def test_packs_take_the_data_set_in_order() -> None:
    rows = list(itertools.islice(SPEC.records(SPEC.options("easy"), "train", 42), 12))
    plans = [plan_pack([LAKE], 4, 42, group) for group in range(3)]
    assert [record for plan in plans for record in plan.records] == rows
    assert (rows[0]["seed"], rows[0]["size"]) == (15795, 4)


def test_second_epoch_has_the_same_rows_and_new_worlds() -> None:
    first, second = plan_pack([LAKE], 4, 42, 5), plan_pack([LAKE], 4, 42, 5 + 50_000 // 4)
    assert first.records == second.records
    assert first.pack_seed != second.pack_seed


def test_pack_seed_depends_on_run_seed_group_and_split() -> None:
    seeds = {
        plan_pack([LAKE], 4, run_seed, group, split).pack_seed
        for run_seed in range(5)
        for group in range(50)
        for split in ("train", "held_out")
    }
    assert len(seeds) == 500
    assert all(0 <= seed < 1 << 64 for seed in seeds)
    assert max(seeds) >= 1 << 63  # all 64 bits are used


def test_weights_are_shares_of_packs() -> None:
    presets = Counter(plan_pack([LAKE, HARD_LAKE], 2, 0, group).preset for group in range(2000))
    assert abs(presets["hard"] / 2000 - 0.75) < 0.03  # three standard errors
    sizes = {(plan.preset, r["size"]) for plan in _plans(200) for r in plan.records}
    assert sizes == {("easy", 4), ("easy", 5), ("hard", 6), ("hard", 7)}


def _plans(count: int) -> list[PackPlan]:
    return [plan_pack([LAKE, HARD_LAKE], 2, 0, group) for group in range(count)]


def test_tasks_share_the_world_and_count_positions() -> None:
    config = EnvironmentConfig(name="frozen_lake_obscure", preset="easy", options={"size_max": 4})
    plan = plan_pack([config], 3, 1, 9)
    tasks = plan.tasks()
    assert [task.position for task in tasks] == [0, 1, 2]
    assert {task.pack_seed for task in tasks} == {plan.pack_seed}
    assert {task.pack_size for task in tasks} == {3} == {plan.pack_size}
    assert [task.record for task in tasks] == list(plan.records)
    assert all(task.options == {"size_max": 4} for task in tasks)
    assert msgspec.json.decode(msgspec.json.encode(plan), type=PackPlan) == plan


def _streaming_spec(num_records: int | None = None) -> EnvironmentSpec:
    """An environment without rows of its own order, whose splits share no world (parity of the pack seed)."""

    def records(options: Mapping[str, Any], split: str, seed: int) -> Iterator[dict[str, Any]]:
        generator = random.Random(seed)
        for _ in itertools.count() if num_records is None else range(num_records):
            yield {"seed": generator.getrandbits(32)}

    def pack_seed_for(options: Mapping[str, Any], split: str, seed: int) -> int:
        return seed // 2 * 2 + (split == "held_out")

    return msgspec.structs.replace(SPEC, record_at=None, records=records, pack_seed_for=pack_seed_for)


def test_streams_are_drawn_per_group_and_worlds_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "get", lambda name: _streaming_spec())
    groups = [plan_pack([LAKE], 4, 0, group) for group in (0, 1, 10**12)]
    assert len({record["seed"] for plan in groups for record in plan.records}) == 12
    assert all(plan.pack_seed % 2 == 0 for plan in groups)
    held_out = [plan_pack([LAKE], 4, 0, group, "held_out") for group in range(20)]
    assert all(plan.pack_seed % 2 == 1 for plan in held_out)


def test_data_that_ends_too_early_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "get", lambda name: _streaming_spec(num_records=3))
    with pytest.raises(EnvironmentInputError, match="has 3 records, the pack needs 4"):
        plan_pack([LAKE], 4, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([], 4, 0, 0), "mixture is empty"),
        (([LAKE], 0, 0, 0), "pack_size is 0"),
        (([LAKE], 4, 0, -1), "group is -1"),
        (([LAKE], 4, 0, 0, "test"), "no split 'test'"),
        (([EnvironmentConfig(name="lake", preset="easy")], 4, 0, 0), "no environment 'lake'"),
        (([EnvironmentConfig(name="frozen_lake_obscure", preset="e")], 4, 0, 0), "presets are easy, hard"),
        (
            ([EnvironmentConfig(name="frozen_lake_obscure", preset="easy", options={"sizes": 3})], 4, 0, 0),
            "unknown option sizes",
        ),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(EnvironmentInputError, match=words):
        plan_pack(*arguments)


def test_seeds_are_the_first_bytes_of_a_sha256_and_never_change() -> None:
    # Runs are reproducible by their seed, so these numbers are part of the format. Computed with sha256sum.
    assert hash64("") == 0xE3B0C44298FC1C14
    assert stable_seed("sampling", 0, 1, 2) == hash64('["sampling",0,1,2]')
    assert derived_seed(7, 2, 0) == hash64("7,2,0") >> 1


def test_padding_and_dropping_follow_the_reference() -> None:
    """Seven tasks of one taskset and two of another, cut by hand into packs of three."""
    tasks = [(0, 10), (1, 90), (0, 11), (0, 12), (0, 13), (1, 91), (0, 14), (0, 15), (0, 16)]
    padded = cut_packs(tasks, 3)
    assert [(p.taskset, p.rows) for p in padded] == [
        (0, (10, 11, 12)),
        (0, (13, 14, 15)),
        (0, (16, 10, 11)),
    ]  # taskset 1 has fewer than 3 tasks: dropped even though padding is on
    dropped = cut_packs(tasks, 3, is_padded=False)
    assert [p.rows for p in dropped] == [(10, 11, 12), (13, 14, 15)]


def test_ralph_packs_of_a_list() -> None:
    tasks = [(0, 10), (0, 11), (0, 12), (0, 13), (0, 14)]
    assert [p.rows for p in cut_packs(tasks, 2, "ralph_sample")] == [(10, 10), (12, 12), (14, 14)]
    assert [p.rows for p in cut_packs(tasks, 2, "ralph_sample", is_padded=False)] == [(10, 10), (12, 12)]
    full = cut_packs(tasks, 2, "ralph_full", is_padded=False)
    assert [p.rows for p in full] == [(row, row) for row in range(10, 15)]
    assert [told_position("ralph_full", i, 2, 1) for i in range(len(full))] == [0, 1, 0, 1, 0]
    assert cut_packs([(3, 7)], 4, "ralph_full")[0].rows == (7, 7, 7, 7)  # never dropped for being few


def test_ralph_plans_repeat_one_task() -> None:
    regular = plan_pack([LAKE], 4, 42, 7)
    sample = plan_pack([LAKE], 4, 42, 7, strategy="ralph_sample")
    assert sample.records == (regular.records[0],) * 4
    assert [task.position for task in sample.tasks()] == [0, 0, 0, 0]
    assert [task.position for task in regular.tasks()] == [0, 1, 2, 3]
    full = plan_pack([LAKE], 4, 42, 7, strategy="ralph_full")
    assert full.records == (SPEC.record_at(SPEC.options("easy"), "train", 42, 7),) * 4  # type: ignore[misc]
    assert [task.position for task in full.tasks()] == [3, 3, 3, 3]
    assert len({regular.pack_seed, sample.pack_seed, full.pack_seed}) == 3


def test_plain_seeds_are_those_of_the_reference() -> None:
    assert plan_pack([LAKE], 4, 42, 0, has_plain_seeds=True).pack_seed == 15069623396018555611
    first = plan_pack([LAKE], 4, 1, 3, has_plain_seeds=True)
    again = plan_pack([LAKE], 4, 2, 3 + 50_000 // 4, has_plain_seeds=True)
    assert first.pack_seed == again.pack_seed  # same rows one epoch later, another run seed: same world


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(EnvironmentInputError, match="ralph_sample"):
        plan_pack([LAKE], 4, 0, 0, strategy="ralph")  # type: ignore[arg-type]
