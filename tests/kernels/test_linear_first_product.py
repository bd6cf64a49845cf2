"""The fused first product (exponentials, not logits), in torch: against log_softmax in fp64, and itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cod_kernels import KernelInputError, LossOptions, linear_logprob, linear_segment_loss
from cod_kernels.linear_logprob.exponentials import LOWEST_LOGPROB
from cod_kernels.linear_logprob.products import aligned_rows, has_aligned_rows
from cod_kernels.linear_logprob.reference import linear_logprob_reference
from cod_kernels.linear_logprob.tune import time_first_products

ROWS = 70


def _inputs(
    rows: int = ROWS,
    vocab: int = 203,
    width: int = 24,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> dict[str, Any]:
    """Targets are sampled from the tempered distribution, as a policy samples them."""
    generator = torch.Generator().manual_seed(rows * 1000 + vocab)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator) * scale).to(dtype)
    bias = torch.randn(vocab, generator=generator).to(dtype)
    temperature = torch.rand(rows, generator=generator) + 0.7
    logits = (hidden.double() @ weight.double().t() + bias.double()) / temperature[:, None]
    targets = torch.multinomial(torch.softmax(logits, 1), 1, generator=generator).squeeze(1)
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "bias": bias,
        "temperature": temperature,
        "coefficients": torch.randn(rows, generator=generator),
    }


def _truth(data: dict[str, Any], softcap: float | None, *, has_h: bool = False) -> list[torch.Tensor]:
    """Log-prob, entropy, and gradients of hidden, weight and bias, in fp64 through autograd."""
    leaves = [data[k].double().requires_grad_() for k in ("hidden", "weight", "bias")]
    logprob, entropy = linear_logprob_reference(
        leaves[0], leaves[1], data["targets"], data["temperature"].double(), leaves[2], softcap
    )
    total = (logprob * data["coefficients"]).sum()
    (total + (entropy * data["coefficients"].flip(0)).sum() * has_h).backward()
    return [logprob.detach(), entropy.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


def _in_chunk(data: dict[str, Any], softcap: float | None, **more: Any) -> list[torch.Tensor]:
    """The same through mode 1: a segment per token, whose advantage is the coefficient."""
    leaves = [data[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")]
    count = len(data["targets"])
    dtype = torch.float64 if leaves[0].dtype == torch.float64 else torch.float32
    loss, _, logprob = linear_segment_loss(
        leaves[0], leaves[1], data["targets"], torch.zeros(count, dtype=dtype), torch.arange(count),
        -data["coefficients"], torch.ones(count), temperature=data["temperature"], bias=leaves[2],
        softcap=softcap, has_entropy=True, options=LossOptions(clip="none"), first_product="fused", **more,
    )  # fmt: skip
    loss.backward()
    return [logprob, *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


def _by_autograd(
    data: dict[str, Any], softcap: float | None, *, has_h: bool = False, **more: Any
) -> list[torch.Tensor]:
    """The same through mode 2."""
    leaves = [data[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")]
    logprob, entropy = linear_logprob(
        leaves[0], leaves[1], data["targets"], temperature=data["temperature"], bias=leaves[2],
        softcap=softcap, return_entropy=True, first_product="fused", **more,
    )  # fmt: skip
    total = (logprob * data["coefficients"]).sum()
    if has_h:
        total = total + (entropy * data["coefficients"].flip(0)).sum()
    total.backward()
    return [logprob.detach(), entropy.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


def _far(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.double() - right).norm() / right.norm().clamp(min=1e-30))


@pytest.mark.parametrize("chunk_rows", [None, 1, 16, 70])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_values_and_gradients_against_fp64(chunk_rows: int | None, softcap: float | None) -> None:
    data = _inputs()
    truth = _truth(data, softcap)
    found = _in_chunk(data, softcap, chunk_rows=chunk_rows)
    assert (found[0] - truth[0]).abs().max() < 1e-5
    assert max(_far(a, b) for a, b in zip(found[1:], truth[2:], strict=True)) < 1e-5
    for has_h in (False, True):  # the gradient of the entropy takes the plain product
        truth = _truth(data, softcap, has_h=has_h)
        found = _by_autograd(data, softcap, has_h=has_h, chunk_rows=chunk_rows)
        assert max(float((a - b).abs().max()) for a, b in zip(found[:2], truth[:2], strict=True)) < 1e-5
        assert max(_far(a, b) for a, b in zip(found[2:], truth[2:], strict=True)) < 1e-5


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_bf16(softcap: float | None) -> None:
    data = _inputs(rows=256, vocab=4099, width=128, dtype=torch.bfloat16, scale=0.3)
    truth = _truth(data, softcap)
    found = _in_chunk(data, softcap, chunk_rows=100)
    assert (found[0] - truth[0]).abs().max() < 1e-5
    for ours, right in zip(found[1:], truth[2:], strict=True):
        assert ours.dtype == torch.bfloat16
        assert _far(ours, right) < 3e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peaked_logits_up_to_200(dtype: torch.dtype) -> None:
    """A rival far above the others: targets with p near 1, in between, and down to e^-90."""
    generator = torch.Generator().manual_seed(5)
    rows, vocab, width = 200, 3001, 256
    weight = torch.randn(vocab, width, generator=generator).to(dtype)
    top = torch.randperm(vocab, generator=generator)[:rows]
    hidden = (weight[top].float() * torch.linspace(0.1, 0.75, rows)[:, None]).to(dtype)
    targets = top.clone()
    logits = hidden.double() @ weight.double().t()
    assert 150 < logits.abs().max() < 260
    for row in range(0, rows, 4):  # a token whose probability is as small as may be
        order = torch.argsort(logits[row] - logits[row].max(), descending=True)
        gap = (logits[row, order[0]] - logits[row, order]).tolist()
        reach = [i for i, g in enumerate(gap) if g < 100]
        targets[row] = order[reach[-1]]
    data = {
        "hidden": hidden,
        "weight": weight,
        "bias": torch.zeros(vocab, dtype=dtype),
        "targets": targets,
        "temperature": torch.ones(rows),
        "coefficients": torch.randn(rows, generator=generator),
    }
    truth = _truth(data, None)
    found = _in_chunk(data, None, chunk_rows=64)
    assert truth[0].min() < -80 and truth[0].max() > -1e-6
    near = truth[0] > -20
    assert (found[0] - truth[0])[near].abs().max() < 1e-5
    # Far rows are differences of logits around 200, of which float32 keeps steps of 1.5e-5.
    assert (found[0] - truth[0]).abs().max() < 4e-5
    bound = 1e-4 if dtype == torch.float32 else 3e-3
    assert max(_far(a, b) for a, b in zip(found[1:], truth[2:], strict=True)) < bound


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_gradcheck(softcap: float | None, chunk_rows: int | None) -> None:
    data = _inputs(rows=7, vocab=11, width=3, dtype=torch.float64)
    leaves = [data[k].requires_grad_() for k in ("hidden", "weight", "bias")]

    def call(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        return linear_logprob(
            hidden, weight, data["targets"], temperature=data["temperature"], bias=bias, softcap=softcap,
            chunk_rows=chunk_rows, first_product="fused",
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize(("rows", "vocab", "width"), [(1, 1, 1), (1, 2, 3), (3, 4097, 5), (2, 8192, 1)])
def test_odd_sizes(rows: int, vocab: int, width: int) -> None:
    data = _inputs(rows, vocab, width)
    truth, found = _truth(data, None), _in_chunk(data, None)
    assert (found[0] - truth[0]).abs().max() < 1e-5
    if vocab == 1:
        assert found[0].item() == 0 and not any(grad.any() for grad in found[1:])
    else:
        assert max(_far(a, b) for a, b in zip(found[1:], truth[2:], strict=True)) < 1e-5


def test_rows_out_of_reach_are_refused_by_name_and_rows_within_are_right() -> None:
    hidden, targets = torch.ones(4, 1), torch.tensor([0, 1, 0, 1])
    weight = torch.tensor([[0.0], [-103.0]])
    within = linear_logprob(hidden, weight, targets, first_product="fused")
    assert within.tolist() == pytest.approx([0, -103, 0, -103], rel=1e-6)  # type: ignore[union-attr]
    weight[1] = LOWEST_LOGPROB - 0.01
    with pytest.raises(KernelInputError, match=r"row 1 is below -104, out of reach of first_product='fused'"):
        linear_logprob(hidden, weight, targets, first_product="fused", chunk_rows=3)
    plain = linear_logprob(hidden, weight, targets)
    assert plain.tolist() == pytest.approx([0, LOWEST_LOGPROB - 0.01] * 2)  # type: ignore[union-attr]


def test_a_bias_of_minus_infinity_takes_a_token_out_of_the_vocabulary() -> None:
    data = _inputs()
    keep = torch.arange(203) != (data["targets"][0] + 1) % 203
    keep[data["targets"]] = True
    data["bias"][~keep] = -torch.inf
    positional = [data[k] for k in ("hidden", "weight", "targets")]
    logprob, entropy = linear_logprob(
        *positional, bias=data["bias"], return_entropy=True, first_product="fused"
    )
    place = (torch.cumsum(keep, 0) - 1)[data["targets"]]
    fewer = linear_logprob_reference(
        data["hidden"].double(), data["weight"][keep].double(), place, 1.0, data["bias"][keep].double()
    )
    assert (logprob - fewer[0]).abs().max() < 1e-5 and (entropy - fewer[1]).abs().max() < 1e-5


def test_bitwise_repeatable_and_backward_twice() -> None:
    data = _inputs(dtype=torch.bfloat16)
    for run in (_in_chunk, _by_autograd):
        for chunk_rows in (None, 16):
            first, second = (run(data, None, chunk_rows=chunk_rows) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    hidden = data["hidden"].requires_grad_()
    out = linear_logprob(hidden, data["weight"], data["targets"], first_product="fused")
    (first,) = torch.autograd.grad(out.sum(), hidden, retain_graph=True)  # type: ignore[union-attr]
    (second,) = torch.autograd.grad(out.sum(), hidden)  # type: ignore[union-attr]
    assert torch.equal(first, second)
    assert data["weight"].grad is None


def test_rows_that_are_not_trained() -> None:
    data = _inputs()
    data["coefficients"][30:] = 0
    everything = _in_chunk(data, None, chunk_rows=16)
    some = _in_chunk(data, None, chunk_rows=16, num_trained=30)
    assert torch.equal(everything[0], some[0])
    for a, b in zip(everything[1:], some[1:], strict=True):  # products over fewer rows may round otherwise
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    none = _in_chunk(data, None, num_trained=0)
    assert torch.equal(none[0], _in_chunk(data, None)[0]) and not any(grad.any() for grad in none[1:])


def test_autocast_changes_nothing() -> None:
    data = _inputs(dtype=torch.bfloat16)
    for first_product in ("plain", "fused"):
        found = []
        for is_on in (False, True):
            hidden, weight = (data[k].clone().requires_grad_() for k in ("hidden", "weight"))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_on):
                out = linear_logprob(
                    hidden, weight, data["targets"], chunk_rows=16,
                    first_product=first_product,  # type: ignore[arg-type]
                )  # fmt: skip
                out.sum().backward()  # type: ignore[union-attr]
            found.append([out, hidden.grad, weight.grad])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))  # type: ignore[arg-type]


def test_bad_input_names_the_argument() -> None:
    data = _inputs()
    positional = [data[k] for k in ("hidden", "weight", "targets")]
    with pytest.raises(KernelInputError, match="first_product is 'x'; it must be 'plain' or 'fused'"):
        linear_logprob(*positional, first_product="x")  # type: ignore[arg-type]
    with pytest.raises(KernelInputError, match=r"hidden is torch\.float16, whose"):
        linear_logprob(*(t.half() for t in positional[:2]), positional[2], first_product="fused")
    for row, value in ((3, torch.nan), (4, torch.inf)):
        hidden = data["hidden"].clone()
        hidden[row, 2] = value
        with pytest.raises(KernelInputError, match=rf"hidden\[{row}\] is not finite"):
            linear_logprob(hidden, *positional[1:], first_product="fused")
    weight = torch.full_like(data["weight"], torch.inf)
    with pytest.raises(KernelInputError, match="weight or bias hold NaN"):
        linear_logprob(positional[0], weight, positional[2], first_product="fused")
    weight = data["weight"].clone()
    weight[next(v for v in range(203) if v not in data["targets"])] = torch.inf
    with pytest.raises(KernelInputError, match="hold"):
        linear_logprob(positional[0], weight, positional[2], first_product="fused")


@pytest.mark.parametrize(
    ("matrix", "is_aligned"),
    [
        (torch.zeros(4, 8, dtype=torch.bfloat16), True),
        (torch.zeros(4, 7, dtype=torch.bfloat16), False),
        (torch.zeros(4, 16, dtype=torch.bfloat16)[:, :7], True),
        (torch.zeros(4, 16, dtype=torch.bfloat16)[:, 1:9], False),
        (torch.zeros(8, 8, dtype=torch.bfloat16).t(), False),
        (torch.zeros(1, 8, dtype=torch.bfloat16).expand(4, 8), False),
        (torch.zeros(4, 1, dtype=torch.bfloat16), False),
        (torch.zeros(1, 12, dtype=torch.float32), True),
    ],
)
def test_rows_for_the_copy_engine(matrix: torch.Tensor, is_aligned: bool) -> None:
    """Multiples of 16 bytes from row to row, elements side by side, the first on a 16-byte boundary."""
    matrix = matrix + 0 if is_aligned and matrix.is_contiguous() else matrix
    assert has_aligned_rows(matrix) == is_aligned
    copy = aligned_rows(matrix)
    assert has_aligned_rows(copy) and torch.equal(copy, matrix)
    assert (copy.data_ptr() == matrix.data_ptr()) == is_aligned


def test_both_products_are_timed() -> None:
    hidden, weight, targets = torch.randn(64, 16), torch.randn(300, 16), torch.arange(64)
    times, failed = time_first_products(hidden, weight, targets, num_rounds=2)
    assert times.keys() == {"plain", "fused"} and min(times.values()) > 0 and not failed
    times, failed = time_first_products(hidden.half(), weight.half(), targets, num_rounds=1)
    assert times.keys() == {"plain"} and "float16" in failed["fused"]
