"""The learner process against a real server link: whole, stopped, and resumed to the bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from learner_world import VOCAB

from cod_async.config.load import save_resolved
from cod_async.config.schema import Config
from cod_async.errors import NumericsError
from cod_async.learner.checkpoint import all_checkpoints, newest_checkpoint
from cod_async.learner.loop import run_learner
from cod_async.learner.selftest import random_items
from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.segment import Version
from cod_async.models.directory import load_model, weights_of
from cod_async.store.trained import extend_trained_digest
from cod_async.transport.link import Received, ServerLink
from cod_async.weights.digest import tensors_digest
from cod_async.weights.load import load_weights
from cod_async.weights.publish import published_versions, read_manifest
from cod_async.wire.messages import (
    Bye,
    Checkpointed,
    Finished,
    LineageOpened,
    OpenLineage,
    Published,
    PublishRecorded,
    StepBatch,
    StepDone,
    StepRecorded,
    StepRequest,
    Stop,
    ToClient,
    ToCoordinator,
    TrainItem,
)


class ScriptedCoordinator(threading.Thread):
    """Answers a learner over a real socket; the batch of a step depends on the step alone."""

    def __init__(self, run_dir: Path, config: Config) -> None:
        super().__init__(daemon=True)
        self.run_dir, self.config = run_dir, config
        self.log: list[ToCoordinator] = []
        self.num_lineages = 0
        self.stop_at: int | None = None
        self.goal_at: int | None = None
        self.poison_at: int | None = None
        self.should_exit = threading.Event()
        self.num_byes = threading.Semaphore(0)
        self._num_sessions = 0
        self.link = ServerLink(
            config.transport.bind, config.run.name, config.transport, allocate_session=self._allocate
        )
        (run_dir / "coordinator.json").write_text(json.dumps({"address": self.link.address, "pid": 1}))

    def _allocate(self, hello: object) -> int:
        self._num_sessions += 1
        return self._num_sessions

    def items(self, step: int) -> list[TrainItem]:
        items = random_items(24, vocab_size=VOCAB, min_tokens=3, max_tokens=30, seed=step)
        if step == self.poison_at:
            row = items[0].rows[0]
            bad = Array.of([-1e30] * row.num_action_tokens, "<f4")
            items[0] = msgspec.structs.replace(
                items[0], advantage=-1e38, rows=(msgspec.structs.replace(row, behavior_logprobs=bad),)
            )
        return items

    def answers(self, message: ToCoordinator) -> list[ToClient]:
        match message:
            case OpenLineage():
                step = 0 if message.branch is None else message.branch.step
                self.num_lineages += 1
                return [
                    LineageOpened(
                        nonce=message.nonce, lineage=self.num_lineages - 1, step=step, num_rolled_back=0
                    )
                ]
            case StepRequest():
                if message.version.step == self.stop_at:
                    return [Stop(reason="enough")]
                items = self.items(message.version.step)
                parts = [items[:10], items[10:]]
                return [
                    StepBatch(
                        version=message.version,
                        plan_digest=f"plan-{message.version.step}",
                        part=part,
                        num_parts=2,
                        items=parts[part],
                    )
                    for part in (1, 0)
                ]
            case StepDone():
                return [
                    StepRecorded(
                        version=message.version, should_stop=message.version.step + 1 == self.goal_at
                    )
                ]
            case Published():
                return [PublishRecorded(version=message.manifest.version)]
            case Checkpointed():
                return [PublishRecorded(version=message.version)]
            case _:
                return []

    def run(self) -> None:
        while not self.should_exit.is_set():
            for event in self.link.poll(timeout_s=0.01):
                if isinstance(event, Received):
                    self.log.append(event.message)
                    if isinstance(event.message, Bye):
                        self.num_byes.release()
                    for reply in self.answers(event.message):
                        self.link.send(event.session.session, reply)
        self.link.close()

    def learn(self) -> int:
        """Run a learner in this thread, and wait until everything it said has arrived."""
        code = run_learner(self.run_dir)
        assert self.num_byes.acquire(timeout=10)
        return code

    def of(self, kind: type) -> list[object]:
        return [message for message in self.log if isinstance(message, kind)]


@pytest.fixture
def coordinator(run_dir: Path, config: Config) -> Iterator[ScriptedCoordinator]:
    thread = ScriptedCoordinator(run_dir, config)
    thread.start()
    yield thread
    thread.should_exit.set()
    thread.join(timeout=10)


@pytest.fixture(autouse=True)
def _restore_torch() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(num_threads)


def _final_digest(run_dir: Path) -> str:
    (newest,) = [v for v in published_versions(run_dir) if v == max(published_versions(run_dir))]
    return read_manifest(run_dir, newest).digest


def test_whole_run(run_dir: Path, coordinator: ScriptedCoordinator) -> None:
    assert coordinator.learn() == 0
    done = [m for m in coordinator.log if isinstance(m, StepDone)]
    assert sorted({(m.version.step, m.plan_digest) for m in done}) == [(s, f"plan-{s}") for s in range(4)]
    assert all(
        {"loss", "grad_norm", "entropy", "masked_frac", "wait_s", "lag_mean"} <= set(m.metrics) for m in done
    )
    versions = [m.manifest.version for m in coordinator.log if isinstance(m, Published)]
    assert sorted(set(versions)) == [Version(0, step) for step in range(5)]
    saved = {m.version.step: m for m in coordinator.log if isinstance(m, Checkpointed)}
    assert sorted(saved) == [2, 4]
    chain = ""
    for step in range(4):
        chain = extend_trained_digest(chain, f"plan-{step}")
    assert saved[4].trained_digest == chain
    assert saved[4].path == "checkpoints/step_00000004-L0"
    assert [m.version for m in coordinator.log if isinstance(m, Finished)] == [Version(0, 4)]
    assert published_versions(run_dir) == [Version(0, 3), Version(0, 4)]
    manifest = read_manifest(run_dir, Version(0, 4))
    stored = load_model(run_dir / saved[4].path)
    assert tensors_digest(weights_of(stored)) == manifest.digest
    assert load_weights(run_dir, manifest).keys() == weights_of(stored).keys()
    assert manifest.digest != tensors_digest(weights_of(load_model(run_dir / "model")))


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_stopped_and_resumed_is_the_same_to_the_bit(
    run_dir: Path, config: Config, coordinator: ScriptedCoordinator, tmp_path: Path, stop_at: int
) -> None:
    coordinator.stop_at = stop_at
    assert coordinator.learn() == 0
    assert not coordinator.of(Finished)
    record = newest_checkpoint(run_dir)
    assert record is not None and record.version == Version(0, stop_at)
    coordinator.stop_at = None
    assert coordinator.learn() == 0
    opened = [m for m in coordinator.log if isinstance(m, OpenLineage)]
    assert opened[-1].branch == Version(0, stop_at)
    assert opened[-1].trained_digest == record.trained_digest
    assert max(all_checkpoints(run_dir)) == Version(1, 4)

    other = tmp_path / "straight"
    other.mkdir()
    (run_dir / "model").rename(other / "model")
    save_resolved(config, other)
    straight = ScriptedCoordinator(other, config)
    straight.start()
    try:
        assert straight.learn() == 0
    finally:
        straight.should_exit.set()
        straight.join(timeout=10)
    assert _final_digest(run_dir) == _final_digest(other)
    ours, theirs = newest_checkpoint(run_dir), newest_checkpoint(other)
    assert ours is not None and theirs is not None
    assert ours.files["optimizer.safetensors"] == theirs.files["optimizer.safetensors"]
    assert ours.trained_digest == theirs.trained_digest


def test_goal_reached_early(run_dir: Path, coordinator: ScriptedCoordinator) -> None:
    coordinator.goal_at = 3
    assert coordinator.learn() == 0
    assert max(all_checkpoints(run_dir)) == Version(0, 3)
    assert [m.version.step for m in coordinator.log if isinstance(m, Finished)] == [3]


def test_a_run_that_is_over_only_says_so_again(run_dir: Path, coordinator: ScriptedCoordinator) -> None:
    assert coordinator.learn() == 0
    before = _final_digest(run_dir)
    assert coordinator.learn() == 0
    assert len(coordinator.of(Finished)) == 2
    assert _final_digest(run_dir) == before


def test_a_poisoned_batch_is_kept_and_never_applied(run_dir: Path, coordinator: ScriptedCoordinator) -> None:
    coordinator.poison_at = 2
    with pytest.raises(NumericsError, match="its batch is kept in"):
        run_learner(run_dir)
    (path,) = (run_dir / "failed_steps").iterdir()
    kept = msgspec.msgpack.decode(path.read_bytes())
    assert kept["plan_digest"] == "plan-2"
    items = msgspec.convert(kept["items"], list[TrainItem])
    assert items == sorted(coordinator.items(2), key=lambda item: item.key)
    assert {m.version.step for m in coordinator.log if isinstance(m, StepDone)} == {0, 1}
    record = newest_checkpoint(run_dir)
    assert record is not None and record.version == Version(0, 2)


def test_stop_with_a_silent_coordinator_still_leaves_a_checkpoint(
    run_dir: Path, coordinator: ScriptedCoordinator
) -> None:
    """The step's answer never comes; the learner is told to stop and must not wait for it for ever."""
    original = coordinator.answers

    def silent(message: ToCoordinator) -> list[ToClient]:
        if isinstance(message, StepDone) and message.version.step == 2:
            return [Stop(reason="going away")]
        return [] if isinstance(message, Checkpointed) and message.version.step == 3 else original(message)

    coordinator.answers = silent  # type: ignore[method-assign]
    assert coordinator.learn() == 0
    record = newest_checkpoint(run_dir)
    assert record is not None and record.version == Version(0, 3)


def test_sigterm_while_waiting_for_data(run_dir: Path, coordinator: ScriptedCoordinator) -> None:
    """A real process that waits for a batch that never comes checkpoints, says Bye and exits 0."""
    reached = threading.Event()
    original = coordinator.answers

    def starve(message: ToCoordinator) -> list[ToClient]:
        if isinstance(message, StepRequest) and message.version.step == 3:
            reached.set()
            return []
        return original(message)

    coordinator.answers = starve  # type: ignore[method-assign]
    code = (
        "import sys, pathlib, cod_async.learner.loop as l; sys.exit(l.run_learner(pathlib.Path(sys.argv[1])))"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(run_dir)], stderr=subprocess.PIPE) as process:
        assert reached.wait(60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    assert coordinator.num_byes.acquire(timeout=10)
    assert not coordinator.of(Finished)
    record = newest_checkpoint(run_dir)
    assert record is not None and record.version == Version(0, 3)
