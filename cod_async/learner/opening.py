"""What a step is computed with: the trainer of a run, and how its items become rows.

The loop and a replay both come here, so that a replayed step meets the same code with the same settings.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from cod_async.config.schema import Config
from cod_async.learner.checkpoints.record import TrainerRecord
from cod_async.learner.checkpoints.resume import find_checkpoint, load_checkpoint
from cod_async.learner.fitting import check_rows, find_room, has_reference
from cod_async.learner.packing import FlatRows, flatten, token_budget
from cod_async.learner.parallel.world import World, device_of
from cod_async.learner.selftest import check_packing
from cod_async.learner.step import Trainer
from cod_async.lifecycle.segment import Version
from cod_async.models.loading import load_policy
from cod_async.wire.messages import TrainItem

log = logging.getLogger(__name__)


def configure_torch(config: Config) -> None:
    """Fix threads and seeds, and prefer deterministic algorithms, so that a recorded step replays to the
    bit.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS promises no fixed order
    torch.set_num_threads(config.learner.num_threads)
    torch.manual_seed(config.run.seed)
    torch.use_deterministic_algorithms(True)
    # Filling every new buffer costs a pass over memory and guards nothing here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def open_trainer(
    run_dir: Path,
    config: Config,
    record: TrainerRecord | None = None,
    *,
    weights: Path | None = None,
    world: World | None = None,
) -> Trainer:
    """Return the trainer as it was at a checkpoint, or at the very start.

    Args:
        run_dir: the run folder.
        config: of the run.
        record: a verified checkpoint; None: the starting model and an optimizer without a past.
        weights: model directory to take in place of the starting model.
        world: the ranks, all of which open it; this process alone when None.

    Raises:
        CheckpointError: the checkpoint does not fit this model or optimizer.
        InputError: a row of full length does not fit the device.
    """
    world = World.alone(device_of(config.learner)) if world is None else world
    room = find_room(run_dir / "model", config, world)
    learner = room.learner
    # Of several ranks each loads into host memory, and keeps its share only, layer by layer.
    device = "cpu" if world.size > 1 else str(world.device)
    model = load_policy(weights or run_dir / "model", device=device, lora=learner.lora)
    reference = load_policy(run_dir / "model", device=device) if has_reference(config) else None
    trainer = Trainer.create(model, learner, config.loss, config.engine.temperature, reference, world)
    trainer.passes.sharing = replace(trainer.passes.sharing, max_row_tokens=room.max_row_tokens)
    trainer.passes.memory.forecast_bytes = room.forecast_bytes
    if record is not None:
        load_checkpoint(run_dir, record, trainer.model, trainer.optimizer, world)
        trainer.compute.refresh()
    return trainer


def open_tested(
    run_dir: Path, config: Config, world: World | None = None
) -> tuple[Trainer, TrainerRecord | None]:
    """Return the trainer at the newest checkpoint or at the start, and that checkpoint, after the self-test.

    Raises:
        InputError: there are checkpoints, and none can be loaded.
        WorkError: the self-test failed.
    """
    record = find_checkpoint(run_dir, config.run.name, world)
    trainer = open_trainer(run_dir, config, record, world=world)
    error = check_packing(
        trainer.model,
        config.engine.temperature,
        trainer.max_rectangle_tokens,
        config.model.max_context_tokens,
        kind=trainer.kind,
        logprobs=trainer.logprobs,
        is_bfloat16=config.learner.compute_dtype == "bfloat16",
    )
    log.info("packed and separate rows agree to %.1e", error)
    return trainer, record


def rows_of(items: Sequence[TrainItem], config: Config, trainer: Trainer, version: Version) -> FlatRows:
    """Lay the rows of a step end to end and check them.

    Args:
        items: the whole step, sorted by key.
        config: of the run.
        trainer: that will train on them.
        version: that the step starts from.

    Raises:
        WorkError: a row that no engine can have produced, or that no device here holds.
        NumericsError: a log-prob is not finite.
    """
    flat = flatten(
        items,
        vocab_size=int(trainer.model.head_weight.shape[0]),
        max_row_tokens=config.model.max_context_tokens,
        version=version,
        has_prefix_merging=config.learner.has_prefix_merging,
    )
    check_rows(flat, items, trainer.passes.sharing.max_row_tokens)
    return flat


def use_settings(trainer: Trainer, config: Config) -> None:
    """Have a trainer compute with other settings of those that a resumed run may change."""
    torch.set_num_threads(config.learner.num_threads)
    sharing = trainer.passes.sharing
    max_tokens = token_budget(config.learner, trainer.model.device, sharing.kind)
    trainer.passes.sharing = replace(sharing, max_tokens=max_tokens)
    trainer.learner = config.learner
