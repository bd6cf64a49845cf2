"""linear_logprob against log_softmax in fp64, finite differences, and itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cod_kernels import BackendUnavailableError, KernelInputError, linear_logprob
from cod_kernels.dispatch import choose_backend
from cod_kernels.linear_logprob.reference import linear_logprob_reference


def _inputs(
    rows: int = 70, vocab: int = 203, width: int = 24, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rows * 1000 + vocab)
    return {
        "hidden": (torch.randn(rows, width, generator=generator) * scale).to(dtype),
        "weight": torch.randn(vocab, width, generator=generator).to(dtype),
        "targets": torch.randint(vocab, (rows,), generator=generator),
        "bias": torch.randn(vocab, generator=generator).to(dtype),
        "temperature": torch.rand(rows, generator=generator) + 0.5,
    }


def _run(function: Any, data: dict[str, Any], coefficients: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    leaves = [data[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")]
    results = function(*leaves)
    sum((c.to(r.dtype) * r).sum() for c, r in zip(coefficients, results, strict=True)).backward()
    return [r.detach() for r in results] + [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("chunk_rows", [None, 1, 16, 70])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("has_entropy", [False, True])
def test_values_and_gradients_against_fp64(
    chunk_rows: int | None, softcap: float | None, has_entropy: bool
) -> None:
    data = _inputs()
    coefficients = (torch.linspace(-1, 1, 70), torch.linspace(0.5, -0.5, 70))[: 1 + has_entropy]

    def ours(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = linear_logprob(
            hidden,
            weight,
            data["targets"],
            temperature=data["temperature"],
            bias=bias,
            softcap=softcap,
            return_entropy=has_entropy,
            chunk_rows=chunk_rows,
        )
        return out if isinstance(out, tuple) else (out,)

    def truth(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return linear_logprob_reference(
            hidden, weight, data["targets"], data["temperature"].double(), bias, softcap
        )[: 1 + has_entropy]

    wide = {k: v.double() if v.is_floating_point() else v for k, v in data.items()}
    found, expected = _run(ours, data, coefficients), _run(truth, wide, coefficients)
    for value, right in zip(found[: 1 + has_entropy], expected, strict=False):
        assert value.dtype == torch.float32
        assert (value - right).abs().max() < 1e-5
    for value, right in zip(found[1 + has_entropy :], expected[1 + has_entropy :], strict=True):
        assert (value - right).norm() / right.norm() < 1e-5


def test_bf16_inputs() -> None:
    data = _inputs(dtype=torch.bfloat16)
    coefficients = (torch.linspace(-1, 1, 70),)

    def ours(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (linear_logprob(h, w, data["targets"], bias=b, chunk_rows=32),)  # type: ignore[return-value]

    def truth(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return linear_logprob_reference(h, w, data["targets"], 1.0, b)[:1]

    wide = {k: v.double() if v.is_floating_point() else v for k, v in data.items()}
    found, expected = _run(ours, data, coefficients), _run(truth, wide, coefficients)
    assert (found[0] - expected[0]).abs().max() < 1e-5
    for value, right in zip(found[1:], expected[1:], strict=True):
        assert value.dtype == torch.bfloat16
        assert (value.double() - right).norm() / right.norm() < 3e-3


@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_gradcheck(chunk_rows: int | None) -> None:
    data = _inputs(rows=7, vocab=11, width=3, dtype=torch.float64, scale=1.0)
    leaves = [data[k].requires_grad_() for k in ("hidden", "weight", "bias")]
    for softcap in (None, 2.0):
        for has_entropy in (False, True):

            def call(
                h: torch.Tensor,
                w: torch.Tensor,
                b: torch.Tensor,
                cap: float | None = softcap,
                entropy: bool = has_entropy,
            ) -> Any:
                return linear_logprob(
                    h,
                    w,
                    data["targets"],
                    temperature=0.7,
                    bias=b,
                    softcap=cap,
                    return_entropy=entropy,
                    chunk_rows=chunk_rows,
                )

            assert torch.autograd.gradcheck(call, leaves)


def test_probabilities_sum_to_one_and_entropy_of_uniform() -> None:
    vocab, width = 37, 8
    hidden = torch.randn(1, width).expand(vocab, width).contiguous()
    weight = torch.randn(vocab, width)
    logprob = linear_logprob(hidden, weight, torch.arange(vocab))
    assert float(logprob.exp().sum()) == pytest.approx(1, abs=1e-6)  # type: ignore[union-attr]
    uniform, entropy = linear_logprob(
        torch.zeros(3, width), weight, torch.tensor([0, 5, 36]), return_entropy=True
    )
    assert uniform.tolist() == pytest.approx([-torch.log(torch.tensor(37.0)).item()] * 3, abs=1e-6)
    assert entropy.tolist() == pytest.approx([torch.log(torch.tensor(37.0)).item()] * 3, abs=1e-6)


def test_peaked_logits_stay_finite() -> None:
    hidden = torch.tensor([[1.0], [1.0], [-1.0]], requires_grad=True)
    weight = torch.tensor([[500.0], [0.0], [-500.0]])
    logprob, entropy = linear_logprob(hidden, weight, torch.tensor([0, 2, 0]), return_entropy=True)
    assert logprob.tolist() == pytest.approx([0, -1000, -1000])
    assert entropy.tolist() == pytest.approx([0, 0, 0], abs=1e-12)
    (logprob.sum() + entropy.sum()).backward()
    assert torch.isfinite(hidden.grad).all()  # type: ignore[arg-type]


def test_bitwise_repeatable_and_chunk_invariant() -> None:
    data = _inputs(rows=300, vocab=119, width=64)

    def run(chunk_rows: int | None) -> list[torch.Tensor]:
        hidden, weight = data["hidden"].clone().requires_grad_(), data["weight"].clone().requires_grad_()
        out = linear_logprob(hidden, weight, data["targets"], chunk_rows=chunk_rows)
        out.sum().backward()  # type: ignore[union-attr]
        return [out, hidden.grad, weight.grad]  # type: ignore[list-item]

    for chunk_rows in (None, 64):
        assert all(torch.equal(a, b) for a, b in zip(run(chunk_rows), run(chunk_rows), strict=True))
    for a, b in zip(run(None), run(64), strict=True):
        assert (a - b).norm() / a.norm() < 1e-6


def test_backward_twice_and_frozen_head() -> None:
    data = _inputs()
    hidden = data["hidden"].requires_grad_()
    out = linear_logprob(hidden, data["weight"], data["targets"])
    (first,) = torch.autograd.grad(out.sum(), hidden, retain_graph=True)  # type: ignore[union-attr]
    (second,) = torch.autograd.grad(out.sum(), hidden)  # type: ignore[union-attr]
    assert torch.equal(first, second)
    assert data["weight"].grad is None


def test_no_gradient_is_recorded_without_need() -> None:
    data = _inputs()
    with torch.no_grad():
        out = linear_logprob(data["hidden"], data["weight"], data["targets"])
    assert not out.requires_grad  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"hidden": torch.zeros(0, 24), "targets": torch.zeros(0, dtype=torch.int64)}, "hidden has no rows"),
        ({"targets": torch.full((70,), 203)}, r"targets\[0\] is 203, outside the vocabulary of 203"),
        ({"targets": torch.arange(70) - 3}, r"targets\[0\] is -3"),
        ({"targets": torch.zeros(69, dtype=torch.int64)}, r"targets must be \[70\]"),
        ({"targets": torch.zeros(70)}, "targets must be int32 or int64"),
        ({"weight": torch.zeros(203, 23)}, "weight has width 23"),
        ({"weight": torch.zeros(203, 24, dtype=torch.float64)}, "weight is torch.float64"),
        ({"hidden": torch.zeros(70)}, r"hidden must be \[T, H\]"),
        ({"hidden": torch.zeros(70, 24, dtype=torch.int64)}, "hidden must be floating"),
        ({"hidden": torch.full((70, 24), float("nan"))}, r"hidden\[0\] is not finite"),
        ({"weight": torch.full((203, 24), float("inf"))}, "weight or bias hold NaN"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": torch.arange(70.0)}, r"temperature\[0\] is 0.0"),
        ({"temperature": torch.ones(3)}, r"temperature must be a number or \[70\]"),
        ({"bias": torch.zeros(3)}, r"bias must be \[203\]"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"chunk_rows": 0}, "chunk_rows"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ],
)
def test_bad_input_names_the_argument(changes: dict[str, Any], part: str) -> None:
    data = _inputs() | changes
    positional = [data.pop(k) for k in ("hidden", "weight", "targets")]
    with pytest.raises(KernelInputError, match=part):
        linear_logprob(*positional, **data)


def test_no_silent_fallback() -> None:
    cuda = torch.device("cuda")
    with pytest.raises(BackendUnavailableError, match="pass backend='torch'"):
        choose_backend("op", "auto", cuda, has_triton_kernel=False)
    with pytest.raises(BackendUnavailableError, match="needs CUDA"):
        choose_backend("op", "triton", torch.device("cpu"), has_triton_kernel=True)
    assert choose_backend("op", "torch", cuda, has_triton_kernel=False) == "torch"
    assert choose_backend("op", "auto", cuda, has_triton_kernel=True) == "triton"
    assert choose_backend("op", "auto", torch.device("cpu"), has_triton_kernel=True) == "torch"
