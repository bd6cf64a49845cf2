"""PDE Discovery: hidden worlds, families, data rows, options and records against their vectors."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest

from cod_async.envs.base import TaskSpec
from cod_async.envs.pde_discovery import SPEC
from cod_async.envs.pde_discovery.basis import FUNCTIONS, TERMS, features
from cod_async.envs.pde_discovery.dataset import BENCHMARK_SEED, NUM_TRAIN_ROWS
from cod_async.envs.pde_discovery.env import PdeDiscovery
from cod_async.envs.pde_discovery.families import (
    FamilyName,
    calibrate,
    corners,
    digest,
    eligible,
    load,
    max_amplitude,
)
from cod_async.envs.pde_discovery.options import PRESETS, parse_options
from cod_async.envs.pde_discovery.world import World, WorldKey, initial_state, make_world
from cod_async.errors import EnvironmentInputError

MAX_AMPLITUDE = 2.765625


def world(seed: int, template: int | None = None, family: FamilyName = "train", size: int = 4) -> World:
    max_terms = 2 if family == "train" else 3
    return make_world(WorldKey(seed, template, size, family, 1, max_terms, 3.0, 1, 2))


def test_dictionary() -> None:
    assert len(TERMS) == 15 and TERMS[0] == "u" and TERMS[-1] == "u/(1+u+u**2)"
    zero, one = np.zeros(1), np.ones(1)
    assert all(function(zero)[0] == 0.0 for function in FUNCTIONS.values())
    e, sines = float(np.e), [float(np.sin(1)), float(np.sin(2))]
    at_one = [1.0] * 6 + [*sines, e - 1, float(np.log(2)), float(np.tanh(1)), 0.5, 0.5, 0.5, 1 / 3]
    assert features(one)[0] == pytest.approx(at_one, rel=1e-14)
    u = np.array([-1.7, 0.3, 2.2])
    for term, values in zip(TERMS, features(u).T, strict=True):
        names = {"u": u, "sin": np.sin, "exp": np.exp, "log": np.log, "tanh": np.tanh}
        assert values == pytest.approx(eval(term, {"__builtins__": {}}, names), rel=1e-12)  # noqa: S307


@pytest.mark.parametrize(
    ("seed", "equation"),
    [
        (0, {"u**3": -0.9, "sin(u)": -0.56}),
        (1, {"u**3": 1.93, "u**5": -0.72}),
        (1234, {"u**5": -1.07, "u**2/(1+u**2)": 1.88}),
    ],
)
def test_hidden_equations_of_training_seeds(seed: int, equation: dict[str, float]) -> None:
    assert world(seed).equation == equation


def test_hidden_equations_of_the_benchmark() -> None:
    rows = [SPEC.record_at(PRESETS["eval"], "held_out", BENCHMARK_SEED, 8 * pack) for pack in range(3)]  # type: ignore[misc]
    assert [row["environment_seed"] for row in rows[:2]] == [1011653606, 128044285]
    equations = [world(row["environment_seed"], row["template_index"], "eval", 8).equation for row in rows]
    assert equations == [
        {"u": 0.61, "u**4": -1.35},
        {"u**2": 0.68, "u**3": -1.21},
        {"u**5": -1.88, "sin(u)": 1.35},
    ]


def test_own_goldens_of_later_templates() -> None:
    """Frozen by this project: templates whose place in the file is our choice."""
    assert world(7).equation == {"u**5": -1.85, "sin(2*u)": -1.66}
    assert world(7, 24, "eval", 8).equation == {"u**7": -1.44, "sin(2*u)": 1.85, "u**2/(1+u**2)": 1.66}


def test_amplitudes_and_shapes() -> None:
    amplitudes = world(1234).amplitudes
    assert amplitudes == pytest.approx([2.691512, 0.101282, 0.968346, 1.422353], abs=5e-7)
    for trajectory, values in ((2, [0.316534, 0.925875, 0.609341]), (3, [0.020171, 1.003193, 1.16311])):
        u = initial_state(1234, trajectory, amplitudes[trajectory], (1, 2), 257)
        assert u[[64, 128, 192]] == pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize("size", [1, 3, 4, 8])
def test_one_amplitude_per_band_and_states_that_reach_them(size: int) -> None:
    for seed in range(5):
        amplitudes = world(seed, size=size).amplitudes
        bands = sorted(int(amplitude / MAX_AMPLITUDE * size) for amplitude in amplitudes)
        assert bands == list(range(size))
        for k, amplitude in enumerate(amplitudes):
            u = initial_state(seed, k, amplitude, (1, 2), 65)
            assert u.min() >= 0.0 and u[0] == u[-1] == 0.0 and u.max() == pytest.approx(amplitude, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "sizes", "num_supports", "manifest"),
    [("train", (5, 35, 0), 35, "c62d625e8ccca4aa"), ("eval", (0, 17, 8), 25, "e9d23ccd2864e317")],
)
def test_families(name: FamilyName, sizes: tuple[int, ...], num_supports: int, manifest: str) -> None:
    templates = load(name).templates
    assert tuple(sum(len(t) == size for t in templates) for size in (1, 2, 3)) == sizes
    assert len({frozenset(t) for t in templates if len(t) > 1}) + sizes[0] == num_supports
    assert len({tuple(t.items()) for t in templates}) == len(templates)
    assert digest(templates).startswith(manifest)


def test_no_set_of_terms_is_in_both_families_and_every_term_is_trained() -> None:
    train, held_out = (
        {frozenset(template) for template in load(name).templates} for name in ("train", "eval")
    )
    assert not train & held_out
    assert frozenset().union(*train) == set(TERMS)
    assert all(len(support) >= 2 for support in held_out)


@pytest.mark.parametrize(("name", "max_terms"), [("train", 2), ("eval", 3)])
def test_shipped_amplitude_is_the_calibrated_one(name: FamilyName, max_terms: int) -> None:
    templates = eligible(name, 1, max_terms)
    assert calibrate(json.dumps(templates), 3.0) == max_amplitude(name, 1, max_terms, 3.0) == MAX_AMPLITUDE


def test_amplitude_for_other_settings_is_computed() -> None:
    assert max_amplitude("eval", 3, 3, 1.5) == calibrate(json.dumps(eligible("eval", 3, 3)), 1.5) < 1.5
    with pytest.raises(EnvironmentInputError, match="no template"):
        calibrate("[]", 3.0)


def test_corners_are_those_of_the_box() -> None:
    assert corners([{"u": -1, "u**2": 1}]) == [
        {"u": -a, "u**2": b} for a, b in itertools.product((0.5, 2.0), repeat=2)
    ]


def test_training_rows() -> None:
    rows = SPEC.records(PRESETS["train"], "train", 42)
    assert list(itertools.islice(rows, 3)) == [{"seed": s} for s in (366021215, 137135022, 1689723136)]
    assert SPEC.record_at is not None
    held_out = SPEC.record_at(PRESETS["train"], "held_out", 42, 0)
    assert held_out == {"seed": 1173316832} == SPEC.record_at(PRESETS["train"], "held_out", 42, 32)
    first = SPEC.record_at(PRESETS["train"], "train", 42, 0)
    assert first == SPEC.record_at(PRESETS["train"], "train", 42, NUM_TRAIN_ROWS)
    assert SPEC.record_at(PRESETS["train"], "train", 1 << 63, 0) != first


def test_benchmark_rows_are_stratified() -> None:
    for split in ("held_out", "train"):
        rows = list(itertools.islice(SPEC.records(PRESETS["eval"], split, BENCHMARK_SEED), 4001))
        assert rows[4000] == rows[0]
        del rows[4000]
        assert len({row["seed"] for row in rows}) == 4000
        for number, row in enumerate(rows):
            pack = number // 8
            assert (row["pack_index"], row["template_index"], row["instance"]) == (
                pack,
                pack % 25,
                pack // 25,
            )
            assert row["environment_seed"] == rows[8 * pack]["seed"]
    train, held_out = (
        {
            row["environment_seed"]
            for row in itertools.islice(SPEC.records(PRESETS["eval"], split, BENCHMARK_SEED), 4000)
        }
        for split in ("train", "held_out")
    )
    assert not train & held_out


@pytest.mark.parametrize(
    ("preset", "changes", "sizes"),
    [
        ("train", {}, (50_000, 32)),
        ("eval", {}, (4_000, 4_000)),
        ("eval", {"rows_per_pack": 7}, (3_997, 3_997)),
    ],
)
def test_rows_start_over_after_their_number(
    preset: str, changes: dict[str, Any], sizes: tuple[int, int]
) -> None:
    options = SPEC.options(preset, changes)
    assert SPEC.num_records is not None and SPEC.record_at is not None
    for split, size in zip(("train", "held_out"), sizes, strict=True):
        assert SPEC.num_records(options, split) == size
        assert SPEC.record_at(options, split, 5, size) == SPEC.record_at(options, split, 5, 0)
        assert SPEC.record_at(options, split, 5, size - 1) != SPEC.record_at(options, split, 5, 0)
    with pytest.raises(EnvironmentInputError, match="splits are train, held_out"):
        SPEC.num_records(options, "test")


def test_pack_seeds_differ_by_split() -> None:
    seeds = {
        SPEC.pack_seed_for(PRESETS["train"], split, seed)
        for split in ("train", "held_out")
        for seed in range(50)
    }
    assert len(seeds) == 100 and all(0 <= seed < 1 << 64 for seed in seeds)


@pytest.mark.parametrize("call", [SPEC.records, SPEC.pack_seed_for])
def test_wrong_splits_and_seeds(call: Any) -> None:
    with pytest.raises(EnvironmentInputError, match="splits are train, held_out"):
        call(PRESETS["train"], "test", 0)
    with pytest.raises(EnvironmentInputError, match="negative"):
        SPEC.records(PRESETS["train"], "train", -1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"family": "all", "max_steps": 0, "parity": 1},
            ["family is 'all'", "max_steps is 0", "parity is 1"],
        ),
        ({"min_terms": 3}, ["min_terms is 3 but max_terms is 2"]),
        ({"min_modes": 2, "max_modes": 1}, ["min_modes is 2"]),
        ({"max_points": True, "u_noise": float("nan")}, ["max_points is True", "u_noise is nan"]),
        (
            {"state_bound": -1, "condition_threshold": 0.5},
            ["state_bound is -1", "condition_threshold is 0.5"],
        ),
        ({"rows_per_pack": 65}, ["rows_per_pack is 65"]),
        ({"state_bound": 10**400}, ["state_bound is 1000"]),
        ({"family": "eval", "max_terms": 1}, ["has no equation of 1 to 1 terms"]),
        ({"points": 3}, ["unknown option points"]),
        ({"family": ["train"]}, ["family is"]),
    ],
)
def test_bad_options_are_refused_with_every_problem(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(EnvironmentInputError) as caught:
        parse_options({**PRESETS["train"], **changes})
    assert len(caught.value.problems) == len(words)
    for problem, word in zip(caught.value.problems, words, strict=True):
        assert word in problem


def task(record: dict[str, Any], pack_size: int = 4, position: int = 0, pack_seed: int = 1234) -> TaskSpec:
    return TaskSpec("pde_discovery", "train", {}, record, pack_seed, position, pack_size)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({}, ["seed is None"]),
        (
            {"seed": -1, "template_index": 40},
            ["seed is -1", "template_index is 40; it must be an integer from 0 to 39"],
        ),
        ({"seed": 1.0, "environment_seed": True}, ["seed is 1.0", "environment_seed is True"]),
        ({"seed": 1 << 64, "x": 0}, ["unknown field x", "seed is 18446744073709551616"]),
    ],
)
def test_bad_records_are_refused_with_every_field(record: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(EnvironmentInputError) as caught:
        PdeDiscovery(PRESETS["train"]).reset(task(record))
    assert len(caught.value.problems) == len(words)
    for problem, word in zip(caught.value.problems, words, strict=True):
        assert word in problem


def test_packs_that_are_too_long_are_refused() -> None:
    with pytest.raises(EnvironmentInputError, match="at most 64"):
        PdeDiscovery(PRESETS["train"]).reset(task({"seed": 1}, pack_size=65))


def test_a_pack_may_not_mix_worlds() -> None:
    assert SPEC.record_at is not None
    rows = [SPEC.record_at(PRESETS["eval"], "held_out", 0, row) for row in range(9)]
    environment = PdeDiscovery(PRESETS["eval"])
    environment.reset(task(rows[7], 3, 1))
    with pytest.raises(EnvironmentInputError, match="packs of 8: use a pack size that divides it"):
        environment.reset(task(rows[8], 3, 2))


def test_views() -> None:
    environment = PdeDiscovery(PRESETS["train"])
    environment.reset(task({"seed": 1}, 4, 2))
    hidden = environment.hidden()
    assert set(hidden) == {"equation", "amplitudes"} and environment.task_view() == {"trajectory": 2}
    assert hidden["equation"] == {"u**5": -1.07, "u**2/(1+u**2)": 1.88}
    assert hidden["amplitudes"] == pytest.approx([2.691512, 0.101282, 0.968346, 1.422353], abs=5e-7)
    json.dumps(hidden)
    environment = PdeDiscovery(PRESETS["train"])
    environment.reset(task({"seed": 1, "environment_seed": 1, "template_index": 3}))
    assert list(environment.hidden()["equation"]) == ["tanh(u)"]
