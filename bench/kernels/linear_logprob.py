"""linear_logprob and linear_segment_loss: errors against fp64, then time beside GEMM yardsticks and peers."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.kernels.measure import Row, compare, peak_bytes, ratio, time_limit
from bench.kernels.peers import Peer, installed
from cod_kernels import LossOptions, linear_logprob, linear_segment_loss
from cod_kernels.linear_logprob.chunks import FirstProduct
from cod_kernels.linear_logprob.tune import time_first_products

CPU_SHAPES = ((2048, 4096, 128), (4096, 512, 64))
"""T, V, H; the first is the one with a bar."""
CUDA_SHAPES = (
    (8192, 151_936, 4096),
    (8192, 151_643, 4096),
    (32_768, 151_936, 4096),
    (8192, 128_256, 4096),
    (8192, 151_936, 2048),
    (8192, 32_000, 1024),
)
_PLAIN = LossOptions(clip="none")


def inputs(
    shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, scale: float = 1.0
) -> dict[str, Tensor]:
    """Return random hidden states, head, targets and coefficients; logits are normal with that scale."""
    rows, vocab, width = shape
    generator = torch.Generator(device=device).manual_seed(rows + vocab + width)
    normal: dict[str, Any] = {"generator": generator, "device": device}
    hidden = torch.randn(rows, width, **normal).to(dtype)
    weight = (torch.randn(vocab, width, **normal) * scale / width**0.5).to(dtype)
    return {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "targets": torch.randint(vocab, (rows,), **normal),
        "coefficients": torch.randn(rows, **normal),
    }


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> None:
    """Whole logits, float32 log-softmax, autograd."""
    logprob = torch.log_softmax((hidden @ weight.t()).float(), 1).gather(1, targets[:, None]).squeeze(1)
    (logprob * coefficients).sum().backward()


def in_chunk(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    coefficients: Tensor,
    first_product: FirstProduct = "plain",
) -> Tensor:
    """Mode 1, three matrix products: one segment per token, its advantage the coefficient."""
    count = targets.numel()
    ids = torch.arange(count, device=targets.device)
    zeros, ones = torch.zeros_like(coefficients), torch.ones_like(coefficients)
    loss, _, logprob = linear_segment_loss(
        hidden, weight, targets, zeros, ids, -coefficients, ones, options=_PLAIN, first_product=first_product
    )
    loss.backward()
    return logprob


def by_autograd(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> None:
    """Mode 2, four matrix products."""
    logprob = linear_logprob(hidden, weight, targets)
    (logprob * coefficients).sum().backward()  # type: ignore[union-attr, operator]


def forward_only(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    coefficients: Tensor,
    first_product: FirstProduct = "plain",
) -> None:
    """Proximal and reference log-probs, one matrix product."""
    with torch.no_grad():
        linear_logprob(hidden, weight, targets, first_product=first_product)


def products(data: dict[str, Tensor], count: int) -> Callable[[], None]:
    """Return ``count`` (3 or 4) bare matrix products of the shape: the physical yardstick."""
    hidden, weight = data["hidden"].detach(), data["weight"].detach()
    chunk = min(hidden.shape[0], 8192)
    rows = hidden[:chunk]
    logits = torch.empty(chunk, weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    d_hidden, d_weight = torch.empty_like(rows), torch.empty_like(weight)

    def run() -> None:
        for start in range(0, hidden.shape[0], chunk):
            part = hidden[start : start + chunk]
            for _ in range(count - 2):
                torch.mm(part, weight.t(), out=logits)
            torch.mm(logits, weight, out=d_hidden)
            torch.mm(logits.t(), part, out=d_weight)

    return run


def first_products(device: torch.device) -> tuple[FirstProduct, ...]:
    """Return the first products that can run on a device; the fused one needs Hopper or Blackwell."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return ("plain",)
    return ("plain", "fused")


def tiles(data: dict[str, Tensor], seconds: float) -> list[Row]:
    """Time the three products of a step with either first product, and with every tile of the fused one."""
    rows: list[Row] = []
    for has_entropy in (False, True):
        row: Row = {"has_entropy": has_entropy, "ms": {}, "failed": {}}
        rows.append(row)
        try:
            with time_limit(seconds / 2):
                times, row["failed"] = time_first_products(
                    data["hidden"], data["weight"], data["targets"], has_entropy=has_entropy
                )
            row["ms"] = {name: round(value, 3) for name, value in times.items()}
        except TimeoutError as error:
            row["failed"] = {"all": str(error)}
    return rows


def correctness(device: torch.device) -> list[Row]:
    """Errors against fp64 at logits up to about 32 from bf16 inputs: ours, and float32 log_softmax's."""
    rows: list[Row] = []
    shapes = ((257, 4099, 128), (64, 32_003, 256))
    for shape, product in itertools.product(shapes, first_products(device)):
        data = inputs(shape, device, torch.bfloat16, scale=7.0)
        hidden, weight, targets, coefficients = (
            data[k] for k in ("hidden", "weight", "targets", "coefficients")
        )
        wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
        truth = torch.log_softmax(wide[0] @ wide[1].t(), 1).gather(1, targets[:, None]).squeeze(1)
        (truth * coefficients).sum().backward()
        logprob = in_chunk(hidden, weight, targets, coefficients, product)
        grads = [hidden.grad, weight.grad]
        again = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
        repeated = in_chunk(again[0], again[1], targets, coefficients, product)
        same = [
            torch.equal(a, b)
            for a, b in ((logprob, repeated), *zip(grads, (t.grad for t in again), strict=True))
        ]  # type: ignore[arg-type]
        with torch.no_grad():
            plain = torch.log_softmax(hidden.float() @ weight.float().t(), 1).gather(1, targets[:, None])
        truth = truth.detach()
        error, plain_error = logprob - truth, plain.squeeze(1) - truth
        relative = [
            float((a.double() - b.grad).norm() / b.grad.norm())  # type: ignore[union-attr, operator]
            for a, b in zip(grads, wide, strict=True)
        ]
        rows.append(
            {
                "shape": shape,
                "dtype": f"{hidden.dtype}, {product} first product",
                "logprob_max_error": float(error.abs().max()),
                "logprob_rms_error": float(error.square().mean().sqrt()),
                "plain_max_error": float(plain_error.abs().max()),
                "d_hidden_relative": relative[0],
                "d_weight_relative": relative[1],
                "is_bitwise_repeatable": all(same),
            }
        )
    return rows


def _contestant(run: Peer, data: dict[str, Tensor]) -> Callable[[], None]:
    def call() -> None:
        data["hidden"].grad = data["weight"].grad = None
        run(data["hidden"], data["weight"], data["targets"], data["coefficients"])

    return call


def _nothing(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> None:
    """Leave no gradient behind."""


def speed(device: torch.device, seconds: float) -> tuple[list[Row], list[str]]:
    """Return (a row per shape, peers that are missing)."""
    shapes = CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    peers, missing = installed()
    rows = []
    for shape in shapes:
        data = inputs(shape, device, dtype)
        ours: dict[str, Peer] = {
            "in-chunk loss": in_chunk,
            "in-chunk loss, fused first product": partial(in_chunk, first_product="fused"),
            "plain autograd": by_autograd,
            "forward only": forward_only,
            "forward only, fused first product": partial(forward_only, first_product="fused"),
        }
        others = {"eager": naive, "compiled": torch.compile(naive, dynamic=False), **peers}
        contestants = {"3 GEMMs": products(data, 3), "4 GEMMs": products(data, 4)}
        contestants |= {name: _contestant(run, data) for name, run in (ours | others).items()}
        times, failed = compare(contestants, device, seconds=0.85 * seconds / len(shapes))
        width = 4 if device.type == "cuda" else data["weight"].element_size()
        grads = data["weight"].numel() * width + data["hidden"].numel() * data["hidden"].element_size()
        rows.append(
            {
                "shape_tvh": shape,
                "dtype": str(data["hidden"].dtype),
                "ms": {name: round(statistics.median(t), 3) for name, t in times.items()},
                "num_rounds": len(times["in-chunk loss"]) if "in-chunk loss" in times else 0,
                "share_of_3_gemms": ratio(times, "3 GEMMs", "in-chunk loss"),
                "share_of_3_gemms_fused": ratio(times, "3 GEMMs", "in-chunk loss, fused first product"),
                "share_of_4_gemms": ratio(times, "4 GEMMs", "plain autograd"),
                "times_faster_than": {
                    name: ratio(times, name, "in-chunk loss") for name in others if name in times
                },
                "autograd_times_faster_than_eager": ratio(times, "eager", "plain autograd"),
                "peak_bytes_beyond_inputs_and_gradients": peak_bytes(
                    contestants["in-chunk loss"], device, grads, _contestant(_nothing, data)
                ),
                "peak_bytes_fused": peak_bytes(
                    contestants["in-chunk loss, fused first product"],
                    device,
                    grads,
                    _contestant(_nothing, data),
                )
                if "in-chunk loss, fused first product" in times
                else None,
                "failed": failed,
                "tiles": tiles(data, 0.15 * seconds) if shape == shapes[0] else None,
            }
        )
        del data, contestants
    return rows, missing
