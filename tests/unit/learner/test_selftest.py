"""The self-test passes what is sound, on every class of model and layout, and refuses what is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from learner_world import tiny_model
from model_world import FAMILIES, write

from cod_async.errors import WorkError
from cod_async.learner.selftest import BFLOAT16_TOLERANCE, check_packing, compare_rows
from cod_async.models.layout import RECTANGLE, Layout, LayoutKind
from cod_async.models.loading import load_policy
from cod_async.models.qwen3 import Qwen3

KINDS: tuple[LayoutKind, ...] = ("rectangle", "packed", "tree")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_in_every_layout(family: str, tmp_path: Path) -> None:
    write(tmp_path, family)
    policy = load_policy(tmp_path)
    for kind in KINDS:
        found = compare_rows(policy, 1.0, 512, 128, kind=kind)
        assert found.error < 2e-5 and found.leak < 2e-6 and found.spread > 0.1


def test_recurrent_layers_keep_the_rows_of_a_rectangle_apart(tmp_path: Path) -> None:
    """And are refused end to end, where the state of one row would run into the next."""
    write(tmp_path, "qwen3_5")
    policy = load_policy(tmp_path)
    assert policy.is_recurrent
    found = compare_rows(policy, 1.0, 2048, 128)
    assert found.error < 2e-5 and found.leak < 2e-6 and found.spread > 0.1
    policy.is_recurrent = False
    for kind in ("packed", "tree"):
        with pytest.raises(WorkError, match="differ by"):
            check_packing(policy, 1.0, 2048, 128, kind=kind)  # type: ignore[arg-type]


class Faulty(Qwen3):
    """A model with a fault in how it reads layouts."""

    fault = ""

    def forward(self, input_ids: torch.Tensor, layout: Layout = RECTANGLE) -> torch.Tensor:
        if layout.kind == "rectangle":
            hidden: torch.Tensor = super().forward(input_ids, layout)
            return hidden + 0.01 * hidden.mean(0, keepdim=True) if self.fault == "padding" else hidden
        if self.fault == "rows" and layout.kind == "packed":  # everything is one row
            layout = Layout("packed", (sum(layout.lengths),), layout.position_ids)
        if self.fault == "roots":  # no row sees its parents
            layout = Layout("packed", layout.lengths, layout.position_ids)
        if self.fault == "positions" and layout.position_ids is not None:  # two tokens in one place
            positions = layout.position_ids // 2
            layout = Layout(layout.kind, layout.lengths, positions, layout.parents)
        hidden = super().forward(input_ids, layout)
        return hidden + 0.01 * hidden.mean(1, keepdim=True) if self.fault == "faint" else hidden


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_model_passes_the_self_test(kind: LayoutKind) -> None:
    found = compare_rows(tiny_model(), 1.0, 256, 48, kind=kind)
    assert found.error < 1e-5 and found.leak < 1e-6 and found.spread > 0.1
    assert check_packing(tiny_model(), 1.0, 256, 4, kind=kind) < 1e-5  # the shortest rows a model may take


@pytest.mark.parametrize(
    ("fault", "kind", "is_bfloat16", "part"),
    [
        ("padding", "rectangle", False, "differ by"),
        ("rows", "packed", False, "differ by"),
        ("positions", "packed", False, "differ by"),
        ("positions", "tree", False, "differ by"),
        ("roots", "tree", False, "differ by"),
        ("faint", "packed", True, "change by"),  # within the rounding of bfloat16, but not silent
    ],
)
def test_the_self_test_refuses_what_is_wrong(
    fault: str, kind: LayoutKind, is_bfloat16: bool, part: str
) -> None:
    model = Faulty(tiny_model().config)
    model.load_state_dict(tiny_model().state_dict())
    with torch.no_grad():  # attention that matters as it does in a trained model
        for name, value in model.named_parameters():
            if name.endswith("o_proj.weight"):
                value.mul_(10.0)
    model.fault = fault
    with pytest.raises(WorkError, match=part):
        check_packing(model, 1.0, 4096, 48, kind=kind, is_bfloat16=is_bfloat16)


def test_bfloat16_has_a_bound_of_its_own() -> None:
    """Two ways to round in bfloat16 stay within it; rows run together do not."""
    model = tiny_model().bfloat16()
    for kind in KINDS:
        found = compare_rows(model, 1.0, 4096, 48, kind=kind)
        assert found.error <= BFLOAT16_TOLERANCE * found.spread and found.leak <= 1e-4
