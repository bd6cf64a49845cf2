"""A recorded run without processes: the real coordinator and run database, and the learner's own step.

Actors are those of :mod:`coordinator_world`; what they say means nothing, but every number of every step is a
real one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coordinator_world import RUN, Actor, Learner, LearnerCheckpoint, World, make_config
from learner_world import tiny_model

from cod_async.config.load import save_resolved
from cod_async.config.schema import Config
from cod_async.learner.checkpoints.record import TrainerRecord
from cod_async.learner.checkpoints.writer import write_checkpoint
from cod_async.learner.opening import open_trainer, rows_of
from cod_async.learner.witness import Witness
from cod_async.lifecycle.segment import Version
from cod_async.models.directory import save_model, weights_of
from cod_async.weights.publish import CONFIG_FILE, publish
from cod_async.wire.messages import StepDone, TrainItem


class RecordedRun:
    """A run folder whose steps are taken one by one.

    Attributes:
        run_dir: the folder.
        batches: items of every step, by version.
    """

    def __init__(self, run_dir: Path, **sections: Any) -> None:
        learner = {
            "lr": 1e-2,
            "groups_per_step": 2,
            "tokens_per_micro_batch": 64,
            **sections.pop("learner", {}),
        }
        self.config: Config = make_config(learner=learner, **sections)
        self.run_dir = run_dir
        run_dir.mkdir()
        save_model(run_dir / "model", tiny_model())
        save_resolved(self.config, run_dir)
        self.world = World(run_dir, self.config)
        self.actor = Actor(self.world)
        self.saved: dict[int, LearnerCheckpoint] = {}
        self.batches: dict[Version, list[TrainItem]] = {}
        self.open(None)

    def open(self, step: int | None) -> None:
        """Start a learner, from the checkpoint of a step or from the very beginning."""
        saved = None if step is None else self.saved[step]
        record = None if saved is None or saved.version is None else self._record(saved.version)
        self.learner = Learner(self.world, saved)
        self.trainer = open_trainer(self.run_dir, self.config, record)
        self.witness = Witness(self.trainer, self.config.learner)

    def take_step(self) -> Version:
        """Play, train, report; return the version that was trained from."""
        learner, version = self.learner, self.learner.version
        self.actor.ask(64)
        self.actor.play_all()
        learner.request_step()
        assert learner.batch is not None
        digest, items = learner.batch
        self.batches[version] = items
        self.witness.begin(version.step)
        metrics = self.trainer.take_step(rows_of(items, self.config, self.trainer, version), version.step)
        done = StepDone(version=version, plan_digest=digest, metrics=metrics, witness=self.witness.of_step())
        self.world.say(learner.session, done)
        learner.take_step()  # says it again, which changes nothing, and keeps the books
        return version

    def checkpoint(self) -> Version:
        """Save what there is and return its version."""
        saved = self.learner.checkpoint()
        assert saved.version is not None
        record = self._bare(saved.version)
        write_checkpoint(
            self.run_dir, record, self.trainer.model, self.trainer.optimizer, self.config.learner
        )
        self.saved[saved.version.step] = saved
        return saved.version

    def publish(self) -> None:
        """Write the present weights as a published version."""
        publish(
            self.run_dir,
            RUN,
            self.learner.version,
            weights_of(self.trainer.model),  # type: ignore[arg-type]
            3,
            config_file=self.run_dir / "model" / CONFIG_FILE,
        )

    def kill(self) -> None:
        """End the learner without a word."""
        self.learner.die()

    def close(self) -> None:
        self.world.store.close()

    def _bare(self, version: Version) -> TrainerRecord:
        return TrainerRecord(
            run=RUN, version=version, trained_digest=self.learner.trained_digest, config_digest=""
        )

    def _record(self, version: Version) -> TrainerRecord:
        from cod_async.learner.checkpoints.record import read_record

        return read_record(self.run_dir, version)
