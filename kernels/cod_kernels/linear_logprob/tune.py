"""Times the first products on the device at hand: which one is faster there has to be measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cod_kernels.linear_logprob.chunks import Engine, FirstProduct, Problem
from cod_kernels.linear_logprob.op import make_engine, make_problem


def _milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    with torch.cuda.device(device):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        stop = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        run()
        stop.record()
        stop.synchronize()
    return float(start.elapsed_time(stop))


def _step(make: Callable[[], Engine]) -> None:
    """A training step's products over all rows: forward, then gradients with coefficients of one.

    The engine is made anew, as in a real step, so that contestants do not hold memory beside each other.
    """
    engine = make()
    engine.want((True, True, False))
    for rows in engine.problem.chunks():
        stats = engine.whole(engine.forward(rows), rows)
        engine.backward(rows, stats.lse, None, torch.ones_like(stats.logprob), None)


def _contestants(problem: Problem, backend: str) -> dict[str, Callable[[], Engine]]:
    """Return what makes an engine: one per tile of a fused product in Triton, otherwise one per product."""
    if problem.first_product == "plain" or backend != "triton":
        return {problem.first_product: partial(make_engine, problem, backend)}
    from cod_kernels.linear_logprob.exponentials_triton import TritonExponentials, tiles_of

    return {f"fused.{tile.name}": partial(TritonExponentials, problem, tile) for tile in tiles_of(problem)}


def time_first_products(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    has_entropy: bool = False,
    backend: str = "auto",
    num_rounds: int = 7,
) -> tuple[dict[str, float], dict[str, str]]:
    """Time a training step's three products with either first product, and with every tile of the fused one.

    Args:
        hidden: [T, H].
        weight: [V, H].
        targets: [T].
        has_entropy: with the entropy, whose tiles are others.
        backend: ``auto``, ``torch`` or ``triton``.
        num_rounds: timed rounds, >= 1; contestants alternate, after one round that is not timed.

    Returns:
        (median milliseconds by name: ``plain``, and ``fused`` or ``fused.<tile>``; reason by name for what
        cannot run here).
    """
    failed: dict[str, str] = {}
    found: dict[str, Callable[[], Engine]] = {}
    products: tuple[FirstProduct, ...] = ("plain", "fused")
    for product in products:
        problem, chosen = make_problem(
            hidden, weight, targets, temperature=1.0, bias=None, softcap=None, has_entropy=has_entropy,
            chunk_rows=None, group=None, vocab_start=None, backend=backend, first_product=product,
        )  # fmt: skip
        found |= _contestants(problem, chosen)
    steps = {name: partial(_step, make) for name, make in found.items()}
    for name in found:
        try:
            steps[name]()
        except TimeoutError:  # a caller's limit, which is not the contestant's fault
            raise
        except Exception as error:  # dtype, device, memory, or whatever a compiler raises
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            del steps[name]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(num_rounds):
        for name, step in steps.items():
            times[name].append(_milliseconds(step, hidden.device))
    return {name: statistics.median(rounds) for name, rounds in times.items()}, failed
