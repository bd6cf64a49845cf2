from __future__ import annotations

from collections.abc import Callable

from coordinator_world import Actor, Learner, World

from cod_async.coordinator.leasing import MAX_HELD_PER_HEARTBEAT
from cod_async.lifecycle.segment import Version
from cod_async.wire.messages import Fence, Heartbeat, LeaseRef, LeaseRequest, LeaseReturn, Leases, Refused
from cod_async.wire.session import Closed, Received

MakeWorld = Callable[..., World]


def answers(actor: Actor) -> list[Leases]:
    return [message for message in actor.messages if isinstance(message, Leases)]


def fences(actor: Actor) -> list[tuple[str, list[LeaseRef]]]:
    return [(m.reason, m.leases) for m in actor.messages if isinstance(m, Fence)]


def state_of(world: World, group: int, member: int) -> tuple[str, int, int, str]:
    lease = world.store.work.lease(group, member)
    assert lease is not None
    return lease.state, lease.lease_epoch, lease.next_ordinal, lease.reason


def test_nothing_before_a_version_is_published(make_world: MakeWorld) -> None:
    world = make_world()
    actor = Actor(world)
    actor.ask()
    assert answers(actor) == []  # parked
    world.tick(1.0)
    assert answers(actor) == [Leases(request=1, leases=[])]  # ask again later
    actor.ask()
    Learner(world)  # publishes version 0.0: the parked request is served without being asked again
    assert len(answers(actor)[-1].leases) == 4
    assert {lease.min_version for lease in answers(actor)[-1].leases} == {Version(0, 0)}


def test_leases_of_a_group_share_the_world_and_differ_in_seeds(make_world: MakeWorld) -> None:
    world = make_world()
    Learner(world)
    actor = Actor(world)
    actor.ask(4)
    leases = answers(actor)[0].leases
    assert [(lease.ref.group, lease.ref.member, lease.ref.lease_epoch) for lease in leases] == [
        (0, 0, 0),
        (0, 1, 0),
        (1, 0, 0),
        (1, 1, 0),
    ]
    assert leases[0].pack_seed == leases[1].pack_seed != leases[2].pack_seed
    assert leases[0].records_json == leases[1].records_json and len(leases[0].records_json) == 2
    assert len({lease.sampling_seed for lease in leases}) == 4


def test_capacity_bounds_what_is_handed_out(make_world: MakeWorld) -> None:
    world = make_world()  # 2 groups per step, 2 members, one step ahead: 4 groups
    Learner(world)
    first, second = Actor(world, "a"), Actor(world, "b", instance=2)
    first.ask(5)
    second.ask(100)
    assert [len(first.lives), len(second.lives)] == [5, 3]


def test_a_repeated_request_gets_the_same_answer_also_after_a_crash(make_world: MakeWorld) -> None:
    world = make_world()
    Learner(world)
    actor = Actor(world)
    actor.ask(3)
    request = LeaseRequest(request=1, num_lifecycles=3)
    world.say(actor.session, request)
    world.crash()
    world.say(actor.session, request)
    first, *rest = answers(actor)
    assert [answer.leases for answer in rest] == [first.leases] * 2
    assert world.store.work.count_leases() == {"held": 3, "free": 1}


def test_an_old_request_that_was_answered_empty_grants_nothing(make_world: MakeWorld) -> None:
    world = make_world()
    actor = Actor(world)
    actor.ask()
    world.tick(1.0)
    Learner(world)
    world.say(
        actor.session, LeaseRequest(request=1, num_lifecycles=4)
    )  # a repetition that crossed the answer
    assert answers(actor)[-1].leases == [] and world.store.work.count_leases()["held"] == 0


def test_repeating_a_parked_request_does_not_prolong_it(make_world: MakeWorld) -> None:
    world = make_world()
    actor = Actor(world)
    actor.ask()
    world.tick(0.6)
    world.say(actor.session, LeaseRequest(request=1, num_lifecycles=4))
    world.tick(0.5)
    assert answers(actor) == [Leases(request=1, leases=[])]


def test_takeover_goes_on_after_the_last_committed_segment(make_world: MakeWorld) -> None:
    world = make_world()
    Learner(world)
    first = Actor(world, "a")
    first.ask(1)
    ref = next(iter(first.lives))
    first.play(ref)
    sealed = first.outbox.get(first.seal(ref))  # never sent
    first.die()
    second = Actor(world, "b", instance=2)
    second.ask(1)
    lease = answers(second)[0].leases[0]
    assert lease.ref == LeaseRef(0, 0, 1)
    assert lease.state is not None and lease.state.next_ordinal == 1 and lease.state.hint == "hint 0"
    assert sealed is not None and sealed.key.ordinal == 1
    second.play_all()
    assert state_of(world, 0, 0) == ("ended", 1, 3, "")


def test_a_zombie_is_fenced(make_world: MakeWorld) -> None:
    world = make_world()
    Learner(world)
    zombie = Actor(world, "a")
    zombie.ask(1)
    ref = next(iter(zombie.lives))
    zombie.play(ref)
    seq = zombie.seal(ref)
    zombie.world.close(zombie.session, "expired")
    other = Actor(world, "b", instance=2)
    other.ask(1)
    other.play(next(iter(other.lives)))
    zombie.connect()
    zombie.send(seq)
    assert zombie.dropped == {"fenced": 1}
    assert fences(zombie) == [("fenced", [LeaseRef(0, 0, 0)])]
    rows = world.store._connection.execute(
        "SELECT ordinal, lease_epoch FROM segments ORDER BY ordinal"
    ).fetchall()
    assert rows == [(0, 0), (1, 1)]


def test_given_back_leases_are_retried_and_then_given_up(make_world: MakeWorld) -> None:
    world = make_world(actors={"max_retries": 2})
    Learner(world)
    actor = Actor(world)
    for epoch in range(3):
        actor.ask(1)
        assert next(iter(actor.lives)) == LeaseRef(0, 0, epoch)
        actor.give_back(LeaseRef(0, 0, epoch))
        world.say(
            actor.session, LeaseReturn(lease=LeaseRef(0, 0, epoch), reason="infrastructure")
        )  # repeated
    assert state_of(world, 0, 0) == ("given_up", 3, 0, "infrastructure")


def test_draining_is_no_failure(make_world: MakeWorld) -> None:
    world = make_world(actors={"max_retries": 0})
    Learner(world)
    actor = Actor(world)
    actor.ask(1)
    actor.give_back(LeaseRef(0, 0, 0), "draining")
    assert state_of(world, 0, 0) == ("free", 1, 0, "")


def test_deadline(make_world: MakeWorld) -> None:
    world = make_world(groups={"deadline_s": 10.0})
    Learner(world)
    actor = Actor(world)
    actor.ask(2)
    world.tick(9.0)
    world.crash()  # a restart gives every lease its whole time again
    world.tick(9.0)
    assert state_of(world, 0, 0)[0] == "held"
    actor.play(LeaseRef(0, 1, 0))
    world.tick(2.0)
    assert state_of(world, 0, 0) == ("given_up", 1, 0, "deadline")
    assert state_of(world, 0, 1) == ("given_up", 1, 1, "deadline")
    assert actor.lives == {}
    group = world.store.work.group(0)
    assert group is not None and group.state == "dropped"
    assert world.brain.status()["drops"] == {"deadline": 1}


def test_heartbeats_fence_what_is_not_held(make_world: MakeWorld) -> None:
    world = make_world()
    Learner(world)
    actor = Actor(world)
    actor.ask(1)
    held = LeaseRef(0, 0, 0)
    unknown, old = LeaseRef(77, 0, 0), LeaseRef(0, 0, 9)
    world.say(actor.session, Heartbeat(held=[held, unknown, old]))
    assert fences(actor) == [("not_yours", [unknown, old])]
    actor.play_all()
    world.say(actor.session, Heartbeat(held=[held]))  # ended, and the actor has not heard of it yet
    assert len(fences(actor)) == 1


def test_a_restarted_actor_gets_its_predecessors_work(make_world: MakeWorld) -> None:
    world = make_world()
    Learner(world)
    old = Actor(world, "a", instance=1)
    old.ask(2)
    world.close(old.session, "replaced")
    new = Actor(world, "a", instance=2)
    new.ask(2)
    assert list(new.lives) == [LeaseRef(0, 0, 1), LeaseRef(0, 1, 1)]


def test_roles_are_kept_apart(make_world: MakeWorld) -> None:
    world = make_world()
    learner = Learner(world)
    world.say(learner.session, LeaseRequest(request=1, num_lifecycles=1))
    refused = [m for m in learner.messages if isinstance(m, Refused)]
    assert [(m.code, m.is_fatal) for m in refused] == [("wrong_role", True)]


def test_fences_of_one_reason_travel_together_and_a_flood_of_leases_is_cut(make_world: MakeWorld) -> None:
    world = make_world()
    Learner(world)
    actor = Actor(world)
    unknown = [LeaseRef(7, member, 3) for member in range(2 * MAX_HELD_PER_HEARTBEAT)]
    world.say(actor.session, Heartbeat(held=[*unknown[:1], *unknown]))
    assert fences(actor) == [("not_yours", unknown[: MAX_HELD_PER_HEARTBEAT - 1])]


def test_a_started_group_keeps_its_oldest_floor_across_lineages(make_world: MakeWorld) -> None:
    world = make_world(learner={"groups_per_step": 1}, staleness={"max_lag": 3})
    learner, actor = Learner(world), Actor(world)
    for _ in range(2):
        actor.ask(64)
        for early in [ref for ref in actor.lives if ref.group < 2]:
            while early in actor.lives:
                actor.play(early)
        learner.request_step()
        learner.take_step()
    ref = LeaseRef(2, 0, 0)
    world.store.work.set_floor(2, Version(0, 2))  # its tokens are of this version
    learner.die()
    again = Learner(world)  # from the start, with other weights: what was sampled so far counts as step 0
    again.request_step()
    again.take_step("noise")
    actor.give_back(ref)
    actor.ask(1)
    assert LeaseRef(ref.group, ref.member, 1) in actor.lives
    group = world.store.work.group(ref.group)
    assert group is not None and group.floor == Version(0, 2)  # 1.1 is a lower step, and younger


def test_a_quorum_that_closes_with_a_takeover_leaves_nothing_to_grant(make_world: MakeWorld) -> None:
    world = make_world(
        lifecycle={"pack_size": 2, "group_size": 4},
        learner={"groups_per_step": 1},
        groups={"close": "quorum", "quorum_members": 2, "after_s": 10.0, "late": "drop"},
    )
    Learner(world)
    actor, other = Actor(world), Actor(world, "other", instance=2)
    actor.ask(4)
    for member in (0, 1):
        while LeaseRef(0, member, 0) in actor.lives:
            actor.play(LeaseRef(0, member, 0))
    actor.play(LeaseRef(0, 2, 0))
    world.time += 20.0
    request = Received(world.session(other.session), LeaseRequest(request=1, num_lifecycles=2), 10)
    world.apply(Closed(world.session(actor.session), "expired"), request)
    assert state_of(world, 0, 2)[3] == "late_group"
    assert state_of(world, 0, 3) == ("given_up", 2, 0, "late_group")


def test_deadlines_of_lifecycles_that_were_cut_off_are_forgotten(make_world: MakeWorld) -> None:
    world = make_world(
        lifecycle={"pack_size": 1, "group_size": 2},
        groups={"close": "quorum", "quorum_members": 1, "deadline_s": 10.0, "late": "drop"},
    )
    Learner(world)
    actor = Actor(world)
    actor.ask(2)
    actor.play(LeaseRef(0, 0, 0))
    assert state_of(world, 0, 1)[3] == "late_group"
    world.tick(11.0)
    assert world.brain._leasing._granted_at == {}
