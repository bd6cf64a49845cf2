"""A checkpoint is whole or it is not there; resuming is exact to the bit."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from learner_world import VOCAB, tiny_model
from safetensors.torch import load_file

from cod_async.config.learner import LoraConfig
from cod_async.config.load import load_resolved, save_resolved
from cod_async.config.schema import LearnerConfig, LossConfig
from cod_async.errors import CheckpointError, InputError
from cod_async.launch.export import export_model, trained_versions
from cod_async.learner.checkpoints.record import (
    TrainerRecord,
    all_checkpoints,
    checkpoint_folder,
    describe,
    newest_checkpoint,
    prune_checkpoints,
    read_record,
)
from cod_async.learner.checkpoints.resume import find_checkpoint, load_checkpoint
from cod_async.learner.checkpoints.state import named_state
from cod_async.learner.checkpoints.writer import write_checkpoint
from cod_async.learner.packing import flatten
from cod_async.learner.selftest import random_items
from cod_async.learner.step import Trainer
from cod_async.lifecycle.segment import Version
from cod_async.models.directory import save_model
from cod_async.models.export import weights_of
from cod_async.models.loading import load_policy
from cod_async.models.qwen3 import Qwen3, Qwen3Config

LEARNER = LearnerConfig(lr=1e-2, keep_checkpoints=9)


def _trainer(seed: int = 0) -> Trainer:
    return Trainer.create(tiny_model(seed), LEARNER, LossConfig(), 1.0)


def _step(trainer: Trainer, step: int) -> None:
    items = random_items(20, vocab_size=VOCAB, min_tokens=3, max_tokens=20, seed=step)
    trainer.take_step(flatten(items, vocab_size=VOCAB), step)


def _save(run_dir: Path, trainer: Trainer, step: int, lineage: int = 0, **learner: int) -> TrainerRecord:
    record = TrainerRecord(run="t", version=Version(lineage, step), trained_digest="abc", config_digest="def")
    config = msgspec.structs.replace(LEARNER, **learner)
    return write_checkpoint(run_dir, record, trainer.model, trainer.optimizer, config)


def _everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    state = named_state(trainer.model, trainer.optimizer)
    return {f"{kind}/{name}": value for kind, named in state.items() for name, value in named.items()}


def _assert_same(one: Trainer, other: Trainer) -> None:
    ours, theirs = _everything(one), _everything(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_resume_is_exact_to_the_bit(run_dir: Path) -> None:
    straight = _trainer()
    for step in range(4):
        _step(straight, step)
    broken = _trainer()
    for step in range(2):
        _step(broken, step)
    saved = _save(run_dir, broken, 2)
    found = find_checkpoint(run_dir, "t")
    assert found == saved
    assert (found.version, found.trained_digest, found.num_ranks) == (Version(0, 2), "abc", 1)
    resumed = _trainer(seed=1)
    load_checkpoint(run_dir, found, resumed.model, resumed.optimizer)
    _assert_same(resumed, broken)
    for step in range(2, 4):
        _step(resumed, step)
    _assert_same(resumed, straight)


@pytest.mark.parametrize("options", [{"optimizer": "adamw_8bit"}, {"has_optimizer_offload": True}])
def test_other_optimizers_resume_to_the_bit(run_dir: Path, options: dict[str, Any]) -> None:
    """Moments in blocks of 8-bit codes, and moments beside copies of the parameters."""
    config = msgspec.structs.replace(LEARNER, **options)

    def trainer_of(seed: int) -> Trainer:
        shape = Qwen3Config(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=64,
        )  # fmt: skip
        model = Qwen3(shape, torch.Generator().manual_seed(seed))
        return Trainer.create(model, config, LossConfig(), 1.0)

    straight, resumed = trainer_of(0), trainer_of(1)
    _step(straight, 0)
    save_model(run_dir / "model", trainer_of(2).model)
    record = _save(run_dir, straight, 1)
    load_checkpoint(run_dir, record, resumed.model, resumed.optimizer)
    _assert_same(resumed, straight)
    for trainer in (straight, resumed):
        _step(trainer, 1)
    _assert_same(resumed, straight)


def test_generators_go_on_where_they_were(run_dir: Path) -> None:
    trainer = _trainer()
    torch.manual_seed(5)
    torch.rand(3)
    record = _save(run_dir, trainer, 1)
    expected = torch.rand(4)
    torch.manual_seed(6)
    load_checkpoint(run_dir, record, trainer.model, trainer.optimizer)
    assert torch.equal(torch.rand(4), expected)


def test_checkpoint_of_an_untrained_model(run_dir: Path) -> None:
    record = _save(run_dir, _trainer(), 0)
    resumed, straight = _trainer(seed=1), _trainer()
    load_checkpoint(run_dir, record, resumed.model, resumed.optimizer)
    for trainer in (resumed, straight):
        _step(trainer, 0)
    _assert_same(resumed, straight)


def test_folder_is_private_and_names_are_those_of_the_model_directory(run_dir: Path) -> None:
    trainer = _trainer()
    _step(trainer, 0)
    record = _save(run_dir, trainer, 1)
    folder = run_dir / checkpoint_folder(Version(0, 1))
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "config.json",
        "generation_config.json",
        "generators/rank-00000-00000.safetensors",
        "optimizer/rank-00000-00000.safetensors",
        "tokenizer.json",
        "trainer.json",
        "weights/rank-00000-00000.safetensors",
    ]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert set(record.files) == {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    } - {"trainer.json"}
    weights = load_file(folder / "weights" / "rank-00000-00000.safetensors")
    start = load_file(run_dir / "model" / "model.safetensors")
    assert {name: value.shape for name, value in weights.items()} == {
        name: value.shape for name, value in start.items()
    }
    moments = load_file(folder / "optimizer" / "rank-00000-00000.safetensors")
    assert set(moments) == {f"{key}/{name}" for key in ("exp_avg", "exp_avg_sq", "step") for name in weights}


def test_export_is_a_model_directory_of_the_trained_weights(run_dir: Path) -> None:
    transformers = pytest.importorskip("transformers")
    trainer = _trainer()
    _step(trainer, 0)
    _save(run_dir, trainer, 1)
    assert set(trained_versions(run_dir)) == {Version(0, 1)}
    out = run_dir.parent / "out"
    assert export_model(run_dir, out) == Version(0, 1)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.arange(10)[None] % VOCAB
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, trainer.model.logits(ids), atol=1e-5)
    weights = run_dir / checkpoint_folder(Version(0, 1)) / "weights" / "rank-00000-00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match="does not match its digest"):
        export_model(run_dir, run_dir.parent / "other")
    assert sorted(path.name for path in run_dir.parent.iterdir()) == ["out", run_dir.name]


def test_adapters_alone_are_stored_and_exported_merged(run_dir: Path) -> None:
    pytest.importorskip("peft")
    lora = LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "down_proj"))
    config = load_resolved(run_dir)
    save_resolved(
        msgspec.structs.replace(config, learner=msgspec.structs.replace(LEARNER, lora=lora)), run_dir
    )

    def trainer_of() -> Trainer:
        policy = load_policy(run_dir / "model", lora=lora)
        return Trainer.create(policy, LEARNER, LossConfig(), 1.0)

    trained, resumed = trainer_of(), trainer_of()
    _step(trained, 0)
    record = _save(run_dir, trained, 1)
    load_checkpoint(run_dir, record, resumed.model, resumed.optimizer)
    _assert_same(resumed, trained)
    names = named_state(trained.model, trained.optimizer)["weights"].keys()
    assert len(names) == 2 * 2 * 2 and all("lora_" in name for name in names)
    out = run_dir.parent / "out"
    export_model(run_dir, out)
    merged, expected = load_file(out / "model.safetensors"), weights_of(trained.model)
    start = load_file(run_dir / "model" / "model.safetensors")
    assert all(torch.equal(merged[name], expected[name]) for name in merged)
    changed = {name for name in merged if not torch.equal(merged[name], start[name])}
    assert changed == {
        f"model.layers.{layer}.{part}.weight"
        for layer in range(2) for part in ("self_attn.q_proj", "mlp.down_proj")
    }  # fmt: skip


def test_pruning_keeps_the_first_and_the_newest(run_dir: Path) -> None:
    trainer = _trainer()
    for lineage, step in [(0, 2), (0, 4), (0, 6), (1, 6), (1, 8)]:
        (run_dir / "checkpoints" / "step_00000099-L0.tmp").mkdir(parents=True, exist_ok=True)
        _save(run_dir, trainer, step, lineage, keep_checkpoints=2)
    assert all_checkpoints(run_dir) == [Version(0, 2), Version(1, 6), Version(1, 8)]
    assert not list((run_dir / "checkpoints").glob("*.tmp"))


def test_pruning_keeps_the_newest_and_every_so_many_steps(run_dir: Path) -> None:
    for step in range(2, 31, 2):
        (run_dir / checkpoint_folder(Version(0, step))).mkdir(parents=True)
    removed = prune_checkpoints(run_dir, 1, 10)
    assert [version.step for version in all_checkpoints(run_dir)] == [2, 10, 20, 30]
    assert [version.step for version in removed] == [4, 6, 8, 12, 14, 16, 18, 22, 24, 26, 28]


FILES = (
    "weights/rank-00000-00000.safetensors", "optimizer/rank-00000-00000.safetensors",
    "generators/rank-00000-00000.safetensors", "config.json", "trainer.json",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-5]),
        lambda path: path.write_bytes(path.read_bytes().replace(b"0", b"1", 1)),
        lambda path: path.unlink(),
    ],
    ids=["cut", "changed", "gone"],
)
def test_damaged_checkpoints_are_passed_over(
    run_dir: Path, name: str, damage: Callable[[Path], object]
) -> None:
    trainer = _trainer()
    _save(run_dir, trainer, 1)
    _save(run_dir, trainer, 2)
    damage(run_dir / checkpoint_folder(Version(0, 2)) / name)
    with pytest.raises(CheckpointError, match="older"):
        read_record(run_dir, Version(0, 2))
    found = newest_checkpoint(run_dir)
    assert found is not None and found.version == Version(0, 1)
    damage(run_dir / checkpoint_folder(Version(0, 1)) / name)
    with pytest.raises(InputError, match="no checkpoint can be loaded"):  # never a fresh start in silence
        find_checkpoint(run_dir, "t")


def test_a_checkpoint_of_another_run_is_passed_over_by_name(run_dir: Path) -> None:
    _save(run_dir, _trainer(), 2)
    with pytest.raises(InputError, match="is of run 't', not 'u'"):
        newest_checkpoint(run_dir, "u")


def test_an_earlier_format_is_refused_by_name(run_dir: Path) -> None:
    folder = run_dir / checkpoint_folder(Version(0, 4))
    folder.mkdir(parents=True)
    old = {"run": "t", "version": {"lineage": 0, "step": 4}, "trained_digest": "", "files": {}, "digest": ""}
    (folder / "trainer.json").write_bytes(msgspec.json.encode(old))
    with pytest.raises(InputError, match="checkpoint format 1, this program reads 2"):
        newest_checkpoint(run_dir)


def test_names_outside_the_folder_are_refused(run_dir: Path) -> None:
    record = _save(run_dir, _trainer(), 2)
    for name in ("../../config.json", "/etc/passwd", "weights/../../config.json", ""):
        wrong = msgspec.structs.replace(record, files={name: "0" * 64}, digest="")
        wrong = msgspec.structs.replace(wrong, digest=wrong.own_digest())
        path = run_dir / checkpoint_folder(record.version) / "trainer.json"
        path.write_bytes(msgspec.json.encode(wrong))
        with pytest.raises(CheckpointError, match="outside its folder"):
            read_record(run_dir, record.version)


def test_no_checkpoint(run_dir: Path) -> None:
    assert newest_checkpoint(run_dir) is None
    (run_dir / "checkpoints" / "step_00000004-L0.tmp").mkdir(parents=True)  # was being written
    assert newest_checkpoint(run_dir) is None


def test_a_checkpoint_of_another_model_is_refused(run_dir: Path) -> None:
    record = _save(run_dir, _trainer(), 2)
    other = _trainer()
    del other.model.model.layers[1]
    with pytest.raises(CheckpointError, match=r"model.layers.1.*is unknown.* and \d+ more"):
        load_checkpoint(run_dir, record, other.model, other.optimizer)


def test_what_is_said_of_a_checkpoint() -> None:
    record = TrainerRecord(
        run="t", version=Version(1, 40), trained_digest="", config_digest="", data_parallel=2, created_at=1e9
    )
    assert describe(record, 2, 1, 1e9 + 3 * 3600) == (
        "checkpoint 1.40 (step 40), 3 hours old, written by 2 ranks (2 data x 1 sequence), as many as now"
    )
    assert describe(record, 1, 1, 1e9 + 59) == (
        "checkpoint 1.40 (step 40), 59 seconds old, written by 2 ranks (2 data x 1 sequence); now 1 rank"
    )
