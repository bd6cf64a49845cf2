"""Grid Navigation: maps, tasks, data set and options against the reference's published vectors."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from cod_async.envs.base import TaskSpec
from cod_async.envs.grid_navigation import SPEC
from cod_async.envs.grid_navigation.options import PRESETS, GridOptions, parse_options
from cod_async.envs.grid_navigation.oracle import is_feasible, rook_moves
from cod_async.envs.grid_navigation.worlds import (
    GridTask,
    cost_map,
    entered_cells,
    make_task,
    make_task_and_walk,
)
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.packs import stable_pack_seed

EVAL = SPEC.options("eval")
CODE_DEFAULTS = {
    "size_min": 12,
    "size_max": 16,
    "num_components": 6,
    "scale_min": 0.1,
    "scale_max": 0.35,
    "rounds_min": 6,
    "rounds_max": 10,
    "reveal_radius": 1,
}


def options(preset: str = "eval", **changes: Any) -> GridOptions:
    return parse_options(SPEC.options(preset, changes))


@pytest.mark.parametrize(
    ("chosen", "pack_seed", "size", "total"),
    [
        (options("eval"), 0, 14, 6256),
        (options("eval"), 1, 12, 3815),
        (options("train_27b"), 0, 12, 2100),
        (options("train_27b"), 1, 10, 2842),
        (options("train_8b"), 0, 12, 2450),
        (options("train_8b"), 1, 10, 1795),
        (options("eval", **CODE_DEFAULTS), 0, 16, 4619),
    ],
)
def test_maps_of_the_reference(chosen: GridOptions, pack_seed: int, size: int, total: int) -> None:
    costs = cost_map(chosen, pack_seed)
    assert costs.shape == (size, size) and costs.sum() == total


def test_first_row_and_maximum_of_the_reference() -> None:
    costs = cost_map(options("eval"), 0)
    assert costs[0].tolist() == [0, 0, 0, 0, 1, 2, 7, 16, 29, 39, 42, 36, 26, 16]
    assert np.argwhere(costs == 99).tolist() == [[5, 1]]


def test_every_map_reaches_both_ends() -> None:
    for preset, seed in itertools.product(PRESETS, range(100)):
        costs = cost_map(options(preset), (1 << 64) - 1 - seed)
        assert costs.min() == 0 and costs.max() == 99 and costs.dtype == np.int64


def test_sides_cover_their_range() -> None:
    sides = {len(cost_map(options("eval"), seed)) for seed in range(100)}
    assert sides == {10, 11, 12, 13, 14}


def test_maps_cannot_be_written_to_and_flat_ground_is_free() -> None:
    with pytest.raises(ValueError, match="read-only"):
        cost_map(options(), 0)[0, 0] = 1
    # Bumps far narrower than the distance of two cells: all heights are zero.
    flat = cost_map(options(size_min=2, size_max=2, scale_min=0.001, scale_max=0.001), 3)
    assert not flat.any()


@pytest.mark.parametrize(
    ("seed", "size", "rounds", "expected"),
    [
        (0, 10, (3, 5), GridTask((6, 5), (4, 2), 5)),
        (1, 10, (3, 5), GridTask((5, 7), (3, 7), 4)),
        (42, 12, (3, 5), GridTask((9, 7), (3, 4), 3)),
    ],
)
def test_tasks_of_the_reference(seed: int, size: int, rounds: tuple[int, int], expected: GridTask) -> None:
    assert make_task(seed, size, *rounds) == expected


def test_the_walk_of_a_task_is_a_witness() -> None:
    for seed, (size, low, high) in itertools.product(
        range(150), [(2, 1, 4), (3, 2, 3), (12, 3, 6), (32, 50, 50)]
    ):
        task, walk = make_task_and_walk(seed, size, low, high)
        assert low <= task.num_rounds <= high and len(walk) == task.num_rounds
        assert walk[-1] == task.goal != task.start
        for before, after in itertools.pairwise((task.start, *walk)):
            assert after in rook_moves(before, size)


def test_tasks_depend_on_the_map_through_its_side_alone() -> None:
    records = list(itertools.islice(SPEC.records(EVAL, "train", 42), 20))
    seeds = [seed for seed in range(60) if len(cost_map(options(), seed)) == 12][:2]
    views = []
    for pack_seed in seeds:
        environment = SPEC.make(EVAL)
        played = []
        for position, record in enumerate(records):
            environment.reset(TaskSpec(SPEC.name, "eval", {}, record, pack_seed, position, len(records)))
            played.append(environment.task_view())
        views.append(played)
    assert views[0] == views[1]


def test_feasibility_is_what_walking_gives() -> None:
    """Sets of cells reachable in exactly k moves, by walking, for every start, goal and k."""
    for size in (2, 3, 4, 5):
        cells = list(itertools.product(range(size), repeat=2))
        for start in cells:
            reached = {start}
            for num_rounds in range(6):
                assert {c for c in cells if is_feasible(start, c, num_rounds, size)} == reached
                reached = {after for cell in reached for after in rook_moves(cell, size)}


def test_entered_cells_exclude_the_origin() -> None:
    assert entered_cells((2, 3), (2, 6)) == ((2, 4), (2, 5), (2, 6))
    assert entered_cells((2, 3), (2, 0)) == ((2, 2), (2, 1), (2, 0))
    assert entered_cells((2, 3), (0, 3)) == ((1, 3), (0, 3))
    assert entered_cells((2, 3), (3, 3)) == ((3, 3),)


def test_data_set_of_the_reference() -> None:
    train = [record["seed"] for record in itertools.islice(SPEC.records(EVAL, "train", 42), 50_000)]
    held_out = [record["seed"] for record in itertools.islice(SPEC.records(EVAL, "held_out", 42), 4_000)]
    assert train[:3] == [786788, 646660, 8348274]
    assert held_out[:3] == [9316220, 7213, 2133818]
    assert len(set(train) | set(held_out)) == 54_000
    assert SPEC.num_records is not None
    assert [SPEC.num_records(EVAL, split) for split in ("train", "held_out")] == [50_000, 4_000]


def test_records_start_over_and_are_reached_directly() -> None:
    assert SPEC.record_at is not None
    stream = list(itertools.islice(SPEC.records(EVAL, "held_out", 42), 4_002))
    assert stream[4_000:] == stream[:2]
    assert SPEC.record_at(EVAL, "held_out", 42, 10**15 * 4_000 + 3_999) == stream[3_999]
    assert SPEC.record_at(EVAL, "train", 1 << 70, 0) != SPEC.record_at(EVAL, "train", 0, 0)


@pytest.mark.parametrize(("split", "seed", "words"), [("test", 0, "splits are"), ("train", -1, "negative")])
def test_bad_data_arguments(split: str, seed: int, words: str) -> None:
    with pytest.raises(EnvironmentInputError, match=words):
        SPEC.records(EVAL, split, seed)
    with pytest.raises(EnvironmentInputError, match="splits are"):
        SPEC.pack_seed_for(EVAL, "test", 0)


def test_splits_share_no_pack_seed() -> None:
    train, held_out = (
        {SPEC.pack_seed_for(EVAL, split, seed) for seed in range(500)} for split in ("train", "held_out")
    )
    assert len(train) == len(held_out) == 500 and max(train | held_out) > 1 << 63
    assert all(seed % 2 == 0 for seed in train) and all(seed % 2 == 1 for seed in held_out)
    assert SPEC.has_held_out_worlds is not None and SPEC.has_held_out_worlds(EVAL)


def test_stable_pack_seed_of_the_reference() -> None:
    assert stable_pack_seed((0, row) for row in range(4)) == 15069623396018555611


def test_presets_of_the_reference() -> None:
    table = {
        "train_8b": (8, 12, 4, 0.10, 0.35, 4, 6, 2),
        "train_27b": (8, 12, 4, 0.15, 0.45, 3, 5, 1),
        "eval": (10, 14, 5, 0.15, 0.45, 3, 5, 1),
    }
    assert set(table) == set(SPEC.presets)
    for preset, expected in table.items():
        assert tuple(SPEC.options(preset)[key] for key in CODE_DEFAULTS) == expected
        assert SPEC.options(preset)["parity"] is False


def test_wrong_options_are_all_listed() -> None:
    bad = {
        "size_min": 1,
        "size_max": 33,
        "num_components": 1,
        "scale_min": 0.0,
        "scale_max": float("nan"),
        "rounds_min": 0,
        "rounds_max": 5.0,
        "reveal_radius": True,
        "parity": "yes",
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
        ({"size_min": 14, "size_max": 13}, "size_min is 14 but size_max is 13"),
        ({"scale_min": 0.5}, "scale_min is 0.5 but scale_max is 0.45"),
        ({"rounds_max": 2}, "rounds_min is 3 but rounds_max is 2"),
    ],
)
def test_contradictory_options(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(EnvironmentInputError, match=words):
        SPEC.make(SPEC.options("eval", overrides))
