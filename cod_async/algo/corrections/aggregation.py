"""From tokens to one number: the weight that every token of a segment has in the loss.

Weights come from the whole of what one optimiser step trains on, so that losses and gradients of
micro-batches add up to those of the step, however it is cut.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_weights(num_tokens: Tensor, aggregation: str, *, fixed_length_tokens: int = 0) -> Tensor:
    """Return the weight of each token of a segment, float64 [N].

    With n_s tokens in segment s, S segments that have any, and A tokens in all: ``token_mean`` 1 / A (the
    paper's, arXiv 2606.20002, equation of the loss); ``segment_mean`` 1 / (S n_s) (GSPO, arXiv 2507.18071);
    ``sequence_mean`` 1 / S; ``fixed_length`` 1 / (S L), which gives no length a preference (Dr. GRPO, arXiv
    2503.20783).

    Args:
        num_tokens: [N] action tokens of each segment, at least one above 0.
        aggregation: one of the four.
        fixed_length_tokens: L of ``fixed_length``.

    Raises:
        ValueError: no such aggregation.
    """
    counts = num_tokens.double()
    num_segments = (counts > 0).sum()
    if aggregation == "token_mean":
        return torch.ones_like(counts) / counts.sum()
    if aggregation == "segment_mean":
        return 1 / (num_segments * counts.clamp(min=1))
    if aggregation == "sequence_mean":
        return torch.ones_like(counts) / num_segments
    if aggregation == "fixed_length":
        return torch.ones_like(counts) / (num_segments * fixed_length_tokens)
    raise ValueError(f"no aggregation {aggregation!r}")
