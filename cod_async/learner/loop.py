"""The learner process, in the order of a segment's life.

Ask the coordinator for a step's worth of trainable segments, pack their rows, run forward and backward, take
one optimiser step, report it, publish the new version, checkpoint now and then. Whatever ends the loop
cleanly (all steps done, the coordinator's word, a signal) leaves a checkpoint behind; whatever ends it
otherwise leaves the last one.
"""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from cod_async.config.load import config_digest, load_resolved
from cod_async.config.schema import Config
from cod_async.errors import CheckpointError, NumericsError, WeightsError
from cod_async.learner.checkpoints.record import TrainerRecord, checkpoint_folder
from cod_async.learner.checkpoints.writer import CheckpointWriter
from cod_async.learner.distillation import divergence_by_environment
from cod_async.learner.failing import FailedStep, keep_failed
from cod_async.learner.opening import configure_torch, open_tested, rows_of
from cod_async.learner.parallel.following import (
    Follower,
    Leave,
    PublishWeights,
    SaveCheckpoint,
    TakeStep,
    follow,
    give,
    ignore_signals,
    naming_lost_ranks,
    publish_policy,
)
from cod_async.learner.parallel.world import World
from cod_async.learner.port import CoordinatorPort, StopWish
from cod_async.learner.step import Trainer
from cod_async.learner.timeline import Timeline
from cod_async.learner.token_records import TokenRecorder, keep_records
from cod_async.learner.witness import Witness
from cod_async.lifecycle.segment import Version
from cod_async.store.trained import EMPTY_TRAINED_DIGEST, extend_trained_digest
from cod_async.weights.delta import write_delta
from cod_async.weights.manifest import Manifest
from cod_async.weights.publish import published_versions, read_manifest
from cod_async.wire.messages import Checkpointed, TrainItem

log = logging.getLogger(__name__)


@dataclass
class Learner:
    """Everything the loop works on.

    Attributes:
        run_dir, config: the run.
        trainer: model and optimiser.
        port: the coordinator.
        stop: the wish to stop.
        version: of the weights in the model.
        trained_digest: of all plans trained up to ``version``.
        checkpointed: version of the last checkpoint that was begun or gone on from, or None.
        publish_s: seconds that the last publication took.
        num_dropped: batches in a row that were not finite.
        recorder: of per-token records, None without them.
        witness: of the step being taken.
        checkpoints: writes them beside training.
    """

    run_dir: Path
    config: Config
    trainer: Trainer
    port: CoordinatorPort
    stop: StopWish
    version: Version
    trained_digest: str
    checkpointed: Version | None
    publish_s: float = 0.0
    num_dropped: int = 0
    recorder: TokenRecorder | None = None
    witness: Witness = field(init=False)
    checkpoints: CheckpointWriter = field(init=False)

    def __post_init__(self) -> None:
        learner = self.config.learner
        self.witness = Witness(self.trainer, self.trainer.learner)
        self.checkpoints = CheckpointWriter(
            self.run_dir,
            self.trainer.model,
            self.trainer.optimizer,
            learner,
            world=self.trainer.world,
            on_durable=self._announce_checkpoint,
        )
        if learner.has_token_records:
            self.recorder = TokenRecorder(self.trainer)
        self._begin_period(self.version.step)

    @property
    def timeline(self) -> Timeline:
        """Where the seconds of the present step go."""
        return self.trainer.timeline

    def run(self) -> None:
        """Train until all steps are done or somebody asks to stop, then checkpoint and say goodbye."""
        reason = "all steps are done"
        self._publish()
        while self.version.step < self.config.run.num_steps and not self.stop.is_set:
            asked = time.perf_counter()
            # Not asked earlier: a step is planned when it is asked for, and one that is never taken, because
            # the run is over before it, would leave its segments in flight.
            with self.timeline.span("wait"):
                batch = self.port.next_batch(self.version)
            if batch is None:
                break
            plan_digest, items = batch
            wait_s = time.perf_counter() - asked
            try:
                metrics = self._train(items, wait_s)
            except NumericsError as error:
                self.checkpoints.settle()  # should this end the run, what it goes on from is durable
                self._drop(plan_digest, items, error)
                continue
            done = self.port.step_done(self.version, plan_digest, metrics, self.witness.of_step())
            self._begin_period(self.version.step + 1)
            self.num_dropped = 0
            self.version = Version(self.version.lineage, self.version.step + 1)
            self.trained_digest = extend_trained_digest(self.trained_digest, plan_digest)
            if self.version.step % self.config.weights.publish_every_steps == 0:
                self._publish()
            with self.timeline.span("report"):
                is_over = self.port.recorded(done)
            if self.version.step % self.config.learner.checkpoint_every_steps == 0:
                self._checkpoint()
            if is_over:
                reason = "the coordinator's goal is reached"
                break
        self._leave(reason, is_finished=not self.stop.is_set)

    def _train(self, items: list[TrainItem], wait_s: float) -> dict[str, float]:
        """Pack the items and take the optimiser step; return its metrics.

        Raises:
            NumericsError: something is not finite; nothing was applied.
        """
        started = time.perf_counter()
        with self.timeline.span("broadcast"):
            give(self.trainer.world, TakeStep(self.version, items))
        with self.timeline.span("digest"):
            self.witness.begin(self.version.step)
        with self.timeline.span("pack"):
            flat = rows_of(items, self.config, self.trainer, self.version)
        packed_s = time.perf_counter() - started
        if self.recorder is not None:
            with self.timeline.span("records"):
                self.recorder.begin(flat)
        metrics = self.trainer.take_step(flat, self.version.step) | divergence_by_environment(items)
        if self.recorder is not None:
            with self.timeline.span("records"):
                keep_records(self.run_dir, self.config, self.version, items, self.recorder.found())
        trained = [item for item in items if not item.is_context]
        lags = [item.lag_steps for item in trained]
        metrics |= {
            "num_segments": float(len(trained)),
            "lag_mean": sum(lags) / len(lags),
            "lag_max": max(lags),
            "wait_s": wait_s,
            "pack_s": packed_s,
            "publish_s": self.publish_s,
            "checkpoint_pause_s": self.checkpoints.pause_s,
            "num_failed_checkpoints": float(self.checkpoints.num_failed),
            "step_s": time.perf_counter() - started + wait_s,
            **self.timeline.metrics(),
        }
        self.port.counters["trained_tokens"] = (
            self.port.counters.get("trained_tokens", 0.0) + metrics["num_action_tokens"]
        )
        self.port.counters["step"] = float(self.version.step + 1)
        return metrics

    def _drop(self, plan_digest: str, items: list[TrainItem], error: NumericsError) -> None:
        """Keep a batch that could not be trained; with ``on_nonfinite = "skip"`` have its plan dropped.

        Raises:
            NumericsError: the run is to stop here.
        """
        learner = self.config.learner
        failed = FailedStep(
            version=self.version,
            plan_digest=plan_digest,
            items=items,
            error=str(error),
            witness=self.witness.of_step(),
        )
        path = keep_failed(self.run_dir, failed)
        if learner.on_nonfinite == "stop":
            raise NumericsError(f"{error}; its batch is kept in {path}") from None
        log.warning("%s; its batch is dropped and kept in %s", error, path)
        self.port.dropped(self.version, plan_digest)
        self.num_dropped += 1
        if self.num_dropped >= learner.max_skipped_steps:
            raise NumericsError(
                f"{error}; {self.num_dropped} batches in a row were dropped (learner.max_skipped_steps): the "
                f"model is broken; the last one is kept in {path}"
            ) from None

    def _begin_period(self, step: int) -> None:
        """Write the trace of the period that ends with a step's report, and begin the next one."""
        every = self.config.learner.trace_every_steps
        if self.timeline.is_traced:
            about = {"run": self.config.run.name, "lineage": self.version.lineage}
            self.timeline.write_trace(self.run_dir, self.version.step, about)
        self.timeline.begin(is_traced=every > 0 and step % every == 0)

    def _publish(self) -> None:
        started = time.perf_counter()
        with self.timeline.span("publish"):
            self._publish_weights()
        self.publish_s = time.perf_counter() - started

    def _publish_weights(self) -> None:
        base = self._newest_published() if self.config.weights.has_deltas else None
        give(self.trainer.world, PublishWeights(self.version))
        manifest = publish_policy(
            self.run_dir,
            self.config.run.name,
            self.version,
            self.trainer.model,
            self.config.weights.keep_versions,
            self.trainer.world,
        )
        if base is not None and base.version < manifest.version:
            self._write_delta(base, manifest)
        self.port.published(manifest)

    def _newest_published(self) -> Manifest | None:
        """Return the version that hosts are expected to have when the next one is published."""
        versions = published_versions(self.run_dir)
        return read_manifest(self.run_dir, versions[-1]) if versions else None

    def _write_delta(self, base: Manifest, manifest: Manifest) -> None:
        """Write what changed beside the new version, before anybody hears of it. Both are compared in their
        files, so no copy of the weights is kept. A delta is a convenience: without it hosts pull in full.
        """
        try:
            info = write_delta(self.run_dir, base, manifest)
        except (WeightsError, OSError) as error:
            log.warning("version %s is published without a delta: %s", manifest.version, error)
            return
        num_bytes = sum(shard.num_bytes for shard in manifest.shards)
        if info is None:
            log.info("version %s: too much changed for a delta", manifest.version)
        else:
            log.info("version %s: delta of %.1f %%", manifest.version, 100 * info.num_bytes / num_bytes)

    def _checkpoint(self) -> None:
        """Begin a checkpoint; it becomes durable beside the next steps, if it is not the last one."""
        record = TrainerRecord(
            run=self.config.run.name,
            version=self.version,
            trained_digest=self.trained_digest,
            config_digest=config_digest(self.config),
        )
        with self.timeline.span("checkpoint"):
            give(self.trainer.world, SaveCheckpoint(record))
            self.checkpoints.begin(record)
        self.checkpointed = self.version

    def _announce_checkpoint(self, record: TrainerRecord) -> None:
        """Tell the coordinator of a durable checkpoint; runs on the thread that wrote it."""
        self.port.checkpointed(
            Checkpointed(
                version=record.version,
                path=checkpoint_folder(record.version),
                digest=record.digest,
                trained_digest=record.trained_digest,
            )
        )

    def _leave(self, reason: str, *, is_finished: bool) -> None:
        """Publish and checkpoint what is new, and say that it was the last step if it was."""
        if is_finished and self.version.step % self.config.weights.publish_every_steps:
            self._publish()
        self._wait_for_last_checkpoint()
        give(self.trainer.world, Leave())
        self.port.settle()
        if is_finished:
            self.port.finished(self.version, reason)
        log.info("left at version %s: %s", self.version, self.stop.reason or reason)

    def _wait_for_last_checkpoint(self) -> None:
        """See to it that the present version is durable; what failed before is tried once more.

        Raises:
            CheckpointError: it cannot be written; the one before it stands.
        """
        self.checkpoints.wait()
        if self.checkpointed != self.version or self.checkpoints.problem:
            self._checkpoint()
            self.checkpoints.wait()
        if self.checkpoints.problem:
            raise CheckpointError(
                f"the checkpoint of version {self.version} cannot be written: {self.checkpoints.problem}; "
                "make room and go on with cod train --resume"
            )


def start_learner(
    run_dir: Path, config: Config, port: CoordinatorPort, stop: StopWish, world: World | None = None
) -> Learner | None:
    """Load the newest valid checkpoint or the starting model, test the packing, and open a lineage.

    Returns:
        The learner, or None if asked to stop before the coordinator answered.

    Raises:
        CheckpointError: the coordinator's history and the checkpoint do not meet at one step.
        InputError: there are checkpoints, and none can be loaded.
    """
    trainer, record = open_tested(run_dir, config, world)
    branch = None if record is None else record.version
    trained_digest = EMPTY_TRAINED_DIGEST if record is None else record.trained_digest
    opened = port.open_lineage(branch, trained_digest)
    if opened is None:
        give(trainer.world, Leave())
        return None
    if opened.step != (0 if branch is None else branch.step):
        raise CheckpointError(
            f"the coordinator goes on at step {opened.step}, the newest checkpoint is {branch or 'none'}; "
            "restore the run database that belongs to it"
        )
    version = Version(opened.lineage, opened.step)
    log.info(
        "lineage %d opens at step %d, %d steps rolled back",
        opened.lineage,
        opened.step,
        opened.num_rolled_back,
    )
    return Learner(
        run_dir, config, trainer, port, stop, version, trained_digest, version if record is not None else None
    )


def run_learner(run_dir: Path, rank: int = 0) -> int:
    """Run the learner of the run in ``run_dir`` until it is over; the body of ``cod learner RUN``.

    Args:
        run_dir: the run folder.
        rank: of this process, where the learner has several; rank 0 leads, the others follow.

    Returns:
        0: all steps are done, or it was asked to stop.

    Raises:
        CodError: the work failed; the last checkpoint stands.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    config = load_resolved(run_dir)
    configure_torch(config)
    if rank:
        ignore_signals()
        with naming_lost_ranks():
            world = World.of_learner(config.learner, rank)
            trainer, _ = open_tested(run_dir, config, world)
            follow(world, Follower(run_dir, config, trainer))
            world.close()
        return 0
    num_ranks = config.learner.data_parallel * config.learner.sequence_parallel
    stop = StopWish(config.run.grace_s)
    restore_signals = stop.install()
    port = CoordinatorPort.open(run_dir, config, stop)
    try:
        with naming_lost_ranks():
            world = World.of_learner(config.learner)
            learner = start_learner(run_dir, config, port, stop, world)
            if learner is not None:
                learner.run()
            world.close()
    finally:
        port.close()
        restore_signals()
        if num_ranks > 1:  # a signal on the way out would look as if a rank had been killed
            ignore_signals()
    return 0
