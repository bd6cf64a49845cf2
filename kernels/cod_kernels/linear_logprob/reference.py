"""The definition, and the torch twin: the same numbers chunk by chunk, so that no [T, V] tensor is ever
whole.

The definition is one call of ``log_softmax``. The twin holds one chunk of logits and one of probabilities,
both small enough for the cache, and works in place. Where only the log-prob is differentiated, the row's
coefficient is applied to [C, H] tensors instead of [C, V], which leaves three matrix products and one softmax
pass as all vocabulary-sized work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cod_kernels.linear_logprob.chunks import Engine, Problem, Stats

CHUNK_ELEMENTS = 1 << 21
"""Logits in one chunk (8 MB in float32): large enough for the matrix product, small enough for the cache."""

MIN_CHUNK_ROWS = 128

_SMALLEST_PROBABILITY = 1e-30
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


def chunk_rows_for(vocab_size: int) -> int:
    """Return how many rows of logits fit into one chunk."""
    return max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // vocab_size)


class TorchEngine(Engine):
    """The twin: logits ``z`` and their softmax ``p`` of one chunk at a time."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        dtype = problem.compute_dtype
        shape = (min(problem.chunk_rows, problem.hidden.shape[0]), problem.weight.shape[0])
        self._weight = problem.weight.to(dtype)
        self._bias = None if problem.bias is None else problem.bias.to(dtype)
        self._z = torch.empty(shape, dtype=dtype, device=problem.hidden.device)
        self._p = torch.empty_like(self._z)
        self._slope: Tensor | None = None
        self._lse = self._z[:, 0]

    def forward(self, rows: slice, *, is_kept: bool = True) -> Stats:
        """Fill the buffers with a chunk; see :class:`Engine`."""
        problem = self.problem
        count = rows.stop - rows.start
        z, p = self._z[:count], self._p[:count]
        torch.mm(problem.hidden[rows].to(z.dtype), self._weight.t(), out=z)
        if self._bias is not None:
            z += self._bias
        if problem.softcap is not None:
            z.div_(problem.softcap).tanh_()
            self._slope = 1 - z.square()
            z.mul_(problem.softcap)
        inverse = problem.inverse(rows)
        if isinstance(inverse, Tensor) or inverse != 1.0:
            z.mul_(inverse)
        torch.softmax(z, 1, out=p)
        index, is_owner = problem.local_targets(rows)
        target_logit = z.gather(1, index).squeeze(1)
        logprob, self._lse = _target_logprob(z, p, target_logit, index)
        if is_owner is not None:
            logprob = torch.where(is_owner, logprob, torch.nan)
        entropy = None
        if problem.has_entropy:
            z.sub_(self._lse[:, None])  # from here on the log-probs
            if self._bias is not None:
                z.clamp_(min=_LOG_ZERO)  # a bias of minus infinity takes a token out of the vocabulary
            entropy = -torch.einsum("cv,cv->c", p, z)
        self.fresh_rows = rows
        return Stats(logprob, self._lse, entropy)

    def backward(
        self, rows: slice, lse: Tensor, entropy: Tensor | None, g: Tensor | None, h: Tensor | None
    ) -> None:
        """Add the chunk's gradients; see :class:`Engine`.

        With p the softmax and g, h the gradients of log-prob and entropy H:
        ``dz_v = g (1[v = y] - p_v) - h p_v (log p_v + H)``, then the chain through temperature and soft-cap.
        """
        problem = self.problem
        index, is_owner = problem.local_targets(rows)
        inverse = problem.inverse(rows)
        g = torch.zeros_like(lse) if g is None else g.to(lse.dtype)
        owned = g if is_owner is None else g * is_owner
        count = rows.stop - rows.start
        scale = None if problem.group is None else (self._lse[:count] - lse).exp()
        if h is None and problem.softcap is None and self.d_bias is None and scale is None:
            self._add_by_rows(rows, index, is_owner, g[:, None] * inverse)
            return
        self.fresh_rows = None
        dz, z = self._p[:count], self._z[:count]
        if h is not None and entropy is not None:
            z.add_((self._lse[:count] - lse + entropy)[:, None]).mul_(h[:, None]).add_(g[:, None])
            dz.mul_(z).neg_()
        else:
            dz.mul_(-g[:, None])
        if scale is not None:
            dz.mul_(scale[:, None])
        dz.scatter_add_(1, index, owned[:, None])
        if isinstance(inverse, Tensor) or inverse != 1.0:
            dz *= inverse
        if self._slope is not None:
            dz *= self._slope[:count]
        if self.d_hidden is not None:
            torch.mm(dz, self._weight, out=self.d_hidden[rows])
        if self.d_weight is not None:
            self.d_weight.addmm_(dz.t(), problem.hidden[rows].to(dz.dtype))
        if self.d_bias is not None:
            self.d_bias += dz.sum(0)

    def _add_by_rows(self, rows: slice, index: Tensor, is_owner: Tensor | None, factor: Tensor) -> None:
        """Add gradients with the coefficients applied to [C, H] tensors; the buffers stay as they are."""
        p = self._p[: rows.stop - rows.start]
        kept = p.gather(1, index)
        p.scatter_(1, index, kept - (1.0 if is_owner is None else is_owner[:, None].to(p.dtype)))
        if self.d_hidden is not None:
            torch.mm(p, self._weight, out=self.d_hidden[rows]).mul_(-factor)
        if self.d_weight is not None:
            self.d_weight.addmm_(p.t(), self.problem.hidden[rows].to(p.dtype) * factor, alpha=-1)
        p.scatter_(1, index, kept)


def _target_logprob(z: Tensor, p: Tensor, target_logit: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return (log-prob of the target, log of the sum of exponentials) of each row.

    The softmax holds both already, unless the target's probability underflows; those rows are summed anew.
    """
    if z.device.type != "cpu":  # looking for such rows would stall the device
        lse = torch.logsumexp(z, 1)
        return target_logit - lse, lse
    probability = p.gather(1, index).squeeze(1)
    logprob = probability.log()
    lse = target_logit - logprob
    is_tiny = probability < _SMALLEST_PROBABILITY
    if bool(is_tiny.any()):
        lse[is_tiny] = torch.logsumexp(z[is_tiny], 1)
        logprob[is_tiny] = target_logit[is_tiny] - lse[is_tiny]
    return logprob, lse
