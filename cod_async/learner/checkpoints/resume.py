"""Finding the checkpoint to go on from, and loading it on however many ranks there are now."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec
import torch

from cod_async.errors import InputError
from cod_async.learner.checkpoints.record import (
    TrainerRecord,
    checkpoint_folder,
    describe,
    newest_checkpoint,
)
from cod_async.learner.checkpoints.state import host_mesh_of, load_generator_state, load_named_state
from cod_async.learner.parallel.world import World

log = logging.getLogger(__name__)


def find_checkpoint(run_dir: Path, run: str, world: World | None = None) -> TrainerRecord | None:
    """Return the newest checkpoint of a run that can be loaded; None if there is none.

    It is the same on every rank. Rank 0 looks and reads every byte of it; the others hear what it found.

    Raises:
        InputError: there are checkpoints, and none of them can be loaded.
    """
    world = world if world is not None else World.alone()
    record: TrainerRecord | None = None
    problem: str | None = None
    if world.is_main:
        try:
            record = newest_checkpoint(run_dir, run)
        except InputError as error:
            problem = str(error)
    problem = world.first_problem(problem)
    if problem is not None:
        raise InputError(problem.splitlines())
    told = world.tell(msgspec.json.encode(record) if world.is_main else None)
    record = msgspec.json.decode(told, type=TrainerRecord | None)
    if record is not None and world.is_main:
        log.info("going on from %s", describe(record, world.data_parallel, world.sequence_parallel))
    return record


def load_checkpoint(
    run_dir: Path, record: TrainerRecord, model: torch.nn.Module, optimizer: Any, world: World | None = None
) -> None:
    """Put weights, optimizer state and generators of a verified checkpoint back, in place.

    Args:
        run_dir: the run folder.
        record: from :func:`find_checkpoint` or ``read_record``.
        model: the policy as it was built from the run's ``model/``, whole or sharded.
        optimizer: of its parameters.
        world: the ranks now; those that wrote it may have been more or fewer.

    Raises:
        CheckpointError: it does not fit this model or optimizer.
    """
    world = world if world is not None else World.alone()
    folder = run_dir / checkpoint_folder(record.version)
    load_named_state(model, optimizer, folder, host_mesh=host_mesh_of(world))
    device = next(model.parameters()).device
    if not load_generator_state(world.rank, device, folder):
        log.info(
            "rank %d: the checkpoint has no generator states for it; they begin from run.seed", world.rank
        )
