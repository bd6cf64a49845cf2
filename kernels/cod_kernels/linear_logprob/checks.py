"""What ``linear_logprob`` refuses: every message names the argument, and for values the first bad index."""

from __future__ import annotations

import torch
from torch import Tensor

from cod_kernels.dispatch import KernelInputError, first_index, require
from cod_kernels.faults import NOT_FINITE, OUT_OF_REACH, OUTSIDE_VOCABULARY, note_fault
from cod_kernels.linear_logprob.chunks import Problem

_OP = "linear_logprob"
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32)


def check_call(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    chunk_rows: int | None,
    first_product: str,
) -> None:
    """Check shapes, dtypes, devices and numbers.

    Raises:
        KernelInputError: something is wrong.
    """
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
    require(softcap is None or 0 < softcap < float("inf"), f"{_OP}: softcap must be positive, is {softcap}")
    require(
        first_product in ("plain", "fused"),
        f"{_OP}: first_product is {first_product!r}; it must be 'plain' or 'fused'",
    )
    require(chunk_rows is None or chunk_rows >= 1, f"{_OP}: chunk_rows must be at least 1, is {chunk_rows}")


def inverse_temperature(temperature: Tensor | float, hidden: Tensor, dtype: torch.dtype) -> Tensor | float:
    """Return 1 / temperature: a number, or [T, 1] in ``dtype`` (on CUDA NaN where it is not positive).

    Raises:
        KernelInputError: wrong shape, device or value.
    """
    if not isinstance(temperature, Tensor):
        is_fine = 0 < temperature < float("inf")
        require(is_fine, f"{_OP}: temperature must be positive and finite, is {temperature}")
        return 1.0 / temperature
    require(
        temperature.shape == hidden.shape[:1],
        f"{_OP}: temperature must be a number or [{hidden.shape[0]}], has shape {list(temperature.shape)}",
    )
    require(temperature.device == hidden.device, f"{_OP}: temperature is on {temperature.device}")
    is_good = (temperature > 0) & torch.isfinite(temperature)
    if hidden.device.type == "cpu" and not bool(is_good.all()):
        index = first_index(~is_good)
        raise KernelInputError(
            f"{_OP}: temperature[{index}] is {float(temperature[index])}; it must be positive and finite"
        )
    inverse = temperature.detach().to(dtype).reciprocal()
    return torch.where(is_good, inverse, torch.nan)[:, None]


def check_values(problem: Problem) -> None:
    """Look for targets outside an unsplit vocabulary: at once on the CPU, by a note on a device.

    Raises:
        KernelInputError: on the CPU, naming the first.
    """
    if problem.group is not None:
        return
    targets, size = problem.targets, problem.weight.shape[0]
    if targets.device.type != "cpu":
        note_fault(OUTSIDE_VOCABULARY, (targets < 0) | (targets >= size))
        return
    low, high = torch.aminmax(targets)
    if int(low) < 0 or int(high) >= size:
        index = first_index((targets < 0) | (targets >= size))
        raise KernelInputError(
            f"{_OP}: targets[{index}] is {int(targets[index])}, outside the vocabulary of {size}"
        )


def check_result(problem: Problem, logprob: Tensor) -> None:
    """Look for log-probs that are not finite: at once on the CPU, by a note on a device.

    Raises:
        KernelInputError: on the CPU, naming the cause and the first row.
    """
    is_bad = ~torch.isfinite(logprob)
    if logprob.device.type != "cpu":
        if problem.first_product == "fused":  # minus infinity is its mark of a row out of reach
            is_beyond = logprob == -torch.inf
            note_fault(OUT_OF_REACH, is_beyond)
            is_bad &= ~is_beyond
        note_fault(NOT_FINITE, is_bad)
        return
    if not bool(is_bad.any()):
        return
    bad_rows = ~torch.isfinite(problem.hidden).all(1)
    if bool(bad_rows.any()):
        raise KernelInputError(f"{_OP}: hidden[{first_index(bad_rows)}] is not finite")
    index = first_index(is_bad)
    cause = "weight or bias hold NaN or infinity"
    if problem.group is not None:
        cause += (
            f", or targets[{index}] = {int(problem.targets[index])} is in no rank's part of the vocabulary"
        )
    raise KernelInputError(f"{_OP}: the log-prob of row {index} is not finite; {cause}")
