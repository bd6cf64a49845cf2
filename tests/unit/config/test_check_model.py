"""A model is named by a folder, and what must be in the folder by a shape; a plan needs the shape alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from cod_async.config import Config, load_config
from cod_async.config.check import check
from cod_async.config.load import load_resolved, save_resolved
from cod_async.models.directory import config_from_dir, save_model
from cod_async.models.qwen3 import Qwen3, Qwen3Config
from cod_async.models.tokenizers import write_chatml_tokenizer

ROOT = Path(__file__).resolve().parents[3]
SHAPES = ROOT / "configs" / "models"


def made(tmp_path: Path, path: object, shape: object, *more: str) -> Config:
    base = ['environments=[{name="hidden_buttons", preset="door"}]', f'run.output_dir="{tmp_path}"']
    return load_config([], [*base, f'model.path="{path}"', f'model.shape="{shape}"', *more])


def write_model(folder: Path) -> Path:
    num_ids = write_chatml_tokenizer(folder, ["some words"], 300, 256)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = Qwen3Config(**sizes, vocab_size=num_ids, num_key_value_heads=1, head_dim=16)
    save_model(folder, Qwen3(config, torch.Generator().manual_seed(0)))
    return folder


def test_a_plan_needs_no_weights_and_a_run_says_where_they_belong(tmp_path: Path) -> None:
    config = made(tmp_path, tmp_path / "weights", SHAPES / "qwen3-8b")
    assert check(config, needs_weights=False) == []
    assert check(config, for_train=False) == []
    [problem] = check(config)
    assert problem.startswith("model.path: no such folder")
    assert str(tmp_path / "weights") in problem and "qwen3-8b" in problem and "model.safetensors" in problem


def test_a_model_that_fits_its_shape_is_fine(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    assert check(made(tmp_path, folder, folder)) == []
    assert config_from_dir(folder).hidden_size == 16


@pytest.mark.parametrize("needs_weights", [True, False])
def test_a_model_of_another_shape_is_refused(tmp_path: Path, needs_weights: bool) -> None:
    folder = write_model(tmp_path / "model")
    [problem] = check(made(tmp_path, folder, SHAPES / "qwen3-8b"), needs_weights=needs_weights)
    assert problem.startswith("model.path: ") and "hidden_size: 4096, not 16" in problem


def test_a_shape_without_a_path_says_nothing(tmp_path: Path) -> None:
    [problem] = check(made(tmp_path, "", SHAPES / "qwen3-8b"))
    assert problem.startswith("model.shape: ") and "both, or neither" in problem


@pytest.mark.parametrize("needs_weights", [True, False])
def test_a_shape_that_is_not_there_is_named(tmp_path: Path, needs_weights: bool) -> None:
    problems = check(made(tmp_path, "/nowhere", tmp_path / "none"), needs_weights=needs_weights)
    assert [problem.split(":")[0] for problem in problems] == ["model.shape", "model.path"][
        : 1 + needs_weights
    ]


SGLANG = ('engine.kind="sglang"', 'engine.urls=["http://127.0.0.1:1"]', "evaluation.is_enabled=false")
HYBRID = SHAPES / "qwen3.6-27b"


def test_a_hybrid_model_is_planned_with_servers_and_without_evaluation(tmp_path: Path) -> None:
    assert check(made(tmp_path, "/nowhere", HYBRID, *SGLANG), needs_weights=False) == []
    found = check(made(tmp_path, "/nowhere", HYBRID), needs_weights=False)
    assert [problem.split(":")[0] for problem in found] == ["engine.kind", "evaluation"]
    assert all('not model_type "qwen3_5"' in problem for problem in found)
    assert "evaluation.is_enabled = false" in found[1]
    later = made(tmp_path, "/nowhere", HYBRID, *SGLANG, "evaluation.every_steps=5")
    assert [problem.split(":")[0] for problem in check(later, needs_weights=False)] == ["evaluation"]


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("learner.has_prefix_tree=true", "learner.has_prefix_tree"),
        ("learner.sequence_parallel=2", "learner.sequence_parallel"),
        ('learner.layout="packed"', "learner.layout"),
    ],
)
def test_what_recurrent_layers_cannot_do_is_refused_in_a_plan(
    tmp_path: Path, setting: str, named: str
) -> None:
    [problem] = check(made(tmp_path, "/nowhere", HYBRID, *SGLANG, setting), needs_weights=False)
    assert problem.startswith(f"{named}: ") and "recurrent layers" in problem
    assert check(made(tmp_path, "/nowhere", SHAPES / "qwen3-8b", setting), needs_weights=False) == []


def changed_model(folder: Path, **changes: object) -> Path:
    write_model(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "qwen3_moe", "num_experts": 8}, "router replay does not exist yet"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ({"auto_map": {"AutoModelForCausalLM": "m.M"}}, "auto_map"),
        ({"model_type": None}, "model_type is None"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_by_name(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    folder = changed_model(tmp_path / "model", **changes)
    [problem] = check(made(tmp_path, folder, ""), needs_weights=False)
    assert problem.startswith("model.path: ") and said in problem


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "olmo3"])
def test_other_families_are_trained_with_servers(tmp_path: Path, model_type: str) -> None:
    folder = changed_model(tmp_path / "model", model_type=model_type, architectures=["SomeForCausalLM"])
    assert check(made(tmp_path, folder, "", *SGLANG)) == []
    assert [p.split(":")[0] for p in check(made(tmp_path, folder, ""))] == ["engine.kind", "evaluation"]


def test_a_scaled_qwen3_is_not_what_the_embedded_engine_computes(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
    folder = changed_model(tmp_path / "model", rope_parameters=rope)
    assert check(made(tmp_path, folder, "", *SGLANG)) == []
    found = check(made(tmp_path, folder, ""))
    assert [p.split(":")[0] for p in found] == ["engine.kind", "evaluation"]
    assert "this variant of qwen3" in found[0]


@pytest.mark.parametrize("kind", ["text", "nested"])
def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path, kind: str) -> None:
    folder = write_model(tmp_path / "model")
    file = folder / "config.json"
    values = json.loads(file.read_text()) | {
        "vocab_size": 5,
        "model_type": "llama",
        "architectures": ["XForCausalLM"],
    }
    file.write_text(json.dumps(values if kind == "text" else {"model_type": "llama", "text_config": values}))
    [problem] = check(made(tmp_path, folder, "", *SGLANG))
    assert "the model only 5 embeddings" in problem


@pytest.mark.parametrize("path", ["", "model"])
def test_adapters_for_layers_that_a_model_lacks_are_refused(tmp_path: Path, path: str) -> None:
    folder = str(write_model(tmp_path / "model")) if path else ""
    lora = ("learner.lora.rank=4", 'learner.lora.targets=["q_proj", "in_proj_qkv", "lm_head"]')
    found = check(made(tmp_path, folder, "", *lora))
    assert [problem.split('"')[1] for problem in found] == ["in_proj_qkv", "lm_head"]
    assert "it has q_proj, k_proj" in found[0]
    [problem] = check(made(tmp_path, "/nowhere", HYBRID, *SGLANG, *lora), needs_weights=False)
    assert '"lm_head"' in problem
    assert check(made(tmp_path, folder, "", "learner.lora.rank=4")) == []
    [empty] = check(made(tmp_path, folder, "", "learner.lora.rank=4", "learner.lora.targets=[]"))
    assert empty.startswith("learner.lora.targets: empty")


def test_a_context_beyond_the_shape_is_refused_without_weights(tmp_path: Path) -> None:
    sets = ("model.max_context_tokens=40961", "learner.tokens_per_micro_batch=40961")
    [problem] = check(made(tmp_path, "/nowhere", SHAPES / "qwen3-8b", *sets), needs_weights=False)
    assert problem.startswith("model.max_context_tokens: 40961 ") and "40960" in problem


def test_a_relative_shape_counts_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "configs"
    folder.mkdir()
    tree = {"environments": [{"name": "hidden_buttons", "preset": "door"}], "model": {"shape": "../shapes/m"}}
    (folder / "a.json").write_text(json.dumps(tree))
    monkeypatch.chdir(tmp_path)
    assert load_config(["configs/a.json"]).model.shape == str(tmp_path / "shapes" / "m")
    given = load_config(["configs/a.json"], ['model.shape="shapes/m"'])
    assert given.model.shape == "shapes/m"  # as --output and model.path, from where the command runs
    resolved = load_config(["configs/a.json"])
    save_resolved(resolved, tmp_path)
    os.chdir(folder)
    assert load_resolved(tmp_path) == resolved == load_config([tmp_path / "config.json"])
