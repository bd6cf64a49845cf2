"""Corrections of whole segments and steps against NumPy written from their formulas, in fp64, odd sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cod_async.algo.corrections.aggregation import token_weights
from cod_async.algo.corrections.proximal import interpolation_share
from cod_async.algo.corrections.second_moment import second_moment_bounds
from cod_async.algo.corrections.segments import (
    bounded_weight,
    geometric_mask,
    negative_drift_mask,
    segment_log_ratios,
)
from cod_async.algo.corrections.step_size import effective_sample_frac, step_size_factor

SIZES = (1, 7, 2, 31, 1, 13)


def _segments() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(11)
    ids = rng.permutation(np.repeat(np.arange(len(SIZES)), SIZES))
    return rng.normal(0, 0.3, ids.size), ids


def test_segment_log_ratios() -> None:
    values, ids = _segments()
    for reduction, of in (("geometric_mean", np.mean), ("product", np.sum)):
        found = segment_log_ratios(torch.from_numpy(values), torch.from_numpy(ids), len(SIZES) + 1, reduction)
        expected = [of(values[ids == s]) for s in range(len(SIZES))] + [0.0]
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="no reduction 'median'"):
        segment_log_ratios(torch.zeros(1), torch.zeros(1, dtype=torch.int64), 1, "median")


def test_weights_and_masks_of_segments() -> None:
    log_ratios = np.array([-2.0, -0.1, 0.0, 0.1, 1.0, 50.0])
    ratios = np.exp(np.minimum(log_ratios, 20))
    given_ratios = torch.from_numpy(log_ratios)
    weight, is_outside = bounded_weight(given_ratios, "truncated", 0.0, 2.0)
    np.testing.assert_allclose(weight.numpy(), np.minimum(ratios, 2.0))
    assert is_outside.tolist() == [False, False, False, False, True, True]
    weight, is_outside = bounded_weight(given_ratios, "masked", 0.5, 2.0)
    np.testing.assert_allclose(weight.numpy(), ratios * ((ratios >= 0.5) & (ratios <= 2)))
    assert is_outside.tolist() == [True, False, False, False, True, True]
    assert geometric_mask(given_ratios, 0.9, 1.11).tolist() == [False, True, True, True, False, False]
    advantages = torch.tensor([-1.0, -1.0, -1.0, 1.0, -1.0, 0.0])
    kept = negative_drift_mask(torch.tensor([-0.2, -1e-5, 0.3, -5.0, -1e-3, -5.0]), advantages, 1e-4)
    assert kept.tolist() == [False, True, True, True, False, True]
    with pytest.raises(ValueError, match="no behaviour weight 'none'"):
        bounded_weight(given_ratios, "none", 0.0, 1.0)


def test_interpolation_share() -> None:
    lags = torch.tensor([0, 1, 2, 3, 5, 16])
    assert interpolation_share(lags).tolist() == [0, 0, 1 / 2, 2 / 3, 4 / 5, 15 / 16]


def test_token_weights() -> None:
    sizes = torch.tensor([3, 0, 5])
    assert token_weights(sizes, "token_mean").tolist() == [1 / 8] * 3
    assert token_weights(sizes, "segment_mean")[[0, 2]].tolist() == pytest.approx([1 / 6, 1 / 10])
    assert token_weights(sizes, "sequence_mean").tolist() == [1 / 2] * 3
    fixed = token_weights(sizes, "fixed_length", fixed_length_tokens=10)
    assert fixed.tolist() == pytest.approx([1 / 20] * 3)
    with pytest.raises(ValueError, match="no aggregation 'median'"):
        token_weights(sizes, "median")


def _bounds_by_sorting(
    log_ratios: np.ndarray, advantages: np.ndarray, budget: float, narrowest: tuple[float, float]
) -> tuple[float, float]:
    """The same bound, found exactly: sort the squares and look where the line of means crosses the budget."""
    counted = ((advantages > 0) & (log_ratios > 0)) | ((advantages < 0) & (log_ratios < 0))
    squares = np.sort(log_ratios[counted] ** 2)
    bound = 20.0
    if squares.size and squares.mean() > budget:
        for k in range(squares.size):  # the k smallest lie under t^2
            t_squared = (budget * squares.size - squares[:k].sum()) / (squares.size - k)
            if t_squared <= squares[k]:
                break
        bound = math.sqrt(t_squared)
    return max(bound, math.log(narrowest[1])), max(bound, -math.log(narrowest[0]))


@given(
    st.lists(st.tuples(st.floats(-6, 6), st.sampled_from([-1.5, 0.0, 0.7])), min_size=1, max_size=40),
    st.sampled_from([1e-3, 0.04, 0.5, 3.0]),
)
@settings(max_examples=150, deadline=None)
def test_second_moment_bounds(tokens: list[tuple[float, float]], budget: float) -> None:
    log_ratios, advantages = (np.array(column) for column in zip(*tokens, strict=True))
    for narrowest in ((0.7, 1.5), (1.0, 1.0)):
        found = second_moment_bounds(
            torch.from_numpy(log_ratios), torch.from_numpy(advantages), budget, narrowest
        )
        expected = _bounds_by_sorting(log_ratios, advantages, budget, narrowest)
        assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_drifted_step_is_brought_back_to_its_budget() -> None:
    rng = np.random.default_rng(5)
    drift, advantages = rng.normal(0, 0.6, 997), rng.normal(size=997)
    (upper, lower) = second_moment_bounds(
        torch.from_numpy(drift), torch.from_numpy(advantages), 0.04, (1.0, 1.0)
    ).tolist()
    counted = drift[((advantages > 0) & (drift > 0)) | ((advantages < 0) & (drift < 0))]
    assert upper == lower
    assert (counted**2).mean() > 0.04
    assert (counted.clip(-upper, upper) ** 2).mean() == pytest.approx(0.04, rel=1e-12)


def test_step_size() -> None:
    ratios = np.array([1.0, 2.0, 0.5])
    ess = effective_sample_frac(float(ratios.sum()), float((ratios**2).sum()), 3)
    assert ess == pytest.approx(3.5**2 / (3 * 5.25))
    assert effective_sample_frac(0.0, 0.0, 0.0) == 0
    assert step_size_factor(ess, 0.5) == pytest.approx(math.sqrt(ess))
    assert step_size_factor(0.0, 0.0) == 1
