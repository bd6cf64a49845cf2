"""A checkpoint is whole or it is not there; resuming is exact to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from learner_world import VOCAB, tiny_model

from cod_async.config.schema import LearnerConfig, LossConfig
from cod_async.errors import CheckpointError
from cod_async.learner.checkpoint import (
    TrainerRecord,
    all_checkpoints,
    checkpoint_folder,
    load_checkpoint,
    newest_checkpoint,
    optimizer_tensors,
    read_record,
    restore_optimizer,
    save_checkpoint,
)
from cod_async.learner.packing import flatten
from cod_async.learner.selftest import random_items
from cod_async.learner.step import Trainer
from cod_async.lifecycle.segment import Version


def _trainer() -> Trainer:
    return Trainer.create(tiny_model(), LearnerConfig(lr=1e-2), LossConfig(), 1.0)


def _step(trainer: Trainer, step: int) -> None:
    items = random_items(20, vocab_size=VOCAB, min_tokens=3, max_tokens=20, seed=step)
    trainer.take_step(flatten(items, vocab_size=VOCAB), step)


def _save(run_dir: Path, trainer: Trainer, step: int, lineage: int = 0, keep: int = 9) -> TrainerRecord:
    record = TrainerRecord(
        run="t", version=Version(lineage, step), trained_digest="abc", config_digest="def", files={}
    )
    return save_checkpoint(run_dir, record, trainer.model, trainer.optimizer, keep)


def test_resume_is_exact_to_the_bit(run_dir: Path) -> None:
    straight = _trainer()
    for step in range(4):
        _step(straight, step)
    broken = _trainer()
    for step in range(2):
        _step(broken, step)
    saved = _save(run_dir, broken, 2)
    found = newest_checkpoint(run_dir)
    assert found == saved
    assert (found.version, found.trained_digest) == (Version(0, 2), "abc")
    model, state = load_checkpoint(run_dir, found)
    resumed = Trainer.create(model, LearnerConfig(lr=1e-2), LossConfig(), 1.0)
    restore_optimizer(model, resumed.optimizer, state)
    for step in range(2, 4):
        _step(resumed, step)
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    ours, theirs = (optimizer_tensors(t.model, t.optimizer) for t in (straight, resumed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_checkpoint_of_an_untrained_model(run_dir: Path) -> None:
    trainer = _trainer()
    record = _save(run_dir, trainer, 0)
    model, state = load_checkpoint(run_dir, record)
    assert state == {}
    restore_optimizer(model, Trainer.create(model, LearnerConfig(), LossConfig(), 1.0).optimizer, state)


def test_folder_is_a_hugging_face_model_with_its_tokenizer(run_dir: Path) -> None:
    transformers = pytest.importorskip("transformers")
    trainer = _trainer()
    _step(trainer, 0)
    _save(run_dir, trainer, 1)
    folder = run_dir / checkpoint_folder(Version(0, 1))
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "optimizer.safetensors",
        "tokenizer.json",
        "trainer.json",
    }
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(10)[None] % VOCAB
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, trainer.model.logits(ids), atol=1e-5)


def test_pruning_keeps_the_first_and_the_newest(run_dir: Path) -> None:
    trainer = _trainer()
    for lineage, step in [(0, 2), (0, 4), (0, 6), (1, 6), (1, 8)]:
        (run_dir / "checkpoints" / "step_00000099-L0.tmp").mkdir(parents=True, exist_ok=True)
        _save(run_dir, trainer, step, lineage, keep=2)
    assert all_checkpoints(run_dir) == [Version(0, 2), Version(1, 6), Version(1, 8)]
    assert not list((run_dir / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "config.json", "trainer.json"]
)
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-5]),
        lambda path: path.write_bytes(path.read_bytes().replace(b"0", b"1", 1)),
        lambda path: path.unlink(),
    ],
)
def test_damaged_checkpoints_are_passed_over(
    run_dir: Path, name: str, damage: Callable[[Path], object]
) -> None:
    trainer = _trainer()
    _step(trainer, 0)
    _save(run_dir, trainer, 1)
    _step(trainer, 1)
    _save(run_dir, trainer, 2)
    damage(run_dir / checkpoint_folder(Version(0, 2)) / name)
    with pytest.raises(CheckpointError, match="older"):
        read_record(run_dir, Version(0, 2))
    found = newest_checkpoint(run_dir)
    assert found is not None and found.version == Version(0, 1)


def test_no_checkpoint(run_dir: Path) -> None:
    assert newest_checkpoint(run_dir) is None
    (run_dir / "checkpoints" / "step_00000004-L0").mkdir(parents=True)
    assert newest_checkpoint(run_dir) is None


def test_optimizer_state_of_another_model_is_refused() -> None:
    trainer = _trainer()
    _step(trainer, 0)
    state = optimizer_tensors(trainer.model, trainer.optimizer)
    missing = {key: value for key, value in state.items() if not key.startswith("exp_avg/")}
    with pytest.raises(CheckpointError, match="missing or unknown"):
        restore_optimizer(trainer.model, trainer.optimizer, missing)
    name = next(key for key in state if key.startswith("exp_avg/"))
    with pytest.raises(CheckpointError, match="shape"):
        restore_optimizer(trainer.model, trainer.optimizer, state | {name: torch.zeros(1)})
