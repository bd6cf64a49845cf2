"""Both first products on a CUDA device: what the interpreter and the ahead-of-time compiler cannot show."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from cod_kernels import KernelInputError, LossOptions, linear_logprob, linear_segment_loss, raise_faults
from cod_kernels.linear_logprob.memory import fused_chunk_rows, plain_chunk_rows

LIMIT_BYTES = 3 << 30


def _has_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10)


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _has_hopper(), reason="no CUDA device of compute capability 9.x or 10.x"),
]
PRODUCTS: Any = pytest.mark.parametrize("first_product", ["plain", "fused"])


def _inputs(
    rows: int, vocab: int, width: int, *, is_full: bool = False, device: str = "cuda"
) -> dict[str, Any]:
    generator = torch.Generator(device=device).manual_seed(rows + vocab + width)
    normal: dict[str, Any] = {"generator": generator, "device": device}
    hidden = torch.randn(rows, width, **normal).bfloat16()
    weight = (torch.randn(vocab, width, **normal) * (7 / width**0.5)).bfloat16()
    logits = hidden.float() @ weight.float().t()
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": torch.multinomial(torch.softmax(logits, 1), 1, generator=generator).squeeze(1),
        "bias": torch.randn(vocab, **normal).bfloat16() if is_full else None,
        "temperature": torch.rand(rows, **normal) + 0.7 if is_full else 1.0,
        "softcap": 30.0 if is_full else None,
    }


def _step(
    data: dict[str, Any], coefficients: torch.Tensor, first_product: Any, **more: Any
) -> list[torch.Tensor]:
    """Log-prob, then gradients of hidden, weight and bias, through the loss in the chunk."""
    call = dict(data)
    leaves = [
        None if call[k] is None else call[k].detach().requires_grad_() for k in ("hidden", "weight", "bias")
    ]
    count, device = len(data["targets"]), data["targets"].device
    loss, _, logprob = linear_segment_loss(
        leaves[0], leaves[1], data["targets"], torch.zeros(count, device=device),  # type: ignore[arg-type]
        torch.arange(count, device=device), -coefficients, torch.ones(count, device=device),
        temperature=data["temperature"], bias=leaves[2], softcap=data["softcap"],
        options=LossOptions(clip="none"), first_product=first_product, **more,
    )  # fmt: skip
    loss.backward()
    return [logprob, *(leaf.grad for leaf in leaves if leaf is not None)]  # type: ignore[misc]


def _truth(data: dict[str, Any], coefficients: torch.Tensor) -> list[torch.Tensor]:
    leaves = [
        None if data[k] is None else data[k].double().requires_grad_() for k in ("hidden", "weight", "bias")
    ]
    logits = leaves[0] @ leaves[1].t()  # type: ignore[operator, union-attr]
    if leaves[2] is not None:
        logits = logits + leaves[2]
    if data["softcap"] is not None:
        logits = data["softcap"] * torch.tanh(logits / data["softcap"])
    temperature = data["temperature"]
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.double()[:, None]
    logprob = torch.log_softmax(logits / temperature, 1).gather(1, data["targets"][:, None]).squeeze(1)
    (logprob * coefficients).sum().backward()
    return [logprob.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]  # type: ignore[misc]


def _check(found: list[torch.Tensor], truth: list[torch.Tensor]) -> None:
    assert (found[0] - truth[0]).abs().max() < 1e-4
    for ours, right in zip(found[1:], truth[1:], strict=True):
        assert float((ours.double() - right).norm() / right.norm()) < 3e-3


@PRODUCTS
@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("shape", [(1, 37, 8), (257, 4099, 128), (300, 32_003, 100)])
def test_against_fp64(shape: tuple[int, int, int], is_full: bool, first_product: str) -> None:
    data = _inputs(*shape, is_full=is_full)
    coefficients = torch.randn(shape[0], device="cuda")
    found = _step(data, coefficients, first_product, chunk_rows=256)
    if shape[0] > 1:
        _check(found, _truth(data, coefficients))
    else:
        assert (found[0] - _truth(data, coefficients)[0]).abs().max() < 1e-4
    again = _step(data, coefficients, first_product, chunk_rows=256)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    raise_faults(torch.device("cuda"))


def test_every_tile_gives_the_same() -> None:
    from cod_kernels.linear_logprob.chunks import Problem
    from cod_kernels.linear_logprob.exponentials_triton import TritonExponentials, tiles_of

    data = _inputs(500, 3001, 264)
    for has_entropy in (False, True):
        problem = Problem(
            data["hidden"], data["weight"], data["targets"], None, 1.0, None, has_entropy, 500, torch.float32,
            first_product="fused",
        )  # fmt: skip
        truth = _truth(data, torch.ones(500, device="cuda"))[0]
        for tile in tiles_of(problem):
            logprob = TritonExponentials(problem, tile).forward(slice(0, 500)).logprob
            assert (logprob - truth).abs().max() < 1e-4, tile.name


@PRODUCTS
def test_tensors_that_are_not_contiguous(first_product: str) -> None:
    data = _inputs(200, 1003, 72, is_full=True)
    coefficients = torch.randn(200, device="cuda")
    dense = _step(data, coefficients, first_product)
    strided = dict(data)
    strided["hidden"] = data["hidden"].repeat_interleave(2, 1)[:, ::2]
    strided["weight"] = data["weight"].t().contiguous().t()
    strided["bias"] = data["bias"].repeat_interleave(2)[::2]
    strided["temperature"] = data["temperature"].repeat_interleave(2)[::2]
    strided["targets"] = data["targets"].repeat_interleave(2)[::2]
    for ours, right in zip(_step(strided, coefficients, first_product), dense, strict=True):
        assert float((ours.double() - right.double()).norm() / right.double().norm()) < 3e-3


@PRODUCTS
def test_own_stream_and_own_thread(first_product: str) -> None:
    data = _inputs(300, 2003, 64)
    coefficients = torch.randn(300, device="cuda")
    plain = _step(data, coefficients, first_product)
    torch.cuda.synchronize()
    found: list[list[torch.Tensor]] = []

    def work() -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            found.append(_step(data, coefficients, first_product))
        stream.synchronize()

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert all(torch.equal(a, b) for a, b in zip(found[0], plain, strict=True))


@PRODUCTS
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_the_current_one(first_product: str) -> None:
    data = _inputs(130, 1003, 64, device="cuda:1")
    coefficients = torch.randn(130, device="cuda:1")
    assert torch.cuda.current_device() == 0
    _check(_step(data, coefficients, first_product), _truth(data, coefficients))


@PRODUCTS
def test_nothing_waits_for_the_device(first_product: str) -> None:
    data = _inputs(300, 2003, 64)
    coefficients = torch.randn(300, device="cuda")
    _step(data, coefficients, first_product)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(data, coefficients, first_product)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_rows_out_of_reach_are_refused_by_name() -> None:
    hidden = torch.ones(3, 8, device="cuda", dtype=torch.bfloat16)
    weight = torch.zeros(11, 8, device="cuda", dtype=torch.bfloat16)
    weight[4] = 16
    logprob = linear_logprob(hidden, weight, torch.tensor([4, 5, 4], device="cuda"), first_product="fused")
    assert torch.isfinite(logprob).tolist() == [True, False, True]  # type: ignore[arg-type]
    with pytest.raises(KernelInputError, match="row 1 is below -104"):
        raise_faults(torch.device("cuda"))


@PRODUCTS
@pytest.mark.parametrize("rows", [8192, 20_000])
def test_peak_memory(rows: int, first_product: str) -> None:
    """At most 3 GiB beyond inputs and gradients, whatever the number of rows."""
    vocab, width = 151_936, 4096
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("less than 40 GiB of device memory")
    hidden = torch.randn(rows, width, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(vocab, width, device="cuda") / 64).bfloat16().requires_grad_()
    targets = torch.randint(vocab, (rows,), device="cuda")
    zeros, ones = torch.zeros(rows, device="cuda"), torch.ones(rows, device="cuda")
    ids = torch.arange(rows, device="cuda")
    call: Any = {"options": LossOptions(clip="none"), "first_product": first_product}
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss, *_ = linear_segment_loss(hidden, weight, targets, zeros, ids, ones, ones, **call)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    gradients = vocab * width * 4 + rows * width * 2
    assert torch.cuda.max_memory_allocated() - before - gradients <= LIMIT_BYTES
    chunk = plain_chunk_rows(vocab) if first_product == "plain" else None
    assert chunk == 4352 or fused_chunk_rows(vocab, width, torch.bfloat16, 128) == 8192


def test_offsets_beyond_32_bits() -> None:
    """A chunk of exponentials of more than 2^31 elements, its last row against the same row alone."""
    rows, vocab, width = 16_512, 131_072, 64
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("less than 40 GiB of device memory")
    assert rows * vocab > 1 << 31
    data = _inputs(256, vocab, width)
    data["hidden"] = data["hidden"].repeat(rows // 256 + 1, 1)[:rows].contiguous()
    data["targets"] = data["targets"].repeat(rows // 256 + 1)[:rows].contiguous()
    coefficients = torch.ones(rows, device="cuda")
    found = _step(data, coefficients, "fused", chunk_rows=rows)
    last = {**data, "hidden": data["hidden"][-1:], "targets": data["targets"][-1:]}
    alone = _step(last, coefficients[-1:], "fused")
    assert torch.equal(found[0][-1:], alone[0])
    assert float((found[1][-1:].float() - alone[1].float()).norm() / alone[1].float().norm()) < 1e-2
