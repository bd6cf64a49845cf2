"""Runs every kernel in Triton's interpreter, and prints its distance from fp64 and from the torch twin.

Its own process, because Triton decides at import whether kernels are interpreted. Few, large tiles: the
interpreter's cost is per operation on a tile. It rounds float32 to bf16 by truncation, so bf16 gradients are
compared with twice the bound that hardware meets.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import json
import sys
from typing import Any

import exponential_cases
import numpy as np
import torch
from test_segment_loss import DEVICE_ONLY, spoiled
from test_segment_loss_modes import CLIPS, COUNT, KLS, SEGMENT_CLIPS, SEGMENTS, WEIGHTS, arrays, tensors

from cod_kernels import LossOptions, linear_logprob, linear_segment_loss, segment_loss, segment_reduce
from cod_kernels.linear_logprob.reference import linear_logprob_reference
from cod_kernels.segment_loss.reference import METRIC_NAMES, loss_gradient_and_metrics

Result = dict[str, float]


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
        return float("inf")
    finite = torch.isfinite(a)
    return float((a.double() - b.double())[finite].norm() / b.double()[finite].norm().clamp(min=1e-30))


def loss_modes() -> Result:
    """Largest distance from the twin over every clip, with and without proximal log-probs and parts."""
    worst: Result = {"loss": 0.0, "gradient": 0.0, "metrics": 0.0}
    for number, clip in enumerate(CLIPS):
        for is_full in (False, True):
            data = arrays(number)
            options = clip | KLS[(number + is_full) % 4] | WEIGHTS[(number + 1) % 3 if is_full else 0]
            if is_full:
                data["negative_advantages"] = -np.abs(data["advantages"]) / 2
                data["advantages"] = np.abs(data["advantages"])
            else:
                del data["proximal_logprobs"]
            compare_with_twin(data, options, worst)
    return worst


def loss_anchors() -> Result:
    """The same for proximal log-probs as shares, and for one ratio per segment."""
    worst: Result = {"loss": 0.0, "gradient": 0.0, "metrics": 0.0}
    for number, clip in enumerate(CLIPS):
        data = arrays(number)
        del data["proximal_logprobs"]
        data["proximal_mix"] = np.random.default_rng(number).choice([0.0, 0.5, 1.0], COUNT)
        compare_with_twin(data, clip | KLS[number % 4] | WEIGHTS[number % 3], worst)
    for number, clip in enumerate(SEGMENT_CLIPS):
        data = arrays(number) | {"segment_log_ratios": np.random.default_rng(number).normal(0, 0.2, SEGMENTS)}
        if number % 2:
            del data["proximal_logprobs"]
        compare_with_twin(data, clip | KLS[number % 4], worst)
    return worst


def compare_with_twin(data: dict[str, np.ndarray], options: dict[str, Any], worst: Result) -> None:
    """Call both backends and keep the largest distances."""
    given: dict[str, Any] = tensors(data, torch.float32)
    found = []
    for backend in ("torch", "triton"):
        leaf = given["current_logprobs"].clone().requires_grad_()
        call = given | options | {"current_logprobs": leaf, "entropy": torch.ones(COUNT), "backend": backend}
        loss, metrics = segment_loss(**call)
        loss.backward()
        found.append((loss.detach(), leaf.grad, metrics))
    for name, a, b in zip(worst, found[1], found[0], strict=True):
        worst[name] = max(worst[name], apart(a, b))  # type: ignore[arg-type]


def loss_finish() -> Result:
    """Many blocks, a last one that is not full, and the same bits twice."""
    generator = torch.Generator().manual_seed(0)
    count = 40 * 1024 + 17
    behavior = -torch.rand(count, generator=generator)
    current = behavior + torch.randn(count, generator=generator) * 0.2
    ids = torch.randint(50, (count,), generator=generator)
    advantages, weights = torch.randn(50, generator=generator), torch.full((50,), 1 / count)
    call = (current, behavior, ids, advantages, weights)
    twin, first, second = (segment_loss(*call, backend=backend) for backend in ("torch", "triton", "triton"))
    same = torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    return {"loss": apart(first[0], twin[0]), "metrics": apart(first[1], twin[1]), "repeats": float(not same)}


def loss_lengths() -> Result:
    """One token, blocks that are full or miss one, and ids of 32 bits; parts and a bound from the device."""
    worst = 0.0
    for count in (1, 2, 1023, 1024, 1025):
        generator = torch.Generator().manual_seed(count)
        behavior = -torch.rand(count, generator=generator)
        current = behavior + torch.randn(count, generator=generator) * 0.3
        ids = torch.randint(3, (count,), generator=generator, dtype=torch.int32)
        positive, negative = torch.rand(3, generator=generator), -torch.rand(3, generator=generator)
        call = (current, behavior, ids, positive, torch.full((3,), 1 / count))
        more: dict[str, Any] = {"clip": "m2po", "m2po_bound": torch.tensor(0.2), "dual_clip": 1.3}
        twin, ours = (
            segment_loss(*call, negative_advantages=negative, backend=backend, **more)
            for backend in ("torch", "triton")
        )
        worst = max(worst, apart(ours[0], twin[0]), apart(ours[1], twin[1]))
    return {"loss_and_metrics": worst}


def loss_bad_tokens() -> Result:
    """Values that only a device has seen: tokens become NaN and are counted as in the twin."""
    from cod_kernels.segment_loss.kernel import launch

    wrong = 0
    for changes, switches, bad, _ in DEVICE_ONLY:
        inputs, bad = spoiled(changes, bad)
        options = LossOptions(**switches)
        loss, gradient, metrics = launch(inputs, options)
        twin = loss_gradient_and_metrics(inputs, options, has_checked=False)
        counts = [METRIC_NAMES.index(n) for n in ("num_nonfinite", "num_bad_segments", "num_bad_ids")]
        is_right = torch.isnan(loss) and torch.nonzero(torch.isnan(gradient)).flatten().tolist() == bad
        is_right = is_right and torch.equal(metrics[counts], twin[2][counts]) and metrics[-1] == bad[0]
        wrong += not is_right
    return {"wrong_cases": float(wrong)}


def reduce() -> Result:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20_000, generator=generator, dtype=torch.float64)
    ids = torch.randint(3, (20_000,), generator=generator) * 2
    result = {}
    for name, given, is_sorted in (("any_order", ids, False), ("sorted", ids.sort().values, True)):
        a = segment_reduce(values, given, 6, backend="torch")
        b = segment_reduce(values, given, 6, is_sorted=is_sorted, backend="triton")
        result[name] = apart(b[0], a[0]) + apart(b[1], a[1])
    skewed = torch.full((20_000,), 7, dtype=torch.int32)  # one long segment among short ones
    skewed[:9] = torch.arange(9, dtype=torch.int32)
    a, b = (segment_reduce(values, skewed, 11, backend=backend) for backend in ("torch", "triton"))
    result["skewed"] = apart(b[0], a[0]) + apart(b[1], a[1])
    a, b = (segment_reduce(values[:1], ids[:1], 5, backend=backend) for backend in ("torch", "triton"))
    result["one_token"] = apart(b[0], a[0]) + apart(b[1], a[1])
    return result


def reduce_host_reads() -> Result:
    """What runs on CUDA between the checks."""
    from host_reads import host_reads_of

    from cod_kernels.segment_reduce.kernel import launch

    values, ids = torch.ones(50), torch.arange(50) % 4
    return {"reads": float(len(host_reads_of(lambda: launch(values, ids, 4, False))))}


def logprob(dtype: torch.dtype, *, is_full: bool, vocab: int = 5003) -> Result:
    """Distance from fp64 of values (absolute) and gradients (relative); two chunks, odd vocabulary."""
    generator = torch.Generator().manual_seed(1)
    rows, width = 40, 64
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator) * 0.5).to(dtype)
    bias = torch.randn(vocab, generator=generator).to(dtype) if is_full else None
    targets = torch.randint(vocab, (rows,), generator=generator)
    temperature = torch.rand(rows, generator=generator) + 0.5 if is_full else torch.full((rows,), 0.8)
    softcap = 5.0 if is_full else None
    g, h = (torch.randn(rows, generator=generator) for _ in range(2))

    def run(is_wide: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        leaves = [
            None if t is None else (t.double() if is_wide else t.clone()).requires_grad_()
            for t in (hidden, weight, bias)
        ]
        if is_wide:
            values = linear_logprob_reference(
                leaves[0], leaves[1], targets, temperature.double(), leaves[2], softcap
            )  # type: ignore[arg-type]
        else:
            values = linear_logprob(  # type: ignore[assignment]
                leaves[0], leaves[1], targets, temperature=temperature if is_full else 0.8, bias=leaves[2],
                softcap=softcap, return_entropy=True, backend="triton", chunk_rows=32,
            )  # type: ignore[arg-type]  # fmt: skip
        ((values[0] * g).sum() + (values[1] * h).sum()).backward()
        return [v.detach() for v in values], [leaf.grad for leaf in leaves if leaf is not None]  # type: ignore[misc]

    ours, truth = run(False), run(True)
    names = ("hidden", "weight", "bias")
    result = {
        name: float((a - b).abs().max())
        for name, a, b in zip(("logprob", "entropy"), ours[0], truth[0], strict=True)
    }
    return result | {f"d_{n}": apart(a, b) for n, a, b in zip(names, ours[1], truth[1], strict=False)}


def fused() -> Result:
    """The loss inside the chunk: Triton against the twin, and against itself."""
    generator = torch.Generator().manual_seed(2)
    rows, vocab, width = 48, 1009, 32
    base = [
        torch.randn(rows, width, generator=generator),
        torch.randn(vocab, width, generator=generator) * 0.3,
    ]
    targets = torch.randint(vocab, (rows,), generator=generator)
    with torch.no_grad():
        behavior = linear_logprob(*base, targets) + torch.randn(rows, generator=generator) * 0.2
    ids = torch.arange(rows) // 10
    advantages, weights = torch.randn(5, generator=generator), torch.full((5,), 1 / rows)
    found = []
    for backend in ("torch", "triton", "triton"):
        hidden, weight = (t.clone().requires_grad_() for t in base)
        loss, metrics, _ = linear_segment_loss(
            hidden, weight, targets, behavior, ids, advantages, weights, has_entropy=True,
            options=LossOptions(clip="ppo"), backend=backend, chunk_rows=32,
        )  # type: ignore[arg-type]  # fmt: skip
        loss.backward()
        found.append([loss.detach(), metrics, hidden.grad, weight.grad])
    names = ("loss", "metrics", "d_hidden", "d_weight")
    result = {n: apart(a, b) for n, a, b in zip(names, found[1], found[0], strict=True)}
    same = all(torch.equal(a, b) for a, b in zip(found[1], found[2], strict=True))
    return result | {"repeats": float(not same)}


def bad_values() -> Result:
    """Wrong rows become NaN in the kernels, never a number."""
    from cod_kernels.linear_logprob.chunks import Problem, forward_walk
    from cod_kernels.linear_logprob.kernel import TritonEngine

    hidden, weight = torch.ones(4, 8), torch.ones(11, 8)
    hidden[1, 3] = float("nan")
    hidden[2, 3] = float("inf")
    targets = torch.tensor([11, 0, 0, 3])
    problem = Problem(hidden, weight, targets, None, 1.0, None, False, 4, torch.float32)
    logprob = forward_walk(TritonEngine(problem)).logprob
    right = [bool(v) for v in torch.isnan(logprob)] == [True, True, True, False]
    return {"rows": float(not right), "value": abs(float(logprob[3]) + float(np.log(11)))}


def host_reads() -> Result:
    """The whole walk with the loss in the chunk, as it runs on CUDA: nothing is read back."""
    from host_reads import host_reads_of

    from cod_kernels.linear_logprob.chunks import Problem
    from cod_kernels.linear_logprob.fused import loss_walk
    from cod_kernels.linear_logprob.kernel import TritonEngine
    from cod_kernels.segment_loss.reference import LossInputs

    rows, segments = 48, 5
    problem = Problem(
        torch.randn(rows, 8),
        torch.randn(33, 8),
        torch.arange(rows) % 33,
        None,
        1.0,
        None,
        True,
        32,
        torch.float32,
    )
    engine = TritonEngine(problem)
    engine.want((True, True, False))
    tokens = torch.zeros(rows)
    inputs = LossInputs(
        tokens, tokens, torch.arange(rows) % segments, torch.randn(segments), torch.ones(segments)
    )
    found = host_reads_of(lambda: loss_walk(engine, inputs, LossOptions(), rows, "triton"))
    # On the CPU alone, a chunk without any gradient is found out by reading: one read per chunk.
    return {"reads_beyond_those_of_the_cpu": float(len(found) - 2)}


def bf16_dot_is_wrong() -> Result:
    """The interpreter's known fault: kept in view, so that nobody trusts bf16 products in it."""
    import triton
    import triton.language as tl

    @triton.jit
    def product(a_ptr, b_ptr, out_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
        tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))

    a, b = (torch.randn(16, 16).to(torch.bfloat16) for _ in range(2))
    out = torch.empty(16, 16)
    product[(1,)](a, b, out, 16)
    return {"distance": min(apart(out, a.float() @ b.float()), 1e30)}


CASES: dict[str, Any] = {
    "loss_modes": loss_modes,
    "loss_anchors": loss_anchors,
    "loss_finish": loss_finish,
    "loss_lengths": loss_lengths,
    "loss_bad_tokens": loss_bad_tokens,
    "reduce": reduce,
    "reduce_host_reads": reduce_host_reads,
    "logprob_fp32": lambda: logprob(torch.float32, is_full=False),
    "logprob_fp32_full": lambda: logprob(torch.float32, is_full=True),
    "logprob_bf16": lambda: logprob(torch.bfloat16, is_full=False),
    "logprob_bf16_full": lambda: logprob(torch.bfloat16, is_full=True),
    "fused": fused,
    "bad_values": bad_values,
    "host_reads": host_reads,
    "bf16_dot_is_wrong": bf16_dot_is_wrong,
    **exponential_cases.INTERPRETED,
}

if __name__ == "__main__":
    names = sys.argv[1:] or list(CASES)
    json.dump({name: CASES[name]() for name in names}, sys.stdout)
