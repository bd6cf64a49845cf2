"""``linear_logprob``: dispatch and autograd around the engines."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cod_kernels.dispatch import choose_backend
from cod_kernels.linear_logprob.checks import check_call, check_result, check_values, inverse_temperature
from cod_kernels.linear_logprob.chunks import (
    Engine,
    FirstProduct,
    Problem,
    Stats,
    backward_walk,
    forward_walk,
)
from cod_kernels.linear_logprob.exponentials import TorchExponentials
from cod_kernels.linear_logprob.memory import fused_chunk_rows, plain_chunk_rows
from cod_kernels.linear_logprob.reference import TorchEngine, chunk_rows_for

_OP = "linear_logprob"


def make_engine(problem: Problem, backend: str) -> Engine:
    """Return the engine of ``torch`` or ``triton`` and of the problem's first product."""
    if problem.first_product == "fused":
        if backend == "triton":
            from cod_kernels.linear_logprob.exponentials_triton import TritonExponentials

            return TritonExponentials(problem)
        return TorchExponentials(problem)
    if backend == "triton":
        from cod_kernels.linear_logprob.kernel import TritonEngine

        return TritonEngine(problem)
    return TorchEngine(problem)


def default_chunk_rows(problem: Problem, backend: str) -> int:
    """Return how many rows a chunk has unless the caller says."""
    size, width = problem.weight.shape
    if backend != "triton":
        return chunk_rows_for(size)
    if problem.first_product == "plain":
        return plain_chunk_rows(size)
    from cod_kernels.linear_logprob.exponentials_triton import NARROW

    # Of the narrowest tile, which has the most partial sums: a chunk has the same rows with every tile.
    return fused_chunk_rows(size, width, problem.hidden.dtype, NARROW.vocab)


def with_plain_product(problem: Problem, backend: str) -> Problem:
    """Return the same problem with stored logits, which the gradient of the entropy needs."""
    problem = dataclasses.replace(problem, first_product="plain")
    return dataclasses.replace(problem, chunk_rows=default_chunk_rows(problem, backend))


def make_problem(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor,
    bias: Tensor | None,
    softcap: float | None,
    has_entropy: bool,
    chunk_rows: int | None,
    group: Any,
    vocab_start: int | None,
    backend: str,
    first_product: FirstProduct,
) -> tuple[Problem, str]:
    """Check the arguments and return (problem without history, implementation)."""
    check_call(hidden, weight, targets, bias, softcap, chunk_rows, first_product)
    chosen = choose_backend(_OP, backend, hidden.device)
    start = 0
    if group is not None:
        start = dist.get_rank(group) * weight.shape[0] if vocab_start is None else vocab_start
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    problem = Problem(
        hidden=hidden.detach(),
        weight=weight.detach(),
        targets=targets,
        bias=None if bias is None else bias.detach(),
        inverse_temperature=inverse_temperature(temperature, hidden, dtype),
        softcap=softcap,
        has_entropy=has_entropy,
        chunk_rows=chunk_rows or 0,
        compute_dtype=dtype,
        group=group,
        vocab_start=start,
        first_product=first_product,
    )
    if chunk_rows is None:
        problem = dataclasses.replace(problem, chunk_rows=default_chunk_rows(problem, chosen))
    check_values(problem)
    return problem, chosen


class _LinearLogprob(torch.autograd.Function):
    """Chunked forward; backward from the kept logits (one chunk) or by computing them again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem, backend: str
    ) -> tuple[Tensor, Tensor | None]:
        engine = make_engine(problem, backend)
        is_kept = any(ctx.needs_input_grad[:3]) and hidden.shape[0] <= problem.chunk_rows
        if problem.first_product == "fused" and problem.has_entropy:
            is_kept = False  # its gradient needs logits, which exponentials in bf16 do not give back
        stats: Stats = forward_walk(engine, is_kept=is_kept)
        ctx.engine = engine if is_kept else None
        ctx.problem, ctx.backend = problem, backend
        ctx.set_materialize_grads(False)
        entropy = stats.entropy
        ctx.save_for_backward(hidden, weight, bias, stats.lse, entropy)
        return stats.logprob, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, lse, entropy = ctx.saved_tensors
        if grads[0] is None and grads[1] is None:
            return None, None, None, None, None
        problem: Problem = ctx.problem
        if grads[1] is not None and problem.first_product == "fused":
            problem = with_plain_product(problem, ctx.backend)
        engine = ctx.engine or make_engine(problem, ctx.backend)
        engine.want(ctx.needs_input_grad[:3])
        backward_walk(engine, lse, entropy, grads[0], grads[1])
        found = ((engine.d_hidden, hidden), (engine.d_weight, weight), (engine.d_bias, bias))
        engine.d_hidden = engine.d_weight = engine.d_bias = None
        return (*(None if grad is None else grad.to(of.dtype) for grad, of in found), None, None)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    return_entropy: bool = False,
    process_group: Any = None,
    vocab_start: int | None = None,
    backend: str = "auto",
    chunk_rows: int | None = None,
    first_product: FirstProduct = "plain",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the log-prob of each target token, without ever making the [T, V] logits.

    ``logprob_t = log softmax(cap(hidden_t @ weight.T + bias) / temperature_t)[target_t]`` with
    ``cap(z) = softcap * tanh(z / softcap)``. Differentiable in hidden, weight and bias; the entropy is too.

    Args:
        hidden: [T, H] floating point, T >= 1: the state that predicts target t (for token t of a row, the
            last hidden state of token t - 1).
        weight: [V, H] output head, same dtype; with ``process_group`` this rank's rows of it.
        targets: int64 or int32 [T] in [0, V); with ``process_group`` ids of the whole vocabulary.
        temperature: > 0; a number, or one per row [T].
        bias: [V], same dtype, or None.
        softcap: > 0 or None.
        return_entropy: also return the entropy of each row's distribution, in nats.
        process_group: ranks that each hold some rows of the head, and the same hidden states and targets;
            results and the gradient of hidden are those of the whole head, on every rank.
        vocab_start: first token id of this rank's rows; rank x V when None (equal shares).
        backend: ``auto`` (Triton on CUDA, torch elsewhere), ``torch`` or ``triton``.
        chunk_rows: rows of logits held at once; chosen from V when None. Results differ between chunk sizes
            in the last bits only; equal inputs and chunk size give equal bits.
        first_product: ``plain``: the first matrix product stores a chunk of float32 logits, which other
            passes read. ``fused``: it ends in exponentials relative to the target's logit (README.md); bf16
            on CUDA, compute capability 9.x or 10.x, log-probs above -104. The gradient of the entropy takes
            the plain one in the backward pass.

    Returns:
        float32 [T] (float64 when hidden is), natural logarithm; with ``return_entropy`` also the entropy [T].

    Raises:
        KernelInputError: names the argument, and on the CPU the first offending index; on CUDA bad rows are
            NaN and :func:`cod_kernels.raise_faults` names the first.
        BackendUnavailableError: Triton is wanted and cannot be had.
    """
    problem, chosen = make_problem(
        hidden,
        weight,
        targets,
        temperature=temperature,
        bias=bias,
        softcap=softcap,
        has_entropy=return_entropy,
        chunk_rows=chunk_rows,
        group=process_group,
        vocab_start=vocab_start,
        backend=backend,
        first_product=first_product,
    )
    logprob, entropy = _LinearLogprob.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, problem, chosen
    )
    check_result(problem, logprob.detach())
    return (logprob, entropy) if return_entropy else logprob
