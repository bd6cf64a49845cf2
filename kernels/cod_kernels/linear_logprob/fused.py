"""The loss inside the chunk: while a chunk's logits are there, their loss is taken and differentiated.

The loss of a token depends on its own log-prob and on numbers known before the step, so its coefficient is
known as soon as the chunk's log-probs are. The logits then need not be computed a second time: three matrix
products in all instead of four.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cod_kernels.dispatch import require
from cod_kernels.linear_logprob.checks import check_result
from cod_kernels.linear_logprob.chunks import Engine, FirstProduct, Stats, join
from cod_kernels.linear_logprob.op import make_engine, make_problem
from cod_kernels.segment_loss.checks import check_call as check_loss
from cod_kernels.segment_loss.op import evaluate, loss_inputs, merge_metrics
from cod_kernels.segment_loss.reference import METRIC_NAMES, LossInputs, LossOptions

_OP = "linear_segment_loss"
_FIRST_BAD = METRIC_NAMES.index("first_bad_token")
DEFAULT_OPTIONS = LossOptions()


def loss_walk(
    engine: Engine, inputs: LossInputs, options: LossOptions, num_trained: int, backend: str
) -> tuple[Tensor, Tensor, Stats]:
    """Return (loss, metrics, statistics of all rows) and leave the gradients in the engine.

    Args:
        engine: with room for the gradients that are wanted.
        inputs: of the loss; ``current`` is not looked at.
        options: the loss.
        num_trained: rows from here on get no gradient.
        backend: of the loss, ``torch`` or ``triton``.
    """
    problem = engine.problem
    losses, metrics, statistics = [], [], []
    for rows in problem.chunks():
        is_trained = rows.start < num_trained and engine.is_wanted
        stats = engine.whole(engine.forward(rows, is_kept=is_trained), rows)
        part = inputs.rows(rows, stats.logprob)
        if stats.entropy is not None:
            part = LossInputs(**{**vars(part), "entropy": stats.entropy})
        loss, g, numbers = evaluate(part, options, backend)
        numbers[_FIRST_BAD] += rows.start
        losses.append(loss)
        metrics.append(numbers)
        statistics.append(stats)
        if not is_trained or (g.device.type == "cpu" and not bool(g.any())):
            continue
        trained = slice(rows.start, min(rows.stop, num_trained))
        count = trained.stop - trained.start
        engine.backward(trained, stats.lse[:count], None, g[:count], None)
    engine.finish()
    return torch.stack(losses).sum(), merge_metrics(metrics), join(statistics)


class _LinearSegmentLoss(torch.autograd.Function):
    """Gradients are made in the forward pass; backward scales and rounds them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        engine, inputs, options, num_trained, backend = call
        engine.want(ctx.needs_input_grad[:3])
        loss, metrics, stats = loss_walk(engine, inputs, options, num_trained, backend)
        ctx.gradients = (engine.d_hidden, engine.d_weight, engine.d_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, weight.dtype)
        ctx.set_materialize_grads(False)
        outputs = [metrics, stats.logprob] + ([] if stats.entropy is None else [stats.entropy])
        ctx.mark_non_differentiable(*outputs)
        return loss, metrics, stats.logprob, outputs[2] if len(outputs) == 3 else None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream = grads[0]
        if upstream is None:
            return None, None, None, None
        is_one = upstream.device.type == "cpu" and float(upstream) == 1.0
        results: list[Tensor | None] = []
        for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True):
            if gradient is None:
                results.append(None)
            elif is_one:
                results.append(gradient.to(dtype))
            else:
                out = torch.empty_like(gradient, dtype=dtype)
                results.append(torch.mul(gradient, upstream.to(gradient.dtype), out=out))
        return (*results, None)


def linear_segment_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    behavior_logprobs: Tensor,
    segment_ids: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    has_entropy: bool = False,
    negative_advantages: Tensor | None = None,
    proximal_logprobs: Tensor | None = None,
    proximal_mix: Tensor | None = None,
    segment_log_ratios: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    options: LossOptions = DEFAULT_OPTIONS,
    m2po_bound: Tensor | float | None = None,
    num_trained: int | None = None,
    process_group: Any = None,
    vocab_start: int | None = None,
    backend: str = "auto",
    chunk_rows: int | None = None,
    first_product: FirstProduct = "plain",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, metrics, log-probs): ``segment_loss(linear_logprob(...), ...)`` in three matrix products.

    Arguments that ``linear_logprob`` or ``segment_loss`` have too mean the same here.

    Args:
        hidden: [A, H], differentiable.
        weight: [V, H], differentiable; its gradient is added up in float32.
        targets: int64 or int32 [A].
        behavior_logprobs: [A].
        segment_ids: int32 or int64 [A] in [0, N).
        advantages: [N].
        weights: [N].
        temperature: number or [A].
        bias: [V] or None, differentiable.
        softcap: > 0 or None.
        has_entropy: put the entropy into the metrics; it has no gradient here.
        negative_advantages: [N] or None.
        proximal_logprobs: [A] or None.
        proximal_mix: [A] or None.
        segment_log_ratios: [N] or None.
        reference_logprobs: [A] or None.
        options: the switches of the loss.
        m2po_bound: with clip ``m2po``.
        num_trained: rows from this one on get no gradient and cost one matrix product; all get one when None.
            Put tokens of segments without advantage last (the CPU finds chunks without gradient by itself).
        process_group: ranks over which the vocabulary is split.
        vocab_start: first token id of this rank's rows.
        backend: ``auto``, ``torch`` or ``triton``.
        chunk_rows: rows of logits held at once.
        first_product: ``plain`` or ``fused``, as of :func:`linear_logprob`.

    Returns:
        (loss, a scalar to call backward on; metrics; log-probs [A] without history).

    Raises:
        KernelInputError: names the argument, and on the CPU the first offending index.
        BackendUnavailableError: Triton is wanted and cannot be had.
    """
    problem, chosen = make_problem(
        hidden,
        weight,
        targets,
        temperature=temperature,
        bias=bias,
        softcap=softcap,
        has_entropy=has_entropy,
        chunk_rows=chunk_rows,
        group=process_group,
        vocab_start=vocab_start,
        backend=backend,
        first_product=first_product,
    )
    count = hidden.shape[0]
    num_trained = count if num_trained is None else num_trained
    require(0 <= num_trained <= count, f"{_OP}: num_trained must be in [0, {count}], is {num_trained}")
    like = torch.empty(count, dtype=problem.compute_dtype, device=hidden.device)
    tokens = {
        "current_logprobs": like, "behavior_logprobs": behavior_logprobs,
        "proximal_logprobs": proximal_logprobs, "proximal_mix": proximal_mix,
        "reference_logprobs": reference_logprobs, "entropy": None,
    }  # fmt: skip
    segments = {
        "advantages": advantages, "weights": weights, "negative_advantages": negative_advantages,
        "segment_log_ratios": segment_log_ratios,
    }  # fmt: skip
    check_loss(tokens, segment_ids, segments, options, m2po_bound)
    inputs = loss_inputs(like, tokens, segment_ids, segments, m2po_bound)
    call = (make_engine(problem, chosen), inputs, options, num_trained, chosen)
    loss, metrics, logprob, _ = _LinearSegmentLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, call
    )
    check_result(problem, logprob)
    return loss, metrics, logprob
