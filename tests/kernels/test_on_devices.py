"""The segment ops where they will run: on CUDA with Triton, and the same tests on the CPU with the twin.

``pytest tests/kernels -m gpu`` is what the benchmark runs first on a GPU; the CPU half shows everywhere else
that the tests themselves are right.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from test_segment_loss import DEVICE_ONLY, spoiled
from test_segment_loss_modes import CLIPS, COUNT, KLS, SEGMENTS, WEIGHTS, arrays, tensors, transcription

from cod_kernels import (
    KernelInputError,
    LossOptions,
    merge_metrics,
    raise_faults,
    segment_loss,
    segment_reduce,
    summarize_metrics,
)
from cod_kernels.segment_loss.reference import METRIC_NAMES, LossInputs, segment_loss_reference

HAS_CUDA = torch.cuda.is_available()
ON_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_CUDA)]


def tokens(count: int, segments: int, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    behavior = -torch.rand(count, generator=generator)
    data = {
        "current_logprobs": behavior + torch.randn(count, generator=generator) * 0.3,
        "behavior_logprobs": behavior,
        "segment_ids": torch.randint(segments, (count,), generator=generator),
        "advantages": torch.randn(segments, generator=generator),
        "weights": torch.rand(segments, generator=generator) / count,
    }
    return {name: tensor.to(device) for name, tensor in data.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("clip", CLIPS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_mode_against_numpy(clip: dict[str, Any], device: str) -> None:
    for number, (weight, kl) in enumerate((w, k) for w in WEIGHTS for k in KLS):
        data = arrays(number)
        if weight["behavior_weight"] == "none" and number % 2:
            del data["proximal_logprobs"]
        if number % 3 == 0:
            data["negative_advantages"] = -np.abs(data["advantages"]) / 2
            data["advantages"] = np.abs(data["advantages"])
        options = clip | weight | kl
        expected, gradient = transcription(data, options)
        given = {k: v.to(device) for k, v in tensors(data, torch.float32).items()}
        leaf = given["current_logprobs"].requires_grad_()
        loss, metrics = segment_loss(**given, **options)  # type: ignore[arg-type]
        loss.backward()
        scale = float(np.abs(gradient).max())
        assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert leaf.grad is not None
        # A token at the edge of a clip may fall to either side in float32: allow one in a thousand.
        apart = np.abs(leaf.grad.cpu().double().numpy() - gradient) > 1e-4 * scale
        assert apart.sum() <= COUNT // 500
        assert summarize_metrics(metrics)["num_action_tokens"] == COUNT


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [1, 2, 31, 1023, 1024, 1025, 70_001])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_any_length_and_the_same_bits_twice(count: int, ids_dtype: torch.dtype, device: str) -> None:
    data = tokens(count, 1 + count // 100, device)
    data["segment_ids"] = data["segment_ids"].to(ids_dtype)
    results = []
    for _ in range(2):
        leaf = data["current_logprobs"].clone().requires_grad_()
        loss, metrics = segment_loss(**(data | {"current_logprobs": leaf}), clip="ppo")  # type: ignore[arg-type]
        (loss * -2.5).backward()
        results.append((loss.detach(), metrics, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))  # type: ignore[arg-type]
    wide = [t.double() if t.is_floating_point() else t.long() for t in data.values()]
    leaf = wide[0].requires_grad_()
    truth = segment_loss_reference(LossInputs(*wide), LossOptions(clip="ppo"))
    (truth * -2.5).backward()
    loss, _, gradient = results[0]
    assert gradient is not None and leaf.grad is not None
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5, abs=1e-7)
    assert (gradient - leaf.grad).norm() <= 1e-5 * leaf.grad.norm() + 1e-12


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 1), (5000, 7), (5000, 9000), (300_001, 3), (300_001, 2000)])
@pytest.mark.parametrize("is_sorted", [False, True])
def test_sums_by_segment(shape: tuple[int, int], is_sorted: bool, device: str) -> None:
    count, segments = shape
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(count, generator=generator, dtype=torch.float64) * 100
    ids = torch.randint(segments, (count,), generator=generator) // 2 * 2
    ids[: count // 2] = 0  # one long segment, and every second one empty
    ids = ids.sort().values if is_sorted else ids
    truth = np.zeros(segments)
    np.add.at(truth, ids.numpy(), values.numpy())
    given = values.to(device).requires_grad_()
    sums, counts = segment_reduce(given, ids.to(device), segments, is_sorted=is_sorted)
    again, _ = segment_reduce(given, ids.int().to(device), segments, is_sorted=is_sorted)
    assert torch.equal(sums, again)
    assert counts.tolist() == np.bincount(ids.numpy(), minlength=segments).tolist()
    np.testing.assert_allclose(sums.detach().cpu().numpy(), truth, rtol=0, atol=1e-10 * count)
    slope = torch.arange(segments, dtype=torch.float64)
    (sums * slope.to(device)).sum().backward()
    assert given.grad is not None and torch.equal(given.grad.cpu(), slope[ids])


@pytest.mark.parametrize("device", DEVICES)
def test_bad_values_are_refused_and_named(device: str) -> None:
    """At once on the CPU; on CUDA when the step's numbers are read."""
    data = tokens(100, 3, device)
    for name, index, value in (
        ("behavior_logprobs", 40, math.nan),
        ("segment_ids", 40, 3),
        ("weights", 0, math.inf),
    ):
        wrong = dict(data) | {name: data[name].clone()}
        wrong[name][index] = value
        with pytest.raises(KernelInputError, match=name.removesuffix("_logprobs")):
            summarize_metrics(segment_loss(**wrong)[1])  # type: ignore[arg-type]
    ids = data["segment_ids"].clone()
    ids[7] = -1
    raise_faults(torch.device(device))
    with pytest.raises(KernelInputError, match=r"segment_ids\[7\]"):
        sums, _ = segment_reduce(data["current_logprobs"], ids, 3)
        assert torch.isnan(sums).all()
        raise_faults(torch.device(device))
    for name in ("behavior_logprobs", "segment_ids", "advantages", "weights"):
        with pytest.raises(KernelInputError, match=f"{name} is on meta"):
            segment_loss(**(data | {name: data[name].to("meta")}))  # type: ignore[arg-type]
    segment_loss(**data)  # type: ignore[arg-type]
    raise_faults(torch.device(device))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("changes", "switches", "bad", "message"), DEVICE_ONLY)
def test_bad_tokens_on_cuda(
    changes: dict[str, Any], switches: dict[str, Any], bad: Any, message: str, backend: str
) -> None:
    from cod_kernels.segment_loss.op import evaluate

    inputs, bad = spoiled(changes, bad)
    moved = {k: v if v is None else v.cuda() for k, v in vars(inputs).items()}
    loss, gradient, metrics = evaluate(LossInputs(**moved), LossOptions(**switches), backend)
    assert torch.isnan(loss)
    assert torch.nonzero(torch.isnan(gradient)).flatten().tolist() == bad
    assert metrics[METRIC_NAMES.index("first_bad_token")] == bad[0]
    with pytest.raises(KernelInputError, match=message):
        summarize_metrics(metrics)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_nothing_is_read_back_on_cuda(backend: str) -> None:
    data = tokens(5000, 20, "cuda")
    leaf = data["current_logprobs"].requires_grad_()

    def step() -> torch.Tensor:
        parts = []
        for _ in range(2):
            more = {"clip": "m2po", "m2po_bound": 0.3, "backend": backend}
            loss, metrics = segment_loss(**data, **more)  # type: ignore[arg-type]
            loss.backward()
            parts.append(metrics)
        sums, counts = segment_reduce(leaf, data["segment_ids"], 20, backend=backend)
        (sums / counts.clamp(min=1)).sum().backward()
        return merge_metrics(parts)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert summarize_metrics(metrics)["num_action_tokens"] == 10_000
    raise_faults(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_a_device_that_is_not_the_current_one() -> None:
    data = tokens(5000, 20, "cuda:1")
    expected = tokens(5000, 20, "cpu")
    with torch.cuda.device(0):
        loss, _ = segment_loss(**data)  # type: ignore[arg-type]
        sums, _ = segment_reduce(data["current_logprobs"], data["segment_ids"], 20)
    assert loss.item() == pytest.approx(segment_loss(**expected)[0].item(), rel=1e-5)  # type: ignore[arg-type]
    truth, _ = segment_reduce(expected["current_logprobs"], expected["segment_ids"], 20)
    assert torch.allclose(sums.cpu(), truth, rtol=1e-6)


def test_a_segment_per_token_and_one_for_all() -> None:
    """Extremes of the number of segments give the same loss where the advantage is the same."""
    data = tokens(500, 1, "cpu") | {"advantages": torch.tensor([0.7]), "weights": torch.tensor([0.01])}
    one, _ = segment_loss(**data)  # type: ignore[arg-type]
    many = {"segment_ids": torch.arange(500), "advantages": torch.full((500,), 0.7)}
    each, _ = segment_loss(**(data | many | {"weights": torch.full((500,), 0.01)}))  # type: ignore[arg-type]
    assert one.item() == pytest.approx(each.item(), rel=1e-6)
    assert SEGMENTS < COUNT
