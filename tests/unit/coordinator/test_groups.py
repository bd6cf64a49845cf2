"""Closing groups and credit, on numbers worked by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from coordinator_world import Actor, Learner, World

from cod_async.lifecycle.segment import SegmentKey
from cod_async.store.ledger import ledger
from cod_async.wire.messages import Fence, LeaseRef

MakeWorld = Callable[..., World]


def begin(world: World, num_lifecycles: int) -> tuple[Learner, Actor]:
    learner, actor = Learner(world), Actor(world)
    actor.ask(num_lifecycles)
    return learner, actor


def play(actor: Actor, member: int, rewards: list[float], group: int = 0) -> None:
    ref = LeaseRef(group, member, 0)
    for reward in rewards:
        actor.send(actor.seal(ref, reward=reward, num_tokens=2))


def group_state(world: World, group: int = 0) -> str:
    row = world.store.work.group(group)
    assert row is not None
    return row.state


def test_credit_of_a_group(make_world: MakeWorld) -> None:
    world = make_world(learner={"groups_per_step": 1})
    learner, actor = begin(world, 2)
    play(actor, 0, [0.0, -0.1, 1.0])  # solve 0, update 0, solve 1
    assert group_state(world) == "open"
    play(actor, 1, [1.0, 0.0, 0.0])
    assert group_state(world) == "closed"
    learner.request_step()
    assert learner.batch is not None
    advantages = {(item.key.member, item.key.ordinal): item.advantage for item in learner.batch[1]}
    # returns: member 0: solve 0 (0+1)/2, update 0 (-.1+1)/2, solve 1 1; member 1: (1+0)/2, (0+0)/2, 0
    expected = {(0, 0): 0.0, (0, 1): 0.225, (0, 2): 0.5, (1, 0): 0.0, (1, 1): -0.225, (1, 2): -0.5}
    assert advantages == pytest.approx(expected)
    report = world.store.history.step(learner.version)
    assert report is not None
    assert report.report["reward_by_position"] == [0.5, 0.5]
    assert report.report["update_reward_by_position"] == [-0.05]
    assert (report.report["num_segments"], report.report["num_action_tokens"]) == (6, 12)


def test_red_balances_the_selection(make_world: MakeWorld) -> None:
    world = make_world(
        lifecycle={"pack_size": 1, "group_size": 2},
        learner={"groups_per_step": 1},
        credit_assignment={"red": "bisection", "parity": True},
        model={"max_context_tokens": 1000},
    )
    learner, actor = begin(world, 2)
    actor.send(actor.seal(LeaseRef(0, 0, 0), reward=1.0, num_tokens=100))
    actor.send(actor.seal(LeaseRef(0, 1, 0), reward=0.0, num_tokens=110))
    learner.request_step()
    assert learner.batch is not None
    # the published vector: advantages .5, -.5 over 100, 110 tokens become .5243, -.4768
    assert [item.advantage for item in learner.batch[1]] == pytest.approx([0.5243, -0.4768], abs=1e-4)


def test_what_a_given_up_member_leaves(make_world: MakeWorld) -> None:
    world = make_world(
        learner={"groups_per_step": 1}, lifecycle={"pack_size": 2, "group_size": 3}, actors={"max_retries": 0}
    )
    learner, actor = begin(world, 3)
    play(actor, 0, [1.0, 0.0, 1.0])
    play(actor, 1, [0.0, 0.0, 0.0])
    play(actor, 2, [1.0, 0.0])
    actor.give_back(LeaseRef(0, 2, 0))
    assert group_state(world) == "closed"
    assert world.brain.status()["drops"] == {"infrastructure": 2}
    learner.request_step()
    assert learner.batch is not None
    assert {item.key.member for item in learner.batch[1]} == {0, 1}
    assert [item.advantage for item in learner.batch[1] if item.key.ordinal == 0] == [0.5, -0.5]


def test_a_window_keeps_what_had_closed(make_world: MakeWorld) -> None:
    world = make_world(
        learner={"groups_per_step": 1},
        actors={"max_retries": 0},
        credit_assignment={"style": "sliding_window_mean", "window": 1},
    )
    learner, actor = begin(world, 2)
    play(actor, 0, [1.0, 0.0, 1.0])
    play(actor, 1, [0.0, 0.0])
    actor.give_back(LeaseRef(0, 1, 0))
    learner.request_step()
    assert learner.batch is not None
    keys = [item.key for item in learner.batch[1]]
    # with a window of one, solve 0 and update 0 of the lost member had their returns; solve 1 stands alone
    assert keys == [SegmentKey(0, m, o) for m in (0, 1) for o in (0, 1)]
    assert world.brain.status()["drops"] == {"singleton_group": 1}


def test_a_single_member_has_nothing_to_compare_with(make_world: MakeWorld) -> None:
    world = make_world(learner={"groups_per_step": 1}, actors={"max_retries": 0})
    learner, actor = begin(world, 2)
    play(actor, 0, [1.0, 0.0, 1.0])
    actor.give_back(LeaseRef(0, 1, 0))
    assert group_state(world) == "dropped"
    assert ledger(world.folder)["segments"]["dropped"] == {"singleton_group": 3}
    actor.ask(4)
    assert LeaseRef(2, 0, 0) in actor.lives  # the dropped group made room for another
    learner.request_step()
    assert learner.batch is None


def test_groups_of_one_are_trained(make_world: MakeWorld) -> None:
    world = make_world(learner={"groups_per_step": 1}, lifecycle={"pack_size": 1, "group_size": 1})
    learner, actor = begin(world, 1)
    play(actor, 0, [1.0])
    learner.request_step()
    assert learner.batch is not None and [item.advantage for item in learner.batch[1]] == [0.0]


def test_quorum(make_world: MakeWorld) -> None:
    world = make_world(
        learner={"groups_per_step": 1},
        lifecycle={"pack_size": 1, "group_size": 3},
        groups={"close": "quorum", "quorum_members": 2, "after_s": 10.0, "late": "drop"},
    )
    learner, actor = begin(world, 3)
    play(actor, 0, [1.0])
    play(actor, 1, [0.0])
    world.tick(9.0)
    assert group_state(world) == "open"
    world.tick(1.5)
    assert group_state(world) == "closed"
    assert [m for m in actor.messages if isinstance(m, Fence)] == [
        Fence(leases=[LeaseRef(0, 2, 0)], reason="late_group")
    ]
    learner.request_step()
    assert learner.batch is not None and len(learner.batch[1]) == 2


def test_quorum_drops_what_the_late_member_had_delivered(make_world: MakeWorld) -> None:
    world = make_world(
        learner={"groups_per_step": 1},
        lifecycle={"pack_size": 2, "group_size": 3},
        groups={"close": "quorum", "quorum_members": 2, "after_s": 10.0, "late": "drop"},
    )
    _, actor = begin(world, 3)
    play(actor, 2, [1.0])
    play(actor, 0, [1.0, 0.0, 1.0])
    play(actor, 1, [0.0, 0.0, 1.0])
    world.tick(9.0)
    world.crash()  # the wait begins anew: nobody knows how long the coordinator was away
    world.tick(9.0)
    assert group_state(world) == "open"
    world.tick(1.0)
    assert group_state(world) == "planned"  # the learner's request came again after the crash
    assert world.brain.status()["drops"] == {"late_group": 1}
