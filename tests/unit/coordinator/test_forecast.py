"""Forecasts against a brute-force quantile, and admission by forecast on numbers worked by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cod_async.coordinator.forecast import MAX_SAMPLES, MIN_SAMPLES, Forecast, Samples
from cod_async.coordinator.planner import CLOSED, Closing, Limits, Running, may_start

WORLD = ("hidden_buttons", "door")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.floats(0, 100), max_size=400), st.floats(0.01, 0.99), st.floats(-1, 60))
def test_quantiles_of_the_newest(values: list[float], share: float, longer_than_s: float) -> None:
    samples = Samples()
    for value in values:
        samples.add(value)
    left = sorted(value for value in values[-MAX_SAMPLES:] if value > longer_than_s)
    expected = left[min(len(left) - 1, int(share * len(left)))] if left else None
    assert samples.quantile(share, longer_than_s) == expected
    assert len(samples) == min(len(values), MAX_SAMPLES)


def learned(walls: list[tuple[float, float]], share: float = 0.9) -> tuple[Forecast, Clock]:
    """A forecast that has seen lifecycles of two episodes."""
    clock = Clock()
    forecast = Forecast(share, clock)
    for member, (first_s, second_s) in enumerate(walls):
        forecast.began(0, member, WORLD, 0)
        forecast.sealed(0, member, 1, first_s, is_last=False)
        forecast.sealed(0, member, 2, second_s, is_last=True)
    return forecast, clock


def test_what_is_left_of_a_lifecycle_by_position() -> None:
    forecast, clock = learned([(10.0, float(index)) for index in range(20)])
    assert forecast.of_new(WORLD, 1) == Closing(10.0 + 10, 10.0 + 18)  # the 11th and the 19th of 20
    assert forecast.of_new(WORLD, 1, ordinal=1) == Closing(10.0, 18.0)
    # of four members each has to be in time with probability 0.9 ** (1/4) = 0.974: the last of 20
    whole = forecast.of_new(WORLD, 4)
    assert whole is not None and whole.late_s == 10.0 + 19
    forecast.began(7, 0, WORLD, 0)
    clock.now += 5.0
    assert forecast.of_running(7, [0]) == Closing(15.0, 23.0)
    forecast.sealed(7, 0, 1, 5.0, is_last=False)
    clock.now += 14.5  # five of twenty second episodes took longer: 15 to 19
    assert forecast.of_running(7, [0]) == Closing(2.5, 4.5)
    clock.now += 5.0  # longer than any: nothing is known
    assert forecast.of_running(7, [0]) is None


def test_too_little_is_known_of_few_and_of_other_environments() -> None:
    forecast, _ = learned([(1.0, 1.0)] * (MIN_SAMPLES - 1))
    assert forecast.of_new(WORLD, 1) is None
    forecast.began(9, 0, WORLD, 0)
    assert forecast.of_running(9, [0]) is None and forecast.of_running(9, [1]) is None
    assert forecast.overdue(2.0) == []
    assert forecast.of_new(("hidden_buttons", "cross"), 1) is None


def test_lifecycles_that_were_cut_off_are_learned_with_the_time_they_took() -> None:
    forecast, clock = learned([(1.0, 1.0)] * MIN_SAMPLES)
    for member in range(8):
        forecast.began(1, member, WORLD, 0)
    clock.now += 50.0
    for member in range(8):
        forecast.gone(1, member, is_cut_off=member < 4)
    closing = forecast.of_new(WORLD, 1)
    assert closing == Closing(2.0, 50.0)  # 16 of 2 s and 4 of 50 s; those taken away say nothing


def test_overdue() -> None:
    forecast, clock = learned([(1.0, 1.0)] * MIN_SAMPLES)
    forecast.began(3, 0, WORLD, 0)
    clock.now += 4.0
    forecast.began(3, 1, WORLD, 1)
    clock.now += 2.5
    assert forecast.overdue(3.0) == [(3, 0)]  # 6.5 s against 3 x 2 s; the other has 2.5 s against 3 x 1 s
    assert forecast.overdue(4.0) == []


LIMITS = Limits(groups_per_step=2, max_lag=2, plan_ahead_steps=2, num_steps=100, on_bound="expire")


def running(birth: int, soon_s: float, late_s: float, renewal_s: float = math.inf) -> Running:
    return Running(birth, Closing(soon_s, late_s), renewal_s)


def test_a_group_that_would_be_trained_in_front_of_an_older_one_waits() -> None:
    # at step 5 the slow group (birth 3) must be in this step: one more closed group in front is too many
    slow, quick = running(3, 50.0, 90.0), running(5, 10.0, 20.0)
    assert may_start(quick, [slow], 5, 0.0, LIMITS)  # fewer than a step's worth
    assert not may_start(quick, [slow, Running(5, CLOSED)], 5, 0.0, LIMITS)
    assert may_start(running(5, 95.0, 99.0), [slow, Running(5, CLOSED)], 5, 0.0, LIMITS)  # it closes later
    young = running(5, 50.0, 90.0)
    assert may_start(quick, [young, Running(5, CLOSED)], 5, 0.0, LIMITS)  # it has until step 7


def test_a_slow_learner_takes_fewer_steps_meanwhile() -> None:
    slow, quick = running(3, 50.0, 90.0), running(5, 10.0, 20.0)
    others = [slow, Running(5, CLOSED)]
    assert not may_start(quick, others, 5, 30.0, LIMITS)
    assert may_start(quick, [running(4, 50.0, 90.0), Running(5, CLOSED)], 5, 100.0, LIMITS)


def test_places_are_filled_again_while_a_slow_group_runs() -> None:
    # four groups that turn over every 10 s close twelve times in 30 s: six steps, of which two are allowed
    others = [running(5, 10.0, 15.0, 10.0) for _ in range(4)]
    assert not may_start(running(5, 10.0, 30.0, 10.0), others, 5, 0.0, LIMITS)
    assert may_start(running(5, 10.0, 15.0, 10.0), others[:3], 5, 0.0, LIMITS)  # 3 x 1.5 in 15 s: two steps


def test_what_is_past_help_or_unknown_holds_nobody_back() -> None:
    quick = running(5, 10.0, 20.0)
    hopeless, unknown = running(0, 50.0, 90.0), Running(3, None)
    assert may_start(quick, [hopeless, unknown], 5, 0.0, LIMITS)
    assert may_start(Running(5, None), [running(3, 50.0, 90.0), Running(5, CLOSED)], 5, 0.0, LIMITS)


@pytest.mark.parametrize("num_others", [0, 1])
def test_less_than_a_steps_worth_may_always_start(num_others: int) -> None:
    others = [running(0, 1e6, 1e9, 1e-9)] * num_others
    assert may_start(running(5, 1e6, 1e9, 1e-9), others, 5, 1.0, LIMITS)
