"""The engine of the fused first product on CUDA: its tiles, and the launches of its kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cod_kernels.dispatch import BackendUnavailableError, KernelInputError, is_interpreting, on_device
from cod_kernels.linear_logprob.chunks import Problem
from cod_kernels.linear_logprob.exponentials import ExponentialEngine, Targets
from cod_kernels.linear_logprob.kernel import add_rows_kernel, exponentials_kernel, target_kernel
from cod_kernels.linear_logprob.memory import padded
from cod_kernels.linear_logprob.products import aligned_rows

TARGET_BLOCK = 2048
TARGET_WARPS = 4
ADD_BLOCK = 1024
ADD_WARPS = 4


@dataclass(frozen=True)
class Tile:
    """A configuration of the kernel.

    Attributes:
        rows, vocab, width: block of hidden states x block of the vocabulary, summed in steps of ``width``.
        num_warps, num_stages: of a program; stages are blocks of both factors in flight.
        group: row blocks that are walked together, so that a block of the head is read once for all of them.
        is_flat: merge the loops, so that the next tile's loads start before this one's epilogue.
    """

    rows: int
    vocab: int
    width: int
    num_warps: int
    num_stages: int
    group: int = 8
    is_flat: bool = False

    @property
    def name(self) -> str:
        """Return a short name."""
        flat = ".flat" if self.is_flat else ""
        return f"{self.rows}x{self.vocab}x{self.width}.w{self.num_warps}.s{self.num_stages}{flat}"


WIDE = Tile(128, 256, 64, 8, 3)
WIDE_FLAT = Tile(128, 256, 64, 8, 3, is_flat=True)
TALL = Tile(256, 128, 64, 8, 3)
NARROW = Tile(128, 128, 64, 8, 4)
DEEP = Tile(128, 128, 128, 8, 3)


def tiles_for(
    *, has_entropy: bool, has_softcap: bool, has_bias: bool, generation: int = 9
) -> tuple[Tile, ...]:
    """Return the tiles that compile without spilling for such a call; the first is used unless one is asked
    for. Entropy and soft-cap need the registers that a wide tile takes.

    Args:
        has_entropy: whether the entropy is computed.
        has_softcap: whether logits are capped.
        has_bias: whether there is a bias.
        generation: first number of the device's compute capability.
    """
    if has_softcap:
        return (NARROW,)
    if has_entropy:
        return (NARROW, DEEP)
    if has_bias:
        return (WIDE, NARROW)
    return (WIDE, WIDE_FLAT, TALL, NARROW) if generation == 9 else (WIDE_FLAT, TALL, NARROW)


def tiles_of(problem: Problem) -> tuple[Tile, ...]:
    """Return the tiles for a call."""
    device = problem.hidden.device
    return tiles_for(
        has_entropy=problem.has_entropy,
        has_softcap=problem.softcap is not None,
        has_bias=problem.bias is not None,
        generation=torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9,
    )


def require_hopper(device: torch.device) -> None:
    """Raise unless the device can run the kernel: Hopper or datacenter Blackwell, or the interpreter.

    Raises:
        BackendUnavailableError: says what to pass instead.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] not in (9, 10):
        found = torch.cuda.get_device_name(device)
        raise BackendUnavailableError(
            "linear_logprob: first_product 'fused' needs a device of compute capability 9.x or 10.x, got "
            f"{found}; pass first_product='plain'"
        )


def num_programs(device: torch.device) -> int:
    """Return how many programs run at once: one per multiprocessor, or two in the interpreter."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _descriptor(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], block)


class TritonExponentials(ExponentialEngine):
    """One chunk of exponentials, made by the kernel."""

    def __init__(self, problem: Problem, tile: Tile | None = None) -> None:
        allowed = (torch.bfloat16, torch.float32) if is_interpreting() else (torch.bfloat16,)
        if problem.hidden.dtype not in allowed:
            raise KernelInputError(
                f"linear_logprob: hidden is {problem.hidden.dtype}; first_product 'fused' takes bfloat16, "
                "pass first_product='plain'"
            )
        require_hopper(problem.hidden.device)
        self._tile = tile or tiles_of(problem)[0]
        super().__init__(problem, self._tile.vocab)
        self._weight = aligned_rows(problem.weight)
        bias = problem.bias
        self._bias = self._weight if bias is None else bias.contiguous()
        inverse = problem.inverse_temperature
        by_row = isinstance(inverse, Tensor)
        self._switches: dict[str, Any] = {
            "HAS_BIAS": bias is not None,
            "HAS_SOFTCAP": problem.softcap is not None,
            "ROW_TEMPERATURE": by_row,
        }
        self._factors = (float(problem.softcap or 1.0), 0.0 if by_row else float(inverse))

    def _inverse(self, rows: slice) -> Tensor:
        """Return 1 / temperature per row, or something to point at where it is one number."""
        inverse = self.problem.inverse_temperature
        return inverse[rows].reshape(-1).contiguous() if isinstance(inverse, Tensor) else self._bias

    def add_rows(self, out: Tensor, columns: Tensor, rows: Tensor, factor: Tensor) -> None:
        """See :class:`ExponentialEngine`; one writer per row of ``out``, found by sorting."""
        count, width = rows.shape
        ordered, order = torch.sort(columns.int(), stable=True)
        end = torch.searchsorted(ordered, ordered, right=True, out_int32=True)
        with on_device(out):
            add_rows_kernel[(count, triton.cdiv(width, ADD_BLOCK))](
                out, out.stride(0), out.stride(1), order, ordered, end, rows, rows.stride(0), rows.stride(1),
                factor.contiguous(), width, BLOCK=ADD_BLOCK, num_warps=ADD_WARPS, enable_fp_fusion=True,
            )  # fmt: skip

    def target_logits(self, rows: slice) -> Targets:
        """See :class:`ExponentialEngine`."""
        problem = self.problem
        hidden = aligned_rows(problem.hidden[rows])
        count, width = hidden.shape
        # Padded, like all that a kernel writes row by row: it is compiled again where alignment differs.
        out = torch.empty((3, padded(count)), dtype=torch.float32, device=hidden.device)
        with on_device(hidden):
            target_kernel[(count,)](
                hidden, hidden.stride(0), self._weight, self._weight.stride(0), self.columns(rows).int(),
                self._bias, self._inverse(rows), out, out.stride(0), width, problem.weight.shape[0],
                *self._factors,
                BLOCK=TARGET_BLOCK, num_warps=TARGET_WARPS, enable_fp_fusion=True, **self._switches,
            )  # fmt: skip
        return Targets(*out[:, :count])

    def exponentials(self, rows: slice, target_logit: Tensor, out: Tensor | None, partials: Tensor) -> None:
        """See :class:`ExponentialEngine`."""
        problem, tile = self.problem, self._tile
        hidden = aligned_rows(problem.hidden[rows])
        count, width = hidden.shape
        size = problem.weight.shape[0]
        switches = self._switches | {
            "HAS_ENTROPY": problem.has_entropy,
            "HAS_OUT": out is not None,
            "UPCAST": is_interpreting(),
            "IS_FLAT": tile.is_flat,
            "GROUP": tile.group,
            "ROWS": tile.rows,
            "VOCAB": tile.vocab,
            "WIDTH": tile.width,
        }
        grid = min(triton.cdiv(count, tile.rows) * triton.cdiv(size, tile.vocab), num_programs(hidden.device))
        with on_device(hidden):
            exponentials_kernel[(grid,)](
                _descriptor(hidden, [tile.rows, tile.width]),
                _descriptor(self._weight, [tile.vocab, tile.width]),
                None if out is None else _descriptor(out, [tile.rows, tile.vocab]),
                self.columns(rows).int(), target_logit.contiguous(), self._bias, self._inverse(rows),
                partials[0], partials[-1], partials.stride(1), count, size, width, *self._factors,
                num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True, **switches,
            )  # fmt: skip
