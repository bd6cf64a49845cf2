"""Attention inside Qwen3 and inside decoders of transformers: rows alone, packed and in a tree agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense_attention import worst
from torch import Tensor, nn
from transformers import (
    AutoModel,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
)
from transformers import (
    Qwen3Config as HuggingFaceQwen3Config,
)

from cod_async.errors import InputError
from cod_async.models.attention.transformers import ATTENTION_NAME, cod_attention, register
from cod_async.models.layout import RECTANGLE, Layout
from cod_async.models.policy import Policy
from cod_async.models.qwen3 import Qwen3, Qwen3Config

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LENGTHS = (5, 1, 9)
ROWS = torch.arange(15) * 7 % 50
# A row of 4, which two continue: 4 + 3 and 4 + 5, the second of them continued by 2 more.
NODES, PARENTS = (4, 3, 5, 2), (-1, 0, 0, 2)
TREE_ROWS = ([0, 1], [0, 2, 3])


def packed() -> Layout:
    return Layout("packed", LENGTHS, torch.cat([torch.arange(length) for length in LENGTHS])[None])


def tree() -> Layout:
    return Layout("tree", NODES, torch.tensor([[0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9, 10]]), PARENTS)


def qwen3() -> Qwen3:
    config = Qwen3Config(**SIZES, head_dim=6)
    return Qwen3(config, torch.Generator().manual_seed(1)).double()


def from_transformers(config: Any, attention: str = ATTENTION_NAME) -> nn.Module:
    register()
    torch.manual_seed(1)
    model: nn.Module = AutoModel.from_config(config, attn_implementation=attention).double()
    return model.eval()


def hidden_of(model: nn.Module) -> Callable[[Tensor, Layout], Tensor]:
    def compute(input_ids: Tensor, layout: Layout) -> Tensor:
        if isinstance(model, Qwen3):
            hidden: Tensor = model(input_ids, layout)
        else:
            hidden = model(
                input_ids, position_ids=layout.position_ids, use_cache=False, cod_layout=layout
            ).last_hidden_state
        return hidden

    return compute


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


MODELS = {
    "qwen3": qwen3,
    "transformers-qwen3": lambda: from_transformers(HuggingFaceQwen3Config(**SIZES, head_dim=6)),
    "transformers-qwen2": lambda: from_transformers(Qwen2Config(**SIZES)),
    "transformers-llama": lambda: from_transformers(LlamaConfig(**SIZES)),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


def test_packed_rows_are_rows_alone(model: nn.Module) -> None:
    compute = hidden_of(model)
    out = compute(ROWS[None], packed())
    alone = torch.cat([compute(row[None], RECTANGLE) for row in ROWS.split(LENGTHS)], dim=1)
    assert worst(out, alone) < 1e-6  # transformers' norms are in float32
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    found = gradients((out * weights).sum(), model)
    expected = gradients((alone * weights).sum(), model)
    assert len(found) > 10
    assert worst(tuple(found), tuple(expected)) < 1e-6  # type: ignore[arg-type]


def test_rows_of_a_tree_are_rows_alone(model: nn.Module) -> None:
    compute = hidden_of(model)
    nodes = ROWS[:14].split(NODES)
    out = compute(ROWS[None, :14], tree())[0].split(NODES)
    found, expected = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for path in TREE_ROWS:
        row = torch.cat([nodes[node] for node in path])
        alone = compute(row[None], RECTANGLE)[0]
        shared = torch.cat([out[node] for node in path])
        assert worst(shared, alone) < 1e-6
        weights = torch.linspace(-1, 1, alone.numel(), dtype=torch.float64).view(alone.shape)
        found, expected = found + (shared * weights).sum(), expected + (alone * weights).sum()
    grads = gradients(found, model)
    assert worst(tuple(grads), tuple(gradients(expected, model))) < 1e-6  # type: ignore[arg-type]


def test_a_rectangle_is_what_transformers_computes() -> None:
    config = LlamaConfig(**SIZES)
    ids = ROWS.view(3, 5)
    expected = from_transformers(config, "eager")(ids, use_cache=False).last_hidden_state
    out = hidden_of(from_transformers(config))(ids, RECTANGLE)
    assert worst(out, expected) < 1e-6  # its softmax is in float32


def test_hybrid_models_take_rectangles() -> None:
    config = Qwen3_5TextConfig(
        **{**SIZES, "num_hidden_layers": 4},
        head_dim=8,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    expected = from_transformers(config, "eager")(ROWS[None], use_cache=False).last_hidden_state
    assert worst(hidden_of(from_transformers(config))(ROWS[None], RECTANGLE), expected) < 1e-6


def test_recomputed_layers_get_the_layout() -> None:
    model = from_transformers(LlamaConfig(**SIZES))
    expected = gradients(hidden_of(model)(ROWS[None], packed()).sin().sum(), model)
    model.train()
    model.activation_checkpointing_enable()  # type: ignore[operator]
    found = gradients(hidden_of(model)(ROWS[None], packed()).sin().sum(), model)
    assert worst(tuple(found), tuple(expected)) < 1e-12  # type: ignore[arg-type]


def test_a_policy_of_its_own() -> None:
    policy: Policy = qwen3()
    assert [type(block).__name__ for block in policy.blocks] == ["Block", "Block"]
    assert policy.dtype == torch.float64
    assert policy.device == torch.device("cpu")
    assert policy.adapter_id == ""
    assert not policy.is_recurrent


def test_positions_of_a_rectangle_can_be_given() -> None:
    policy = qwen3()
    shifted = Layout("rectangle", (), (torch.arange(7) + 100)[None])
    # Only differences of positions count, up to the float32 of the tables.
    assert worst(policy(ROWS[None, :7], shifted), policy(ROWS[None, :7])) < 1e-4


def test_packed_rows_need_positions() -> None:
    with pytest.raises(ValueError, match="the packed layout needs position_ids"):
        qwen3()(ROWS[None], Layout("packed", LENGTHS))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MistralConfig(**SIZES, sliding_window=8), "MistralAttention asks for sliding_window"),
        (Gemma2Config(**SIZES, head_dim=6, sliding_window=None), "Gemma2Attention asks for"),
        (LlamaConfig(**SIZES, attention_dropout=0.1), "LlamaAttention asks for dropout = 0.1"),
        (
            GptOssConfig(**SIZES, num_local_experts=2, layer_types=["full_attention"] * 2),
            "GptOssAttention asks for s_aux: attention with sinks",
        ),
    ],
)
def test_attention_of_another_kind_is_refused_by_name(config: Any, message: str) -> None:
    model = from_transformers(config).train()
    with pytest.raises(InputError, match=message):
        hidden_of(model)(ROWS[None], RECTANGLE)


def test_a_missing_layout_and_a_mask_are_refused() -> None:
    model = from_transformers(LlamaConfig(**SIZES))
    with pytest.raises(InputError, match="LlamaAttention got no cod_layout"):
        model(ROWS[None], use_cache=False)
    mask = torch.zeros(1, 1, 15, 15, dtype=torch.float64)
    with pytest.raises(InputError, match="LlamaAttention got an attention mask"):
        model(ROWS[None], attention_mask=mask, use_cache=False, cod_layout=RECTANGLE)


def test_calls_that_do_not_fit_are_refused() -> None:
    module = nn.Module()
    query = torch.zeros(1, 2, 5, 4)
    with pytest.raises(InputError, match="8 keys for 5 queries: pass use_cache=False"):
        cod_attention(module, query, torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8, 4), cod_layout=RECTANGLE)
    with pytest.raises(InputError, match="values of width 6"):
        cod_attention(module, query, query, torch.zeros(1, 2, 5, 6), cod_layout=RECTANGLE)
    with pytest.raises(InputError, match="not causal"):
        cod_attention(module, query, query, query, is_causal=False, cod_layout=RECTANGLE)
