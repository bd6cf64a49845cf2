"""Checkpoints beside training: what the loop waits for, and what every way to fail leaves behind."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_world import VOCAB, tiny_model

from cod_async.config.schema import LearnerConfig, LossConfig
from cod_async.errors import CheckpointError
from cod_async.learner.checkpoints.record import (
    TrainerRecord,
    all_checkpoints,
    checkpoint_folder,
    newest_checkpoint,
)
from cod_async.learner.checkpoints.resume import load_checkpoint
from cod_async.learner.checkpoints.state import trained_weights
from cod_async.learner.checkpoints.writer import CheckpointWriter, write_checkpoint
from cod_async.learner.packing import flatten
from cod_async.learner.selftest import random_items
from cod_async.learner.step import Trainer
from cod_async.lifecycle.segment import Version

LEARNER = LearnerConfig(lr=1e-2, keep_checkpoints=2)
POINTS = (
    "made",
    "weights",
    "optimizer",
    "generators",
    "written",
    "recorded",
    "renamed",
    "pruned",
    "announced",
)


def make_trainer() -> Trainer:
    return Trainer.create(tiny_model(), LEARNER, LossConfig(), 1.0)


def take_step(trainer: Trainer, step: int) -> None:
    items = random_items(6, vocab_size=VOCAB, min_tokens=3, max_tokens=9, seed=step)
    trainer.take_step(flatten(items, vocab_size=VOCAB), step)


def record_of(step: int) -> TrainerRecord:
    return TrainerRecord(run="t", version=Version(0, step), trained_digest=f"t{step}", config_digest="c")


def writer_of(
    run_dir: Path, trainer: Trainer, learner: LearnerConfig = LEARNER, **more: Any
) -> CheckpointWriter:
    return CheckpointWriter(run_dir, trainer.model, trainer.optimizer, learner, **more)


class Gate:
    """Holds the writing thread at a point until it is let on."""

    def __init__(self, point: str) -> None:
        self.point = point
        self.reached, self.may_go_on = threading.Event(), threading.Event()

    def __call__(self, name: str) -> None:
        if name == self.point:
            self.reached.set()
            assert self.may_go_on.wait(30)


def weights_in(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, as a resumed learner has them."""
    trainer = make_trainer()
    record = newest_checkpoint(run_dir)
    assert record is not None and record.version.step == step
    load_checkpoint(run_dir, record, trainer.model, trainer.optimizer)
    return {name: value.clone() for name, value in trained_weights(trainer.model).items()}


def test_training_goes_on_while_a_checkpoint_is_written(run_dir: Path) -> None:
    """What is written is the state when it began, whatever steps were taken since; it counts when it is
    durable.
    """
    trainer = make_trainer()
    take_step(trainer, 0)
    before = {name: value.clone() for name, value in trained_weights(trainer.model).items()}
    gate = Gate("made")
    durable: list[TrainerRecord] = []
    writer = writer_of(run_dir, trainer, on_durable=durable.append, on_point=gate)
    writer.begin(record_of(1))
    assert gate.reached.wait(30)
    for step in range(1, 4):
        take_step(trainer, step)
    assert not durable and newest_checkpoint(run_dir) is None
    gate.may_go_on.set()
    assert writer.wait() == Version(0, 1)
    assert [record.version for record in durable] == [Version(0, 1)]
    found = weights_in(run_dir, 1)
    assert all(torch.equal(found[name], before[name]) for name in before)
    assert not all(torch.equal(found[name], value) for name, value in trained_weights(trainer.model).items())


def test_the_next_checkpoint_waits_for_the_one_before(run_dir: Path) -> None:
    trainer = make_trainer()
    gate = Gate("written")
    order: list[str] = []
    writer = writer_of(
        run_dir, trainer, on_durable=lambda record: order.append(f"durable {record.version}"), on_point=gate
    )
    writer.begin(record_of(1))
    assert gate.reached.wait(30)

    def second() -> None:
        writer.begin(record_of(2))
        order.append("second began")

    thread = threading.Thread(target=second)
    thread.start()
    gate.may_go_on.set()
    thread.join(30)
    assert writer.wait() == Version(0, 2)
    assert order[0] == "durable 0.1" and set(order[1:]) == {"second began", "durable 0.2"}
    assert all_checkpoints(run_dir) == [Version(0, 1), Version(0, 2)]


def test_without_asynchronous_checkpoints_begin_returns_when_it_is_durable(run_dir: Path) -> None:
    durable: list[TrainerRecord] = []
    learner = LearnerConfig(has_async_checkpoints=False)
    writer = writer_of(run_dir, make_trainer(), learner, on_durable=durable.append)
    writer.begin(record_of(3))
    assert [record.version for record in durable] == [Version(0, 3)]
    assert writer.pause_s > 0


def test_what_goes_wrong_while_announcing_reaches_the_loop(run_dir: Path) -> None:
    def refuse(record: TrainerRecord) -> None:
        raise ValueError("refused")

    writer = writer_of(run_dir, make_trainer(), on_durable=refuse)
    writer.begin(record_of(1))
    with pytest.raises(ValueError, match="refused"):
        writer.wait()


# --------------------------------------------------------------------------------------------------------
# disk full


def test_disk_full_is_named_and_the_next_checkpoint_tries_again(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel refuses further bytes (a limit on the size of a file); nothing of the failed checkpoint is
    left, the one before it stands, and the next one is whole.
    """
    trainer = make_trainer()
    writer = writer_of(run_dir, trainer)
    writer.begin(record_of(1))
    assert writer.wait() == Version(0, 1)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    take_step(trainer, 1)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
    try:
        writer.begin(record_of(2))
        assert writer.wait() == Version(0, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert writer.num_failed == 1 and "File too large" in writer.problem
    assert "version 0.2 was NOT written" in caplog.text and "the next one is due in 20 steps" in caplog.text
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_00000001-L0"]
    weights_in(run_dir, 1)
    writer.begin(record_of(3))
    assert writer.wait() == Version(0, 3) and not writer.problem
    weights_in(run_dir, 3)


def test_a_single_checkpoint_that_cannot_be_written_is_an_error(run_dir: Path) -> None:
    trainer = make_trainer()
    (run_dir / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"version 0\.1"):
        write_checkpoint(run_dir, record_of(1), trainer.model, trainer.optimizer, LEARNER)


# --------------------------------------------------------------------------------------------------------
# killed at every point


def in_a_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked process; return its wait status."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(3)
    return os.waitpid(child, 0)[1]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_leaves_a_loadable_checkpoint(run_dir: Path, point: str) -> None:
    trainer = make_trainer()
    write_checkpoint(run_dir, record_of(1), trainer.model, trainer.optimizer, LEARNER)
    take_step(trainer, 1)

    def killed() -> None:
        def die(name: str) -> None:
            if name == point:
                os.kill(os.getpid(), signal.SIGKILL)

        writer = writer_of(run_dir, trainer, on_point=die)
        writer.begin(record_of(2))
        writer.wait()

    assert os.WTERMSIG(in_a_child(killed)) == signal.SIGKILL
    expected = 2 if POINTS.index(point) >= POINTS.index("renamed") else 1
    weights_in(run_dir, expected)
    take_step(trainer, 2)
    write_checkpoint(run_dir, record_of(3), trainer.model, trainer.optimizer, LEARNER)  # cleans up
    assert not list((run_dir / "checkpoints").glob("*.partial"))
    weights_in(run_dir, 3)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("kind", ["weights", "optimizer"])
def test_a_torn_file_under_the_final_name_is_noticed(run_dir: Path, kind: str, share: float) -> None:
    """What a disk may do after a power loss, in spite of every flush."""
    trainer = make_trainer()
    for step in (1, 2):
        write_checkpoint(run_dir, record_of(step), trainer.model, trainer.optimizer, LEARNER)
    path = run_dir / checkpoint_folder(Version(0, 2)) / kind / "rank-00000-00000.safetensors"
    os.truncate(path, int(path.stat().st_size * share))
    weights_in(run_dir, 1)
