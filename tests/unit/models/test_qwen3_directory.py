"""The model equals transformers' Qwen3, and its directories load there and back strictly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cod_async.errors import InputError
from cod_async.models.directory import config_from_dir, load_model, save_model, weights_of
from cod_async.models.qwen3 import Qwen3, Qwen3Config


def make_config(**changes: object) -> Qwen3Config:
    values: dict[str, object] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 128,
    }
    return Qwen3Config(**(values | changes))  # type: ignore[arg-type]


def make_model(**changes: object) -> Qwen3:
    model = Qwen3(make_config(**changes), torch.Generator().manual_seed(7))
    with torch.no_grad():  # norms away from 1, so that a forgotten scale is seen
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.linspace(-0.3, 0.4, parameter.numel()))
    return model


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_transformers_loads_the_directory_with_equal_logits(
    tmp_path: Path, is_tied: bool, num_kv_heads: int
) -> None:
    from transformers import AutoModelForCausalLM

    model = make_model(tie_word_embeddings=is_tied, num_key_value_heads=num_kv_heads)
    save_model(tmp_path, model)
    other, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert type(other).__name__ == "Qwen3ForCausalLM"
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(0, 61, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ids), other(ids, use_cache=False).logits, rtol=0, atol=1e-5)


def test_loads_what_transformers_saves(tmp_path: Path) -> None:
    from transformers import Qwen3Config as OtherConfig
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    other = Qwen3ForCausalLM(
        OtherConfig(
            vocab_size=40,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        )
    ).eval()
    other.save_pretrained(tmp_path, max_shard_size="8KB")
    assert not (tmp_path / "model.safetensors").exists()  # several shards and an index
    model = load_model(tmp_path)
    assert model.config.rope_theta == 5000.0
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ids), other(ids, use_cache=False).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("is_tied", [True, False])
def test_round_trip_is_bitwise(tmp_path: Path, is_tied: bool) -> None:
    model = make_model(tie_word_embeddings=is_tied, eos_token_id=[3, 4], bos_token_id=1)
    save_model(tmp_path, model)
    again = load_model(tmp_path)
    assert again.config == model.config
    for (name, left), (other, right) in zip(
        weights_of(model).items(), weights_of(again).items(), strict=True
    ):
        assert name == other and torch.equal(left, right)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == is_tied
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_right_padding_is_harmless_and_gradients_reach_every_parameter() -> None:
    model = make_model().double()
    ids = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(2))
    padded = torch.cat((ids, torch.full((2, 9), 5)), dim=1)
    torch.testing.assert_close(model(padded)[:, :17], model(ids), rtol=0, atol=1e-12)
    model(ids).square().sum().backward()
    model.logits(ids).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_initial_weights_have_the_stated_spread() -> None:
    model = Qwen3(make_config(hidden_size=256, intermediate_size=512), torch.Generator().manual_seed(0))
    block = model.model.layers[0]
    for weight, std in (
        (model.model.embed_tokens.weight, 256**-0.5),
        (block.self_attn.q_proj.weight, 256**-0.5),
        (block.self_attn.o_proj.weight, 0.1 * 48**-0.5),
        (block.mlp.down_proj.weight, 0.1 * 512**-0.5),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert torch.equal(block.input_layernorm.weight, torch.ones(256))


def edit_config(path: Path, **changes: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    save_model(tmp_path, make_model())
    edit_config(tmp_path, architectures=["LlamaForCausalLM"])
    with pytest.raises(InputError, match="LlamaForCausalLM is not supported"):
        load_model(tmp_path)


def test_unsupported_options_are_all_listed(tmp_path: Path) -> None:
    save_model(tmp_path, make_model())
    edit_config(
        tmp_path,
        attention_bias=True,
        hidden_act="gelu",
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e4},
        head_dim=0,
    )
    with pytest.raises(InputError) as caught:
        config_from_dir(tmp_path)
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert all(word in text for word in ("attention_bias", "'gelu'", "'yarn'", "head_dim"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_and_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    save_model(tmp_path, make_model())
    (tmp_path / name).write_bytes(b"\x00garbage")
    with pytest.raises(InputError, match=name):
        load_model(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=name):
        load_model(tmp_path)


def test_wrong_tensors_are_all_listed(tmp_path: Path) -> None:
    save_model(tmp_path, make_model())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.extra"] = torch.zeros(1)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(2, 3)
    tensors["lm_head.weight"] = torch.zeros(61, 32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as caught:
        load_model(tmp_path)
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert "model.norm.weight is missing" in text and "model.extra is unknown" in text
    assert "shape [2, 3], needs [48, 32]" in text and "tie_word_embeddings" in text


@pytest.mark.parametrize(
    "changes", [{"head_dim": 7}, {"num_key_value_heads": 3}, {"vocab_size": 0}, {"rope_theta": 0.0}]
)
def test_impossible_shapes_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        make_config(**changes)
