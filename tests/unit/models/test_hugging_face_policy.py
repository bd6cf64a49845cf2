"""Models of transformers as policies: the same numbers as transformers itself, in every layout."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cod_async.models.hugging_face import HuggingFacePolicy, build_policy
from cod_async.models.layout import Layout
from cod_async.models.loading import fill_policy, load_policy
from cod_async.models.policy import Policy
from cod_async.models.qwen3 import Qwen3
from cod_async.models.stored import StoredWeights
from tests.model_world import FAMILIES, YARN, ids, write

ATOL = 1e-5


def log_probs(policy: Policy, tokens: torch.Tensor) -> torch.Tensor:
    return (policy(tokens) @ policy.head_weight.T).log_softmax(-1)


def reference(path: Path) -> Any:
    """Load with transformers, with its plainest attention."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def as_hugging_face(path: Path) -> HuggingFacePolicy:
    policy = build_policy(path)
    fill_policy(policy, StoredWeights(path), dtype=torch.float32, device=torch.device("cpu"))
    return policy


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", [*FAMILIES, "mistral", "qwen3_5", "qwen3_next"])
def test_log_probs_are_those_of_transformers(tmp_path: Path, family: str, is_tied: bool) -> None:
    write(tmp_path, family, tie_word_embeddings=is_tied)
    policy, other = load_policy(tmp_path), reference(tmp_path)
    assert isinstance(policy, Qwen3 if family == "qwen3" else HuggingFacePolicy)
    tokens = ids(3, 40)
    with torch.no_grad():
        hidden = other.base_model(tokens, use_cache=False).last_hidden_state
        torch.testing.assert_close(policy(tokens), hidden, rtol=0, atol=ATOL)
        expected = other(tokens, use_cache=False).logits.log_softmax(-1)
        torch.testing.assert_close(log_probs(policy, tokens), expected, rtol=0, atol=ATOL)
    names = set(dict(policy.named_parameters()))
    assert ("lm_head.weight" in names) == (not is_tied)
    assert policy.head_weight.shape == (61, 32) and len(policy.blocks) == 3
    assert policy.is_recurrent == (family in ("qwen3_5", "qwen3_next"))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_are_the_rows_of_a_rectangle(tmp_path: Path, family: str) -> None:
    write(tmp_path, family)
    policy = as_hugging_face(tmp_path)
    lengths = (5, 17, 1, 9)
    tokens = ids(4, 17)
    packed = torch.cat([row[:length] for row, length in zip(tokens, lengths, strict=True)])[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    weights = torch.randn(sum(lengths), 32, generator=torch.Generator().manual_seed(5))

    def gradients(hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        policy.zero_grad()
        (hidden * weights).sum().backward()
        return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}

    side_by_side = policy(tokens)
    hidden = torch.cat([row[:length] for row, length in zip(side_by_side, lengths, strict=True)])
    end_to_end = policy(packed, Layout("packed", lengths, positions))[0]
    torch.testing.assert_close(end_to_end, hidden, rtol=0, atol=ATOL)
    expected, found = gradients(hidden), gradients(end_to_end)
    assert expected.keys() == found.keys() and len(found) > 20
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_plain_qwen3_agrees(tmp_path: Path, is_tied: bool) -> None:
    write(tmp_path, "qwen3", tie_word_embeddings=is_tied, pad_token_id=15)
    plain, other = load_policy(tmp_path), as_hugging_face(tmp_path)
    assert isinstance(plain, Qwen3)
    assert list(plain.state_dict()) == list(other.state_dict())
    tokens = ids(2, 30)
    assert bool((tokens == 15).any())  # the gradient of a padding id that is also text must not be lost
    picked = tokens[:, 1:, None]
    for policy in (plain, other):
        log_probs(policy, tokens)[:, :-1].gather(-1, picked).sum().backward()
    torch.testing.assert_close(log_probs(plain, tokens), log_probs(other, tokens), rtol=0, atol=ATOL)
    gradients = dict(other.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_5"])
def test_tables_that_no_file_stores_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    changes = {"rope_parameters": YARN} if family in ("qwen3", "qwen2") else {}
    write(tmp_path, family, **changes)
    policy = load_policy(tmp_path)  # a scaled rotary goes to transformers for qwen3 too
    found = dict(policy.named_buffers())
    expected = dict(reference(tmp_path).named_buffers())
    assert found.keys() == expected.keys() and len(found) >= 2
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_tables_stay_exact_whatever_happens_to_the_parameters(tmp_path: Path) -> None:
    write(tmp_path, "llama")
    policy = load_policy(tmp_path)
    expected = {name: buffer.clone() for name, buffer in policy.named_buffers()}
    for changed in (
        copy.deepcopy(policy).to(torch.bfloat16),
        copy.deepcopy(policy).to_empty(device="cpu"),
        copy.deepcopy(policy).double(),
    ):
        for name, buffer in changed.named_buffers():
            assert buffer.dtype == torch.float32 and torch.equal(buffer, expected[name])
    in_bf16 = load_policy(tmp_path, dtype=torch.bfloat16)
    assert in_bf16.dtype == torch.bfloat16 and policy.dtype == torch.float32
    assert all(torch.equal(buffer, expected[name]) for name, buffer in in_bf16.named_buffers())


def test_a_row_does_not_depend_on_what_stands_beside_it(tmp_path: Path) -> None:
    write(tmp_path, "llama")
    policy = load_policy(tmp_path)
    long, short = ids(1, 60, seed=4), ids(1, 11, seed=5)
    padded = torch.cat((short, torch.full((1, 49), 3)), dim=1)
    with torch.no_grad():
        together = policy(torch.cat((long, padded)))
        torch.testing.assert_close(together[1, :11], policy(short)[0], rtol=0, atol=ATOL)


def test_a_directory_that_says_nothing_of_tying_is_untied(tmp_path: Path) -> None:
    write(tmp_path, "qwen2", tie_word_embeddings=False)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    policy = load_policy(tmp_path)
    tokens = ids(1, 9)
    with torch.no_grad():
        expected = reference(tmp_path)(tokens, use_cache=False).logits
        torch.testing.assert_close(policy(tokens) @ policy.head_weight.T, expected, rtol=0, atol=ATOL)
