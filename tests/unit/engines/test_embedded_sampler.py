"""Random numbers against integer SplitMix64; sampling against a scalar walk and brute-force nucleus sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cod_async.engines.embedded.sampler import sample, stream_of, uniforms

MASK = (1 << 64) - 1


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def walk(logprobs: list[float], uniform: float) -> int:
    """Scalar twin of ``sample``: walk the distribution in float64."""
    masses = np.exp(np.asarray(logprobs, dtype=np.float64))
    target, running = uniform * float(masses.sum()), 0.0
    for token, mass in enumerate(masses):
        running += float(mass)
        if running > target:
            return token
    return len(masses) - 1


def test_mixing_is_splitmix64() -> None:
    # First outputs of SplitMix64 from state 0, as published with the algorithm.
    golden = 0x9E3779B97F4A7C15
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [mix((i + 1) * golden & MASK) for i in range(3)] == published
    ours = uniforms(np.zeros(3, dtype=np.uint64), np.arange(3))
    assert ours.tolist() == [(value >> 12) * 2.0**-52 for value in published]


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**20))
def test_uniforms_equal_integer_arithmetic(seed: int, index: int) -> None:
    golden = 0x9E3779B97F4A7C15
    expected = (mix((mix(seed ^ golden) + (index + 1) * golden) & MASK) >> 12) * 2.0**-52
    found = uniforms(np.array([stream_of(seed)]), np.array([index]))
    assert found[0] == expected
    assert 0 <= found[0] < 1


def test_uniforms_are_uniform_and_neighbouring_seeds_unrelated() -> None:
    streams = np.array([stream_of(seed) for seed in range(200)])
    grid = np.stack([uniforms(streams, np.full(200, index)) for index in range(200)])
    counts = np.histogram(grid, bins=20, range=(0, 1))[0]
    chi2 = ((counts - 2000) ** 2 / 2000).sum()
    assert chi2 < 45.3  # 99.94 % quantile with 19 degrees of freedom; the draw is fixed
    for other in (grid[:, 1:], grid.T[:, 1:]):
        base = grid[:, :-1] if other.shape == grid[:, 1:].shape else grid
        assert abs(np.corrcoef(base.ravel(), other.ravel())[0, 1]) < 0.02


def draw(
    logits: torch.Tensor, temperature: float, top_p: float, u: list[float]
) -> tuple[list[int], np.ndarray]:
    count = len(u)
    tokens, logprobs = sample(
        logits.expand(count, -1),
        np.full(count, temperature, dtype=np.float32),
        np.full(count, top_p),
        np.array(u),
    )
    return tokens.tolist(), logprobs


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_inverse_cdf_equals_the_scalar_walk(temperature: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(50, generator=generator, dtype=torch.float64) * 3
    logprobs = torch.log_softmax(logits / np.float32(temperature), -1)
    u = [*np.random.default_rng(0).random(300).tolist(), 0.0, 1 - 2.0**-52]
    tokens, reported = draw(logits[None], temperature, 1.0, u)
    assert tokens == [walk(logprobs.tolist(), value) for value in u]
    np.testing.assert_allclose(reported, logprobs[tokens].numpy(), rtol=0, atol=1e-6)


def test_float32_logprobs_are_exact_to_float32_rounding() -> None:
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(4)) * 5
    tokens, reported = draw(logits, 0.7, 1.0, np.linspace(0, 0.999999, 500).tolist())
    wide = torch.log_softmax(logits[0].double() / float(np.float32(0.7)), -1)
    np.testing.assert_allclose(reported, wide[tokens].numpy(), rtol=3e-7, atol=2e-6)
    assert (reported <= 0).all()


def test_frequencies_follow_the_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    u = uniforms(np.full(20_000, stream_of(9)), np.arange(20_000)).tolist()
    tokens, _ = draw(logits, 1.0, 1.0, u)
    found = np.bincount(tokens, minlength=4) / len(tokens)
    np.testing.assert_allclose(found, torch.softmax(logits[0], -1).numpy(), atol=0.012)


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    tokens, logprobs = draw(logits, 1.0, 1.0, [0.0, 0.25, 0.4999999999, 0.5, 0.75, 1 - 2.0**-52])
    assert tokens == [1, 1, 1, 3, 3, 3]
    np.testing.assert_allclose(logprobs, np.log(0.5), atol=1e-6)


@given(st.lists(st.integers(0, 6), min_size=2, max_size=12), st.floats(0.01, 0.99))
def test_nucleus_is_the_smallest_sufficient_set(weights: list[int], top_p: float) -> None:
    logits = torch.tensor([weights], dtype=torch.float64)
    mass = torch.softmax(logits[0], -1).numpy()
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    totals = np.cumsum(mass[order])
    if np.abs(totals - top_p).min() < 1e-9:
        return  # on the edge, rounding decides
    kept = set(order[: int(np.searchsorted(totals, top_p)) + 1])
    u = np.linspace(0, 1 - 2.0**-52, 400)
    tokens, logprobs = draw(logits, 1.0, top_p, u.tolist())
    assert set(tokens) <= kept
    smallest = min(mass[token] for token in kept) / sum(mass[token] for token in kept)
    if smallest > 1 / 200:
        assert set(tokens) == kept
    np.testing.assert_allclose(logprobs, np.log(mass[tokens]), atol=1e-6)  # before the cut


def test_top_p_of_one_row_leaves_the_others_alone() -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(5))
    u, ones = np.array([0.2, 0.5, 0.9]), np.ones(3, dtype=np.float32)
    plain = sample(logits, ones, np.ones(3), u)
    mixed = sample(logits, ones, np.array([1.0, 0.3, 1.0]), u)
    assert plain[0][[0, 2]].tolist() == mixed[0][[0, 2]].tolist()
    assert plain[1][[0, 2]].tobytes() == mixed[1][[0, 2]].tobytes()
