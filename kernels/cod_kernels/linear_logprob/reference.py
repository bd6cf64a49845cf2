"""The definition, and the torch twin: the same numbers chunk by chunk, so that no [T, V] tensor is ever
whole.

The definition is one call of ``log_softmax``. The twin walks over chunks of rows with one [C, V] buffer. When
everything fits into one chunk, it keeps the log-probs for the backward pass (three
matrix products in all); otherwise the backward pass computes the logits again (four).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 21
"""Logits in one chunk (8 MB in float32): large enough for the matrix product, small enough for the cache."""

MIN_CHUNK_ROWS = 128

_LOG_ZERO = -1e30


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor | float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (log-prob of the target, entropy), [T] each, by the book, in the dtype of ``hidden``.

    For tests: it makes the whole [T, V] tensor and is differentiated by autograd.
    """
    logits = hidden @ weight.t()
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(logits.dtype)[:, None]
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None]).squeeze(1), entropy


@dataclass(frozen=True)
class Options:
    """Everything of a call that is not differentiated.

    Attributes:
        inverse_temperature: float or tensor [T, 1] in the compute dtype.
        softcap: ceiling of the logits' size, or None.
        has_entropy: whether the entropy is computed.
        chunk_rows: rows per chunk.
        compute_dtype: float32, or float64 when the hidden states are.
    """

    inverse_temperature: Tensor | float
    softcap: float | None
    has_entropy: bool
    chunk_rows: int
    compute_dtype: torch.dtype

    def inverse(self, rows: slice) -> Tensor | float:
        """Return 1 / temperature of a chunk, broadcastable to [C, V]."""
        value = self.inverse_temperature
        return value[rows] if isinstance(value, Tensor) else value


def chunk_rows_for(vocab_size: int) -> int:
    """Return how many rows of logits fit into one chunk."""
    return max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // vocab_size)


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: slice, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Return (scaled logits of a chunk [C, V], d softcap / d logit or None)."""
    z = hidden[rows].to(options.compute_dtype) @ weight.t()
    if bias is not None:
        z += bias
    slope = None
    if options.softcap is not None:
        z.div_(options.softcap).tanh_()
        slope = 1 - z.square()
        z.mul_(options.softcap)
    inverse = options.inverse(rows)
    if isinstance(inverse, Tensor) or inverse != 1.0:
        z.mul_(inverse)
    return z, slope


def forward_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    options: Options,
    *,
    keep_logprobs: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run the forward pass.

    Args:
        hidden: [T, H].
        weight: [V, H] in the compute dtype.
        targets: int64 [T].
        bias: [V] in the compute dtype or None.
        options: the rest.
        keep_logprobs: return the log-probs of the whole vocabulary; only when there is one chunk.

    Returns:
        (log-prob of the target [T], entropy [T] or None, all log-probs [T, V] or None), in the compute dtype.
    """
    num_rows = hidden.shape[0]
    logprob = torch.empty(num_rows, dtype=options.compute_dtype, device=hidden.device)
    entropy = torch.empty_like(logprob) if options.has_entropy else None
    kept = None
    for start in range(0, num_rows, options.chunk_rows):
        rows = slice(start, min(start + options.chunk_rows, num_rows))
        z, _ = _logits(hidden, weight, bias, rows, options)
        log_p = torch.log_softmax(z, dim=1)
        logprob[rows] = log_p.gather(1, targets[rows, None]).squeeze(1)
        if entropy is not None:
            entropy[rows] = entropy_of(log_p, out=z)
        kept = log_p if keep_logprobs else None
    return logprob, entropy, kept


def entropy_of(log_p: Tensor, out: Tensor) -> Tensor:
    """Return -sum p log p of each row; ``out`` is scratch space. A log-prob of minus infinity adds
    nothing.
    """
    p = torch.exp(log_p, out=out)
    return -torch.einsum("cv,cv->c", p, log_p.clamp(min=_LOG_ZERO))


def backward_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    options: Options,
    saved: tuple[Tensor | None, Tensor | None],
    grads: tuple[Tensor | None, Tensor | None],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Run the backward pass.

    With p the softmax and g, h the gradients of log-prob and entropy H:
    ``dz_v = g (1[v = y] - p_v) - h p_v (log p_v + H)``, then the chain through temperature and soft-cap.

    Args:
        hidden: [T, H].
        weight: [V, H] in the compute dtype.
        targets: int64 [T].
        bias: [V] in the compute dtype or None.
        options: as in the forward pass.
        saved: (entropy [T] or None, all log-probs [T, V] or None).
        grads: gradients of (log-prob, entropy), [T] or None each.
        needs: whether (hidden, weight, bias) need a gradient.

    Returns:
        Gradients of (hidden, weight, bias) in the compute dtype, None where not needed.
    """
    entropy, kept = saved
    grad_logprob, grad_entropy = grads
    d_hidden = (
        torch.empty(hidden.shape, dtype=options.compute_dtype, device=hidden.device) if needs[0] else None
    )
    d_weight = torch.zeros_like(weight) if needs[1] else None
    d_bias = torch.zeros_like(weight[:, 0]) if needs[2] else None
    for start in range(0, hidden.shape[0], options.chunk_rows):
        rows = slice(start, min(start + options.chunk_rows, hidden.shape[0]))
        slope = None
        if kept is None:
            z, slope = _logits(hidden, weight, bias, rows, options)
            log_p = torch.log_softmax(z, dim=1)
            dz = torch.exp(log_p, out=z)
        else:
            log_p = kept
            dz = torch.exp(log_p)
        inner = None
        if grad_entropy is not None and entropy is not None:
            h = grad_entropy[rows].to(options.compute_dtype)
            inner = (log_p.clamp(min=_LOG_ZERO) + entropy[rows, None]).mul_(dz).mul_(h[:, None])
        if grad_logprob is None:
            dz.zero_()
        else:
            g = grad_logprob[rows].to(options.compute_dtype)
            dz.mul_(-g[:, None])
            dz[torch.arange(dz.shape[0], device=dz.device), targets[rows]] += g
        if inner is not None:
            dz -= inner
        inverse = options.inverse(rows)
        if isinstance(inverse, Tensor) or inverse != 1.0:
            dz *= inverse
        if slope is not None:
            dz *= slope
        if d_hidden is not None:
            torch.mm(dz, weight, out=d_hidden[rows])
        if d_weight is not None:
            d_weight.addmm_(dz.t(), hidden[rows].to(options.compute_dtype))
        if d_bias is not None:
            d_bias += dz.sum(0)
    return d_hidden, d_weight, d_bias
