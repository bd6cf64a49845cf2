"""What is wrong with a model directory is said at once and by name; loading takes the model and a tensor."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cod_async.errors import InputError
from cod_async.models import loading, stored
from cod_async.models.directory import load_model
from cod_async.models.loading import load_policy
from cod_async.models.supported import unsupported
from tests.model_world import ids, write

WEIGHTS = "model.safetensors"


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def problems(folder: Path) -> list[str]:
    with pytest.raises(InputError) as caught:
        load_policy(folder)
    assert all(str(folder) in problem for problem in caught.value.problems)
    return list(caught.value.problems)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_missing_unknown_misshapen_and_integer_tensors_are_all_listed(tmp_path: Path, family: str) -> None:
    write(tmp_path, family)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.9.extra"] = torch.zeros(2)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(2, 3)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(48, 32, dtype=torch.int8)

    change(tmp_path, edit)
    found = " | ".join(problems(tmp_path))
    assert len(problems(tmp_path)) == 4
    assert "tensor model.norm.weight is missing" in found
    assert "tensor model.layers.9.extra is unknown" in found
    assert "tensor model.layers.0.mlp.up_proj.weight has shape [2, 3], needs [48, 32]" in found
    assert "tensor model.layers.1.mlp.up_proj.weight has dtype I8, needs a floating-point type" in found


def test_a_long_list_ends_with_a_count(tmp_path: Path) -> None:
    write(tmp_path, "llama")
    change(tmp_path, lambda tensors: tensors.update({f"extra.{i}": torch.zeros(1) for i in range(30)}))
    found = problems(tmp_path)
    assert len(found) == 21 and "and 10 more problems" in found[-1]


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_values_that_are_not_finite_are_named_with_their_tensor(tmp_path: Path, family: str) -> None:
    write(tmp_path, family)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = float("nan")
        tensors["model.layers.1.mlp.up_proj.weight"][2, :2] = float("-inf")

    change(tmp_path, edit)
    found = sorted(problems(tmp_path))
    assert len(found) == 2
    assert "model.layers.1.mlp.up_proj.weight has 2 values that are not finite" in found[0]
    assert "model.norm.weight has 1 values that are not finite" in found[1]


def test_values_too_large_for_the_type_are_named(tmp_path: Path) -> None:
    write(tmp_path, "llama")
    change(tmp_path, lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    load_policy(tmp_path)
    with pytest.raises(
        InputError, match=r"model.norm.weight has 32 values that are not finite as torch.float16"
    ):
        load_policy(tmp_path, dtype=torch.float16)


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_5"])
def test_a_tied_head_may_be_stored_only_if_it_is_the_embedding(tmp_path: Path, family: str) -> None:
    write(tmp_path, family, tie_word_embeddings=True)
    embedding = load_file(tmp_path / WEIGHTS)["model.embed_tokens.weight"]
    change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    policy = load_policy(tmp_path)
    assert policy.head_weight is policy.get_parameter("model.embed_tokens.weight")
    change(tmp_path, lambda tensors: tensors["lm_head.weight"][5].add_(1e-3))
    assert "lm_head.weight differs from model.embed_tokens.weight" in problems(tmp_path)[0]


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    write(tmp_path, "llama", tie_word_embeddings=False)
    change(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    assert problems(tmp_path) == [f"{tmp_path}: tensor lm_head.weight is missing"]


def test_shards_and_their_index_must_agree(tmp_path: Path) -> None:
    write(tmp_path, "llama", max_shard_size="8KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    load_policy(tmp_path)
    names, files = list(content["weight_map"]), sorted(set(content["weight_map"].values()))
    assert len(files) > 2

    def said(**moved: str) -> str:
        index.write_text(json.dumps({"weight_map": content["weight_map"] | moved}))
        return " | ".join(problems(tmp_path))

    assert "no shard has it" in said(ghost=files[0])
    shared = next(file for file in files if list(content["weight_map"].values()).count(file) > 1)
    name = next(name for name in names if content["weight_map"][name] == shared)
    other = next(file for file in files if file != shared)
    assert f"tensor {name} is in {shared}, but the index says {other}" in said(**{name: other})
    assert "is not a plain file name" in said(**{names[0]: "../outside.safetensors"})
    assert "does not exist although the index names it" in said(**{names[0]: "gone.safetensors"})
    index.write_text("{}")
    assert "has no weight_map" in problems(tmp_path)[0]
    index.unlink()
    assert "neither model.safetensors nor" in problems(tmp_path)[0]


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_missing_and_damaged_files_are_named(tmp_path: Path, family: str, name: str) -> None:
    write(tmp_path, family)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    assert name in problems(tmp_path)[0]
    (tmp_path / name).unlink()
    assert name in problems(tmp_path)[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "m.M"}}, "auto_map"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"sliding_window": 64}, "sliding_window 64"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_attention"),
        ({"num_local_experts": 8}, "router replay does not exist yet"),
        ({"model_type": "qwen3_moe"}, "router replay does not exist yet"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ({"logit_scale": 0.5}, "logit_scale 0.5"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
        ({"model_type": "no_such_model"}, "no_such_model"),
        ({"model_type": "mamba"}, "MambaForCausalLM"),
        ({"model_type": "vit"}, '"vit" is no causal language model'),
        ({"hidden_act": "no_such_act"}, "no_such_act"),
        ({"num_attention_heads": 5}, "config.json"),
        ({"hidden_size": "wide"}, "config.json"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_not_trained_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    write(tmp_path, "llama")
    configure(tmp_path, **changes)
    assert said in " | ".join(problems(tmp_path))


def test_everything_that_speaks_against_a_model_is_listed_at_once(tmp_path: Path) -> None:
    write(tmp_path, "llama")
    configure(tmp_path, attention_dropout=0.1, sliding_window=5, num_experts=4)
    assert len(problems(tmp_path)) == 3


def test_ordinary_values_speak_against_nothing() -> None:
    assert unsupported({
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_experts": 0, "logit_scale": 1.0,
        "sliding_window": 131072, "use_sliding_window": False, "attention_dropout": 0.0,
        "classifier_dropout": 0.1, "rope_scaling": {"type": "yarn", "factor": 4.0},
    }) == []  # fmt: skip
    assert unsupported({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}) != []


def test_models_whose_head_has_a_bias_or_whose_attention_is_their_own_are_refused(tmp_path: Path) -> None:
    from transformers import CodeGenConfig, CodeGenForCausalLM, PhiConfig, PhiForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    PhiForCausalLM(PhiConfig(**sizes, num_attention_heads=4)).save_pretrained(tmp_path / "phi")
    assert "the output head has a bias" in problems(tmp_path / "phi")[0]
    small = CodeGenConfig(vocab_size=61, n_embd=32, n_head=4, n_layer=1, rotary_dim=4, n_positions=32)
    CodeGenForCausalLM(small).save_pretrained(tmp_path / "codegen")
    assert "computes attention by itself" in problems(tmp_path / "codegen")[0]


def test_a_head_behind_layers_of_its_own_is_refused(tmp_path: Path) -> None:
    from transformers import ModernBertDecoderConfig, ModernBertDecoderForCausalLM

    config = ModernBertDecoderConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        decoder_bias=False, layer_types=["full_attention"] * 3, pad_token_id=0, cls_token_id=1,
        sep_token_id=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    ModernBertDecoderForCausalLM(config).save_pretrained(tmp_path)
    assert "lm_head beside backbone and head" in problems(tmp_path)[0]


def test_the_plain_qwen3_does_not_pass_over_sliding_layers(tmp_path: Path) -> None:
    write(tmp_path, "qwen3")
    configure(tmp_path, layer_types=["full_attention", "sliding_attention", "full_attention"])
    assert "layer_types sliding_attention" in " | ".join(problems(tmp_path))


class Meter(TorchDispatchMode):
    """Counts the bytes of all storages that live at once, from what operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._seen.get(key)
        if known is not None and known.alive:
            return
        self.now += size
        self.peak = max(self.peak, self.now)
        self._seen[key] = weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_loading_takes_the_model_and_a_tensor_at_most(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, family, torch.bfloat16, hidden_size=128, vocab_size=2000, tie_word_embeddings=False)
    read: list[int] = []
    alive: list[int] = []
    original = stored.StoredWeights.read

    def counted(self: stored.StoredWeights, names: Any) -> Any:
        for name, tensor in original(self, names):
            read.append(tensor.nbytes)
            alive.append(sum(1 for ref in views if ref() is not None))
            views.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    views: list[Any] = []
    monkeypatch.setattr(loading, "_CHUNK", 1 << 10)
    monkeypatch.setattr(stored.StoredWeights, "read", counted)
    with Meter() as meter:
        policy = load_policy(tmp_path)
    num_bytes = sum(p.nbytes for p in policy.parameters())
    largest = max(p.nbytes for p in policy.parameters())
    assert sum(read) == num_bytes // 2  # every tensor once, in bfloat16
    assert max(alive) == 0  # the one before is gone when the next has been read
    assert num_bytes <= meter.peak <= num_bytes + largest


def test_the_engines_model_is_loaded_by_the_same_rules(tmp_path: Path) -> None:
    write(tmp_path, "qwen3", tie_word_embeddings=True)
    with torch.no_grad():
        tokens = ids(1, 12)
        assert torch.equal(load_model(tmp_path)(tokens), load_policy(tmp_path)(tokens))
    change(tmp_path, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(InputError, match=re.escape("model.norm.weight has 32 values that are not finite")):
        load_model(tmp_path)
