"""A checkpoint written by some ranks is read by any other number of them, and fails on all or on none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from learner_world import VOCAB, tiny_model
from ranks import run_ranks

from cod_async.config.schema import LearnerConfig, LossConfig
from cod_async.errors import CheckpointError
from cod_async.launch.export import export_model
from cod_async.learner.checkpoints.record import TrainerRecord, all_checkpoints
from cod_async.learner.checkpoints.resume import find_checkpoint, load_checkpoint
from cod_async.learner.checkpoints.state import named_state
from cod_async.learner.checkpoints.writer import CheckpointWriter
from cod_async.learner.packing import flatten
from cod_async.learner.parallel.local import whole
from cod_async.learner.parallel.world import World
from cod_async.learner.selftest import random_items
from cod_async.learner.step import Trainer
from cod_async.lifecycle.segment import Version
from cod_async.models.directory import load_model, weights_of


def make_trainer(size: int, seed: int = 0) -> Trainer:
    world = World.of_default_group(size, 1) if size > 1 else World.alone()
    config = LearnerConfig(lr=1e-2, data_parallel=size, keep_checkpoints=9)
    return Trainer.create(tiny_model(seed), config, LossConfig(), 1.0, world=world)


def take_step(trainer: Trainer, step: int) -> None:
    items = random_items(12, vocab_size=VOCAB, min_tokens=3, max_tokens=12, seed=step)
    trainer.take_step(flatten(items, vocab_size=VOCAB), step)


def writer_of(trainer: Trainer, run_dir: Path, **more: Any) -> CheckpointWriter:
    return CheckpointWriter(
        run_dir, trainer.model, trainer.optimizer, trainer.learner, world=trainer.world, **more
    )


def record_of(step: int) -> TrainerRecord:
    return TrainerRecord(run="t", version=Version(0, step), trained_digest="d", config_digest="c")


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    state = named_state(trainer.model, trainer.optimizer)
    return {
        f"{kind}/{name}": whole(value).clone()
        for kind, named in state.items()
        for name, value in named.items()
    }


def save_job(rank: int, size: int, folder: Path, run_dir: str) -> dict[str, Any]:
    trainer = make_trainer(size)
    torch.manual_seed(100 + rank)
    take_step(trainer, 0)
    writer = writer_of(trainer, Path(run_dir))
    writer.begin(record_of(1))
    at_one = everything(trainer)
    take_step(trainer, 1)  # beside the writing
    writer.wait()
    return {**at_one, "random": torch.rand(3)}


def load_job(rank: int, size: int, folder: Path, run_dir: str) -> dict[str, Any]:
    trainer = make_trainer(size, seed=1)
    record = find_checkpoint(Path(run_dir), "t", trainer.world)
    assert record is not None
    load_checkpoint(Path(run_dir), record, trainer.model, trainer.optimizer, trainer.world)
    loaded = everything(trainer)
    random = torch.rand(3)
    take_step(trainer, 1)

    def fail(point: str) -> None:
        if rank == 1 and point == "optimizer":
            raise OSError(28, "No space left on device")

    writer = writer_of(trainer, Path(run_dir), on_point=fail)
    writer.begin(record_of(2))
    writer.wait()
    return {
        **loaded, "random": random, "problem": writer.problem, "num_ranks": record.num_ranks,
        "saved": [str(version) for version in all_checkpoints(Path(run_dir))],
    }  # fmt: skip


def test_other_ranks_read_what_ranks_wrote(run_dir: Path) -> None:
    """Four ranks write, two read, then one; every tensor, bit by bit."""
    saved = run_ranks(4, save_job, str(run_dir))
    random = [result.pop("random") for result in saved]
    folder = run_dir / "checkpoints" / "step_00000001-L0" / "weights"
    assert len(list(folder.iterdir())) == 4
    loaded = run_ranks(2, load_job, str(run_dir))
    for rank, result in enumerate(loaded):
        assert torch.equal(result.pop("random"), random[rank])
        assert result.pop("num_ranks") == 4
        assert result.pop("saved") == ["0.1"], "one rank could not write, so no rank has"
        problem = result.pop("problem")
        assert "No space left" in problem
        assert problem.startswith("rank 1: ") == (rank != 1)
        assert result.keys() == saved[0].keys()
        assert [name for name in result if not torch.equal(result[name], saved[0][name])] == []
    alone = make_trainer(1, seed=2)
    record = find_checkpoint(run_dir, "t")
    assert record is not None
    load_checkpoint(run_dir, record, alone.model, alone.optimizer)
    assert [name for name, value in everything(alone).items() if not torch.equal(value, saved[0][name])] == []
    export_model(run_dir, run_dir / "final")
    final = weights_of(load_model(run_dir / "final"))
    assert [name for name in final if not torch.equal(final[name], saved[0][f"weights/{name}"])] == []
    (folder / "rank-00003-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has shape|is missing"):  # even if nobody had verified it
        load_checkpoint(run_dir, record, alone.model, alone.optimizer)
