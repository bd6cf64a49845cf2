"""The ledger against books written by hand."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from coordinator_world import Actor, Learner, World, make_config

from cod_async.errors import InputError, StoreError
from cod_async.store.inspect import inspect_run, lifecycle_segments
from cod_async.store.ledger import ledger, ledger_with_problems
from cod_async.store.metrics_log import MetricsLog


def parts(**numbers: Any) -> dict[str, Any]:
    return {"generated": 0, "trained": 0, "dropped": {}, "lost": {}, "in_flight": 0, **numbers}


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path, make_config(learner={"groups_per_step": 1}))
    Learner(world)
    return world


def take_leases(actor: Actor, num: int = 4) -> list[Any]:
    actor.ask(num)
    return list(actor.lives)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no run database"):
        ledger(tmp_path)


def test_empty_run(world: World) -> None:
    assert ledger(world.folder) == {"segments": parts(), "tokens": parts(), "balanced": True}


def test_live_actor_has_its_outbox_in_flight(world: World) -> None:
    actor = Actor(world)
    refs = take_leases(actor)
    actor.send(actor.seal(refs[0], num_tokens=5))
    actor.seal(refs[1], num_tokens=2)  # sealed, not sent
    actor.counters["sampled_tokens"] += 4  # in an episode that is still open
    actor.counters["open_tokens"] = 4
    actor.heartbeat()
    answer = ledger(world.folder)
    assert answer["segments"] == parts(generated=2, in_flight=2)
    assert answer["tokens"] == parts(generated=11, in_flight=11)
    assert answer["balanced"]


def test_what_arrived_after_the_last_report_is_generated(world: World) -> None:
    actor = Actor(world)
    refs = take_leases(actor)
    actor.send(actor.seal(refs[0], num_tokens=5))
    answer = ledger(world.folder)  # no report at all yet
    assert answer["segments"] == parts(generated=1, in_flight=1)
    assert answer["tokens"] == parts(generated=5, in_flight=5)


def test_killed_actor_loses_what_it_had_reported_and_not_delivered(world: World) -> None:
    actor = Actor(world)
    refs = take_leases(actor)
    actor.send(actor.seal(refs[0], num_tokens=5))
    actor.seal(refs[1], num_tokens=2)
    actor.counters["aborted_tokens"] = 3
    actor.counters["sampled_tokens"] += 3
    actor.heartbeat()
    actor.die()
    answer = ledger(world.folder)
    assert answer["segments"] == parts(generated=2, in_flight=1, lost={"actor_lost": 1})
    assert answer["tokens"] == parts(generated=10, in_flight=5, lost={"aborted": 3, "actor_lost": 2})
    assert answer["balanced"]


def test_clean_end_must_add_up(world: World) -> None:
    actor = Actor(world)
    refs = take_leases(actor)
    actor.send(actor.seal(refs[0], num_tokens=5))
    actor.counters["sealed_segments"] += 1  # it claims one that nobody has ever seen
    actor.leave()
    answer, problems = ledger_with_problems(world.folder)
    assert not answer["balanced"]
    assert "actor-0 said goodbye with 2 segments, 1 are known" in problems[0]


def test_acknowledged_and_missing_is_a_lie(world: World) -> None:
    actor = Actor(world)
    refs = take_leases(actor)
    actor.send(actor.seal(refs[0], num_tokens=5))
    actor.heartbeat()
    assert ledger(world.folder)["balanced"]
    with world.store.transaction():
        world.store._connection.execute("DELETE FROM segments")
    answer, problems = ledger_with_problems(world.folder)
    assert not answer["balanced"] and "1 segments were acknowledged, 0 are here" in problems[0]


def test_undelivered_segments_are_lost_unless_they_arrived(world: World) -> None:
    actor = Actor(world)
    refs = take_leases(actor)
    actor.seal(refs[0], num_tokens=5)
    actor.leave()
    late = Actor(world, "actor-1", instance=7)
    late.ask(1)
    seq = late.seal(next(iter(late.lives)), num_tokens=3)
    segment = late.outbox[seq]
    late.send(seq)
    late.outbox[seq] = segment  # its acknowledgement never came
    late.leave()
    answer = ledger(world.folder)
    assert answer["segments"] == parts(generated=2, in_flight=1, lost={"undelivered": 1})
    assert answer["tokens"] == parts(generated=8, in_flight=3, lost={"undelivered": 5})
    assert answer["balanced"]


def test_one_process_over_two_sessions_is_counted_once(world: World) -> None:
    actor = Actor(world, rng=random.Random(3))
    refs = take_leases(actor)
    actor.send(actor.seal(refs[0], num_tokens=5))
    seq = actor.seal(refs[1], num_tokens=2)
    actor.heartbeat()
    actor.start_over()  # its outbox is offered again in the new session, and fenced there
    assert seq not in actor.outbox and actor.dropped == {"fenced": 1}
    actor.leave()
    answer = ledger(world.folder)
    assert answer["balanced"]
    assert answer["segments"] == parts(generated=2, in_flight=1, dropped={"fenced": 1})


def test_trained_and_dropped(world: World) -> None:
    learner = next(client for client in world.clients.values() if isinstance(client, Learner))
    actor = Actor(world)
    actor.ask(2)
    actor.play_all()
    learner.request_step()
    items = learner.take_step()
    answer = ledger(world.folder)
    assert answer["segments"] == parts(generated=6, trained=6)
    assert answer["tokens"]["trained"] == sum(row.num_action_tokens for item in items for row in item.rows)
    rolled_back = Learner(world)
    assert rolled_back.opened is not None and rolled_back.opened.num_rolled_back == 1
    assert ledger(world.folder)["segments"] == parts(generated=6, in_flight=6)


def test_inspect(world: World) -> None:
    learner = next(client for client in world.clients.values() if isinstance(client, Learner))
    actor = Actor(world)
    actor.ask(2)
    actor.play_all()
    learner.request_step()
    learner.take_step()
    overview = inspect_run(world.folder)
    assert [version["version"] for version in overview["versions"]] == ["0.0", "0.1"]
    assert overview["num_segments"] == 6 and len(overview["lifecycles"]) == 2
    assert overview["lags"] == {"num_segments": 6, "mean": 0.0, "max": 0, "histogram": {"0": 6}}
    one = inspect_run(world.folder, "g000000.m01.o02")
    assert (one["kind"], one["position"], one["state"], one["actor"]) == ("solve", 1, "trained", "actor-0")
    row = one["rows"][0]
    assert row["versions"] == [["0.0", one["num_action_tokens"]]]
    assert len(row["behavior_logprobs"]) == one["num_action_tokens"]
    assert row["token_ids"] == list(range(2 + one["num_action_tokens"]))
    assert [step["version"] for step in one["steps"]] == ["0.0"]
    assert [segment.key.ordinal for segment in lifecycle_segments(world.folder, 0, 1)] == [0, 1, 2]
    for bad in ("g1", "../etc/passwd", "g000009.m00.o00"):
        with pytest.raises(InputError):
            inspect_run(world.folder, bad)


def test_metrics_file_survives_a_torn_tail(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path)
    metrics.append("step", value=float("nan"))
    metrics.close()
    with metrics.path.open("ab") as file:
        file.write(b'{"kind": "sta')
    again = MetricsLog(tmp_path)
    again.append("status", step=3)
    again.close()
    assert metrics.path.read_text() == '{"kind":"step","value":null}\n{"kind":"status","step":3}\n'
