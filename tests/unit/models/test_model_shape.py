"""Shapes are counted as the models themselves are, and wrong ones are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForCausalLM

from cod_async.errors import InputError
from cod_async.models.directory import config_from_dir
from cod_async.models.qwen3 import Qwen3
from cod_async.models.shape import read_shape
from tests.model_world import make

SHIPPED = Path(__file__).resolve().parents[3] / "configs" / "models"
PUBLISHED = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
}


def num_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_shipped_shape_is_a_config_alone() -> None:
    folders = sorted(path for path in SHIPPED.iterdir() if path.is_dir())
    assert {folder.name for folder in folders} == {*PUBLISHED, "qwen3.6-27b"}
    assert all([file.name for file in folder.iterdir()] == ["config.json"] for folder in folders)
    table = (SHIPPED / "README.md").read_text()
    assert all(f"| `{folder.name}` | {read_shape(folder).num_parameters:,} |" in table for folder in folders)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_dense_shape_counts_as_the_model_we_train(name: str) -> None:
    shape = read_shape(SHIPPED / name)
    with torch.device("meta"):
        model = Qwen3(config_from_dir(SHIPPED / name))
    assert shape.num_parameters == num_parameters(model) == PUBLISHED[name]
    assert shape.is_trainable
    assert shape.weights_bytes == 4 * PUBLISHED[name] and shape.optimizer_bytes == 8 * PUBLISHED[name]


def test_the_hybrid_shape_counts_as_transformers_builds_it() -> None:
    folder = SHIPPED / "qwen3.6-27b"
    text = json.loads((folder / "config.json").read_text())["text_config"]
    with torch.device("meta"):
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**text))
    shape = read_shape(folder)
    assert shape.num_parameters == num_parameters(model)
    assert shape.is_trainable and shape.is_recurrent and not shape.is_plain
    assert 26.5e9 < shape.num_parameters < 27.5e9  # "27B" with its vision tower and draft layer


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", {}),
        ("qwen3", {"attention_bias": True}),
        ("qwen2", {}),
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 20, "num_key_value_heads": 1}),
        ("qwen3_5", {}),
        ("qwen3_5", {"num_hidden_layers": 9, "layer_types": None}),
    ],
)
def test_every_family_counts_as_transformers_builds_and_writes_it(
    tmp_path: Path, family: str, changes: dict[str, Any], is_tied: bool
) -> None:
    model = make(family, tie_word_embeddings=is_tied, **changes)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    assert shape.num_parameters == num_parameters(model)
    assert shape.is_trainable and shape.is_tied == is_tied
    assert shape.is_recurrent == (family == "qwen3_5")
    assert shape.is_plain == (family == "qwen3" and not changes)
    kinds = {
        name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)
    }
    assert set(shape.linear_layers) == kinds - {"lm_head"}


def test_a_hybrid_must_say_which_layers_are_which(tmp_path: Path) -> None:
    raw = json.loads((SHIPPED / "qwen3.6-27b" / "config.json").read_text())
    interval = raw["text_config"].pop("full_attention_interval")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match="neither layer_types nor full_attention_interval"):
        read_shape(tmp_path)
    kinds = ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(64)]
    raw["text_config"]["layer_types"] = kinds
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_shape(tmp_path) == read_shape(SHIPPED / "qwen3.6-27b")


def test_what_is_not_trained_is_counted_and_says_why(tmp_path: Path) -> None:
    shape = read_shape(written(tmp_path / "m", attention_dropout=0.5, num_experts=8))
    assert not shape.is_trainable and len(shape.obstacles) == 2
    scaled = read_shape(written(tmp_path / "m", rope_scaling={"rope_type": "yarn", "factor": 4.0}))
    assert scaled.is_trainable and not scaled.is_plain


def written(folder: Path, **changes: Any) -> Path:
    values = json.loads((SHIPPED / "qwen3-0.6b" / "config.json").read_text()) | changes
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return folder


def test_differences_name_both_sides_and_leave_out_claims(tmp_path: Path) -> None:
    shape = read_shape(SHIPPED / "qwen3-0.6b")
    other = read_shape(written(tmp_path / "other", hidden_size=64, max_position_embeddings=7))
    assert shape.differences(other) == ["hidden_size: 1024, not 64"]
    assert shape.differences(shape) == []


def test_every_wrong_size_is_listed(tmp_path: Path) -> None:
    folder = written(
        tmp_path / "m", hidden_size=0, head_dim=True, vocab_size="big", num_hidden_layers=None,
        tie_word_embeddings=1, intermediate_size=1 << 41,
    )  # fmt: skip
    with pytest.raises(InputError) as caught:
        read_shape(folder)
    named = [problem.split(": ")[1].split(" is ")[0] for problem in caught.value.problems]
    assert named == [
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
        "tie_word_embeddings",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[1]", "expected a JSON object"),
        ("{}", 'model_type "None" is unknown'),
        ('{"model_type": ["qwen3"]}', "is unknown"),
        ('{"model_type": "qwen3_5", "text_config": 3}', "vocab_size is None"),
        (" " * (2 << 20), "larger than"),
    ],
    ids=["empty", "deep", "list", "nothing", "wrong type", "hybrid without text", "huge"],
)
def test_what_is_no_shape_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=said):
        read_shape(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        read_shape(tmp_path / "nowhere")
