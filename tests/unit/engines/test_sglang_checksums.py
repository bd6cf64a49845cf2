"""The checksums that a server must report for published tensors, said once more in other ways."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_sglang import FakeServer
from hypothesis import given, settings
from hypothesis import strategies as st

from cod_async.config.schema import ServerConfig
from cod_async.engines.sglang.client import ServerClient
from cod_async.engines.sglang.pushes import checksums, expected_checksums, verify
from cod_async.engines.sglang.pushes.checksums import Form, Parameter, checksum, stacked_parameters
from cod_async.errors import WeightsError
from cod_async.lifecycle.segment import Version
from cod_async.weights.manifest import Manifest
from cod_async.weights.source import PublishedWeights

SCENARIO_S = 40.0
LAYER = "model.layers.0."
SHA = Form(torch.float32, "sha256")


def source_of(
    tensors: dict[str, torch.Tensor], *, architecture: str = "Qwen3ForCausalLM", is_tied: bool = True
) -> PublishedWeights:
    manifest = Manifest(run="r", version=Version(0, 1), digest="", shards=())
    config = {"architectures": [architecture], "tie_word_embeddings": is_tied}
    return PublishedWeights(manifest, Path("/nowhere"), config, tensors)


def layered(*, num_rows: int = 70) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        f"{LAYER}self_attn.v_proj.weight": (4, 8),
        f"{LAYER}self_attn.q_proj.weight": (16, 8),
        f"{LAYER}self_attn.k_proj.weight": (4, 8),
        f"{LAYER}self_attn.q_proj.bias": (16,),
        f"{LAYER}self_attn.k_proj.bias": (4,),
        f"{LAYER}self_attn.v_proj.bias": (4,),
        f"{LAYER}mlp.up_proj.weight": (12, 8),
        f"{LAYER}mlp.gate_proj.weight": (12, 8),
        f"{LAYER}mlp.down_proj.weight": (8, 12),
        "model.embed_tokens.weight": (num_rows, 8),
        "model.norm.weight": (8,),
        "lm_head.weight": (num_rows, 8),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def sha(tensor: torch.Tensor) -> str:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()[:16]


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_tied", [True, False])
def test_parameters_are_stacked_padded_and_converted(
    architecture: str, dtype: torch.dtype, is_tied: bool
) -> None:
    tensors = layered()
    t = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    attention = f"{LAYER}self_attn."
    padding = torch.zeros(58, 8, dtype=dtype)
    expected = {
        f"{attention}qkv_proj.{kind}": sha(
            torch.cat([t[f"{attention}{part}_proj.{kind}"] for part in ("q", "k", "v")])
        )
        for kind in ("weight", "bias")
    } | {
        f"{LAYER}mlp.gate_up_proj.weight": sha(
            torch.cat([t[f"{LAYER}mlp.gate_proj.weight"], t[f"{LAYER}mlp.up_proj.weight"]])
        ),
        f"{LAYER}mlp.down_proj.weight": sha(t[f"{LAYER}mlp.down_proj.weight"]),
        "model.norm.weight": sha(t["model.norm.weight"]),
        "model.embed_tokens.weight": sha(torch.cat([t["model.embed_tokens.weight"], padding])),
    }
    if not is_tied:
        expected["lm_head.weight"] = sha(torch.cat([t["lm_head.weight"], padding]))
    form = Form(dtype, "sha256")
    found = expected_checksums(tensors, 1, architecture=architecture, is_tied=is_tied, form=form)
    assert found == expected


def test_nothing_is_said_about_several_ranks_and_unknown_models() -> None:
    tensors = layered()
    known = {"architecture": "Qwen3ForCausalLM", "is_tied": True}
    assert expected_checksums(tensors, 2, form=SHA, **known) is None  # type: ignore[arg-type]
    assert expected_checksums(tensors, 1, architecture="MambaForCausalLM", is_tied=True, form=SHA) is None
    del tensors[f"{LAYER}self_attn.k_proj.weight"]
    assert stacked_parameters(tensors, architecture="Qwen3ForCausalLM", is_tied=True) is None


@pytest.mark.parametrize(
    ("numel", "dtype", "expected"),
    [
        (5, torch.bfloat16, "9150c51192f597f6"),
        (64, torch.float32, "206653fe08d81cd3"),
        (16391, torch.bfloat16, "21fae9a131690546"),
        (40001, torch.float32, "eb2e59bd5da6d251"),
    ],
)
def test_the_hash_of_a_gpu_server_is_that_of_its_kernel(
    numel: int, dtype: torch.dtype, expected: str
) -> None:
    """The values were computed with SGLang 0.5.23's own Triton kernel, interpreted."""
    tensor = (torch.arange(numel) % 97 - 40).to(dtype) / 8
    assert checksum(Parameter((tensor,)), Form(dtype, "words")) == expected


def slow_hash(raw: bytes) -> int:
    """The same hash, word by word."""
    raw += bytes(-len(raw) % 4)
    words = [int.from_bytes(raw[i : i + 4], "little") for i in range(0, len(raw), 4)]
    mask, total = 0xFFFFFFFF, 0

    def mix(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x85EBCA6B & mask
        x = (x ^ (x >> 13)) * 0xC2B2AE35 & mask
        return x ^ (x >> 16)

    seed = 0x243F6A88
    seeds = (seed, (seed * 0x9E3779B1 ^ 0xDEADBEEF) & mask)
    for tile in range(0, len(words), 8192):
        sums = [0, 0]
        for place in range(tile, min(tile + 8192, len(words))):
            for half, (factor, turn) in enumerate(((0x27D4EB2D, 15), (0x165667B1, 13))):
                turned = (place << turn | place >> (32 - turn)) & mask
                sums[half] += mix(words[place] ^ (place * factor + seeds[half] & mask) ^ turned)
        high, low = (mix((sum_ ^ 4 * len(words)) & mask) for sum_ in sums)
        total += high << 32 | low
    mask = (1 << 64) - 1
    total &= mask
    total = (total ^ total >> 30) * 0xBF58476D1CE4E5B9 & mask
    total = (total ^ total >> 27) * 0x94D049BB133111EB & mask
    return total ^ total >> 31


@given(
    rows=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    width=st.integers(1, 300),
    padding=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=25, deadline=None)
def test_stacked_parts_hash_as_one_tensor(
    rows: list[int], width: int, padding: int, dtype: torch.dtype
) -> None:
    parts = tuple(torch.randn(number, width) for number in rows)
    whole = torch.cat([*parts, torch.zeros(padding, width)]).to(dtype)
    raw = whole.reshape(-1).view(torch.uint8).numpy().tobytes()
    parameter = Parameter(parts, padding)
    assert checksum(parameter, Form(dtype, "sha256")) == hashlib.sha256(raw).hexdigest()[:16]
    expected = f"{slow_hash(raw):016x}"
    assert checksum(parameter, Form(dtype, "words")) == expected


class SumServer(FakeServer):
    """A server with given checksums."""

    def __init__(self, sums: dict[str, str]) -> None:
        super().__init__(checksums=lambda _: sums)


def verified(source: PublishedWeights, sums: dict[str, str], **server_args: object) -> None:
    async def told() -> None:
        async with asyncio.timeout(SCENARIO_S), SumServer(sums) as server:
            server.server_args = dict(server_args)
            client = ServerClient(server.url, settings=ServerConfig(), vocab_size=320)
            try:
                await verify(client, source)
            finally:
                await client.aclose()

    asyncio.run(told())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hashing", ["sha256", "words"])
def test_a_server_is_recognized_by_what_it_holds(dtype: torch.dtype, hashing: Any) -> None:
    source = source_of(layered())
    form = Form(dtype, hashing)
    sums = expected_checksums(source.tensors(), 1, architecture="Qwen3ForCausalLM", is_tied=True, form=form)
    assert sums is not None
    verified(source, sums)
    for name in sums:
        with pytest.raises(WeightsError, match=f"parameter {name} has checksum 00"):
            verified(source, sums | {name: "00" * 8})
    other = expected_checksums(
        source.tensors(), 1, architecture="Qwen3ForCausalLM", is_tied=True, form=Form(torch.float64, "sha256")
    )
    assert other is not None
    with pytest.raises(WeightsError, match=r"model\.norm\.weight has checksum"):
        verified(source, other)


def test_parameters_of_one_side_alone_are_named() -> None:
    source = source_of(layered())
    sums = expected_checksums(source.tensors(), 1, architecture="Qwen3ForCausalLM", is_tied=True, form=SHA)
    assert sums is not None
    verified(source, sums | {"draft.model.norm.weight": "00" * 8})
    with pytest.raises(WeightsError, match=r"only the server has a parameter lm_head\.weight"):
        verified(source, sums | {"lm_head.weight": "00" * 8})
    del sums["model.norm.weight"]
    with pytest.raises(WeightsError, match=r"only L0-S1 has a parameter model\.norm\.weight"):
        verified(source, sums)


def test_a_server_that_cannot_be_checked_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    async def told() -> None:
        async with asyncio.timeout(SCENARIO_S), SumServer({}) as server:
            client = ServerClient(server.url, settings=ServerConfig(), vocab_size=320)
            try:
                for _ in range(3):
                    await verify(client, source_of(layered(), architecture="MambaForCausalLM"))
                server.server_args = {"tp_size": 2}
                for _ in range(3):
                    await verify(client, source_of(layered()))
            finally:
                await client.aclose()

    checksums._NOTED.clear()
    with caplog.at_level(logging.WARNING):
        asyncio.run(told())
    assert [record.message.split("updates: ")[1] for record in caplog.records] == [
        "the layout of MambaForCausalLM is not known",
        "it has 2 ranks, only one can be checked",
    ]
