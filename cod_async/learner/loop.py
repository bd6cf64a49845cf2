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
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from cod_async.config.load import config_digest, load_resolved
from cod_async.config.schema import Config
from cod_async.durable import write_atomic
from cod_async.errors import CheckpointError, NumericsError, WeightsError
from cod_async.learner.checkpoint import (
    TrainerRecord,
    checkpoint_folder,
    load_checkpoint,
    newest_checkpoint,
    restore_optimizer,
    save_checkpoint,
)
from cod_async.learner.packing import flatten
from cod_async.learner.port import CoordinatorPort, StopWish
from cod_async.learner.selftest import check_packing
from cod_async.learner.step import Trainer
from cod_async.lifecycle.segment import Version
from cod_async.models.directory import load_model, weights_of
from cod_async.store.trained import EMPTY_TRAINED_DIGEST, extend_trained_digest
from cod_async.weights.delta import write_delta
from cod_async.weights.manifest import Manifest
from cod_async.weights.publish import CONFIG_FILE, publish, published_versions, read_manifest
from cod_async.wire.messages import Checkpointed, TrainItem

log = logging.getLogger(__name__)

FAILED_STEPS_FOLDER = "failed_steps"


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
        checkpointed: version of the last durable checkpoint, or None.
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

    def run(self) -> None:
        """Train until all steps are done or somebody asks to stop, then checkpoint and say goodbye."""
        reason = "all steps are done"
        self._publish()
        while self.version.step < self.config.run.num_steps and not self.stop.is_set:
            asked = time.perf_counter()
            batch = self.port.next_batch(self.version)
            if batch is None:
                break
            plan_digest, items = batch
            metrics = self._train(items, plan_digest, wait_s=time.perf_counter() - asked)
            done = self.port.step_done(self.version, plan_digest, metrics)
            self.version = Version(self.version.lineage, self.version.step + 1)
            self.trained_digest = extend_trained_digest(self.trained_digest, plan_digest)
            if self.version.step % self.config.weights.publish_every_steps == 0:
                self._publish()
            is_over = self.port.recorded(done)
            if self.version.step % self.config.learner.checkpoint_every_steps == 0:
                self._checkpoint()
            if is_over:
                reason = "the coordinator's goal is reached"
                break
        self._leave(reason, is_finished=not self.stop.is_set)

    def _train(self, items: list[TrainItem], plan_digest: str, wait_s: float) -> dict[str, float]:
        """Pack the items and take the optimiser step; return its metrics.

        Raises:
            NumericsError: something is not finite; the batch is kept in ``failed_steps/`` and nothing was
                applied.
        """
        started = time.perf_counter()
        vocab_size = int(self.trainer.model.head_weight.shape[0])
        packed_s = 0.0
        try:
            flat = flatten(
                items,
                vocab_size=vocab_size,
                max_row_tokens=self.config.model.max_context_tokens,
                version=self.version,
            )
            packed_s = time.perf_counter() - started
            metrics = self.trainer.take_step(flat, self.version.step)
        except NumericsError as error:
            name = f"step_{self.version.step:08d}-L{self.version.lineage}.msgpack"
            path = self.run_dir / FAILED_STEPS_FOLDER / name
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, msgspec.msgpack.encode({"plan_digest": plan_digest, "items": items}))
            raise NumericsError(f"{error}; its batch is kept in {path}") from None
        trained = [item for item in items if not item.is_context]
        lags = [item.lag_steps for item in trained]
        metrics |= {
            "num_segments": float(len(trained)),
            "lag_mean": sum(lags) / len(lags),
            "lag_max": max(lags),
            "wait_s": wait_s,
            "pack_s": packed_s,
            "publish_s": self.publish_s,
            "step_s": time.perf_counter() - started + wait_s,
        }
        self.port.counters["trained_tokens"] = (
            self.port.counters.get("trained_tokens", 0.0) + metrics["num_action_tokens"]
        )
        self.port.counters["step"] = float(self.version.step + 1)
        return metrics

    def _publish(self) -> None:
        started = time.perf_counter()
        tensors = weights_of(self.trainer.model)
        keep = self.config.weights.keep_versions
        base = self._newest_published() if self.config.weights.has_deltas else None
        manifest = publish(
            self.run_dir,
            self.config.run.name,
            self.version,
            tensors,
            keep,
            config_file=self.run_dir / "model" / CONFIG_FILE,
        )
        if base is not None and base.version < manifest.version:
            self._write_delta(base, manifest)
        self.port.published(manifest)
        self.publish_s = time.perf_counter() - started

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
        record = TrainerRecord(
            run=self.config.run.name,
            version=self.version,
            trained_digest=self.trained_digest,
            config_digest=config_digest(self.config),
            files={},
        )
        keep = self.config.learner.keep_checkpoints
        record = save_checkpoint(self.run_dir, record, self.trainer.model, self.trainer.optimizer, keep)
        self.checkpointed = self.version
        self.port.checkpointed(
            Checkpointed(
                version=self.version,
                path=checkpoint_folder(self.version),
                digest=record.digest,
                trained_digest=self.trained_digest,
            )
        )
        log.info("checkpoint of version %s is durable", self.version)

    def _leave(self, reason: str, *, is_finished: bool) -> None:
        """Publish and checkpoint what is new, and say that it was the last step if it was."""
        if is_finished and self.version.step % self.config.weights.publish_every_steps:
            self._publish()
        if self.checkpointed != self.version:
            self._checkpoint()
        self.port.settle()
        if is_finished:
            self.port.finished(self.version, reason)
        log.info("left at version %s: %s", self.version, self.stop.reason or reason)


def start_learner(run_dir: Path, config: Config, port: CoordinatorPort, stop: StopWish) -> Learner | None:
    """Load the newest valid checkpoint or the starting model, test the packing, and open a lineage.

    Returns:
        The learner, or None if asked to stop before the coordinator answered.

    Raises:
        CheckpointError: the coordinator's history and the checkpoint do not meet at one step.
    """
    record = newest_checkpoint(run_dir)
    model, state = (load_model(run_dir / "model"), {}) if record is None else load_checkpoint(run_dir, record)
    reference = load_model(run_dir / "model") if config.loss.kl_coef > 0 else None
    trainer = Trainer.create(model, config.learner, config.loss, config.engine.temperature, reference)
    restore_optimizer(model, trainer.optimizer, state)
    error = check_packing(
        model, config.engine.temperature, trainer.max_rectangle_tokens, config.model.max_context_tokens
    )
    log.info("packed and separate rows agree to %.1e", error)
    branch = None if record is None else record.version
    trained_digest = EMPTY_TRAINED_DIGEST if record is None else record.trained_digest
    opened = port.open_lineage(branch, trained_digest)
    if opened is None:
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


def configure_torch(config: Config) -> None:
    """Fix threads and seeds, and prefer deterministic algorithms, so that a recorded step replays to the
    bit.
    """
    torch.set_num_threads(config.learner.num_threads)
    torch.manual_seed(config.run.seed)
    torch.use_deterministic_algorithms(True)
    # Filling every new buffer costs a pass over memory and guards nothing here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def run_learner(run_dir: Path) -> int:
    """Run the learner of the run in ``run_dir`` until it is over; the body of ``cod learner RUN``.

    Returns:
        0: all steps are done, or it was asked to stop.

    Raises:
        CodError: the work failed; the last checkpoint stands.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    config = load_resolved(run_dir)
    configure_torch(config)
    stop = StopWish(config.run.grace_s)
    restore_signals = stop.install()
    port = CoordinatorPort.open(run_dir, config, stop)
    try:
        learner = start_learner(run_dir, config, port, stop)
        if learner is not None:
            learner.run()
    finally:
        port.close()
        restore_signals()
    return 0
