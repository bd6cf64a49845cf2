"""The loss inside the chunk against the two ops one after the other, and against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cod_kernels import (
    KernelInputError,
    LossOptions,
    linear_logprob,
    linear_segment_loss,
    merge_metrics,
    segment_loss,
    summarize_metrics,
)
from cod_kernels.linear_logprob.reference import TorchEngine

ROWS, VOCAB, WIDTH, SEGMENTS = 90, 211, 16, 7


def _data(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, WIDTH, generator=generator)
    weight = torch.randn(VOCAB, WIDTH, generator=generator) * 0.5
    targets = torch.randint(VOCAB, (ROWS,), generator=generator)
    own = linear_logprob(hidden, weight, targets)
    noise = torch.randn(4, ROWS, generator=generator) * 0.3
    return {
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype),
        "bias": torch.randn(VOCAB, generator=generator).to(dtype),
        "targets": targets,
        "behavior_logprobs": own + noise[0],
        "proximal_logprobs": own + noise[1],
        "reference_logprobs": own + noise[2],
        "segment_ids": torch.randint(SEGMENTS, (ROWS,), generator=generator),
        "advantages": torch.randn(SEGMENTS, generator=generator),
        "weights": torch.rand(SEGMENTS, generator=generator) / ROWS,
        "temperature": torch.rand(ROWS, generator=generator) + 0.5,
    }


def _apart(
    data: dict[str, Any], options: dict[str, Any], softcap: float | None, scale: float
) -> list[torch.Tensor]:
    """The two ops in fp64 through autograd."""
    wide = {k: v.double() if v.is_floating_point() else v for k, v in data.items()}
    leaves = [wide[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")]
    current, entropy = linear_logprob(
        leaves[0], leaves[1], wide["targets"], temperature=wide["temperature"], bias=leaves[2],
        softcap=softcap, return_entropy=True,
    )  # fmt: skip
    tokens = {k: wide[k] for k in ("proximal_logprobs", "reference_logprobs")}
    loss, metrics = segment_loss(
        current, wide["behavior_logprobs"], wide["segment_ids"], wide["advantages"], wide["weights"],
        entropy=entropy.detach(), **tokens, **options,
    )  # fmt: skip
    (loss * scale).backward()
    return [loss.detach(), metrics, current.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


def _joined(
    data: dict[str, Any], options: dict[str, Any], softcap: float | None, scale: float, **more: Any
) -> list[torch.Tensor]:
    names = ("hidden", "weight", "bias")
    leaves = {k: data[k].clone().requires_grad_() for k in names}
    bound = options.get("m2po_bound")
    switches = LossOptions(**{k: v for k, v in options.items() if k != "m2po_bound"})
    loss, metrics, logprob = linear_segment_loss(
        **(data | leaves), softcap=softcap, has_entropy=True, options=switches, m2po_bound=bound, **more
    )
    (loss * scale).backward()
    return [loss.detach(), metrics, logprob, *(leaves[k].grad for k in names)]  # type: ignore[list-item]


@pytest.mark.parametrize("chunk_rows", [None, 1, 32])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip": "ppo", "behavior_weight": "truncated", "kl_coef": 0.1, "dual_clip": 1.2},
        {"clip": "m2po", "m2po_bound": 0.2, "behavior_weight": "masked", "weight_floor": 0.7},
    ],
    ids=["paper", "decoupled", "m2po"],
)
def test_equals_the_two_ops(options: dict[str, Any], softcap: float | None, chunk_rows: int | None) -> None:
    data = _data()
    for scale in (1.0, -2.5):
        truth = _apart(data, options, softcap, scale)
        found = _joined(data, options, softcap, scale, chunk_rows=chunk_rows)
        for ours, right in zip(found, truth, strict=True):
            same = torch.isfinite(right)
            assert torch.equal(same, torch.isfinite(ours))
            assert (ours[same].double() - right[same]).norm() <= 1e-5 * right[same].norm()


def test_bf16() -> None:
    data = _data(torch.bfloat16)
    truth, found = (f(data, {}, None, 1.0) for f in (_apart, _joined))
    assert (found[2].double() - truth[2]).abs().max() < 1e-5
    for ours, right in zip(found[3:], truth[3:], strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - right).norm() / right.norm() < 3e-3


def test_bitwise_repeatable_and_backward_twice() -> None:
    data = _data()
    first, second = (_joined(data, {}, None, 1.0, chunk_rows=32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    hidden = data["hidden"].clone().requires_grad_()
    loss, *_ = linear_segment_loss(**(data | {"hidden": hidden, "bias": None}))
    (one,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (two,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(one, two)
    assert data["weight"].grad is None


def test_rows_that_are_not_trained_cost_a_forward() -> None:
    """Tokens of segments without advantage, sorted to the end: the same loss, metrics and gradients."""
    data = _data()
    data["advantages"][3:] = 0
    order = torch.argsort((data["advantages"][data["segment_ids"]] == 0).int(), stable=True)
    per_token = [k for k, v in data.items() if v.shape[:1] == (ROWS,)]
    data |= {k: data[k][order] for k in per_token}
    trained = int((data["advantages"][data["segment_ids"]] != 0).sum())
    everything = _joined(data, {}, None, 1.0, chunk_rows=16)
    some = _joined(data, {}, None, 1.0, chunk_rows=16, num_trained=trained)
    assert trained % 16  # one chunk has both kinds of rows
    assert all(torch.equal(a, b) for a, b in zip(everything[:3], some[:3], strict=True))
    for a, b in zip(everything[3:], some[3:], strict=True):  # products over fewer rows may round otherwise
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    none = _joined(data, {}, None, 1.0, num_trained=0)
    assert not none[3].any() and not none[4].any()
    assert none[0] == pytest.approx(everything[0].item(), rel=1e-6)


def test_backward_products_take_trained_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    data, seen = _data(), []
    backward = TorchEngine.backward

    def note(engine: TorchEngine, rows: slice, *rest: Any) -> None:
        seen.append((rows.start, rows.stop))
        backward(engine, rows, *rest)

    monkeypatch.setattr(TorchEngine, "backward", note)
    _joined(data, {}, None, 1.0, chunk_rows=16, num_trained=21)
    assert seen == [(0, 16), (16, 21)]


def test_micro_batches_add_up() -> None:
    data = _data() | {"bias": None}
    whole, *_ = linear_segment_loss(**data)
    per_token = [k for k, v in data.items() if v is not None and v.shape[:1] == (ROWS,)]
    parts = [
        linear_segment_loss(**(data | {k: data[k][cut] for k in per_token}))
        for cut in (slice(0, 31), slice(31, ROWS))
    ]
    assert sum(float(p[0]) for p in parts) == pytest.approx(float(whole), rel=1e-5)
    assert summarize_metrics(merge_metrics([p[1] for p in parts]))["num_action_tokens"] == ROWS


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"num_trained": ROWS + 1}, "num_trained must be in"),
        ({"behavior_logprobs": torch.zeros(3)}, r"behavior_logprobs must be \[90\]"),
        ({"segment_ids": torch.full((ROWS,), SEGMENTS)}, r"segment_ids\[0\] is 7"),
        ({"targets": torch.full((ROWS,), VOCAB)}, r"targets\[0\] is 211"),
        ({"hidden": torch.full((ROWS, WIDTH), torch.nan)}, r"hidden\[0\] is not finite"),
        ({"options": LossOptions(clip="x")}, "clip is 'x'"),
    ],
)
def test_bad_input_names_the_argument(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(KernelInputError, match=part):
        linear_segment_loss(**(_data() | changes))
