"""Models with gated delta layers: rows side by side are rows alone, and the recurrence is exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cod_async.models.layout import Layout
from cod_async.models.loading import load_policy
from cod_async.models.policy import Policy
from tests.model_world import ids, write

LENGTHS = (150, 3, 70, 1, 64)
"""Shorter than the convolution's kernel, on a chunk's edge (64), and over several chunks."""


def hybrid(folder: Path, family: str = "qwen3_5") -> Policy:
    write(folder, family, max_position_embeddings=256)
    return load_policy(folder)


def losses(hidden: Tensor, length: int, seed: int) -> Tensor:
    """Weigh the real positions of one row with random numbers."""
    generator = torch.Generator().manual_seed(seed)
    return (hidden[:length] * torch.randn(length, hidden.shape[-1], generator=generator)).sum()


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next"])
def test_rows_of_a_rectangle_are_rows_alone_with_their_gradients(tmp_path: Path, family: str) -> None:
    policy = hybrid(tmp_path, family)
    assert policy.is_recurrent
    tokens = ids(len(LENGTHS), max(LENGTHS))
    together = policy(tokens)
    torch.stack(
        [losses(row, n, i) for i, (row, n) in enumerate(zip(together, LENGTHS, strict=True))]
    ).sum().backward()
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    for index, length in enumerate(LENGTHS):
        alone = policy(tokens[index : index + 1, :length])[0]
        torch.testing.assert_close(together[index, :length], alone, rtol=0, atol=1e-5)
        losses(alone, length, index).backward()
    assert found.keys() == {name for name, _ in policy.named_parameters() if name != "lm_head.weight"}
    for name, parameter in policy.named_parameters():
        if name in found:
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-4 * scale, msg=name)


def test_neighbours_and_padding_do_not_reach_a_row(tmp_path: Path) -> None:
    policy = hybrid(tmp_path)
    first, second = ids(2, 90, seed=1), ids(2, 90, seed=2)
    second[0, :20] = first[0, :20]
    with torch.no_grad():
        left, right = policy(first)[0, :20], policy(second)[0, :20]
    torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["packed", "tree"])
def test_rows_end_to_end_are_refused(tmp_path: Path, kind: str) -> None:
    policy = hybrid(tmp_path)
    layout = Layout(kind, (4, 4), torch.arange(4).repeat(2)[None], parents=(-1, -1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"rectangles only, not the layout '{kind}'"):
        policy(ids(1, 8), layout)


def recurrence(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """Compute the gated delta rule token by token (arXiv 2412.06464, eq. 10), heads and rows apart.

    ``S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T`` and ``o_t = S_t q_t / sqrt(d)``, keys
    and queries of unit length.
    """
    batch, length, heads, width = query.shape
    query = query / (query.square().sum(-1, keepdim=True) + 1e-6).sqrt() / width**0.5
    key = key / (key.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    out = torch.zeros(batch, length, heads, value.shape[-1], dtype=value.dtype)
    eye = torch.eye(width, dtype=value.dtype)
    for b in range(batch):
        for h in range(heads):
            state = torch.zeros(value.shape[-1], width, dtype=value.dtype)
            for t in range(length):
                k, v, rate = key[b, t, h], value[b, t, h], beta[b, t, h]
                state = decay[b, t, h].exp() * state @ (eye - rate * torch.outer(k, k)) + rate * torch.outer(
                    v, k
                )
                out[b, t, h] = state @ query[b, t, h]
    return out


def test_the_chunked_rule_on_a_cpu_is_the_recurrence(tmp_path: Path) -> None:
    from transformers.models.qwen3_5 import modeling_qwen3_5 as module

    hybrid(tmp_path)
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    query, key, value = random(2, 131, 2, 8), random(2, 131, 2, 8), random(2, 131, 4, 6)
    decay, beta = -random(2, 131, 4).exp(), random(2, 131, 4).sigmoid()
    found, state = module.torch_chunk_gated_delta_rule(
        query, key, value, g=decay, beta=beta, use_qk_l2norm_in_kernel=True
    )
    assert state is None
    wide = [
        t.double() for t in (query.repeat_interleave(2, 2), key.repeat_interleave(2, 2), value, decay, beta)
    ]
    torch.testing.assert_close(found.double(), recurrence(*wide), rtol=0, atol=2e-6)


def test_the_chunked_rule_is_what_a_forward_pass_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.qwen3_5 import modeling_qwen3_5 as module

    policy = hybrid(tmp_path)
    calls: list[tuple[int, ...]] = []
    rule = module.torch_chunk_gated_delta_rule

    def counted(query: Tensor, *args: object, **kwargs: object) -> object:
        calls.append(tuple(query.shape))
        return rule(query, *args, **kwargs)

    monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", counted)
    with torch.no_grad():
        policy(ids(2, 70))
    assert calls == [(2, 70, 2, 8)] * 2  # once per gated delta layer, all rows and tokens in one call
