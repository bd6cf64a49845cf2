"""Packed rows shared by ranks: Ulysses and ring in real processes against the dense float64 reference."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_attention import dense, gradients, inputs, visible, worst
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch import Tensor, distributed
from torch.utils.checkpoint import checkpoint

from cod_async.models.attention import attend
from cod_async.models.attention.ring import step_passes
from cod_async.models.attention.sequence import (
    RING_TOKENS_PER_RANK,
    SequenceMode,
    choose_mode,
    make_shard,
    padded_tokens,
    parts_of,
)
from cod_async.models.attention.ulysses import kv_repeats
from cod_async.models.layout import Layout, SequenceShard

SCALE = 0.3
WIDTH = 6
# heads, key heads, row lengths: they cross parts, fill one exactly, have one token, are one for all.
CASES: list[tuple[int, int, list[int]]] = [
    (4, 4, [5, 11, 1, 1, 14]),
    (4, 2, [32]),
    (8, 2, [8, 8, 8, 8]),
    (4, 1, [1, 2, 3, 26, 8]),
    (12, 3, [30, 2]),
    (4, 2, [1] * 32),
    (4, 2, [3, 17, 12, 40, 8]),
]


MODES: tuple[SequenceMode, ...] = ("ulysses", "ring")


def make(case: tuple[int, int, list[int]], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads, lengths = case
    return inputs(sum(lengths), heads, kv_heads, WIDTH, seed=len(lengths), dtype=dtype)


def attend_on_ranks(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Compute each case on this rank's tokens, with two ranks once more in backward; return all numbers."""
    found: dict[str, Any] = {}
    group = distributed.new_group(list(range(size)))
    for mode, number, dtype in product(MODES, range(len(CASES)), (torch.float32, torch.float64)):
        heads, _, lengths = CASES[number]
        whole, num_tokens = make(CASES[number], dtype), sum(lengths)
        shard = make_shard(num_tokens, rank, size, mode, group if number % 2 else None, "cpu")
        query, key, value = (part[:, :, shard.places].requires_grad_() for part in whole)
        layout = Layout("packed", tuple(lengths), None, (), shard)
        if size == 2:
            out = checkpoint(attend, query, key, value, layout, scale=SCALE, use_reentrant=False)
        else:
            out = attend(query, key, value, layout, scale=SCALE)
        weights = torch.linspace(-1.0, 1.0, whole[0].numel(), dtype=torch.float64).sin()
        weights = weights.view(1, num_tokens, heads, WIDTH)[:, shard.places]
        grads = torch.autograd.grad((out.double() * weights).sum(), (query, key, value))
        values = {"places": shard.places, "out": out.detach(), "q": grads[0], "k": grads[1], "v": grads[2]}
        found |= {f"{mode}.{number}.{dtype}.{name}": value for name, value in values.items()}
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_are_one(size: int) -> None:
    results = run_ranks(size, attend_on_ranks, preload=("torch._dynamo",) if size == 2 else ())
    for mode, number, dtype in product(MODES, range(len(CASES)), (torch.float32, torch.float64)):
        case = CASES[number]
        query, key, value = (part.double().requires_grad_() for part in make(case, dtype))
        expected = dense(query, key, value, visible(Layout("packed", tuple(case[2]))), SCALE)
        wanted = dict(zip("qkv", gradients(expected, (query, key, value)), strict=True), out=expected)
        parts = [f"{mode}.{number}.{dtype}.{name}" for name in ("places", "out", "q", "k", "v")]
        places, *found = [
            torch.cat([result[part] for result in results], dim=dim)
            for part, dim in zip(parts, (0, 1, 2, 2, 2), strict=True)
        ]
        assert torch.equal(places.sort().values, torch.arange(sum(case[2])))
        order = places.argsort()
        for name, tensor, dim in zip(("out", "q", "k", "v"), found, (1, 2, 2, 2), strict=True):
            whole = tensor.index_select(dim, order)
            assert whole.dtype == dtype
            tolerance = 1e-12 if dtype == torch.float64 else 3e-6
            assert worst(whole, wanted[name]) < tolerance, (mode, case, dtype, name)


@given(
    size=st.integers(1, 4),
    part=st.integers(1, 5),
    cuts=st.lists(st.integers(1, 39), max_size=8, unique=True),
)
@settings(max_examples=60, deadline=None)
def test_steps_of_a_ring_show_each_pair_once(size: int, part: int, cuts: list[int]) -> None:
    """All ranks' blocks of all steps together are the mask of packed rows, without overlap."""
    num_tokens = 2 * size * part
    edges = [0, *sorted(cut for cut in cuts if cut < num_tokens), num_tokens]
    lengths = tuple(b - a for a, b in pairwise(edges))
    count = torch.zeros(num_tokens, num_tokens, dtype=torch.int64)
    for rank in range(size):
        mine = make_shard(num_tokens, rank, size, "ring", None, "cpu").places
        for step in range(size):
            its = make_shard(num_tokens, (rank - step) % size, size, "ring", None, "cpu").places
            passes = step_passes(lengths, rank, size, step)
            assert sum(not each.is_causal for each in passes) <= 2
            for each in passes:
                for segment in each.segments:
                    queries, keys = mine[segment.queries], its[segment.keys]
                    seen = torch.ones(len(queries), len(keys), dtype=torch.int64)
                    count[queries[:, None], keys] += seen.tril() if each.is_causal else seen
    assert torch.equal(count, visible(Layout("packed", lengths)).long())


def test_parts_of_a_ring_are_even_in_causal_work() -> None:
    assert parts_of(24, 0, 3, "ring") == [(0, 4), (20, 24)]
    assert parts_of(24, 2, 3, "ring") == [(8, 12), (12, 16)]
    assert parts_of(24, 1, 3, "ulysses") == [(8, 16)]
    work = [
        sum(end * (end + 1) // 2 - begin * (begin + 1) // 2 for begin, end in parts_of(64, rank, 4, "ring"))
        for rank in range(4)
    ]
    assert len(set(work)) == 1


def test_padding_rule() -> None:
    assert [padded_tokens(n, 4, "ulysses") for n in (1, 4, 5)] == [4, 4, 8]
    assert [padded_tokens(n, 4, "ring") for n in (1, 8, 9)] == [8, 8, 16]
    assert padded_tokens(7, 1, "ulysses") == 7


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "num_tokens", "mode"),
    [
        (16, 8, 2, 4096, "ulysses"),
        (16, 8, 8, 10_000_000, "ulysses"),  # many key heads: the ring sends more
        (16, 2, 8, 4096, "ulysses"),  # heads divide, and the row is short
        (64, 2, 8, 8 * RING_TOKENS_PER_RANK, "ring"),  # few key heads, very long
        (64, 2, 8, 8 * RING_TOKENS_PER_RANK - 1, "ulysses"),
        (14, 2, 4, 4096, "ring"),  # heads do not divide
    ],
)
def test_choice_of_mode(heads: int, kv_heads: int, size: int, num_tokens: int, mode: str) -> None:
    assert choose_mode(heads, kv_heads, size, num_tokens) == mode


def test_key_heads_are_repeated_just_enough() -> None:
    assert [kv_repeats(kv_heads, 4) for kv_heads in (1, 2, 3, 4, 6, 8)] == [4, 2, 4, 1, 2, 1]


def test_shards_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="12 tokens do not divide among 4 ranks with ring: pad to 16"):
        make_shard(12, 0, 4, "ring", None, "cpu")
    with pytest.raises(ValueError, match="rank 4 of 4"):
        make_shard(16, 4, 4, "ring", None, "cpu")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout("rectangle", ()), "a rectangle cannot be shared"),
        (Layout("tree", (8, 8), None, (-1, 0)), "a tree cannot be shared"),
        (Layout("packed", (8, 7)), "padding is a row of its own"),
    ],
)
def test_layouts_that_ranks_cannot_share_are_refused(layout: Layout, message: str) -> None:
    shard = make_shard(16, 0, 2, "ulysses", None, "cpu")
    shared = Layout(layout.kind, layout.lengths, None, layout.parents, shard)
    with pytest.raises(ValueError, match=message):
        attend(*inputs(8, 2, 2, 4), shared, scale=SCALE)


def test_heads_that_do_not_divide_among_ranks_are_refused() -> None:
    shard = SequenceShard(None, 0, 2, "ulysses", 16, torch.arange(8))
    with pytest.raises(ValueError, match="3 query heads do not divide among 2 ranks"):
        attend(*inputs(8, 3, 3, 4), Layout("packed", (16,), None, (), shard), scale=SCALE)
