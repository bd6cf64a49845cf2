"""Recorded steps, read back: the batch is the one that was sent, and what is missing is known."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from coordinator_world import MEMORY_FOLDER, Actor, Learner, World, make_config

from cod_async.errors import InputError
from cod_async.lifecycle.segment import SegmentKey, Version
from cod_async.store.recorded import RecordedRun, Stretch
from cod_async.wire.messages import TrainItem


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY_FOLDER) as name:
        yield Path(name)


def train(world: World, learner: Learner, actor: Actor) -> list[TrainItem]:
    actor.ask(64)
    actor.play_all()
    learner.request_step()
    items: list[TrainItem] = learner.take_step()
    return items


def test_a_batch_is_the_one_that_was_sent(folder: Path) -> None:
    world = World(folder, make_config(replay={"max_uses": 2, "groups_per_step": 1}))
    learner, actor = Learner(world), Actor(world)
    sent = [train(world, learner, actor) for _ in range(3)]
    run = RecordedRun(folder, is_transcript=False)
    for step, items in enumerate(sent):
        assert run.items(run.version(step)) == items
        assert run.num_missing(Version(0, step)) == 0
    assert len(sent[2]) > len(sent[0])  # some groups were used again
    world.store.close()


def test_a_transcript_needs_the_payloads_of_its_context(folder: Path) -> None:
    sections = {"lifecycle": {"pack_size": 3, "carry": "transcript"}}
    world = World(folder, make_config(**sections))
    learner, actor = Learner(world), Actor(world)
    actor.ask(64)
    actor.play_all()
    # one middle segment is not trained, only gone on from
    context = SegmentKey(0, 0, 2)
    world.store._connection.execute(
        "UPDATE segments SET state = 'dropped', drop_reason = 'stale' "
        "WHERE grp = 0 AND member = 0 AND ordinal = 2"
    )
    learner.request_step()
    items = learner.take_step()
    assert [item.key for item in items if item.is_context] == [context]
    run = RecordedRun(folder, is_transcript=True)
    assert run.items(Version(0, 0)) == items
    with sqlite3.connect(folder / "run.sqlite") as connection:
        connection.execute("UPDATE segments SET payload = NULL WHERE grp = 0 AND member = 0 AND ordinal = 2")
    assert run.num_missing(Version(0, 0)) == 1
    assert RecordedRun(folder, is_transcript=False).num_missing(Version(0, 0)) == 0
    with pytest.raises(InputError, match=rf"payloads of 1 segments are gone, {context} among them"):
        run.items(Version(0, 0))
    world.store.close()


def test_a_history_is_followed_across_lineages(folder: Path) -> None:
    world = World(folder, make_config())
    learner, actor = Learner(world), Actor(world)
    for _ in range(2):
        train(world, learner, actor)
    saved = learner.checkpoint()
    train(world, learner, actor)
    learner.die()
    learner = Learner(world, saved)
    for _ in range(2):
        train(world, learner, actor)
    run = RecordedRun(folder, is_transcript=False)
    assert [run.version(step) for step in range(4)] == [
        Version(0, 0), Version(0, 1), Version(1, 2), Version(1, 3)
    ]  # fmt: skip
    assert run.version(2, lineage=0) == Version(0, 2)
    assert run.history(Version(1, 3)) == [Stretch(1, 2, 3), Stretch(0, 0, 2)]
    assert run.history(Version(0, 2)) == [Stretch(0, 0, 2)]
    assert run.step(Version(0, 2)).state == "rolled_back"
    for step, lineage, problem in (
        (4, None, "--step 4: not taken; the run has steps 0 to 3"),
        (0, 1, "--step 0 --lineage 1: that lineage has no such step; it has 2 to 3"),
        (0, 5, "--lineage 5: the run has lineages 0 to 1"),
    ):
        with pytest.raises(InputError, match=problem):
            run.version(step, lineage)
    world.store.close()


def test_a_run_without_steps_says_so(folder: Path) -> None:
    world = World(folder, make_config())
    run = RecordedRun(folder, is_transcript=False)
    with pytest.raises(InputError, match="the run's learner took no step yet"):
        run.version(0)
    Learner(world)
    with pytest.raises(InputError, match="the run has no finished step"):
        run.version(0)
    world.store.close()
