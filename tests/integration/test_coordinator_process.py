"""The coordinator as a process: real sockets, real kills, clients that only ever see their own answers."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from coordinator_world import RUN, make_config, make_segment

from cod_async.config.load import save_resolved
from cod_async.config.schema import Config
from cod_async.lifecycle.segment import LifecycleState, Segment, Version
from cod_async.store.ledger import ledger_with_problems
from cod_async.transport.client_link import ClientLink
from cod_async.weights.manifest import Manifest
from cod_async.wire.messages import (
    Bye,
    Finished,
    Heartbeat,
    LeaseRequest,
    OpenLineage,
    Published,
    StepDone,
    StepRequest,
    Stop,
    ToClient,
)

PROGRAM = (
    "import pathlib, sys; from cod_async.coordinator.service import run_coordinator; "
    "sys.exit(run_coordinator(pathlib.Path(sys.argv[1])))"
)
NUM_STEPS = 4


class Coordinator:
    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(self.run_dir)],
            stderr=subprocess.DEVNULL,
            env=dict(os.environ),
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process = self.start()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[tuple[Coordinator, Config]]:
    config = make_config(
        run={"name": RUN, "num_steps": NUM_STEPS, "grace_s": 20.0},
        transport={"heartbeat_s": 0.2, "session_timeout_s": 10.0, "resend_s": 0.2},
        learner={"groups_per_step": 2},
    )
    save_resolved(config, tmp_path)
    coordinator = Coordinator(tmp_path)
    yield coordinator, config
    if coordinator.process.poll() is None:
        coordinator.process.kill()
        coordinator.process.wait()


def play_lease(link: ClientLink, lease: object, version: Version, counters: Counter[str]) -> list[Segment]:
    sealed: list[Segment] = []
    state = lease.state or LifecycleState(0, "")  # type: ignore[attr-defined]
    while not sealed or not sealed[-1].is_last:
        segment = make_segment(lease, state, version, num_action_tokens=3)  # type: ignore[arg-type]
        counters.update(sealed_segments=1, sampled_tokens=3)
        link.send_segment(segment)
        sealed.append(segment)
        state = segment.state_after
    return sealed


def drive(run_dir: Path, config: Config, after_part: Callable[[], None]) -> tuple[list[ToClient], int]:
    """Be the learner and one actor until the end; ``after_part`` may do harm between any two requests."""
    heard: list[ToClient] = []
    learner = ClientLink.for_run(run_dir, config, role="learner", name="learner")
    actor = ClientLink.for_run(run_dir, config, role="actor", name="actor-0")
    counters: Counter[str] = Counter()
    actor.set_heartbeat(lambda: Heartbeat(counters={k: float(v) for k, v in counters.items()}))
    learner.start()
    actor.start(heard.append)
    opened = learner.request_future(OpenLineage(branch=None, trained_digest="", nonce="n")).result(30)
    version, request, num_trained = Version(opened.lineage, 0), 0, 0
    while version.step < NUM_STEPS:
        learner.request_future(Published(manifest=Manifest(RUN, version, f"d{version.step}", ()))).result(30)
        after_part()
        batch = learner.request_future(StepRequest(version=version))
        while not batch.done():
            request += 1
            leases = actor.request_future(LeaseRequest(request=request, num_lifecycles=4)).result(30).leases
            after_part()
            for lease in leases:
                play_lease(actor, lease, version, counters)
            after_part()
        parts = batch.result(30)
        num_trained += sum(len(part.items) for part in parts)
        done = StepDone(version=version, plan_digest=parts[0].plan_digest, metrics={"loss": 1.5})
        recorded = learner.request_future(done)
        after_part()
        assert recorded.result(30).should_stop == (version.step + 1 == NUM_STEPS)
        version = Version(version.lineage, version.step + 1)
    learner.send(Finished(version=version, reason="done"))
    learner.close(Bye())
    deadline = time.monotonic() + 30
    while not any(isinstance(message, Stop) for message in heard) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert actor.num_unacked == 0
    actor.close(Bye(counters={k: float(v) for k, v in counters.items()}))
    assert counters["sealed_segments"] == num_trained, "exactly what was played is trained"
    return heard, num_trained


@pytest.mark.fault
def test_killed_again_and_again(run: tuple[Coordinator, Config]) -> None:
    coordinator, config = run
    rng = random.Random(1)
    kills = 0

    def harm() -> None:
        nonlocal kills
        if rng.random() < 0.3 and kills < 3:
            kills += 1
            coordinator.kill()

    heard, num_trained = drive(coordinator.run_dir, config, harm)
    assert coordinator.process.wait(30) == 0
    # Said again at every heartbeat, because any word may be lost.
    assert {message.reason for message in heard if isinstance(message, Stop)} == {"done"}
    assert kills >= 3
    answer, problems = ledger_with_problems(coordinator.run_dir)
    assert answer["balanced"], problems
    assert answer["segments"]["trained"] == num_trained and answer["segments"]["in_flight"] == 0
    records = [json.loads(line) for line in (coordinator.run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if record["kind"] == "step"]
    assert sorted(set(steps)) == list(range(NUM_STEPS))
    assert all(record["learner"] == {"loss": 1.5} for record in records if record["kind"] == "step")
    assert any(record["kind"] == "status" for record in records)


def test_told_to_stop_it_leaves_at_once_and_a_successor_takes_its_port(
    run: tuple[Coordinator, Config],
) -> None:
    coordinator, _ = run
    address = coordinator.run_dir / "coordinator.json"
    deadline = time.monotonic() + 30
    while not address.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    before = json.loads(address.read_text())
    assert before["pid"] == coordinator.process.pid
    while not (coordinator.run_dir / "metrics.jsonl").read_text():  # the loop runs, signals are handled
        time.sleep(0.01)
    coordinator.process.send_signal(signal.SIGTERM)
    assert coordinator.process.wait(10) == 0
    coordinator.process = coordinator.start()
    while json.loads(address.read_text()) == before and time.monotonic() < deadline:
        time.sleep(0.01)
    after = json.loads(address.read_text())
    assert after["address"] == before["address"] and after["pid"] == coordinator.process.pid
