"""segment_loss: loss, gradient and metrics of a million tokens, beside the definition under autograd."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from bench.kernels.measure import Row, compare, ratio
from cod_kernels import LossOptions, segment_loss
from cod_kernels.segment_loss.reference import LossInputs, segment_loss_reference


def _tokens(count: int, device: torch.device) -> tuple[Tensor, ...]:
    generator = torch.Generator(device=device).manual_seed(count)
    make: dict[str, Any] = {"generator": generator, "device": device}
    behavior = -torch.rand(count, **make)
    current = (behavior + torch.randn(count, **make) * 0.2).requires_grad_()
    ids = torch.arange(count, device=device) // 500
    segments = count // 500 + 1
    return (
        current,
        behavior,
        ids,
        torch.randn(segments, **make),
        torch.full((segments,), 1 / count, device=device),
    )


def plain_metrics(
    current: Tensor, behavior: Tensor, ids: Tensor, advantages: Tensor, weights: Tensor
) -> list[Tensor]:
    """The numbers that a plain trainer reports about such a loss, one operation after the other."""
    with torch.no_grad():
        difference = current - behavior
        log_ratio = difference.clamp(-20, 20)
        ratio, advantage = log_ratio.exp(), advantages[ids]
        positive, negative = advantage > 0, advantage < 0
        return [
            (~torch.isfinite(difference)).sum(),
            (difference != log_ratio).sum(),
            positive.sum(),
            negative.sum(),
            (positive & (ratio > 1.2)).sum(),
            (negative & (ratio < 0.8)).sum(),
            ratio.sum(),
            ratio.square().sum(),
            (ratio - 1 - log_ratio).sum(),
            advantage.sum(),
            ratio.max(),
            ratio.min(),
        ]


def run(device: torch.device, seconds: float) -> list[Row]:
    """Return a row per length: error against fp64, and times."""
    rows = []
    lengths = (8192, 131_072, 1_048_576) if device.type == "cuda" else (8192, 131_072)
    for count in lengths:
        given = _tokens(count, device)
        options = LossOptions(clip="ppo")

        def ours(given: tuple[Tensor, ...] = given) -> Tensor:
            given[0].grad = None
            loss, _ = segment_loss(*given, clip="ppo")
            loss.backward()
            return loss.detach()

        def eager(given: tuple[Tensor, ...] = given, options: LossOptions = options) -> None:
            given[0].grad = None
            segment_loss_reference(LossInputs(*given), options).backward()

        def eager_with_metrics(given: tuple[Tensor, ...] = given, step: Any = eager) -> list[Tensor]:
            step()
            return plain_metrics(*given)

        loss = ours()
        gradient = given[0].grad
        wide = [t.detach().double() if t.is_floating_point() else t for t in given]
        wide[0].requires_grad_()
        truth = segment_loss_reference(LossInputs(*wide), options)
        truth.backward()
        contestants = {
            "ours": ours,
            "eager with metrics": eager_with_metrics,
            "eager without metrics": eager,
        }
        times, failed = compare(contestants, device, seconds=seconds / len(lengths))
        rows.append(
            {
                "num_tokens": count,
                "loss_error": float((loss - truth.detach()).abs()),
                "gradient_relative": float((gradient - wide[0].grad).norm() / wide[0].grad.norm()),  # type: ignore[operator, union-attr]
                "ms": {name: round(statistics.median(t), 4) for name, t in times.items()},
                "times_faster_than": {
                    name: ratio(times, name, "ours")
                    for name in contestants
                    if name in times and name != "ours"
                },
                "failed": failed,
            }
        )
    return rows
