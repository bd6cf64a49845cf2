"""Late members of a quorum group, segments of too many versions, and what a restart may hand out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from coordinator_world import Actor, Learner, World

from cod_async.lifecycle.segment import SegmentKey, Version, VersionSpan
from cod_async.store.ledger import ledger, ledger_with_problems
from cod_async.wire.messages import Fence, LeaseRef, LeaseRequest, StepDone

MakeWorld = Callable[..., World]
QUORUM = {"close": "quorum", "quorum_members": 2, "after_s": 10.0, "deadline_s": 100.0}


def play(actor: Actor, member: int, rewards: list[float], group: int = 0) -> None:
    for reward in rewards:
        actor.send(actor.seal(LeaseRef(group, member, 0), reward=reward, num_tokens=2))


def closed_early(make_world: MakeWorld, **sections: Any) -> tuple[World, Learner, Actor]:
    """A group of three that has closed with two while the third has played one of its three episodes."""
    sections = {
        "learner": {"groups_per_step": 1},
        "lifecycle": {"pack_size": 2, "group_size": 3},
        "groups": QUORUM,
        **sections,
    }
    world = make_world(**sections)
    learner, actor = Learner(world), Actor(world)
    actor.ask(3)
    play(actor, 0, [1.0, 0.0, 1.0])
    play(actor, 1, [0.0, 0.0, 0.0])
    play(actor, 2, [1.0])
    world.tick(10.5)
    return world, learner, actor


def states(world: World, member: int = 2) -> list[str]:
    return [row.state for row in world.store.segments.of_group(0) if row.key.member == member]


def trained_advantages(learner: Learner) -> dict[tuple[int, int, int], float]:
    assert learner.batch is not None
    return {(i.key.group, i.key.member, i.key.ordinal): i.advantage for i in learner.batch[1]}


def test_a_late_member_is_trained_against_the_frozen_baseline(make_world: MakeWorld) -> None:
    world, learner, actor = closed_early(make_world)
    assert not [m for m in actor.messages if isinstance(m, Fence)] and states(world) == ["waiting"]
    learner.request_step()
    # returns of member 0: 1, .5, 1 (solve 0, update 0, solve 1); of member 1: 0, 0, 0
    expected = {(0, 0, 0): 0.5, (0, 0, 1): 0.25, (0, 0, 2): 0.5, (0, 1, 0): -0.5, (0, 1, 1): -0.25}
    assert trained_advantages(learner) == pytest.approx({**expected, (0, 1, 2): -0.5})
    learner.take_step()
    play(actor, 2, [0.0, 0.0])  # returns .5, 0, 0 against the baselines .5, .25, .5 of the two in time
    assert states(world) == ["ready"] * 3
    world.crash()
    actor.ask(64)
    for ref in [ref for ref in actor.lives if ref.group == 1]:
        while ref in actor.lives:
            actor.play(ref)
    learner.request_step()
    late = {at: value for at, value in trained_advantages(learner).items() if at[0] == 0}
    assert late == pytest.approx({(0, 2, 0): 0.0, (0, 2, 1): -0.25, (0, 2, 2): -0.5})
    report = world.store.history.step(learner.version)
    assert report is not None
    assert (report.report["num_late_segments"], report.report["num_groups"]) == (3, 1)
    assert report.report["advantage_late_by_position"] == pytest.approx([0.0, -0.5])
    assert report.report["update_advantage_late_by_position"] == pytest.approx([-0.25])
    assert len(report.report["advantage_in_time_by_position"]) == 2
    learner.take_step()
    assert states(world) == ["trained"] * 3
    answer = ledger(world.folder)
    assert answer["balanced"] and answer["segments"]["dropped"] == {}


def test_who_ends_before_the_group_is_trained_goes_with_it(make_world: MakeWorld) -> None:
    _, learner, actor = closed_early(make_world)
    play(actor, 2, [0.0, 0.0])
    learner.request_step()
    assert learner.batch is not None and len(learner.batch[1]) == 9


def test_who_ended_after_the_plan_outlives_it(make_world: MakeWorld) -> None:
    """The plan of the group is dropped; the late member was not in it, so it is planned for itself."""
    world, learner, actor = closed_early(make_world)
    learner.request_step()
    assert learner.batch is not None and len(learner.batch[1]) == 6
    play(actor, 2, [0.0, 0.0])
    assert states(world) == ["ready"] * 3
    done = {"plan_digest": learner.batch[0], "metrics": {}, "dropped_as": "nonfinite"}
    world.say(learner.session, StepDone(version=learner.version, **done))
    learner.batch, learner.parts = None, {}
    learner.request_step()
    assert learner.batch is not None
    assert [item.key for item in learner.batch[1]] == [SegmentKey(0, 2, ordinal) for ordinal in range(3)]
    learner.take_step()
    assert states(world) == ["trained"] * 3
    answer = ledger(world.folder)
    assert answer["balanced"] and answer["segments"]["dropped"] == {"nonfinite": 6}


@pytest.mark.parametrize("how", ["deadline", "infrastructure", "late_group"])
def test_a_late_member_that_does_not_end_is_dropped_by_name(make_world: MakeWorld, how: str) -> None:
    world, learner, actor = closed_early(make_world, actors={"max_retries": 0})
    if how == "deadline":
        world.tick(100.0)
    elif how == "infrastructure":
        actor.give_back(LeaseRef(0, 2, 0))
    else:
        actor.die()  # nobody gets it again
    assert world.brain.status()["drops"] == {how: 1} and states(world) == ["dropped"]
    learner.request_step()
    assert learner.batch is not None and len(learner.batch[1]) == 6


def test_a_late_member_beyond_the_bound_is_too_late(make_world: MakeWorld) -> None:
    world, learner, actor = closed_early(make_world, staleness={"max_lag": 1})
    for group in (1, 2, 3):
        learner.request_step()
        learner.take_step()
        if group == 2:
            play(actor, 2, [0.0, 0.0])  # sampled under version 2, but for the first episode
        actor.ask(64)
        for ref in [ref for ref in actor.lives if ref.group == group]:
            while ref in actor.lives:
                actor.play(ref)
    assert world.brain.status()["drops"] == {"late_group": 1}
    assert states(world) == ["dropped", "trained", "trained"]


def test_a_rollback_takes_only_the_late_members_back(make_world: MakeWorld) -> None:
    world, learner, actor = closed_early(make_world)
    learner.request_step()
    learner.take_step()
    saved = learner.checkpoint()
    play(actor, 2, [0.0, 0.0])
    actor.ask(64)
    for ref in [ref for ref in actor.lives if ref.group == 1]:
        while ref in actor.lives:
            actor.play(ref)
    learner.request_step()
    learner.take_step()
    learner.die()
    again = Learner(world, saved)
    assert states(world) == ["ready"] * 3 and states(world, 0) == ["trained"] * 3
    group = world.store.work.group(0)
    assert group is not None and group.state == "trained"
    again.request_step()
    assert sum(at[0] == 0 for at in trained_advantages(again)) == 3
    again.take_step()
    answer, problems = ledger_with_problems(world.folder)
    assert answer["balanced"], problems
    assert states(world) == ["trained"] * 3


def test_the_end_of_the_run_leaves_no_late_member_in_flight(make_world: MakeWorld) -> None:
    world, learner, actor = closed_early(make_world)
    learner.request_step()
    learner.take_step()
    actor.heartbeat()
    learner.finish()
    world.brain.close_run()
    answer, problems = ledger_with_problems(world.folder)
    assert answer["balanced"], problems
    assert answer["segments"]["in_flight"] == 0
    assert answer["segments"]["dropped"].keys() <= {"run_over", "late_group"}


def test_lone_late_segments_have_nothing_to_compare_with(make_world: MakeWorld) -> None:
    # with a window of one every return closes at once; nobody in time has an update of the third task
    world = make_world(
        learner={"groups_per_step": 1},
        lifecycle={"pack_size": 2, "group_size": 3},
        groups={**QUORUM, "quorum_members": 1, "after_s": 0.0},
        credit_assignment={"style": "sliding_window_mean", "window": 1},
    )
    _, actor = Learner(world), Actor(world)
    actor.ask(3)
    play(actor, 0, [1.0, 0.0, 1.0])  # alone in time: dropped, and nothing is left to be late for
    assert world.brain.status()["drops"] == {"singleton_group": 3}
    assert sorted(ref.member for ref in actor.lives if ref.group == 0) == []


def test_a_segment_of_too_many_versions_counts_but_is_not_trained(make_world: MakeWorld) -> None:
    world = make_world(
        learner={"groups_per_step": 1},
        staleness={"max_lag": 3, "max_version_spread": 1, "plan_ahead_steps": 3},
    )
    learner, actor = Learner(world), Actor(world)
    actor.ask(8)
    for group in range(2):
        for ref in [ref for ref in actor.lives if ref.group == group]:
            while ref in actor.lives:
                actor.play(ref)
        learner.request_step()
        learner.take_step()
    for member, oldest in ((0, 0), (1, 1)):  # from step 0 to step 2, and from step 1 to step 2
        ref = LeaseRef(2, member, 0)
        seq = actor.seal(ref, reward=float(member), num_tokens=4)
        segment = actor.outbox[seq]
        spans = (VersionSpan(Version(0, oldest), 2), VersionSpan(Version(0, 2), 2))
        row = msgspec.structs.replace(segment.rows[0], versions=spans)
        actor.outbox[seq] = msgspec.structs.replace(segment, rows=(row,))
        actor.send(seq)
        while ref in actor.lives:
            actor.send(actor.seal(ref, reward=0.0, num_tokens=2))
    assert world.brain.status()["drops"] == {"version_spread": 1}
    learner.request_step()
    advantages = trained_advantages(learner)
    assert (2, 0, 0) not in advantages
    assert advantages[2, 1, 0] == pytest.approx(0.25)  # .5 - (0 + .5) / 2: the other one counts
    report = world.store.history.step(learner.version)
    assert report is not None
    assert report.report["version_spread_max_steps"] == 1
    assert report.report["dropped_action_tokens"] == {"version_spread": 4}


def test_a_restart_opens_no_burst(make_world: MakeWorld) -> None:
    world = make_world(staleness={"max_lag": 4, "plan_ahead_steps": 1}, learner={"groups_per_step": 2})
    learner, actor = Learner(world), Actor(world)
    for _ in range(3):
        actor.ask(64)
        for ref in sorted(actor.lives, key=lambda ref: (ref.group, ref.member))[:4]:
            while ref in actor.lives:
                actor.play(ref)
        learner.request_step()
        learner.take_step()
    for _ in range(3):
        world.crash()
        for number in range(8):
            hungry = Actor(world, f"hungry-{number}", instance=100 * world.num_crashes + number)
            world.say(hungry.session, LeaseRequest(request=1, num_lifecycles=1000))
        for _ in range(8):
            world.tick(0.5)
        counts = world.store.work.count_leases()
        untrained = world.store.work.untrained()
        # two steps' worth of two groups of two lifecycles, as before the crash
        assert len(untrained) == 4 and counts["held"] + counts["free"] <= 8


def test_abandoned_work_is_trained_on_its_own_record(make_world: MakeWorld) -> None:
    """After a rollback the old lineage's segments come as they were sampled, and only within the bound."""
    world = make_world(learner={"groups_per_step": 1}, staleness={"max_lag": 3, "plan_ahead_steps": 3})
    learner, actor = Learner(world), Actor(world)
    sealed: dict[SegmentKey, Any] = {}
    for _ in range(3):
        actor.ask(64)
        for ref in sorted(actor.lives, key=lambda r: (r.group, r.member))[:2]:
            while ref in actor.lives:
                seq = actor.seal(ref)
                sealed[actor.outbox[seq].key] = actor.outbox[seq]
                actor.send(seq)
        learner.request_step()
        learner.take_step()
    learner.die()
    again = Learner(world)  # from the start: all three steps are undone
    num_old = 0
    for _ in range(4):
        again.request_step()
        if again.batch is None:
            actor.ask(64)
            actor.play_all()
        assert again.batch is not None
        for item in again.batch[1]:
            if item.key in sealed:
                rows = sealed[item.key].rows
                assert item.rows == rows  # tokens, log-probs and versions, bit for bit
                assert {span.version.lineage for row in rows for span in row.versions} == {0}
                assert item.lag_steps == again.version.step  # it counts from the branch, step 0
                num_old += 1
        again.take_step("noise")
    assert num_old == len(sealed)
    assert ledger(world.folder)["balanced"]


def test_one_member_alone_is_no_baseline_for_a_late_one(make_world: MakeWorld) -> None:
    """Of the two in time only one got to the last task: it is dropped there, and so is the late member."""
    world = make_world(
        learner={"groups_per_step": 1},
        lifecycle={"pack_size": 2, "group_size": 4},
        groups=QUORUM,
        credit_assignment={"style": "sliding_window_mean", "window": 1, "std": "group"},
        actors={"max_retries": 0},
    )
    learner, actor = Learner(world), Actor(world)
    actor.ask(4)
    play(actor, 0, [1.0, 0.0, 1.0])
    play(actor, 1, [0.0, 0.0])
    actor.give_back(LeaseRef(0, 1, 0))
    play(actor, 3, [0.0])
    actor.give_back(LeaseRef(0, 3, 0))
    play(actor, 2, [1.0])
    world.tick(10.5)
    assert states(world) == ["waiting"]  # a quorum of two has not ended yet
    row = world.store.work.group(0)
    assert row is not None and row.state == "open"
    world.brain._grouping.close_now(0)
    play(actor, 2, [0.0, 0.0])
    assert states(world) == ["ready", "ready", "dropped"]
    assert world.brain.status()["drops"] == {"singleton_group": 2}
    learner.request_step()
    assert all(abs(advantage) < 10 for advantage in trained_advantages(learner).values())
