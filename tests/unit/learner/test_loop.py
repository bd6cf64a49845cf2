"""The learner process against a real server link: whole, stopped, and resumed to the bit."""

from __future__ import annotations

import json
import shutil
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

from cod_async.cli import main
from cod_async.config.load import save_resolved
from cod_async.config.schema import Config
from cod_async.errors import CheckpointError, NumericsError
from cod_async.launch.export import export_model
from cod_async.launch.supervisor import ENDED_RUN_CODE
from cod_async.learner.checkpoints import writer
from cod_async.learner.checkpoints.record import all_checkpoints, newest_checkpoint
from cod_async.learner.failing import read_failed
from cod_async.learner.loop import run_learner
from cod_async.learner.selftest import random_items
from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.segment import Version
from cod_async.models.directory import load_model, weights_of
from cod_async.store.token_records import read_token_records
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
        self.num_poisoned = 1
        self.dropped: list[tuple[int, str]] = []
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

    def plan_of(self, step: int) -> str:
        """The digest of the plan that a step has now; every dropped one makes it another."""
        attempt = sum(dropped == step for dropped, _ in self.dropped)
        return f"plan-{step}" + "b" * attempt

    def items(self, step: int) -> list[TrainItem]:
        attempt = sum(dropped == step for dropped, _ in self.dropped)
        items = random_items(24, vocab_size=VOCAB, min_tokens=3, max_tokens=30, seed=step + 100 * attempt)
        if step == self.poison_at and attempt < self.num_poisoned:
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
                        plan_digest=self.plan_of(message.version.step),
                        part=part,
                        num_parts=2,
                        items=parts[part],
                    )
                    for part in (1, 0)
                ]
            case StepDone(dropped_as="nonfinite"):
                if (message.version.step, message.plan_digest) not in self.dropped:
                    self.dropped.append((message.version.step, message.plan_digest))
                return [StepRecorded(version=message.version, dropped_plan=message.plan_digest)]
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
    export_model(run_dir, run_dir / "final")
    stored = load_model(run_dir / "final")
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
    for kind in ("weights", "optimizer", "generators"):
        name = f"{kind}/rank-00000-00000.safetensors"
        assert ours.files[name] == theirs.files[name]
    assert ours.trained_digest == theirs.trained_digest


KILLED_WHILE_WRITING = """
import os, pathlib, signal, sys
from cod_async.learner import loop
from cod_async.learner.checkpoints.writer import CheckpointWriter

write = CheckpointWriter._write_own
def write_and_die(self, temporary, staged):
    write(self, temporary, staged)
    if "step_00000004" in temporary.name:
        os.kill(os.getpid(), signal.SIGKILL)
CheckpointWriter._write_own = write_and_die
loop.run_learner(pathlib.Path(sys.argv[1]))
"""


def test_a_learner_killed_while_it_writes_goes_on_from_the_checkpoint_before(
    run_dir: Path, coordinator: ScriptedCoordinator
) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_WRITING, str(run_dir)], check=False, timeout=100
    )
    assert killed.returncode == -signal.SIGKILL
    assert (run_dir / "checkpoints" / "step_00000004-L0.partial" / "optimizer").is_dir()
    assert {message.version for message in coordinator.log if isinstance(message, Checkpointed)} == {
        Version(0, 2)
    }
    before = _final_digest(run_dir)
    assert coordinator.learn() == 0
    opened = [message for message in coordinator.log if isinstance(message, OpenLineage)]
    assert opened[-1].branch == Version(0, 2)
    assert all_checkpoints(run_dir) == [Version(0, 2), Version(1, 4)]
    assert not list((run_dir / "checkpoints").glob("*.partial"))
    assert _final_digest(run_dir) == before


def test_a_checkpoint_that_fails_is_tried_again_before_the_learner_leaves(
    run_dir: Path, coordinator: ScriptedCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the last checkpoint, and has room again a moment later; then it stays full."""
    failures = [OSError(28, "No space left on device")]

    def full(*_: object) -> object:
        if failures:
            raise failures.pop()
        return write(*_)  # type: ignore[arg-type]

    write = writer.write_pieces
    monkeypatch.setattr(writer, "write_pieces", full)
    assert coordinator.learn() == 0
    done = {m.version.step: m.metrics for m in coordinator.log if isinstance(m, StepDone)}
    assert done[3]["num_failed_checkpoints"] == 1.0 and done[1]["num_failed_checkpoints"] == 0.0
    assert all_checkpoints(run_dir) == [Version(0, 4)]  # that of step 2 failed, that of step 4 did not
    shutil.rmtree(run_dir / "checkpoints")
    failures += [OSError(28, "No space left on device")] * 9
    with pytest.raises(CheckpointError, match=r"version 1.4 cannot be written: .*No space left.*make room"):
        run_learner(run_dir)
    assert all_checkpoints(run_dir) == []


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


def test_a_poisoned_batch_is_kept_and_never_applied(
    run_dir: Path, coordinator: ScriptedCoordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator.poison_at = 2
    assert main(["learner", str(run_dir)]) == ENDED_RUN_CODE  # the launcher does not start it again
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("NumericsError: step 2: ") and "its batch is kept in" in last
    (path,) = (run_dir / "failed_steps").iterdir()
    kept = read_failed(path)
    assert (kept.version, kept.plan_digest) == (Version(0, 2), "plan-2")
    assert kept.items == sorted(coordinator.items(2), key=lambda item: item.key)
    assert "was not applied" in kept.error and kept.witness["weights"]
    assert {m.version.step for m in coordinator.log if isinstance(m, StepDone)} == {0, 1}
    record = newest_checkpoint(run_dir)
    assert record is not None and record.version == Version(0, 2)


def skipping(run_dir: Path, config: Config, **learner: object) -> None:
    changed = msgspec.structs.replace(config.learner, on_nonfinite="skip", **learner)
    save_resolved(msgspec.structs.replace(config, learner=changed), run_dir)


def test_a_poisoned_batch_is_dropped_by_name_and_training_goes_on(
    run_dir: Path, config: Config, coordinator: ScriptedCoordinator
) -> None:
    skipping(run_dir, config)
    coordinator.poison_at, coordinator.num_poisoned = 2, 2
    assert coordinator.learn() == 0
    assert coordinator.dropped == [(2, "plan-2"), (2, "plan-2b")]
    done = {(m.version.step, m.plan_digest) for m in coordinator.log if isinstance(m, StepDone)}
    assert done == {
        (0, "plan-0"),
        (1, "plan-1"),
        (2, "plan-2"),
        (2, "plan-2b"),
        (2, "plan-2bb"),
        (3, "plan-3"),
    }
    kept = [read_failed(path) for path in sorted((run_dir / "failed_steps").iterdir())]
    assert [one.plan_digest for one in kept] == ["plan-2", "plan-2b"]
    chain = ""
    for plan in ("plan-0", "plan-1", "plan-2bb", "plan-3"):
        chain = extend_trained_digest(chain, plan)
    record = newest_checkpoint(run_dir)
    assert record is not None and record.trained_digest == chain  # of what was trained, and of nothing else
    # what was dropped left no trace in the weights: the same steps without it lead to the same ones
    before = _final_digest(run_dir)
    straight = run_dir.with_name("straight")
    straight.mkdir()
    (run_dir / "model").rename(straight / "model")
    save_resolved(config, straight)
    other = ScriptedCoordinator(straight, config)
    other.dropped = [(2, ""), (2, "")]
    other.start()
    try:
        assert other.learn() == 0
    finally:
        other.should_exit.set()
        other.join(timeout=10)
    assert _final_digest(straight) == before


def test_too_many_poisoned_batches_in_a_row_end_the_run(
    run_dir: Path, config: Config, coordinator: ScriptedCoordinator
) -> None:
    skipping(run_dir, config, max_skipped_steps=2)
    coordinator.poison_at, coordinator.num_poisoned = 1, 99
    with pytest.raises(NumericsError, match=r"2 batches in a row were dropped \(learner.max_skipped_steps\)"):
        run_learner(run_dir)
    assert coordinator.dropped == [(1, "plan-1"), (1, "plan-1b")]
    assert {m.version.step for m in coordinator.log if isinstance(m, StepDone)} == {0, 1}


def test_a_batch_of_a_dropped_plan_that_comes_late_is_not_trained(
    run_dir: Path, config: Config, coordinator: ScriptedCoordinator
) -> None:
    """The coordinator had sent the plan once more before it was dropped."""
    skipping(run_dir, config)
    coordinator.poison_at = 1
    original, late = coordinator.answers, []

    def answers(message: ToCoordinator) -> list[ToClient]:
        found = original(message)
        if isinstance(message, StepRequest) and message.version.step == 1:
            late.append(found)
            return late[0] if len(late) == 2 else found
        return found

    coordinator.answers = answers  # type: ignore[method-assign]
    assert coordinator.learn() == 0
    assert coordinator.dropped == [(1, "plan-1")]
    assert len(late) == 3
    assert (1, "plan-1b") in {
        (m.version.step, m.plan_digest) for m in coordinator.log if isinstance(m, StepDone)
    }


def test_what_a_step_leaves_behind(run_dir: Path, config: Config, coordinator: ScriptedCoordinator) -> None:
    learner = msgspec.structs.replace(config.learner, has_token_records=True, trace_every_steps=2)
    save_resolved(msgspec.structs.replace(config, learner=learner), run_dir)
    assert coordinator.learn() == 0
    done = [m for m in coordinator.log if isinstance(m, StepDone)]
    for message in done:
        assert isinstance(message.witness, dict)
        assert len(message.witness["weights"]) == len(message.witness["gradients"]) == 64
        assert (message.witness["num_threads"], message.witness["tokens_per_micro_batch"]) == ("1", "256")
        names = {name for name in message.metrics if name.startswith("time_")}
        assert {"time_wait_s", "time_pack_s", "time_forward_s", "time_head_loss_s", "time_backward_s",
                "time_optimizer_s", "time_digest_s", "time_records_s", "time_other_s"} <= names  # fmt: skip
    assert len({message.witness["weights"] for message in done if isinstance(message.witness, dict)}) == 4
    assert {"time_publish_s", "time_report_s", "time_checkpoint_s"} <= set(done[-1].metrics) | set(
        done[2].metrics
    )
    assert sorted(path.name for path in (run_dir / "traces").iterdir()) == [
        "step_00000000.json",
        "step_00000002.json",
    ]
    item = coordinator.items(3)[0]
    found = read_token_records(run_dir, item.key)
    assert [one.version for one in found] == [Version(0, step) for step in range(4)]
    (row,) = item.rows
    assert found[3].tokens["behavior_logprob"].tolist() == row.behavior_logprobs.numpy().tolist()


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
