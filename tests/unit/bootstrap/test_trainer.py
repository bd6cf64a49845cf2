"""The bootstrap's training loop: schedule, batching, loss and gate, against plain references."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cod_async.bootstrap.trainer import TokenDocument, learning_rate, rectangles, token_losses, train
from cod_async.config.schema import BootstrapConfig
from cod_async.errors import NumericsError
from cod_async.models.qwen3 import Qwen3, Qwen3Config

DOCUMENT = st.integers(2, 20).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 15), min_size=n, max_size=n),
        st.lists(st.integers(0, 2), min_size=n, max_size=n),
    )
)


def tiny(seed: int = 0) -> Qwen3:
    config = Qwen3Config(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return Qwen3(config, torch.Generator().manual_seed(seed))


def copy_documents(step: int, number: int) -> Sequence[TokenDocument]:
    """Say again the token before the separator 1: learnable in a few dozen steps."""
    rng = random.Random(step)
    values = [rng.randrange(2, 6) for _ in range(number)]
    return [TokenDocument([value, 1, value], [0, 0, 1]) for value in values]


def test_schedule_warms_up_and_decays_to_a_tenth() -> None:
    rates = [learning_rate(step, peak=1.0, num_steps=100, warmup_steps=10) for step in range(150)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0 - 0.9 * 9 / 99)
    assert rates[99] == pytest.approx(0.1)
    assert rates[100:] == pytest.approx([0.1] * 50)
    assert all(a > b for a, b in itertools.pairwise(rates[9:100]))


@given(st.lists(DOCUMENT, min_size=1, max_size=13))
def test_rectangles_hold_every_document_once(raw: list[tuple[list[int], list[int]]]) -> None:
    documents = [TokenDocument(ids, categories) for ids, categories in raw]
    held = []
    for ids, categories in rectangles(documents):
        assert ids.shape == categories.shape
        lengths = sorted(len(d.token_ids) for d in documents)
        assert ids.shape[1] in lengths
        held += [(tuple(i), tuple(c)) for i, c in zip(ids.tolist(), categories.tolist(), strict=True)]
    assert len(held) == len(documents)
    for document in documents:
        n = len(document.token_ids)
        match = next(
            pair
            for pair in held
            if pair[0][:n] == tuple(document.token_ids)
            and pair[1][:n] == tuple(document.categories)
            and not any(pair[1][n:])
        )
        held.remove(match)
    assert not held


def test_losses_agree_with_one_row_at_a_time() -> None:
    model = tiny().requires_grad_(False)
    rng = np.random.default_rng(0)
    documents = [
        TokenDocument(rng.integers(0, 16, n).tolist(), rng.integers(0, 3, n).tolist())
        for n in (3, 9, 5, 12, 7)
    ]
    found: list[float] = []
    for ids, categories in rectangles(documents):
        found += token_losses(model, torch.from_numpy(ids), torch.from_numpy(categories))[0].tolist()
    expected: list[float] = []
    for document in documents:
        logits = model.logits(torch.tensor([document.token_ids])).double()[0]
        logprobs = logits - logits.logsumexp(-1, keepdim=True)
        expected += [
            -float(logprobs[t - 1, document.token_ids[t]])
            for t in range(1, len(document.token_ids))
            if document.categories[t]
        ]
    assert sorted(found) == pytest.approx(sorted(expected), abs=1e-5)


def test_training_meets_the_gate_and_is_repeatable() -> None:
    config = BootstrapConfig(num_steps=60, documents_per_step=16, lr=2e-2, warmup_steps=5, qa_loss_gate=0.05)
    results: list[Any] = []
    told: list[dict[str, Any]] = []
    for _ in range(2):
        model = tiny(3)
        result = train(model, copy_documents, ["qa"], config, on_progress=told.append)
        results.append((result, [p.detach().clone() for p in model.parameters()]))
    first, second = results
    assert first[0].is_gate_met
    assert first[0].gate_loss is not None and first[0].gate_loss < 0.05
    assert first[0].losses == second[0].losses
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert told[0]["step"] == 10 and "qa" in told[0]["losses"]


def test_a_gate_out_of_reach_ends_at_twice_the_steps() -> None:
    config = BootstrapConfig(num_steps=12, documents_per_step=4, lr=1e-5, qa_loss_gate=1e-6)
    result = train(tiny(), copy_documents, ["qa"], config)
    assert result.num_steps == 24
    assert not result.is_gate_met


def test_without_a_gate_category_the_steps_are_exact() -> None:
    config = BootstrapConfig(num_steps=12, documents_per_step=4, lr=1e-3)
    result = train(tiny(), copy_documents, ["update"], config)
    assert (result.num_steps, result.is_gate_met, result.gate_loss) == (12, True, None)


def test_a_loss_that_is_not_finite_is_loud() -> None:
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match=r"bootstrap\.lr"):
        train(model, copy_documents, ["qa"], BootstrapConfig(num_steps=2, documents_per_step=2))
