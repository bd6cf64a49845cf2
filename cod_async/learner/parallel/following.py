"""Rank 0 leads, the others follow: what they do together, as orders.

Only rank 0 speaks with the coordinator. Before it does something in which the others must take part, it tells
them what: take a step on these items, publish, save, leave. Items go as the bytes that they have on the wire.
A rank that follows decides nothing; signals are rank 0's, which ends the others by an order, and whoever is
left without rank 0 is ended by the parent (:mod:`cod_async.launch.ranks`).
"""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec

from cod_async.config.schema import Config
from cod_async.errors import NumericsError
from cod_async.learner.checkpoints.record import TrainerRecord
from cod_async.learner.checkpoints.writer import CheckpointWriter
from cod_async.learner.opening import rows_of
from cod_async.learner.parallel.world import World, lost_rank
from cod_async.learner.step import Trainer
from cod_async.learner.token_records import TokenRecorder
from cod_async.learner.witness import Witness
from cod_async.lifecycle.segment import Version
from cod_async.models.directory import weights_of
from cod_async.weights.manifest import Manifest
from cod_async.weights.publish import CONFIG_FILE, publish
from cod_async.weights.sharded import publish_sharded
from cod_async.wire.messages import TrainItem

log = logging.getLogger(__name__)


class TakeStep(msgspec.Struct, frozen=True, tag="step"):
    """Take the step from ``version`` on these items."""

    version: Version
    items: list[TrainItem]


class PublishWeights(msgspec.Struct, frozen=True, tag="publish"):
    """Publish the weights as ``version``."""

    version: Version


class SaveCheckpoint(msgspec.Struct, frozen=True, tag="save"):
    """Begin a checkpoint."""

    record: TrainerRecord


class Leave(msgspec.Struct, frozen=True, tag="leave"):
    """Wait for what is being written, and end."""


Order = TakeStep | PublishWeights | SaveCheckpoint | Leave


class Work(Protocol):
    """What a rank does when it is told to."""

    def take_step(self, version: Version, items: list[TrainItem]) -> Any:
        """Take a step."""

    def publish(self, version: Version) -> Any:
        """Take part in a publication."""

    def save(self, record: TrainerRecord) -> Any:
        """Take part in a checkpoint."""

    def leave(self) -> Any:
        """Wait for what is being written."""


def give(world: World, order: Order) -> None:
    """Tell the other ranks what rank 0 is about to do; nothing where there are none."""
    if world.size > 1:
        world.tell(msgspec.msgpack.encode(order))


def follow(world: World, work: Work) -> None:
    """Do what rank 0 says until it says to leave.

    A step that is not applied because something is not finite is rank 0's to judge: it stops or goes on.
    """
    while True:
        order = msgspec.msgpack.decode(world.tell(None), type=Order)
        match order:
            case TakeStep():
                try:
                    work.take_step(order.version, order.items)
                except NumericsError as error:
                    log.warning("%s", error)
            case PublishWeights():
                work.publish(order.version)
            case SaveCheckpoint():
                work.save(order.record)
            case Leave():
                work.leave()
                return


class Follower:
    """The work of a rank other than 0: what :class:`cod_async.learner.loop.Learner` does in which all ranks
    must take part, and nothing else.

    Args:
        run_dir, config: the run.
        trainer: this rank's.
    """

    def __init__(self, run_dir: Path, config: Config, trainer: Trainer) -> None:
        self._run_dir = run_dir
        self._config = config
        self._trainer = trainer
        learner, world = config.learner, trainer.world
        self._witness = Witness(trainer, learner)
        self._checkpoints = CheckpointWriter(run_dir, trainer.model, trainer.optimizer, learner, world=world)
        self._recorder = TokenRecorder(trainer) if learner.has_token_records else None

    def take_step(self, version: Version, items: list[TrainItem]) -> dict[str, float]:
        """Take a step; return its metrics."""
        self._trainer.timeline.begin(is_traced=False)
        self._witness.begin(version.step)
        flat = rows_of(items, self._config, self._trainer, version)
        if self._recorder is not None:
            self._recorder.begin(flat)
        return self._trainer.take_step(flat, version.step)

    def publish(self, version: Version) -> Manifest:
        """Take part in a publication."""
        run, keep = self._config.run.name, self._config.weights.keep_versions
        return publish_policy(self._run_dir, run, version, self._trainer.model, keep, self._trainer.world)

    def save(self, record: TrainerRecord) -> None:
        """Take part in a checkpoint."""
        self._checkpoints.begin(record)

    def leave(self) -> None:
        """Wait for what is being written."""
        self._checkpoints.wait()


def ignore_signals() -> None:
    """Leave SIGTERM and SIGINT to rank 0, which lets the others go in order."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def publish_policy(
    run_dir: Path, run: str, version: Version, model: Any, keep_versions: int, world: World
) -> Manifest:
    """Publish a policy, whole or sharded; arguments as of :func:`cod_async.weights.publish.publish`."""
    tensors = weights_of(model)
    config_file = run_dir / "model" / CONFIG_FILE
    if world.size == 1:
        return publish(run_dir, run, version, tensors, keep_versions, config_file=config_file)
    return publish_sharded(run_dir, run, version, tensors, keep_versions, world, config_file=config_file)


@contextlib.contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Turn an error that only says that another rank is gone into one without a traceback.

    Raises:
        WorkError: another rank is gone.
    """
    try:
        yield
    except Exception as error:
        lost = lost_rank(error)
        if lost is None:
            raise
        raise lost from None
