"""The autopilot: it stays in its bounds, takes its time, and finds the largest lag that is still good."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from coordinator_world import Actor, Learner, LearnerCheckpoint, World, make_config
from hypothesis import given
from hypothesis import strategies as st

from cod_async.config.schema import AutopilotConfig
from cod_async.coordinator.autopilot import Decision, PilotState, restore, start, steer, verdict
from cod_async.coordinator.planner import GroupView, Limits, choose_groups
from cod_async.lifecycle.segment import Version
from cod_async.store.trained import extend_trained_digest
from cod_async.wire.messages import StepDone

CONFIG = AutopilotConfig(is_enabled=True, window_steps=3, retry_steps=40)


def metrics(ess: float, positive: float = 0.0, negative: float = 0.0) -> dict[str, float]:
    return {"ess_frac": ess, "masked_positive_frac": positive, "masked_negative_frac": negative}


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (metrics(0.9), "good"),
        (metrics(0.55), "between"),
        (metrics(0.49), "bad"),
        (metrics(0.9, positive=0.2), "bad"),
        (metrics(0.9, negative=0.11), "bad"),
        (metrics(0.9, negative=0.06), "between"),
    ],
)
def test_verdict(numbers: dict[str, float], expected: str) -> None:
    found = verdict(numbers, CONFIG)
    assert found is not None and found[0] == expected


@pytest.mark.parametrize(
    "numbers", [{}, {"ess_frac": 0.9}, metrics(float("nan")), {**metrics(1.0), "ess_frac": "x"}]
)
def test_no_numbers_no_verdict(numbers: dict[str, Any]) -> None:
    assert verdict(numbers, CONFIG) is None
    state = PilotState(lag=4, num_bad=2)
    assert steer(state, numbers, CONFIG, 8) == (state, None)


def test_a_bad_window_halves_and_is_a_ceiling() -> None:
    state = start(8)
    for _ in range(2):
        state, decision = steer(state, metrics(0.1), CONFIG, 8)
        assert decision is None
    state, decision = steer(state, metrics(0.1), CONFIG, 8)
    assert decision == Decision("brake", 8, 4, 0.1, 0.0)
    for _ in range(8):  # what was generated before the brake is not judged
        state, decision = steer(state, metrics(0.1), CONFIG, 8)
        assert decision is None and state.num_bad == 0
    lags = set()
    for _ in range(31):
        state, _ = steer(state, metrics(1.0), CONFIG, 8)
        lags.add(state.lag)
    assert max(lags) <= 7  # 8 is not tried again yet
    for _ in range(40):
        state, _ = steer(state, metrics(1.0), CONFIG, 8)
    assert state.lag == 8  # it was forgotten


@given(
    numbers=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)), max_size=120),
    max_lag=st.integers(1, 64),
    min_lag=st.integers(0, 64),
    window=st.integers(1, 8),
)
def test_it_stays_in_its_bounds_and_takes_its_time(
    numbers: list[tuple[float, float, float]], max_lag: int, min_lag: int, window: int
) -> None:
    config = AutopilotConfig(is_enabled=True, window_steps=window, min_lag=min_lag, retry_steps=20)
    state, last_change = start(max_lag), -window
    for step, (ess, positive, negative) in enumerate(numbers):
        before = state
        state, decision = steer(state, metrics(ess, positive, negative), config, max_lag)
        assert min(min_lag, max_lag) <= state.lag <= max_lag
        assert (state.lag != before.lag) == (decision is not None)
        if decision is not None:
            assert step - last_change >= window
            last_change = step
        assert restore(msgspec.to_builtins(state), config, max_lag) == state


@given(limit=st.integers(1, 15))
def test_it_settles_at_the_largest_good_lag(limit: int) -> None:
    config = AutopilotConfig(is_enabled=True, window_steps=2, retry_steps=10_000)
    state = start(16)
    for _ in range(2000):
        state, _ = steer(state, metrics(0.3 if state.lag > limit else 0.9), config, 16)
    assert state.lag == limit


def test_restoring_rubbish_starts_anew() -> None:
    assert restore(None, CONFIG, 6) == restore({"lag": "x"}, CONFIG, 6) == PilotState(lag=6)
    assert restore({"lag": 60}, CONFIG, 6).lag == 6


WATCHED = {
    "learner": {"groups_per_step": 1},
    "staleness": {"max_lag": 8},
    "autopilot": {"is_enabled": True, "window_steps": 2},
}


def finish(world: World, learner: Learner, actor: Actor, numbers: dict[str, float]) -> None:
    actor.ask(64)
    actor.play_all()
    learner.request_step()
    assert learner.batch is not None
    done = StepDone(version=learner.version, plan_digest=learner.batch[0], metrics=numbers)
    world.say(learner.session, done)
    learner.take_step()


def test_it_brakes_admission_and_survives_a_crash(make_world: Any) -> None:
    world = make_world(**WATCHED)
    learner, actor = Learner(world), Actor(world)
    finish(world, learner, actor, metrics(0.9))
    ahead = world.brain._core.limits.plan_ahead_steps
    for _ in range(2):
        finish(world, learner, actor, metrics(0.1))
    assert world.brain.status()["lag_limit_steps"] == 4
    assert world.brain._core.limits.plan_ahead_steps < ahead
    report = world.store.history.recent_reports(learner.version, 1)[0]
    assert [event["name"] for event in report["events"]] == ["autopilot_brake"]
    assert (report["events"][0]["lag_before"], report["events"][0]["lag"]) == (8, 4)
    world.crash()
    assert world.brain.status()["lag_limit_steps"] == 4
    actor.ask(64)
    assert world.store.work.count_leases()["held"] <= 2 * (1 + 2) * 1  # lag 4 plans two steps ahead


def test_a_rollback_takes_its_decisions_back(make_world: Any) -> None:
    world = make_world(**WATCHED)
    learner, actor = Learner(world), Actor(world)
    finish(world, learner, actor, metrics(0.9))
    saved = learner.checkpoint()
    for _ in range(2):
        finish(world, learner, actor, metrics(0.1))
    assert world.brain.status()["lag_limit_steps"] == 4
    learner.die()
    Learner(world, saved)
    assert world.brain.status()["lag_limit_steps"] == 8


def test_it_is_off_by_default() -> None:
    assert not make_config().autopilot.is_enabled


def test_a_step_that_only_a_checkpoint_proves_does_not_forget_it(make_world: Any) -> None:
    world = make_world(**WATCHED)
    learner, actor = Learner(world), Actor(world)
    for _ in range(2):
        finish(world, learner, actor, metrics(0.1))
    actor.ask(64)
    actor.play_all()
    learner.request_step()
    assert learner.batch is not None and world.brain.status()["lag_limit_steps"] == 4
    digest, items = learner.batch  # taken and saved, but the learner dies before it says so
    saved = LearnerCheckpoint(
        Version(0, 3),
        extend_trained_digest(learner.trained_digest, digest),
        (*learner.weights_by_step, "w3"),
        (*(tuple(step) for step in learner.history), tuple(items)),
    )
    learner.die()
    again = Learner(world, saved)
    assert again.version == Version(1, 3)
    assert world.brain.status()["lag_limit_steps"] == 4


def test_nothing_expires_by_it() -> None:
    """Under a braked lag, a group that runs since before is not cut off before ``max_lag`` does it."""
    base = Limits(groups_per_step=1, max_lag=8, plan_ahead_steps=4, num_steps=100, on_bound="expire")
    groups = [GroupView(0, False, 2, is_closable=True), GroupView(1, True, 4)]
    for limits in (base, base.steered(2, -1)):
        assert choose_groups(groups, 5, limits).selected == (1,)
        assert choose_groups(groups, 10, limits).last_call == (0,)
    waiting = msgspec.structs.replace(base, on_bound="wait")
    assert choose_groups(groups, 5, waiting).selected == (1,)
    assert choose_groups(groups, 5, waiting.steered(2, -1)).reason == "older_groups_open"
