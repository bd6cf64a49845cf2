"""RED: re-weighting advantages until negative and positive tokens balance.

With a token-mean loss the mean token advantage is negative when failing episodes are longer, and drifts
further down, which destabilises training. RED multiplies each advantage by exp(A / T), which shrinks negative
and amplifies positive ones, with the temperature T at which the token-weighted sum ``F(T) = sum_i L_i A_i
exp(A_i / T)`` is zero. F falls with T, so the root is unique. A set whose sum is not negative is left alone.

Source: arXiv 2606.20002, adaptive reward-distribution balancing. ``parity`` reproduces the published code's
coarse bisection (at most 20 halvings of [0.8, 100], stop below width 0.05, the last midpoint); otherwise the
root is exact, with the same floor of 0.8 on T and no ceiling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MIN_TEMPERATURE = 0.8
"""Floor of T: with unit rewards it keeps factors between exp(-1.25) and exp(1.25)."""

_PARITY_HIGH = 100.0
_PARITY_WIDTH = 0.05
_PARITY_HALVINGS = 20
_ROUNDING = 1e-12
_MAX_EXPONENT = 700.0


def _is_negative(advantages: Sequence[float], num_tokens: Sequence[int], temperature: float) -> bool:
    """Say whether F(T) < 0.

    The sign does not change when F is scaled by a positive number, so every exponent is shifted by the
    largest one when it would overflow. Otherwise ``F(T) = F(inf) + sum L A expm1(A/T)`` keeps full precision
    for large T.
    """
    top = max(advantages) / temperature
    if top > _MAX_EXPONENT:
        return (
            math.fsum(
                n * a * math.exp(a / temperature - top) for a, n in zip(advantages, num_tokens, strict=True)
            )
            < 0
        )
    terms = [n * a for a, n in zip(advantages, num_tokens, strict=True)]
    terms += [n * a * math.expm1(a / temperature) for a, n in zip(advantages, num_tokens, strict=True)]
    return math.fsum(terms) < 0


def red_temperature(
    advantages: Sequence[float], num_tokens: Sequence[int], *, parity: bool = False
) -> float | None:
    """Return the balancing temperature of one set, or None when the set needs none.

    Args:
        advantages: one finite number per episode.
        num_tokens: generated tokens of each episode (>= 0).
        parity: reproduce the published coarse bisection instead of the root.

    Returns:
        T >= 0.8 (the root to the last bit, or the floor when the root lies below it), or None when
        ``sum L_i A_i >= 0`` up to a rounding error of 1e-12 of ``sum L_i |A_i|``.
    """
    products = [n * a for a, n in zip(advantages, num_tokens, strict=True)]
    if math.fsum(products) >= -_ROUNDING * math.fsum(abs(product) for product in products):
        return None
    if parity:
        return _coarse_bisection(advantages, num_tokens)
    low = MIN_TEMPERATURE
    if _is_negative(advantages, num_tokens, low):
        return low
    high = 2 * low
    while not _is_negative(advantages, num_tokens, high):  # ends: F(inf) < 0
        low, high = high, 2 * high
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle
        if _is_negative(advantages, num_tokens, middle):
            high = middle
        else:
            low = middle


def _coarse_bisection(advantages: Sequence[float], num_tokens: Sequence[int]) -> float:
    low, high = MIN_TEMPERATURE, _PARITY_HIGH
    middle = (low + high) / 2
    for _ in range(_PARITY_HALVINGS):
        middle = (low + high) / 2
        if _is_negative(advantages, num_tokens, middle):
            high = middle
        else:
            low = middle
        if high - low < _PARITY_WIDTH:
            break
    return middle


def reweight(advantage: float, temperature: float | None) -> float:
    """Return ``A * exp(A / T)``, or A itself when the set needs no re-weighting.

    Raises:
        OverflowError: the factor is beyond the range of a double; scale the rewards down.
    """
    return advantage if temperature is None else advantage * math.exp(advantage / temperature)
