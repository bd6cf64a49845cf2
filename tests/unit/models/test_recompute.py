"""Recomputation changes what is kept, never what comes out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from memory_meter import MemoryMeter

from cod_async.models.attention import choice
from cod_async.models.layout import RECTANGLE, Layout
from cod_async.models.qwen3 import Qwen3, Qwen3Config
from cod_async.models.recompute import apply_recompute

CONFIG = Qwen3Config(
    vocab_size=90, hidden_size=32, intermediate_size=80, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8,
)  # fmt: skip
MODES: tuple[Any, ...] = ("none", "selective", "full", "offload")
LENGTHS = (31, 7, 22)


def run(mode: Any, layout: Layout) -> tuple[torch.Tensor, int, list[str]]:
    """Return all gradients, the bytes alive between forward and backward, and the parameters' names."""
    model = Qwen3(CONFIG, torch.Generator().manual_seed(0))
    apply_recompute(model, mode)
    shape = (3, 20) if layout.kind == "rectangle" else (1, sum(LENGTHS))
    ids = torch.randint(0, 90, shape, generator=torch.Generator().manual_seed(1))
    with MemoryMeter() as meter:
        hidden = model(ids, layout)
        kept = meter.live_bytes()
    hidden.square().sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(gradients), kept, [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("kind", ["rectangle", "packed", "tree"])
def test_gradients_are_the_same_to_the_bit_and_less_is_kept(kind: str) -> None:
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    if kind == "tree":  # the second and third node continue the first
        positions = torch.cat([torch.arange(31), 31 + torch.arange(7), 31 + torch.arange(22)])[None]
    layout = {
        "rectangle": RECTANGLE,
        "packed": Layout("packed", LENGTHS, positions),
        "tree": Layout("tree", LENGTHS, positions, (-1, 0, 0)),
    }[kind]
    found = {mode: run(mode, layout) for mode in MODES}
    plain, kept, names = found["none"]
    assert plain.abs().sum() > 0
    for mode in MODES[1:]:
        gradients, _, names_here = found[mode]
        assert torch.equal(gradients, plain)
        assert names_here == names, "export and sharding never see it"
    assert found["full"][1] < found["selective"][1] < 0.5 * kept
    assert found["full"][1] < 0.15 * kept


@pytest.mark.parametrize("mode", MODES[1:])
def test_the_first_choice_of_a_kernel_may_fall_into_a_layer(mode: Any) -> None:
    """What tries the kernels must not be kept in the place of a layer's results."""
    layout = Layout("packed", LENGTHS, torch.cat([torch.arange(length) for length in LENGTHS])[None])
    plain, _, _ = run("none", layout)
    choice._pick.cache_clear()
    assert torch.equal(run(mode, layout)[0], plain)


def test_without_gradients_nothing_is_wrapped_up() -> None:
    model = Qwen3(CONFIG, torch.Generator().manual_seed(0))
    ids = torch.randint(0, 90, (2, 5))
    with torch.no_grad():
        before = model(ids)
        apply_recompute(model, "full")
        assert torch.equal(model(ids), before)


def test_a_copy_computes_with_its_own_parameters() -> None:
    model = Qwen3(CONFIG, torch.Generator().manual_seed(0))
    apply_recompute(model, "full")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    ids = torch.randint(0, 90, (2, 5))
    hidden = other(ids)
    plain = Qwen3(CONFIG, torch.Generator().manual_seed(1))
    plain.load_state_dict(other.state_dict())
    assert torch.equal(hidden, plain(ids))
    hidden.square().sum().backward()
    touched = [name for name, p in model.named_parameters() if p.grad is not None]
    assert not touched, "backward recomputes with the copy's parameters too"


def test_twice_is_refused() -> None:
    model = Qwen3(CONFIG, torch.Generator().manual_seed(0))
    apply_recompute(model, "full")
    with pytest.raises(ValueError, match="full"):
        apply_recompute(model, "selective")
