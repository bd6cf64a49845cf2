"""Statistics of an evaluation, against numpy and hand-worked numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cod_async.algo.statistics import mean_and_sem
from cod_async.errors import InputError
from cod_async.evaluate.report import Report, Row, gap, pack_means, report_to_json, suite
from cod_async.evaluate.request import donors, sampling_seed

REWARDS = st.lists(st.floats(-1, 1), min_size=2, max_size=40)


@given(REWARDS)
def test_mean_and_sem_agree_with_numpy(values: list[float]) -> None:
    mean, sem = mean_and_sem(values)
    array = np.array(values)
    assert mean == pytest.approx(array.mean(), abs=1e-12)
    assert sem == pytest.approx(array.std(ddof=1) / np.sqrt(len(values)), abs=1e-9)


def test_a_single_value_has_no_error() -> None:
    assert mean_and_sem([0.25]) == (0.25, 0.0)


def test_gap_is_later_positions_minus_the_first() -> None:
    assert gap([0.25, 0.5, 0.75, 1.0]) == pytest.approx(0.5)
    assert gap([0.3]) == 0.0


def test_the_pack_is_the_unit() -> None:
    # Two packs of two lifecycles: the members of a pack agree, so four values are only two independent ones.
    by_pack = pack_means([[[1.0, 1.0], [1.0, 0.0]], [[0.0, 0.5], [0.0, 0.5]]])
    assert by_pack == [[1.0, 0.5], [0.0, 0.5]]
    mean, sem = mean_and_sem([pack[0] for pack in by_pack])
    assert (mean, sem) == (0.5, pytest.approx(0.5))


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
def test_donors_differ_in_world_and_are_the_nearest(worlds: list[str]) -> None:
    if len(set(worlds)) == 1:
        with pytest.raises(InputError, match="more packs"):
            donors(worlds)
        return
    for i, donor in enumerate(donors(worlds)):
        assert worlds[donor] != worlds[i]
        distance = (donor - i) % len(worlds)
        assert all(worlds[(i + k) % len(worlds)] == worlds[i] for k in range(distance))


def test_sampling_seeds_are_stable_and_distinct() -> None:
    seeds = {sampling_seed(3, pack, member) for pack in range(50) for member in range(4)}
    assert len(seeds) == 200
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert sampling_seed(0, 0, 0) == sampling_seed(0, 0, 0) != sampling_seed(1, 0, 0)


def test_rows_are_what_the_command_line_prints() -> None:
    row = Row(
        environment="hidden_buttons",
        preset="door",
        split="train",
        mode="cod",
        control="normal",
        checkpoint="model",
        position=0,
        mean=0.25,
        sem=0.01,
        n=4,
    )
    report = Report(
        rows=(row,),
        split="train",
        control="normal",
        gap=0.0,
        gap_sem=0.0,
        well_formed_frac=1.0,
        steps_mean=1.0,
        hint_tokens_mean=2.0,
        num_lifecycles=8,
        num_tokens=100,
        wall_s=0.5,
    )
    printed = suite("cod", [report, report])
    assert printed["suite"] == "cod"
    assert len(printed["rows"]) == 2
    assert set(printed["rows"][0]) >= {
        "environment",
        "preset",
        "mode",
        "control",
        "checkpoint",
        "position",
        "mean",
        "sem",
        "n",
    }
    assert report_to_json(report)["reward_by_position"] == [{"mean": 0.25, "sem": 0.01}]
