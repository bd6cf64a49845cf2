"""Prints under how many keys Triton would compile each kernel when only the lengths of a call change."""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from cod_kernels.segment_loss import kernel as loss
from cod_kernels.segment_reduce import kernel as reduce

LENGTHS = (1, 2, 15, 16, 1000, 1024, 1025, 65_536, 1_048_576, 3_000_000)


@triton.jit
def control(pointer, length, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Takes a length and says nothing about it."""
    tl.store(pointer + tl.arange(0, BLOCK), length)


def num_keys(kernel: Any, *variable: str) -> int:
    """Return how many keys calls have that differ in the named arguments alone."""
    bind = create_function_from_signature(
        kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32))
    )
    fixed: dict[str, Any] = {}
    for parameter in kernel.params:
        if parameter.is_constexpr:
            fixed[parameter.name] = 16
        else:
            fixed[parameter.name] = torch.zeros(16) if parameter.name.endswith("_ptr") else 0.5
    keys = set()
    for values in itertools.product(LENGTHS, repeat=len(variable)):
        keys.add(str(bind(**(fixed | dict(zip(variable, values, strict=True))))[1]))
    return len(keys)


if __name__ == "__main__":
    json.dump(
        {
            "segment_loss": num_keys(loss.segment_loss_kernel, "num_tokens", "num_segments"),
            "segment_loss.finish": num_keys(loss.finish_kernel, "num_blocks"),
            "segment_reduce": num_keys(reduce.segment_reduce_kernel, "num_tokens"),
            "control": num_keys(control, "length"),
        },
        sys.stdout,
    )
