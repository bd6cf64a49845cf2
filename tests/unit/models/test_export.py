"""What is saved is what was loaded: names, types, bytes and files; only trained values differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cod_async.errors import InputError
from cod_async.models import export
from cod_async.models.export import policy_weights, save_policy, weights_of
from cod_async.models.loading import load_policy
from cod_async.models.stored import StoredWeights
from tests.model_world import HYBRID, SIZES, ids, shake, write

FAMILIES = ("qwen3", "qwen2", "llama", "qwen3_5")


def all_bytes(folder: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    """Read every stored tensor's type and bytes, with the library's own reader."""
    return {
        name: (tensor.dtype, tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def dress(folder: Path) -> None:
    """Put files of a tokenizer beside the weights, and some that do not belong into a copy."""
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "merges.txt").write_text("a b\n")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    (folder / ".hidden").write_text("x")


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_an_untouched_model_is_saved_byte_for_byte(
    tmp_path: Path, family: str, dtype: torch.dtype, is_tied: bool
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    write(source, family, dtype, tie_word_embeddings=is_tied)
    dress(source)
    save_policy(target, load_policy(source), source=source)  # through float32 parameters
    assert all_bytes(target) == all_bytes(source)
    assert list(StoredWeights(target).tensors) == list(StoredWeights(source).tensors)
    others = {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "merges.txt"}
    assert {file.name for file in target.iterdir()} == others | {"model.safetensors"}
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in others)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "target"}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_the_trained_model_with_its_logits(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    source, target = tmp_path / "source", tmp_path / "target"
    write(source, family, max_shard_size="16KB")
    policy = load_policy(source)
    shake(policy, seed=11)
    save_policy(target, policy, source=source, max_shard_bytes=20_000)
    assert len(list(target.glob("model-*-of-*.safetensors"))) > 2
    other, info = AutoModelForCausalLM.from_pretrained(
        target, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = ids(2, 20)
    with torch.no_grad():
        found = policy(tokens) @ policy.head_weight.T
        torch.testing.assert_close(other(tokens, use_cache=False).logits, found, rtol=0, atol=1e-4)
    again = weights_of(load_policy(target))
    assert all(torch.equal(tensor, again[name]) for name, tensor in policy_weights(policy))


def test_shards_stay_under_their_size_and_the_index_tells_the_total(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    write(source, "llama", torch.bfloat16)
    save_policy(target, load_policy(source), source=source, max_shard_bytes=9_000)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    sizes: dict[str, int] = {}
    for file in target.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118
                assert index["weight_map"][name] == file.name
                sizes[file.name] = sizes.get(file.name, 0) + opened.get_tensor(name).nbytes
    assert max(sizes.values()) <= 9_000 and len(sizes) > 3
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert all_bytes(target) == all_bytes(source)


def vision_model(folder: Path, **changes: Any) -> None:
    """Write a hybrid model as it is released: nested configuration, vision tower, draft head."""
    write(folder, "qwen3_5", torch.bfloat16, **changes)
    text = load_file(folder / "model.safetensors")
    tensors = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: tensor
        for name, tensor in text.items()
    }
    tensors["model.visual.patch_embed.proj.weight"] = torch.randn(3, 5).to(torch.float16)
    tensors["model.visual.blocks.0.count"] = torch.arange(4)
    tensors["mtp.norm.weight"] = torch.randn(32).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    outer = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "tie_word_embeddings": raw["tie_word_embeddings"],
        "text_config": {key: value for key, value in raw.items() if key != "architectures"},
    }
    (folder / "config.json").write_text(json.dumps(outer))


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_vision_tower_is_left_alone_and_kept(tmp_path: Path, is_tied: bool) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    vision_model(source, tie_word_embeddings=is_tied)
    policy = load_policy(source)
    assert not any("visual" in name or "mtp" in name for name, _ in policy.named_parameters())
    weights = weights_of(policy)
    assert "model.language_model.embed_tokens.weight" in weights
    assert ("lm_head.weight" in weights) != is_tied
    save_policy(target, policy, source=source)
    assert all_bytes(target) == all_bytes(source)
    shake(policy, seed=5)
    save_policy(tmp_path / "trained", policy, source=source)
    trained, before = all_bytes(tmp_path / "trained"), all_bytes(source)
    same = {name for name in before if trained[name] == before[name]}
    assert same == {
        "model.visual.patch_embed.proj.weight", "model.visual.blocks.0.count", "mtp.norm.weight",
    }  # fmt: skip


def test_a_text_directory_names_its_tensors_without_the_tower(tmp_path: Path) -> None:
    write(tmp_path, "qwen3_5")
    assert list(weights_of(load_policy(tmp_path))) == [
        name for name in weights_of(load_policy(tmp_path)) if "language_model" not in name
    ]
    assert SIZES["num_hidden_layers"] == len(HYBRID["layer_types"])


def test_a_tied_head_that_was_stored_is_stored_again(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    write(source, "llama", tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    policy = load_policy(source)
    shake(policy, seed=5)
    save_policy(target, policy, source=source)
    saved = load_file(target / "model.safetensors")
    assert torch.equal(saved["lm_head.weight"], policy.head_weight.detach())
    assert torch.equal(saved["lm_head.weight"], saved["model.embed_tokens.weight"])


def test_a_folder_in_use_and_another_models_source_are_refused(tmp_path: Path) -> None:
    source, other = tmp_path / "source", tmp_path / "other"
    write(source, "llama")
    write(other, "llama", hidden_size=16)
    policy = load_policy(source)
    with pytest.raises(InputError, match="is not empty"):
        save_policy(source, policy, source=source)
    with pytest.raises(InputError, match=r"has shape \[61, 16\], needs \[61, 32\]"):
        save_policy(tmp_path / "new", policy, source=other)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        save_policy(tmp_path / "file" / "new", policy, source=source)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "other", "file"}


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    write(source, "llama")
    policy = load_policy(source)

    def fail(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith("mlp.up_proj.weight"):
            raise OSError(28, "No space left on device")
        return tensor

    monkeypatch.setattr(export, "merged", fail)
    with pytest.raises(InputError, match="No space left on device"):
        save_policy(tmp_path / "new", policy, source=source)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
