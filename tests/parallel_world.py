"""One step of a tiny model on any number of ranks: the job that the ranks of a test run, and its parts."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from learner_world import VOCAB
from pull_world import RUN

from cod_async.config.schema import LearnerConfig, LoraConfig, LossConfig
from cod_async.errors import InputError, NumericsError, WeightsError
from cod_async.learner.packing import FlatRows, flatten
from cod_async.learner.parallel.local import local, whole
from cod_async.learner.parallel.world import World
from cod_async.learner.selftest import random_items
from cod_async.learner.step import Trainer
from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.segment import Version
from cod_async.models.directory import config_to_json
from cod_async.models.export import weights_of
from cod_async.models.loading import load_policy
from cod_async.models.policy import Policy
from cod_async.models.qwen3 import Qwen3, Qwen3Config
from cod_async.weights.publish import published_versions
from cod_async.weights.sharded import publish_sharded
from cod_async.wire.messages import TrainItem

TEMPERATURE = 0.8


def model_of(*, is_tied: bool = True, dtype: str = "float64", seed: int = 0) -> Qwen3:
    """A model whose heads divide among four ranks, with fewer rows in some tensors than there are ranks."""
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=4,
        max_position_embeddings=64,
        tie_word_embeddings=is_tied,
    )
    return Qwen3(config, torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))


def items_of(count: int, *, spread: float = 0.3) -> list[TrainItem]:
    """Items whose behavior log-probs lie around the model's own, so that masks and clips bite."""
    model = model_of()
    found = []
    rng = np.random.default_rng(7)
    for item in random_items(count, vocab_size=VOCAB, min_tokens=3, max_tokens=25):
        (row,) = item.rows
        ids = torch.from_numpy(row.token_ids.numpy().astype("int64"))
        with torch.no_grad():
            logprobs = torch.log_softmax(model.logits(ids[None])[0] / TEMPERATURE, -1)
        places = [p for start, stop in row.action_spans for p in range(start, stop)]
        own = np.array([float(logprobs[p - 1, ids[p]]) for p in places])
        behavior = np.minimum(own + spread * rng.normal(size=own.size), 0.0)
        row = msgspec.structs.replace(row, behavior_logprobs=Array.of(behavior, "<f4"))
        found.append(msgspec.structs.replace(item, rows=(row,)))
    return found


def flat_of(case: dict[str, Any]) -> FlatRows:
    """The rows of a case."""
    items = items_of(case.get("num_items", 13), spread=case.get("spread", 0.3))
    flat = flatten(items, vocab_size=VOCAB)
    if "poison" in case:  # a value that only the ranks with this row see
        bad = np.array(flat.behavior_logprobs)
        bad[case["poison"]] = np.nan
        flat = dataclasses.replace(flat, behavior_logprobs=bad)
    if "every" in case:  # only some items have an advantage
        some = np.arange(flat.advantages.size) % case["every"] == 1
        flat = dataclasses.replace(flat, advantages=np.where(some, flat.advantages, 0.0))
    return flat


def trainer_of(case: dict[str, Any], *, is_alone: bool) -> Trainer:
    """The trainer of a case, on this process alone or on the ranks of the default group."""
    shape = {"data_parallel": 1, "sequence_parallel": 1}
    if not is_alone:
        shape = {"data_parallel": case.get("data", 1), "sequence_parallel": case.get("sequence", 1)}
    world = World.alone() if is_alone else World.of_default_group(*shape.values())
    loss = msgspec.convert(case.get("loss", {}), LossConfig)
    settings = {"tokens_per_micro_batch": 64, "layout": "packed", **case.get("learner", {})}
    if not is_alone and case.get("mode"):
        settings["sequence_mode"] = case["mode"]
    learner = msgspec.convert({**settings, **shape}, LearnerConfig)
    reference = _policy(case, seed=1) if loss.kl_coef else None
    return Trainer.create(_policy(case), learner, loss, TEMPERATURE, reference, world)


def _policy(case: dict[str, Any], seed: int = 0) -> Policy:
    dtype = case.get("dtype", "float64")
    if "path" not in case:
        return model_of(is_tied=case.get("is_tied", True), dtype=dtype, seed=seed)
    lora = msgspec.convert(case.get("lora", {}), LoraConfig)
    return load_policy(Path(case["path"]), dtype=getattr(torch, dtype), lora=lora)


def run_case(case: dict[str, Any], *, is_alone: bool) -> dict[str, Any]:
    """Loss, gradients, or parameters and metrics after some steps of a case."""
    trainer = trainer_of(case, is_alone=is_alone)
    flat = flat_of(case)
    if case.get("num_steps", 0) == 0:
        # As on CUDA, where items without an advantage come last and have turns without gradients.
        done = trainer.accumulate(flat, flat.advantages != 0 if "every" in case else None)
        loss = trainer._total_loss(done)
        named = trainer.model.named_parameters()
        found = {f"grad/{name}": whole(p.grad) for name, p in named if p.requires_grad}
        return {"loss": loss, "current": done.current, **found}
    if case.get("optimizer") == "sgd":
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=trainer.learner.lr)
    numbers = [trainer.take_step(flat, step) for step in range(case["num_steps"])]
    names = [name for name in sorted(numbers[0]) if not name.endswith("_s")]
    return {
        **{f"metric/{name}": torch.tensor([n[name] for n in numbers]) for name in names},
        **{f"weight/{name}": whole(p) for name, p in weights_of(trainer.model).items()},
    }


def cases_job(rank: int, size: int, folder: Path, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Run cases one after the other; what they return, with the case's number before each name."""
    found: dict[str, Any] = {}
    for number, case in enumerate(cases):
        for name, value in run_case(case, is_alone=False).items():
            found[f"{number}:{name}"] = value.clone()
    return found


def mixed_job(rank: int, size: int, folder: Path, failing: list[dict[str, Any]]) -> dict[str, Any]:
    """Steps that one rank cannot take; publication from shards; words between ranks; a wrong mesh."""
    found: dict[str, Any] = {}
    for number, case in enumerate(failing):
        trainer = trainer_of(case, is_alone=False)
        before = {name: whole(p.detach()).clone() for name, p in trainer.model.named_parameters()}
        try:
            trainer.take_step(flat_of(case), 0)
        except NumericsError as problem:
            found[f"{number}:error"] = str(problem)
        after = {name: whole(p.detach()) for name, p in trainer.model.named_parameters()}
        found[f"{number}:is_untouched"] = all(torch.equal(before[name], after[name]) for name in before)
        good = {key: value for key, value in case.items() if key != "poison"}
        found[f"{number}:loss"] = trainer.take_step(flat_of(good), 0)["loss"]
    world = World.of_default_group(size, 1)
    found["told"] = world.tell(b"x" * 300_000 if rank == 1 else None, source=1) == b"x" * 300_000
    found["problem"] = world.first_problem(f"from {rank}" if rank >= 1 else None)
    found["no_problem"] = world.first_problem(None)
    try:
        World.of_default_group(size + 1, 1)
    except InputError as error:
        found["mesh"] = str(error)
    found |= _publications(world, folder)
    return found


def _publications(world: World, folder: Path) -> dict[str, Any]:
    """Publish shards of a model, the same again, other weights as the same version, and with a full disk."""
    model = model_of(is_tied=False, dtype="float32")
    model_config = model.config
    learner = LearnerConfig(data_parallel=world.size)
    Trainer.create(model, learner, LossConfig(), TEMPERATURE, None, world)
    run_dir = folder / "run"
    version = Version(0, 1)
    found: dict[str, Any] = {}
    config_file = folder / "config.json"
    if world.is_main:
        run_dir.mkdir()
        config_file.write_text(json.dumps(config_to_json(model_config, torch.float32)))
    world.wait()

    def publish() -> str:
        tensors = weights_of(model)
        manifest = publish_sharded(run_dir, RUN, version, tensors, 2, world, config_file=config_file)
        return msgspec.json.encode(manifest).decode()

    found["manifest"] = publish()
    found["again"] = publish()
    if world.is_main:
        shutil.copytree(run_dir, folder.parent / f"{folder.name}-published")
    found["folder"] = str(folder.parent / f"{folder.name}-published")
    with torch.no_grad():
        local(model.model.norm.weight).add_(1)
    try:
        publish()
    except WeightsError as error:
        found["other"] = str(error)
    version = Version(0, 2)
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:  # the disk of one rank is full
            patch.setattr("cod_async.weights.sharded.fsync_path", _full)
        try:
            publish()
        except (WeightsError, OSError) as error:
            found["full"] = str(error)
    found["num_published"] = len(published_versions(run_dir))
    return found


def _full(path: Path) -> None:
    raise OSError(28, "No space left on device", str(path))
