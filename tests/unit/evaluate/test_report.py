"""Statistics of an evaluation, against numpy and hand-worked numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cod_async.algo.statistics import mean_and_sem
from cod_async.evaluate.report import gap, pack_means

REWARDS = st.lists(st.floats(-1, 1), min_size=2, max_size=40)


@settings(deadline=None)
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
