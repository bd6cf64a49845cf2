"""``linear_logprob``: checks, dispatch and autograd around the implementations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cod_kernels.dispatch import KernelInputError, choose_backend, first_index, require
from cod_kernels.linear_logprob.reference import Options, backward_chunks, chunk_rows_for, forward_chunks

_OP = "linear_logprob"
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32)


class _LinearLogprob(torch.autograd.Function):
    """Chunked forward; backward from the kept log-probs (one chunk) or by computing the logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: Options
    ) -> tuple[Tensor, Tensor | None]:
        wide = weight.to(options.compute_dtype)
        wide_bias = None if bias is None else bias.to(options.compute_dtype)
        needs_grad = any(ctx.needs_input_grad[:3])
        is_one_chunk = hidden.shape[0] <= options.chunk_rows
        keep = needs_grad and is_one_chunk and options.softcap is None
        logprob, entropy, kept = forward_chunks(hidden, wide, targets, wide_bias, options, keep_logprobs=keep)
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, kept)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropy, kept = ctx.saved_tensors
        if grads[0] is None and grads[1] is None:
            return None, None, None, None, None
        options: Options = ctx.options
        wide = weight.to(options.compute_dtype)
        wide_bias = None if bias is None else bias.to(options.compute_dtype)
        d_hidden, d_weight, d_bias = backward_chunks(
            hidden,
            wide,
            targets,
            wide_bias,
            options,
            (entropy, kept),
            (grads[0], grads[1]),
            ctx.needs_input_grad[:3],
        )
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
        )


def _check_shapes(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    require(hidden.dim() == 2, f"{_OP}: hidden must be [T, H], has shape {list(hidden.shape)}")
    require(weight.dim() == 2, f"{_OP}: weight must be [V, H], has shape {list(weight.shape)}")
    require(
        weight.shape[1] == hidden.shape[1],
        f"{_OP}: weight has width {weight.shape[1]}, hidden has width {hidden.shape[1]}",
    )
    require(
        targets.shape == hidden.shape[:1],
        f"{_OP}: targets must be [{hidden.shape[0]}], has shape {list(targets.shape)}",
    )
    require(hidden.shape[0] > 0, f"{_OP}: hidden has no rows; call it with at least one action token")
    require(weight.shape[0] > 0, f"{_OP}: weight has no rows")
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        require(tensor.dtype in _FLOATS, f"{_OP}: {name} must be floating point, is {tensor.dtype}")
    require(
        hidden.dtype == weight.dtype,
        f"{_OP}: weight is {weight.dtype}, hidden is {hidden.dtype}; make them equal",
    )
    require(targets.dtype in _INTEGERS, f"{_OP}: targets must be int32 or int64, is {targets.dtype}")
    if bias is not None:
        require(
            bias.shape == weight.shape[:1],
            f"{_OP}: bias must be [{weight.shape[0]}], has shape {list(bias.shape)}",
        )
        require(bias.dtype == weight.dtype, f"{_OP}: bias is {bias.dtype}, weight is {weight.dtype}")
    for name, other in (("weight", weight), ("targets", targets), ("bias", bias)):
        if other is not None and other.device != hidden.device:
            raise KernelInputError(f"{_OP}: {name} is on {other.device}, hidden is on {hidden.device}")


def _inverse_temperature(temperature: Tensor | float, hidden: Tensor, dtype: torch.dtype) -> Tensor | float:
    if not isinstance(temperature, Tensor):
        is_fine = 0 < temperature < float("inf")
        require(is_fine, f"{_OP}: temperature must be positive and finite, is {temperature}")
        return 1.0 / temperature
    require(
        temperature.shape == hidden.shape[:1],
        f"{_OP}: temperature must be a number or [{hidden.shape[0]}], has shape {list(temperature.shape)}",
    )
    require(temperature.device == hidden.device, f"{_OP}: temperature is on {temperature.device}")
    if hidden.device.type == "cpu":
        bad = ~((temperature > 0) & torch.isfinite(temperature))
        if bool(bad.any()):
            index = first_index(bad)
            raise KernelInputError(
                f"{_OP}: temperature[{index}] is {float(temperature[index])}; it must be positive and finite"
            )
    return temperature.detach().to(dtype).reciprocal()[:, None]


def _check_values(hidden: Tensor, targets: Tensor, vocab_size: int) -> None:
    """Check values on the CPU; on CUDA this would stall the device, so out-of-range targets trap there
    instead.
    """
    if hidden.device.type != "cpu":
        return
    low, high = torch.aminmax(targets)
    if int(low) < 0 or int(high) >= vocab_size:
        index = first_index((targets < 0) | (targets >= vocab_size))
        raise KernelInputError(
            f"{_OP}: targets[{index}] is {int(targets[index])}, outside the vocabulary of {vocab_size}"
        )


def _check_result(hidden: Tensor, logprob: Tensor) -> None:
    if hidden.device.type != "cpu" or bool(torch.isfinite(logprob).all()):
        return
    bad_rows = ~torch.isfinite(hidden).all(1)
    if bool(bad_rows.any()):
        raise KernelInputError(f"{_OP}: hidden[{first_index(bad_rows)}] is not finite")
    index = first_index(~torch.isfinite(logprob))
    raise KernelInputError(
        f"{_OP}: the log-prob of row {index} is not finite; weight or bias hold NaN or infinity"
    )


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
    backend: str = "auto",
    chunk_rows: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the log-prob of each target token, without ever making the [T, V] logits.

    ``logprob_t = log softmax(cap(hidden_t @ weight.T + bias) / temperature_t)[target_t]`` with
    ``cap(z) = softcap * tanh(z / softcap)``. Differentiable in hidden, weight and bias; the entropy is too.

    Args:
        hidden: [T, H] floating point, T >= 1: the state that predicts target t (for token t of a row, the
            last hidden state of token t - 1).
        weight: [V, H] output head, same dtype.
        targets: int64 or int32 [T] in [0, V).
        temperature: > 0; a number, or one per row [T].
        bias: [V], same dtype, or None.
        softcap: > 0 or None.
        return_entropy: also return the entropy of each row's distribution, in nats.
        process_group: tensor-parallel vocabulary; not available yet and refused unless None.
        backend: ``auto`` (Triton on CUDA, torch elsewhere), ``torch`` or ``triton``.
        chunk_rows: rows of logits held at once; chosen from V when None. Results differ between chunk sizes
            in the last bits only; equal inputs and chunk size give equal bits.

    Returns:
        float32 [T] (float64 when hidden is), natural logarithm; with ``return_entropy`` also the entropy [T].

    Raises:
        KernelInputError: names the argument, and on the CPU the first offending index.
        BackendUnavailableError: ``auto`` or ``triton`` on CUDA: the Triton kernel does not exist yet.
    """
    _check_shapes(hidden, weight, targets, bias)
    require(softcap is None or 0 < softcap < float("inf"), f"{_OP}: softcap must be positive, is {softcap}")
    require(
        process_group is None,
        f"{_OP}: process_group: a vocabulary split over ranks is not available yet; "
        "pass None and the whole head",
    )
    require(chunk_rows is None or chunk_rows >= 1, f"{_OP}: chunk_rows must be at least 1, is {chunk_rows}")
    choose_backend(_OP, backend, hidden.device, has_triton_kernel=False)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    options = Options(
        inverse_temperature=_inverse_temperature(temperature, hidden, dtype),
        softcap=softcap,
        has_entropy=return_entropy,
        chunk_rows=chunk_rows or chunk_rows_for(weight.shape[0]),
        compute_dtype=dtype,
    )
    _check_values(hidden, targets, weight.shape[0])
    logprob, entropy = _LinearLogprob.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets.long(), options
    )
    _check_result(hidden, logprob)
    return (logprob, entropy) if return_entropy else logprob
