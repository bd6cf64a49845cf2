"""Two and four ranks against one process: loss, gradients, parameters, every metric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_world import write
from parallel_world import cases_job, flat_of, model_of, run_case, trainer_of
from ranks import run_ranks

from cod_async.config.schema import LearnerConfig, LossConfig
from cod_async.errors import InputError
from cod_async.learner.parallel.shard import LowPrecision, Plain
from cod_async.learner.parallel.world import World
from cod_async.learner.rows.rectangles import MAX_BUCKET_TOKENS
from cod_async.learner.step import Trainer

SURVEYS: list[dict[str, Any]] = [
    {"ratio": "segment"},
    {"segment_mask": "geometric_mean"},
    {"segment_mask": "negative_drift"},
    {"clip": "m2po"},
    {"behavior_weight": "truncated", "weight_level": "segment"},
]
STEPS = {"num_steps": 3}
SGD = {**STEPS, "optimizer": "sgd", "learner": {"lr": 0.1}}
ADAMW = {**STEPS, "learner": {"lr": 0.01}}
PARTS = {"learner": {"lr": 0.01, "minibatches_per_step": 3}, "loss": {"proximal": "start"}}
BFLOAT16 = {"dtype": "float32", "learner": {"compute_dtype": "bfloat16"}}

CASES: dict[int, list[dict[str, Any]]] = {
    2: [
        {"data": 2},
        {"data": 2, "is_tied": False, "learner": {"layout": "rectangles"}},
        {"data": 2, "dtype": "float32"},
        {"data": 2, "num_items": 1},
        {"data": 2, "every": 3},
        {"data": 2, "every": 99},  # one rank has nothing to train
        {"sequence": 2, "mode": "ulysses", "every": 3, "is_tied": False},
        {"sequence": 2, "mode": "ulysses"},
        {"sequence": 2, "mode": "ring", "is_tied": False},
        {"data": 2, "learner": {"has_prefix_tree": True, "layout": "auto"}},
        {"data": 2, "learner": {"recompute": "full"}},
        {"data": 2, "loss": {"kl_coef": 0.1}},
        *({"data": 2, "loss": loss} for loss in SURVEYS),
        {"data": 2, **SGD},
        {"data": 2, **ADAMW},
        {"data": 2, "dtype": "float32", **ADAMW},
        {"data": 2, "dtype": "float32", **STEPS, "learner": {"lr": 0.01, "has_optimizer_offload": True}},
        {"data": 2, **STEPS, **PARTS},
        {"data": 2, **BFLOAT16},
    ],
    4: [
        {"data": 4, "is_tied": False},
        {"data": 4, "num_items": 3},
        {"data": 2, "sequence": 2, "mode": "ulysses"},
        {"data": 2, "sequence": 2, "mode": "ring", "loss": {"ratio": "segment", "kl_coef": 0.1}},
        {"sequence": 4, "mode": "ulysses", "num_items": 2},
        {"sequence": 4, "mode": "ring"},
        {"data": 2, "sequence": 2, "dtype": "float32", **ADAMW},
        {"data": 2, "sequence": 2, **SGD},
    ],
}


OF_MICRO_BATCHES = ("metric/num_micro_batches", "metric/micro_batch_balance", "metric/packing_efficiency")
"""Each rank has fewer micro-batches than one process would."""


def _tolerance(case: dict[str, Any]) -> float:
    if case.get("learner", {}).get("compute_dtype") == "bfloat16":
        return 0.02  # what rounding leaves of it when sums are made in another order
    return 1e-6 if case.get("dtype") == "float32" else 1e-12


@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_compute_what_one_process_does(size: int) -> None:
    results = run_ranks(size, cases_job, CASES[size], timeout_s=250.0)
    for number, case in enumerate(CASES[size]):
        for name, truth in run_case(case, is_alone=True).items():
            found = [result[f"{number}:{name}"] for result in results]
            assert all(torch.equal(found[0], other) for other in found), (case, name)  # to the bit
            if name.startswith("metric/"):
                if name not in OF_MICRO_BATCHES:
                    torch.testing.assert_close(found[0], truth, rtol=1e-4, atol=1e-6, msg=f"{case} {name}")
                continue
            if name.startswith("weight/") and case.get("optimizer") != "sgd":
                allowed = 0.01 * case["learner"]["lr"] * case["num_steps"]
                assert (found[0] - truth).abs().max() <= allowed, (case, name)
            gap = (found[0] - truth).double().norm()
            if not (name.startswith("weight/") and case.get("dtype") == "float32"):
                assert gap <= _tolerance(case) * truth.double().norm() + 1e-14, (case, name, float(gap))


@pytest.mark.timeout(200)
def test_models_of_transformers_and_adapters_are_sharded_too(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    paths = {}
    for family in ("qwen2", "llama", "qwen3_5"):
        (tmp_path / family).mkdir()
        write(tmp_path / family, family)
        paths[family] = str(tmp_path / family)
    cases: list[dict[str, Any]] = [
        {"data": 2, "path": paths["qwen2"]},
        {"data": 2, "path": paths["qwen2"], "lora": {"rank": 3}, **ADAMW},
        {"sequence": 2, "mode": "ring", "path": paths["llama"]},
        {"data": 2, "path": paths["qwen3_5"], "learner": {"layout": "rectangles"}},
    ]
    results = run_ranks(2, cases_job, cases, timeout_s=180.0)
    for number, case in enumerate(cases):
        for name, truth in run_case(case, is_alone=True).items():
            if not name.startswith("metric/"):
                gap = (results[1][f"{number}:{name}"] - truth).norm()
                assert gap <= 1e-6 * truth.norm(), (case, name)  # recurrent layers compute in float32


def test_a_bfloat16_copy_gets_the_work_and_float32_parameters_the_gradient() -> None:
    case = {"dtype": "float32", "num_items": 8}
    exact = run_case(case, is_alone=True)
    trainer = trainer_of({**case, **BFLOAT16}, is_alone=True)
    trainer.accumulate(flat_of(case))
    assert isinstance(trainer.compute, LowPrecision)
    assert trainer.compute.head().dtype == torch.bfloat16
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        gap = (parameter.grad - exact[f"grad/{name}"]).norm() / exact[f"grad/{name}"].norm()
        assert 0 < gap < 0.05, name
    trainer.take_step(flat_of(case), 0)
    twins = dict(trainer.compute.computed.named_parameters())
    assert all(torch.equal(twins[name], p.bfloat16()) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize(
    ("device", "kind", "budget"), [("cuda", "packed", 1 << 20), ("cpu", "rectangle", MAX_BUCKET_TOKENS)]
)
def test_rows_lie_as_suits_the_ranks_device_not_the_memory_that_models_are_loaded_into(
    device: str, kind: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cod_async.learner.step.prepare", lambda policy, world, learner: Plain(policy))
    world = World(data_parallel=2, device=torch.device(device))
    learner = LearnerConfig(data_parallel=2, tokens_per_micro_batch=1 << 20)
    trainer = Trainer.create(model_of(), learner, LossConfig(), 1.0, None, world)
    assert (trainer.kind, trainer.max_rectangle_tokens) == (kind, budget)


def test_ranks_that_the_configuration_does_not_have_are_refused() -> None:
    with pytest.raises(InputError, match=r"learner\.data_parallel = 2"):
        Trainer.create(model_of(), LearnerConfig(data_parallel=2), LossConfig(), 1.0)
    world = World(sequence_parallel=2)
    model = model_of()
    model.is_recurrent = True
    with pytest.raises(InputError, match="recurrent layers"):
        Trainer.create(model, LearnerConfig(sequence_parallel=2), LossConfig(), 1.0, None, world)
