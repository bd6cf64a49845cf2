"""Sampling without a generator's state: the random number of a token is a function of (seed, token index).

A request's random numbers are SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", 2014) started at a mixed seed and jumped to the token's index, so they depend on nothing that
runs beside it and need no state between tokens. The token is drawn by inverting the cumulative distribution,
accumulated in float64: one uniform number a token, no noise tensor of vocabulary size. The reported log-prob
is ``log_softmax(logits / temperature)`` at the token, before any nucleus cut.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

UIntArray = npt.NDArray[np.uint64]
FloatArray = npt.NDArray[np.float64]


def _mix(x: UIntArray) -> UIntArray:
    """SplitMix64's output function, a bijection of 64 bits; arithmetic modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def stream_of(seed: int) -> np.uint64:
    """Return the start of a request's random stream; neighbouring seeds start far apart."""
    return np.uint64(_mix(np.array([seed % (1 << 64)], dtype=np.uint64) ^ _GOLDEN)[0])


def uniforms(streams: UIntArray, indices: npt.NDArray[np.int64]) -> FloatArray:
    """Return one number per row, uniform on [0, 1) in steps of 2^-52.

    Args:
        streams: uint64 [N], from :func:`stream_of`.
        indices: int64 [N], index of the token within its completion, from 0.

    Returns:
        float64 [N]. 52 bits, not 53, so that ``u * total < total`` holds after rounding for every total > 0.
    """
    bits = _mix(streams + (indices.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _nucleus(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """Zero everything outside the smallest set of most likely tokens whose mass reaches ``top_p`` [n, 1].

    Nucleus sampling (arXiv 1904.09751). Ties are broken by token id, lower first.
    """
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1, dtype=torch.float64) - ordered
    kept = ordered.masked_fill(before >= top_p, 0.0)
    kept[:, 0] = ordered[:, 0]
    return torch.zeros_like(probabilities).scatter_(-1, order, kept)


def sample(
    logits: Tensor,
    temperature: npt.NDArray[np.float32],
    top_p: FloatArray,
    uniform: FloatArray,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Draw one token per row.

    Args:
        logits: float [N, V]; float64 stays float64, everything else is widened to float32.
        temperature: float32 [N], > 0.
        top_p: float64 [N], in (0, 1].
        uniform: float64 [N], in [0, 1), from :func:`uniforms`.

    Returns:
        Token ids int64 [N], and log-probs float32 [N] of the tempered distribution before the nucleus cut. A
        row whose logits are not finite has a log-prob that is not finite; its token is meaningless but in
        range.
    """
    scores = logits if logits.dtype == torch.float64 else logits.float()
    if (temperature != 1.0).any():
        scores = scores / torch.from_numpy(temperature)[:, None].to(scores.dtype)
    logprobs = torch.log_softmax(scores, dim=-1)
    probabilities = logprobs.exp()
    cut = np.flatnonzero(top_p < 1.0)
    if cut.size:
        rows = torch.from_numpy(cut)
        probabilities[rows] = _nucleus(probabilities[rows], torch.from_numpy(top_p[cut])[:, None])
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    target = torch.from_numpy(uniform)[:, None] * cumulative[:, -1:]
    # The first index whose cumulative mass exceeds the target: a token of probability 0 is never that index.
    tokens = torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[-1] - 1)
    return tokens[:, 0].numpy(), logprobs.gather(-1, tokens)[:, 0].float().numpy()
