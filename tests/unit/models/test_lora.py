"""Adapters train alone, merge exactly, and load back with peft."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cod_async.config.learner import LoraConfig
from cod_async.errors import InputError
from cod_async.models.export import save_policy, weights_of
from cod_async.models.layout import Layout
from cod_async.models.loading import load_policy
from cod_async.models.lora import adapter_of, save_adapter
from cod_async.models.policy import Policy
from tests.model_world import ids, write

pytest.importorskip("peft")
FAMILIES = ("qwen3", "qwen2", "llama", "qwen3_5")
LORA = LoraConfig(rank=3, alpha=6.0)
HYBRID_LORA = LoraConfig(rank=3, alpha=6.0, targets=("q_proj", "down_proj", "in_proj_qkv", "out_proj"))


def logits(policy: Policy, tokens: torch.Tensor) -> torch.Tensor:
    return policy(tokens) @ policy.head_weight.T


def adapted(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> tuple[Policy, LoraConfig]:
    write(folder, family, dtype)
    lora = HYBRID_LORA if family == "qwen3_5" else LORA
    return load_policy(folder, lora=lora), lora


@torch.no_grad()
def train_a_little(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(9)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_as_the_model_and_only_adapters_train(tmp_path: Path, family: str) -> None:
    policy, _ = adapted(tmp_path, family)
    base = load_policy(tmp_path)
    tokens = ids(2, 15)
    torch.testing.assert_close(logits(policy, tokens), logits(base, tokens), rtol=0, atol=1e-6)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained and all(".lora_A." in name or ".lora_B." in name for name in trained)
    num_layers = 1 + 3 + 2 + 2 if family == "qwen3_5" else 7 * 3  # of a hybrid: q, down, in_proj_qkv, out
    assert len(trained) == 2 * num_layers
    policy(tokens).sum().backward()
    assert {name for name, p in policy.named_parameters() if p.grad is not None} == trained
    assert policy.adapter_id.startswith("lora-") and base.adapter_id == ""
    assert all(not p.is_meta for p in policy.parameters())


def test_every_rank_and_every_repetition_draws_the_same(tmp_path: Path) -> None:
    first, lora = adapted(tmp_path, "llama")
    torch.manual_seed(99)
    second = load_policy(tmp_path, lora=lora)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)
    assert first.adapter_id == second.adapter_id
    assert first.adapter_id != load_policy(tmp_path, lora=LoraConfig(rank=4)).adapter_id
    down = [p for name, p in first.named_parameters() if ".lora_A." in name]
    assert len({p.double().sum().item() for p in down}) == len(down)  # each its own values
    limit = 32**-0.5
    narrow = torch.cat([p.detach().flatten() for p in down if p.shape[1] == 32])
    assert narrow.abs().max() <= limit and narrow.std().item() == pytest.approx(limit / 3**0.5, rel=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_are_the_trained_model_for_engines_without_adapters(
    tmp_path: Path, family: str
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    policy, lora = adapted(source, family)
    train_a_little(policy)
    weights, stored = weights_of(policy), load_file(source / "model.safetensors")
    assert weights.keys() == stored.keys()
    changed = {name for name in stored if not torch.equal(stored[name], weights[name])}
    assert {name.split(".")[-2] for name in changed} == set(lora.targets)
    name = "model.layers.1.self_attn.q_proj.weight"
    adapter = {key: tensor.double() for key, tensor in adapter_of(policy).items()}
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    by_hand = adapter[f"{prefix}.lora_B.weight"] @ adapter[f"{prefix}.lora_A.weight"] * (6.0 / 3)
    torch.testing.assert_close(weights[name].double() - stored[name].double(), by_hand, rtol=0, atol=1e-6)
    save_policy(target, policy, source=source)
    merged = load_policy(target)
    tokens = ids(2, 15)
    with torch.no_grad():
        assert (logits(policy, tokens) - logits(load_policy(source), tokens)).abs().max() > 0.01
        torch.testing.assert_close(logits(merged, tokens), logits(policy, tokens), rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks transformers so
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_the_adapter_onto_the_base_model(tmp_path: Path, family: str) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    source, target = tmp_path / "source", tmp_path / "adapter"
    policy, lora = adapted(source, family)
    train_a_little(policy)
    save_adapter(target, policy, lora, source=source)
    assert {file.name for file in target.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((target / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(source) and config["target_modules"] == sorted(
        lora.targets
    )
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    other = peft.PeftModel.from_pretrained(base, target).eval()
    tokens = ids(2, 15)
    with torch.no_grad():
        found = other(tokens, use_cache=False).logits
        torch.testing.assert_close(found, logits(policy, tokens), rtol=0, atol=1e-4)


def test_packed_rows_and_copies_keep_their_adapters(tmp_path: Path) -> None:
    policy, _ = adapted(tmp_path, "qwen3")
    train_a_little(policy)
    tokens = ids(2, 8)
    layout = Layout("packed", (8, 8), torch.arange(8).repeat(2)[None])
    with torch.no_grad():
        alone = policy(tokens)
        torch.testing.assert_close(
            policy(tokens.view(1, -1), layout).view(2, 8, -1), alone, rtol=0, atol=1e-5
        )
        assert torch.equal(copy.deepcopy(policy)(tokens), alone)


def test_bf16_bases_stay_as_they_are_stored(tmp_path: Path) -> None:
    source = tmp_path / "source"
    policy, _ = adapted(source, "llama", torch.bfloat16)
    save_policy(tmp_path / "out", policy, source=source)  # B is 0: nothing has been trained
    before, after = (load_file(tmp_path / part / "model.safetensors") for part in ("source", "out"))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_targets_that_name_nothing_are_all_listed(tmp_path: Path, family: str) -> None:
    write(tmp_path, family)
    lora = LoraConfig(rank=2, targets=("q_proj", "c_attn", "lm_head", "embed_tokens", "mlp"))
    with pytest.raises(InputError) as caught:
        load_policy(tmp_path, lora=lora)
    text = [problem.split('"')[1] for problem in caught.value.problems]
    assert text == ["c_attn", "lm_head", "embed_tokens", "mlp"]
    assert "names no layer; the layers have down_proj, gate_proj" in caught.value.problems[0]
    assert '"mlp" is no linear layer' in caught.value.problems[3]


def test_a_policy_without_adapters_has_none_to_save(tmp_path: Path) -> None:
    write(tmp_path / "source", "llama")
    policy = load_policy(tmp_path / "source", lora=LoraConfig())
    assert adapter_of(policy) == {} and all(p.requires_grad for p in policy.parameters())
    with pytest.raises(InputError, match="has no adapters"):
        save_adapter(tmp_path / "adapter", policy, LoraConfig(), source=tmp_path / "source")
