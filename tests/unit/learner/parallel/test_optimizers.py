"""Eight-bit moments and moments on the host, against float32 AdamW and against their own definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cod_async.config.learner import LearnerConfig
from cod_async.errors import CheckpointError
from cod_async.learner.parallel.eight_bit import (
    BLOCK,
    MEAN,
    MEAN_DECADES,
    SQUARE,
    SQUARE_DECADES,
    AdamW8bit,
    Codebook,
)
from cod_async.learner.parallel.optimizers import (
    HostOptimizer,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    parameter_groups,
)

MEAN_FACTOR = 10 ** (MEAN_DECADES / 126)
SQUARE_FACTOR = 10 ** (SQUARE_DECADES / 254)


def spread(seed: int, decades: float, *, is_signed: bool) -> Tensor:
    """Values over some decades, in four blocks with scales far apart."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (-decades * torch.rand(4 * BLOCK, generator=generator, dtype=torch.float64))
    sizes = sizes * 10 ** torch.tensor([-12.0, -3.0, 0.0, 6.0]).double().repeat_interleave(BLOCK)
    if is_signed:
        sizes = sizes * torch.where(torch.rand(4 * BLOCK, generator=generator) < 0.5, -1.0, 1.0)
    return sizes.float()


@pytest.mark.parametrize(("book", "factor"), [(MEAN, MEAN_FACTOR), (SQUARE, SQUARE_FACTOR)])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_a_code_is_a_neighbor_of_its_value(book: Codebook, factor: float, seed: int) -> None:
    decades = 5.5
    values = spread(seed, decades, is_signed=book.is_signed)
    random = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed))
    for noise in (None, random):
        codes, scales = book.encode(values, noise)
        found = book.decode(codes, scales)
        assert bool((found.sign() == values.sign()).all())
        ratio = found.double() / values.double()
        allowed = factor * (1 + 1e-4)
        assert ratio.max() <= allowed and ratio.min() >= 1 / allowed
    blocks = values.view(-1, BLOCK)
    assert torch.equal(scales, blocks.abs().amax(1))


@pytest.mark.parametrize("book", [MEAN, SQUARE])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_what_was_decoded_encodes_to_the_same_bits(book: Codebook, seed: int) -> None:
    codes, scales = book.encode(spread(seed, 9.0, is_signed=book.is_signed))
    again, same = book.encode(book.decode(codes, scales))
    assert torch.equal(codes, again) and torch.equal(scales, same)


def test_rounding_has_no_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    for book in (MEAN, SQUARE):
        values = torch.linspace(0.02, 1.0, BLOCK).repeat(400)
        values.view(-1, BLOCK)[:, -1] = 1.0
        codes, scales = book.encode(values, torch.rand(values.shape, generator=generator))
        mean = book.decode(codes, scales).view(-1, BLOCK).double().mean(0)
        wide = values.view(-1, BLOCK)[0].double()
        # A value lies between neighbors at most 12 % apart: 400 draws have a mean within 4 x 6 % / 20.
        assert ((mean - wide).abs() <= 0.012 * wide + 1e-6).all()


def test_small_second_moments_never_become_zero_and_zeros_stay() -> None:
    values = torch.full((BLOCK,), 1e-12)
    values[0], values[1] = 1.0, 0.0
    found = SQUARE.decode(*SQUARE.encode(values, torch.full((BLOCK,), 0.999)))
    assert found[0] == 1 and found[1] == 0
    assert bool((found[2:] >= 1e-12).all()) and bool((found[2:] <= 1.001e-7).all())
    zero = torch.zeros(2 * BLOCK)
    for book in (MEAN, SQUARE):
        assert not book.decode(*book.encode(zero, torch.rand(2 * BLOCK))).any()


def _regression(make: Any, num_steps: int) -> tuple[nn.Module, list[float], Any]:
    """A small network on noisy data; returns it, its losses and the optimizer."""
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 48))
    teacher = nn.Linear(64, 48)
    optimizer = make(model)
    losses = []
    for _ in range(num_steps):
        x = torch.randn(64, 64, generator=generator)
        loss = (model(x) - teacher(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return model, losses, optimizer


SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.98)}


def _eight_bit(model: nn.Module) -> AdamW8bit:
    return AdamW8bit(model.parameters(), weight_decay=0.01, **SETTINGS, min_quantized=1024)


def test_a_short_run_goes_as_with_float32_moments() -> None:
    exact, truth, _ = _regression(
        lambda m: torch.optim.AdamW(m.parameters(), weight_decay=0.01, **SETTINGS), 150
    )
    model, losses, optimizer = _regression(_eight_bit, 150)
    assert losses[0] == truth[0]
    assert truth[-1] < 0.3 * truth[0]  # it learns something
    assert sum(losses[-20:]) == pytest.approx(sum(truth[-20:]), rel=0.03)
    moved = sum((p - q).square().sum() for p, q in zip(model.parameters(), exact.parameters(), strict=True))
    start, *_ = _regression(_eight_bit, 0)
    way = sum((p - q).square().sum() for p, q in zip(start.parameters(), exact.parameters(), strict=True))
    assert moved < 0.01 * way
    state = optimizer.state[next(iter(model.parameters()))]
    assert state["mean_codes"].dtype == state["square_codes"].dtype == torch.uint8


def test_the_first_step_is_that_of_adamw() -> None:
    exact, *_ = _regression(lambda m: torch.optim.AdamW(m.parameters(), weight_decay=0.01, **SETTINGS), 1)
    model, *_ = _regression(_eight_bit, 1)
    for ours, truth in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-7)


def test_a_repeated_run_gives_the_same_bits() -> None:
    one, *_ = _regression(_eight_bit, 20)
    two, *_ = _regression(_eight_bit, 20)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "offload", "offload_8bit"])
def test_a_state_goes_out_by_name_and_comes_back_to_the_bit(name: str) -> None:
    learner = LearnerConfig(
        lr=1e-2,
        optimizer="adamw_8bit" if "8bit" in name else "adamw",
        has_optimizer_offload="offload" in name,
    )
    model, _, optimizer = _regression(lambda m: make_optimizer(m, learner), 3)
    state = optimizer_state(model, optimizer)
    assert set(state) == {
        f"{key}/{n}" for key in ("step", "exp_avg", "exp_avg_sq") for n, _ in model.named_parameters()
    }
    assert all(float(value) == 3 for key, value in state.items() if key.startswith("step/"))
    state = {key: value.detach().clone() for key, value in state.items()}
    other, _, fresh = _regression(lambda m: make_optimizer(m, learner), 0)
    other.load_state_dict(model.state_dict())
    empty = optimizer_state(other, fresh)  # a template before the first step
    assert {key: value.shape for key, value in empty.items()} == {k: v.shape for k, v in state.items()}
    assert not any(value.any() for value in empty.values())
    load_optimizer_state(other, fresh, state)
    for of, having in ((model, optimizer), (other, fresh)):
        for parameter in of.parameters():
            parameter.grad = torch.full_like(parameter, 0.01)
        having.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_state_goes_from_one_optimizer_to_another() -> None:
    model, _, optimizer = _regression(lambda m: make_optimizer(m, LearnerConfig(lr=1e-2)), 3)
    state = optimizer_state(model, optimizer)
    eight = AdamW8bit(model.parameters(), lr=1e-2, min_quantized=1)
    load_optimizer_state(model, eight, state)
    found = optimizer_state(model, eight)
    for key, value in state.items():
        if key.startswith("exp_avg_sq/"):
            assert ((found[key] / value).log().abs() <= 0.07).all(), key


def test_a_state_of_another_model_is_refused() -> None:
    model, _, optimizer = _regression(lambda m: make_optimizer(m, LearnerConfig()), 1)
    state = optimizer_state(model, optimizer)
    with pytest.raises(CheckpointError, match=r"exp_avg/0\.bias is missing or unknown"):
        load_optimizer_state(model, optimizer, {k: v for k, v in state.items() if k != "exp_avg/0.bias"})
    with pytest.raises(CheckpointError, match=r"exp_avg/0.bias has shape \[1\]"):
        load_optimizer_state(model, optimizer, {**state, "exp_avg/0.bias": torch.zeros(1)})


def test_the_host_steps_as_the_device_would() -> None:
    def make(model: nn.Module) -> Any:
        return HostOptimizer(parameter_groups(model, 0.01), lambda of: torch.optim.AdamW(of, **SETTINGS))

    ours, losses, _ = _regression(make, 10)
    exact, truth, _ = _regression(lambda m: torch.optim.AdamW(parameter_groups(m, 0.01), **SETTINGS), 10)
    assert losses == truth
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), exact.parameters(), strict=True))
