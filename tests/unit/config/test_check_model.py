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


def test_an_architecture_that_is_not_trained_is_planned_all_the_same(tmp_path: Path) -> None:
    config = made(tmp_path, "/nowhere", SHAPES / "qwen3.6-27b")
    assert check(config, needs_weights=False) == []
    assert [problem.split(":")[0] for problem in check(config)] == ["model.path", "model.shape"]
    there = made(tmp_path, SHAPES / "qwen3.6-27b", SHAPES / "qwen3.6-27b")
    assert check(there, needs_weights=False) == []
    assert any('"qwen3_5"' in problem for problem in check(there))


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
