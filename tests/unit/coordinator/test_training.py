"""The learner's messages: lineages, plans, versions, checkpoints, the end."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from coordinator_world import (
    RUN,
    Actor,
    Learner,
    LearnerCheckpoint,
    World,
    check_plan_digest,
    make_config,
)

from cod_async.coordinator.brain import Brain
from cod_async.errors import StoreError
from cod_async.lifecycle.segment import SegmentKey, Version
from cod_async.store.database import RunStore
from cod_async.store.ledger import ledger
from cod_async.store.trained import extend_trained_digest
from cod_async.weights.manifest import Manifest
from cod_async.wire.messages import (
    Bye,
    Checkpointed,
    Finished,
    Heartbeat,
    LeaseRef,
    NewVersion,
    Published,
    PublishRecorded,
    Refused,
    SegmentData,
    StepBatch,
    StepDone,
    StepRecorded,
    Stop,
)

MakeWorld = Callable[..., World]


def refusals(learner: Learner) -> list[tuple[str, bool]]:
    return [(m.code, m.is_fatal) for m in learner.messages if isinstance(m, Refused)]


def train(world: World, learner: Learner, actor: Actor, num_steps: int) -> None:
    for _ in range(num_steps):
        actor.ask(64)
        actor.play_all()
        learner.request_step()
        assert learner.batch is not None
        learner.take_step()


def test_opening_twice_with_one_nonce_is_one_lineage(make_world: MakeWorld) -> None:
    world = make_world()
    learner = Learner(world)
    world.crash()
    world.say(learner.session, learner.open_message)
    assert learner.opened is not None and (learner.opened.lineage, learner.opened.step) == (0, 0)
    assert world.store.history.current_lineage() == 0


def test_a_replaced_learner_is_told_to_stop(make_world: MakeWorld) -> None:
    world = make_world()
    old = Learner(world)
    new = Learner(world)
    assert new.opened is not None and new.opened.lineage == 1
    old.request_step()
    world.say(old.session, old.open_message)
    assert refusals(old) == [("lineage_replaced", True)] * 2


def test_a_plan_is_repeated_bit_for_bit_also_after_a_crash(make_world: MakeWorld) -> None:
    world = make_world(credit_assignment={"red": "bisection"})
    learner, actor = Learner(world), Actor(world, rng=random.Random(5))
    actor.ask(64)
    actor.play_all()
    learner.request_step()
    first = learner.batch
    assert first is not None
    check_plan_digest(first, actor.acked)
    for _ in range(2):
        learner.batch, learner.parts = None, {}
        world.crash()
        learner.request_step()
        assert learner.batch == first


def test_a_waiting_request_is_answered_when_the_last_group_closes(make_world: MakeWorld) -> None:
    world = make_world()
    learner, actor = Learner(world), Actor(world)
    learner.request_step()
    assert (
        world.brain.status()["is_learner_waiting"] and world.brain.status()["waits_for"] == "too_few_closed"
    )
    actor.ask(4)
    actor.play_all()
    assert learner.batch is not None and len(learner.batch[1]) == 12


def test_a_batch_comes_in_parts(make_world: MakeWorld) -> None:
    world = make_world(transport={"max_message_bytes": 4096})
    learner, actor = Learner(world), Actor(world)
    actor.ask(4)
    actor.play_all()
    learner.request_step()
    parts = [m for m in learner.messages if isinstance(m, StepBatch)]
    assert len(parts) > 1 and [part.part for part in parts] == list(range(parts[0].num_parts))
    assert all(len(msgspec.msgpack.encode(part)) < 4096 for part in parts)
    keys = [item.key for part in parts for item in part.items]
    assert keys == sorted(keys) and len(keys) == 12


def test_a_step_is_recorded_once(make_world: MakeWorld) -> None:
    world = make_world()
    learner, actor = Learner(world), Actor(world)
    train(world, learner, actor, 1)
    digest = world.store.history.step(Version(0, 0))
    assert digest is not None
    done = StepDone(version=Version(0, 0), plan_digest=digest.plan_digest, metrics={})
    world.say(learner.session, done)
    world.crash()
    world.say(learner.session, done)
    assert [m for m in learner.messages if isinstance(m, StepRecorded)] == [
        StepRecorded(version=Version(0, 0))
    ] * 3
    assert world.brain.step == 1
    world.say(learner.session, StepDone(version=Version(0, 0), plan_digest="other", metrics={}))
    assert refusals(learner) == [("plan_mismatch", True)]


def test_versions_are_announced_once_and_never_change(make_world: MakeWorld) -> None:
    world = make_world()
    learner, actor = Learner(world), Actor(world)
    manifest = Manifest(RUN, Version(0, 0), "other digest", ())
    world.say(learner.session, Published(manifest=manifest))
    assert refusals(learner) == [("digest_mismatch", True)]
    train(world, learner, actor, 1)
    learner.publish()
    assert [m.manifest.version for m in actor.messages if isinstance(m, NewVersion)] == [Version(0, 1)]
    assert [m.version for m in learner.messages if isinstance(m, PublishRecorded)] == [
        Version(0, 0),
        Version(0, 1),
        Version(0, 1),
    ]


def test_an_actor_that_is_behind_is_told_of_the_version_again(make_world: MakeWorld) -> None:
    world = make_world()
    learner, actor = Learner(world), Actor(world)
    train(world, learner, actor, 1)
    for engine, is_told in ((Version(0, 1), False), (None, False), (Version(0, 0), True)):
        actor.messages.clear()
        world.say(actor.session, Heartbeat(engine_version=engine))
        new = [m.manifest.version for m in actor.messages if isinstance(m, NewVersion)]
        assert new == ([Version(0, 1)] if is_told else [])


def test_resume_makes_the_rest_trainable_again(make_world: MakeWorld) -> None:
    world = make_world()
    learner, actor = Learner(world), Actor(world)
    train(world, learner, actor, 2)
    saved = learner.checkpoint()
    train(world, learner, actor, 2)
    lost = [item.key for items in learner.history[2:] for item in items]
    learner.die()
    again = Learner(world, saved)
    assert again.opened is not None
    assert (again.opened.lineage, again.opened.step, again.opened.num_rolled_back) == (1, 2, 2)
    again.request_step()
    assert again.batch is not None and {item.key for item in again.batch[1]} == set(lost[: len(lost) // 2])
    states = dict(world.store._connection.execute("SELECT state, count(*) FROM steps GROUP BY state"))
    assert states == {"done": 2, "rolled_back": 2, "planned": 1}
    answer = ledger(world.folder)
    assert answer["balanced"] and answer["segments"]["trained"] == 24


def test_resume_from_another_history_is_refused(make_world: MakeWorld) -> None:
    world = make_world()
    learner, actor = Learner(world), Actor(world)
    train(world, learner, actor, 2)
    saved = learner.checkpoint()
    learner.die()
    for wrong in (
        msgspec.structs.replace(saved, trained_digest="0" * 64),
        msgspec.structs.replace(saved, version=Version(0, 7)),
        msgspec.structs.replace(saved, version=Version(9, 2)),
    ):
        refused = Learner(world, wrong)
        assert refused.opened is None and refusals(refused) == [("trained_digest", True)]
        refused.die()
    assert world.store.history.current_lineage() == 0


def test_a_checkpoint_proves_a_step_whose_report_was_lost(make_world: MakeWorld) -> None:
    world = make_world()
    learner, actor = Learner(world), Actor(world)
    train(world, learner, actor, 1)
    actor.ask(64)
    actor.play_all()
    learner.request_step()
    assert learner.batch is not None
    digest, items = learner.batch
    learner.die()  # it trained and saved, and its StepDone never arrived
    history = (*(tuple(step) for step in learner.history), tuple(items))
    weights = (*learner.weights_by_step, "next")
    saved = LearnerCheckpoint(
        Version(0, 2), extend_trained_digest(learner.trained_digest, digest), weights, history
    )
    again = Learner(world, saved)
    assert again.opened is not None and (again.opened.step, again.opened.num_rolled_back) == (2, 0)
    assert ledger(world.folder)["segments"]["trained"] == sum(map(len, history))


def test_resume_on_a_branch_that_was_abandoned(make_world: MakeWorld) -> None:
    world = make_world()
    learner, actor = Learner(world), Actor(world)
    train(world, learner, actor, 1)
    early = learner.checkpoint()
    train(world, learner, actor, 2)
    late = learner.checkpoint()
    learner.die()
    second = Learner(world, early)
    second.request_step()
    second.take_step("other")
    second.die()
    third = Learner(world, late)
    assert third.opened is not None and (third.opened.lineage, third.opened.step) == (2, 3)
    trained = {item.key for items in late.history for item in items}
    rows = world.store._connection.execute(
        "SELECT grp, member, ordinal FROM segments WHERE state = 'trained'"
    )
    assert {SegmentKey(*row) for row in rows} == trained
    assert ledger(world.folder)["balanced"]
    train(world, third, actor, 1)


def test_rolled_back_work_that_became_too_old_is_dropped_by_name(make_world: MakeWorld) -> None:
    world = make_world(staleness={"max_lag": 1}, learner={"groups_per_step": 1})
    learner, actor = Learner(world), Actor(world)
    train(world, learner, actor, 5)
    learner.die()
    again = Learner(world)  # from the start: seven groups count from step 0, and only two steps may use them
    for _ in range(4):
        again.request_step()  # at step 2 this drops what is too old, which makes room for new groups
        actor.ask(64)
        actor.play_all()
        assert again.batch is not None
        again.take_step("noise")
    assert world.brain.status()["drops"]["stale"] >= 9
    assert ledger(world.folder)["balanced"]


def test_expire_drops_what_runs_too_long(make_world: MakeWorld) -> None:
    world = make_world(
        staleness={"max_lag": 1, "on_bound": "expire", "plan_ahead_steps": 1}, learner={"groups_per_step": 1}
    )
    learner, actor = Learner(world), Actor(world)
    actor.ask(4)
    slow = LeaseRef(0, 0, 0)
    actor.play(slow)
    for _ in range(3):
        for ref in [ref for ref in actor.lives if ref != slow]:
            while ref in actor.lives:
                actor.play(ref)
        learner.request_step()
        if learner.batch is not None:
            learner.take_step()
        actor.ask(4)
    assert slow not in actor.lives
    assert world.brain.status()["drops"] == {
        "stale": 4
    }  # one of the slow member, three of its group's other one


def test_prune_keeps_what_a_resume_may_need(make_world: MakeWorld) -> None:
    world = make_world(store={"retention": "until_checkpoint"})
    learner, actor = Learner(world), Actor(world)
    saved = []
    for _ in range(3):
        train(world, learner, actor, 2)
        saved.append(learner.checkpoint())

    def kept() -> set[int]:
        rows = world.store._connection.execute(
            "SELECT DISTINCT trained_step FROM segments WHERE payload IS NOT NULL"
        )
        return {row[0] for row in rows if row[0] is not None}

    assert kept() == {4, 5}
    connection = world.store._connection
    num_payloads = connection.execute("SELECT count(*) FROM payloads").fetchone()
    assert num_payloads == connection.execute("SELECT count(payload) FROM segments").fetchone()
    train(world, learner, actor, 1)
    learner.die()
    again = Learner(world, saved[1])  # the newest one is damaged, say
    train(world, again, actor, 2)
    again.die()
    oldest = Learner(world, saved[0])  # what was pruned cannot be trained again, and is dropped by name
    assert oldest.opened is not None
    assert ledger(world.folder)["segments"]["dropped"]["payload_pruned"] == 24
    train(world, oldest, actor, 1)
    assert ledger(world.folder)["balanced"]


def test_a_wrong_checkpoint_is_refused(make_world: MakeWorld) -> None:
    world = make_world()
    learner = Learner(world)
    message = Checkpointed(version=Version(0, 0), path="p", digest="d", trained_digest="wrong")
    world.say(learner.session, message)
    assert refusals(learner) == [("trained_digest", True)]


def test_the_last_step_is_said_to_be_the_last(make_world: MakeWorld) -> None:
    world = make_world(run={"name": RUN, "num_steps": 2})
    learner, actor = Learner(world), Actor(world)
    train(world, learner, actor, 1)
    assert not learner.should_stop
    train(world, learner, actor, 1)
    assert learner.should_stop
    actor.ask(4)
    assert actor.lives == {}


def test_early_stop(make_world: MakeWorld) -> None:
    stop = {"is_enabled": True, "window_steps": 2, "gap": 0.5, "min_steps": 3}
    world = make_world(run={"name": RUN, "num_steps": 50, "early_stop": stop}, learner={"groups_per_step": 1})
    learner, actor = Learner(world), Actor(world)
    for step in range(4):
        later = 1.0 if step >= 1 else 0.0  # the gap is there from step 1 on
        actor.ask(2)
        for ref in list(actor.lives):
            for reward in (0.0, 0.0, later):
                actor.send(actor.seal(ref, reward=reward))
        learner.request_step()
        assert learner.batch is not None
        learner.take_step()
        assert learner.should_stop == (step >= 2)
        if learner.should_stop:
            break
    world.crash()
    actor.ask(2)
    assert actor.lives == {}  # it is remembered


def test_the_end(make_world: MakeWorld) -> None:
    world = make_world(run={"name": RUN, "num_steps": 1})
    learner, actor = Learner(world), Actor(world)
    train(world, learner, actor, 1)
    learner.finish()
    assert actor.is_stopped and world.brain.finished == "done" and world.brain.is_nothing_left
    world.crash()
    late = Actor(world, "late", instance=4)
    assert late.is_stopped
    late.leave()
    actor.leave()
    world.brain.close_run()
    answer = ledger(world.folder)
    assert answer["balanced"] and answer["segments"]["in_flight"] == 0


@pytest.mark.parametrize("has_saved", [False, True])
def test_a_lost_finish_is_understood(make_world: MakeWorld, has_saved: bool) -> None:
    world = make_world(run={"name": RUN, "num_steps": 1})
    learner, actor = Learner(world), Actor(world)
    train(world, learner, actor, 1)
    if has_saved:
        learner.checkpoint()
        learner.die()
    else:
        world.say(learner.session, Bye())
        world.close(learner.session, "bye")
    assert actor.is_stopped
    assert [m for m in actor.messages if isinstance(m, Stop)] == [Stop(reason="all steps are done")]


def test_a_learner_that_died_before_its_last_checkpoint_has_not_finished(make_world: MakeWorld) -> None:
    world = make_world(run={"name": RUN, "num_steps": 1})
    learner, actor = Learner(world), Actor(world)
    train(world, learner, actor, 1)
    learner.die()
    assert not actor.is_stopped and not world.brain.finished
    again = Learner(world)
    again.request_step()
    assert again.batch is not None


def test_an_old_lineage_cannot_finish_the_run(make_world: MakeWorld) -> None:
    world = make_world()
    learner = Learner(world)
    world.say(learner.session, Finished(version=Version(7, 3), reason="who am I"))
    assert not world.brain.finished


def test_a_database_of_another_run_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path, make_config())
    world.store.close()
    store = RunStore(tmp_path)
    with pytest.raises(StoreError, match="holds run"):
        Brain(store, make_config(), "another-run")
    store.close()


class DeterministicActor(Actor):
    """What it plays depends on the lifecycle's seed, the episode and the weights, and on nothing else."""

    def seal(self, ref: LeaseRef, reward: float | None = None, num_tokens: int | None = None) -> int:
        lease, state = self.lives[ref]
        assert self.world.brain.manifest is not None
        self.version = self.world.brain.manifest.version
        seed = f"{lease.sampling_seed} {state.next_ordinal} {self.world.brain.manifest.digest}"
        digest = hashlib.sha256(seed.encode()).digest()
        return super().seal(ref, float(digest[0] % 2), 1 + digest[1] % 4)


class DeterministicLearner(Learner):
    """Its weights depend on what it trains on, lease epochs aside."""

    def take_step(self, noise: str = "", **crash: bool) -> list[object]:  # type: ignore[override]
        assert self.batch is not None
        items = self.batch[1]
        content = [
            (str(item.key), item.advantage, [row.token_ids.data for row in item.rows]) for item in items
        ]
        super().take_step(noise, **crash)
        del self.weights_by_step[-1]
        self.weights_by_step.append(
            hashlib.sha256(repr((self.weights_by_step[-1], content)).encode()).hexdigest()
        )
        return list(items)

    def publish(self, **crash: bool) -> None:
        if len(self.weights_by_step) == self.version.step + 1:
            self.is_pending = True

    def publish_now(self) -> None:
        super().publish()


def play_deterministically(
    world: World, learner: DeterministicLearner, actor: Actor, num_steps: int, kill: int
) -> None:
    """Take steps; with ``kill`` > 0 stop in the middle of the following step after so many segments."""
    for _ in range(num_steps):
        learner.publish_now()
        actor.ask(64)
        actor.play_all()
        learner.request_step()
        learner.take_step()
    if kill:
        learner.publish_now()
        actor.ask(64)
        for _ in range(kill):
            actor.play(next(iter(actor.lives)))


@pytest.mark.parametrize(("num_after", "kill"), [(0, 0), (0, 3), (3, 0), (3, 5)])
def test_a_synchronous_run_resumes_bit_for_bit(tmp_path: Path, num_after: int, kill: int) -> None:
    config = make_config(staleness={"max_lag": 0}, learner={"groups_per_step": 2})
    (tmp_path / "whole").mkdir()
    whole = World(tmp_path / "whole", config)
    learner = DeterministicLearner(whole)
    play_deterministically(whole, learner, DeterministicActor(whole), 8, 0)
    (tmp_path / "broken").mkdir()
    broken = World(tmp_path / "broken", config)
    first, actor = DeterministicLearner(broken), DeterministicActor(broken)
    play_deterministically(broken, first, actor, 4, 0)
    saved = first.checkpoint()
    play_deterministically(broken, first, actor, num_after, kill)
    actor.die()
    first.die()
    broken.crash()
    second = DeterministicLearner(broken, saved)
    play_deterministically(broken, second, DeterministicActor(broken, "actor-1", instance=3), 4, 0)
    assert second.weights_by_step == learner.weights_by_step
    assert [[i.key for i in step] for step in second.history] == [
        [i.key for i in step] for step in learner.history
    ]
    answer = ledger(broken.folder)
    assert answer["balanced"] and answer["segments"]["dropped"] == {}
    whole.store.close()
    broken.store.close()


def test_a_crash_at_every_database_instruction_of_a_step(make_world: MakeWorld) -> None:
    """Interrupt each transaction of a small run at many points; in the end nothing is missing and nothing is
    double.
    """
    world = make_world(learner={"groups_per_step": 1})
    learner, actor = Learner(world), Actor(world)
    stride = 3  # a prime, so that the points differ from message to message
    while learner.version.step < 2:
        actor.ask(2)
        for ref in list(actor.lives):
            while ref in actor.lives:
                seq = actor.seal(ref)
                point = 1
                while seq in actor.outbox:
                    data = SegmentData(seq=seq, segment=actor.outbox[seq])
                    connection_failed = world.fail_inside(actor.session, data, point)
                    point += stride
                    assert connection_failed or seq not in actor.outbox
        learner.request_step()
        assert learner.batch is not None
        digest, _ = learner.batch
        done = StepDone(version=learner.version, plan_digest=digest, metrics={})
        point = 1
        while world.fail_inside(learner.session, done, point):
            point += stride
        learner.take_step()
    assert world.num_crashes > 50
    actor.heartbeat()
    world.say(actor.session, Heartbeat(counters=actor.report()))
    answer = ledger(world.folder)
    assert answer["balanced"]
    assert answer["segments"]["trained"] == 12 and answer["segments"]["generated"] == 12


def test_a_lost_stop_is_said_again(make_world: MakeWorld) -> None:
    world = make_world(run={"name": RUN, "num_steps": 1})
    learner, actor = Learner(world), Actor(world)
    train(world, learner, actor, 1)
    client = world.clients.pop(actor.session)
    learner.finish()  # the actor does not hear of it
    world.clients[actor.session] = client
    assert not actor.is_stopped
    actor.heartbeat()
    assert actor.is_stopped


def test_a_branch_off_nowhere_is_refused(make_world: MakeWorld) -> None:
    world = make_world()
    checkpoint = LearnerCheckpoint(Version(5, 0), "", ("start",), ())
    learner = Learner(world, checkpoint)
    assert refusals(learner) == [("trained_digest", True)]
    assert Learner(world).opened is not None


def test_who_said_no_goodbye_is_lost_when_the_run_is_over(make_world: MakeWorld) -> None:
    world = make_world(run={"name": RUN, "num_steps": 1})
    learner, actor = Learner(world), Actor(world)
    actor.ask(64)
    *others, left = list(actor.lives)
    for ref in others:
        while ref in actor.lives:
            actor.play(ref)
    actor.seal(left)
    actor.heartbeat()
    learner.finish()
    world.brain.close_run()
    assert [row.state for row in world.store.sessions.live()] == []
    answer = ledger(world.folder)
    assert (answer["segments"]["lost"], answer["segments"]["in_flight"]) == ({"actor_lost": 1}, 0)
    assert answer["balanced"]
