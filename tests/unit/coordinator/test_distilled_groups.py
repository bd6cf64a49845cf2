"""Runs that distill: what comes with its teacher's word is trained on, whatever its group came to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from coordinator_world import Actor, Learner, World

from cod_async.observe.transcripts import _segment
from cod_async.store.inspect import inspect_run
from cod_async.store.ledger import ledger
from cod_async.wire.messages import LeaseRef, SegmentData

MakeWorld = Callable[..., World]
OPD: dict[str, Any] = {"loss": {"preset": "opd"}, "learner": {"groups_per_step": 1}}


def begin(world: World, num_lifecycles: int = 2) -> tuple[Learner, Actor]:
    learner, actor = Learner(world), Actor(world)
    actor.ask(num_lifecycles)
    return learner, actor


def test_scores_reach_the_learner_with_their_environment(make_world: MakeWorld) -> None:
    world = make_world(**OPD)
    learner, actor = begin(world)
    actor.play_all()
    learner.request_step()
    assert learner.batch is not None
    items = learner.batch[1]
    assert len(items) == 6
    for item in items:
        assert item.environment == "hidden_buttons.door"
        (row,) = item.rows
        assert row.teacher_logprobs is not msgspec.UNSET
        assert row.teacher_logprobs.numpy().tolist() == [-0.75] * row.num_action_tokens
    shown = inspect_run(world.folder, str(items[0].key))
    assert set(shown["rows"][0]["teacher_logprobs"]) == {-0.75}


def test_one_member_alone_is_trained_too(make_world: MakeWorld) -> None:
    world = make_world(**OPD, actors={"max_retries": 0})
    learner, actor = begin(world)
    while LeaseRef(0, 0, 0) in actor.lives:
        actor.play(LeaseRef(0, 0, 0))
    actor.give_back(LeaseRef(0, 1, 0))
    learner.request_step()
    assert learner.batch is not None and len(learner.batch[1]) == 3
    assert ledger(world.folder)["segments"]["dropped"] == {}


@pytest.mark.parametrize("is_distilling", [True, False])
def test_what_does_not_fit_the_run_is_refused(make_world: MakeWorld, is_distilling: bool) -> None:
    world = make_world(**(OPD if is_distilling else {}))
    _, actor = begin(world)
    seq = actor.seal(LeaseRef(0, 0, 0))
    segment = actor.outbox[seq]
    (row,) = segment.rows
    other = msgspec.UNSET if is_distilling else row.behavior_logprobs
    rows = (msgspec.structs.replace(row, teacher_logprobs=other),)
    actor.outbox[seq] = msgspec.structs.replace(segment, rows=rows)
    world.say(actor.session, SegmentData(seq=seq, segment=actor.outbox[seq]))
    assert actor.dropped == {"bad_teacher": 1}


def test_other_runs_keep_their_bytes(make_world: MakeWorld) -> None:
    """Rows and items without a teacher are encoded as ever: the field is left out."""
    world = make_world(learner={"groups_per_step": 1})
    learner, actor = begin(world)
    actor.play_all()
    learner.request_step()
    assert learner.batch is not None
    for item in learner.batch[1]:
        assert b"teacher" not in msgspec.msgpack.encode(item)
        assert b"environment" not in msgspec.msgpack.encode(item)
    (body,) = world.store._connection.execute("SELECT body FROM payloads LIMIT 1").fetchone()
    assert b"teacher" not in body
    assert _segment.decode(body).teacher_gap_nats is None
