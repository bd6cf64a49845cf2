"""Options of Grid Navigation: what a preset fixes and a config may override, checked all at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from cod_async.envs.checks import OptionCheck

MAX_SIZE = 32
"""Largest grid side in cells; keeps prompts, snapshots and the exact planner bounded."""
MAX_COMPONENTS = 64
"""Most bumps of a cost landscape."""
MAX_ROUNDS = 50
"""Most rounds of a task."""
SCALE_RANGE = (0.001, 100.0)
"""Extent of a bump, as a share of the grid side; outside of it every map is flat."""


class GridOptions(msgspec.Struct, frozen=True):
    """Checked options.

    Attributes:
        size_min, size_max: side of the hidden map, drawn uniformly per pack, both inclusive (2 .. 32 cells).
        num_components: bumps that a map is the sum of (2 .. 64).
        scale_min, scale_max: range of the extents of a bump, as shares of the grid side.
        rounds_min, rounds_max: rounds of a task, drawn uniformly, both inclusive (1 .. 50).
        reveal_radius: Chebyshev radius around entered cells within which costs are revealed (0 .. 31 cells).
        parity: an illegal move counts as ``format_error``, as in the paper's reference implementation;
            False: as ``failure``, so that the format-error rate only counts what could not be read.
    """

    size_min: int
    size_max: int
    num_components: int
    scale_min: float
    scale_max: float
    rounds_min: int
    rounds_max: int
    reveal_radius: int
    parity: bool


def _preset(**changes: Any) -> dict[str, Any]:
    return {
        "size_min": 8,
        "size_max": 12,
        "num_components": 4,
        "scale_min": 0.15,
        "scale_max": 0.45,
        "rounds_min": 3,
        "rounds_max": 5,
        "reveal_radius": 1,
        "parity": False,
        **changes,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "train_8b": _preset(scale_min=0.10, scale_max=0.35, rounds_min=4, rounds_max=6, reveal_radius=2),
    "train_27b": _preset(),
    "eval": _preset(size_min=10, size_max=14, num_components=5),
}
"""The settings of the paper's reference: training of an 8B and of a 27B model, and the evaluation."""


def parse_options(options: Mapping[str, Any]) -> GridOptions:
    """Check a preset merged with overrides; missing options are those of ``train_8b``.

    Raises:
        EnvironmentInputError: every problem at once: unknown names, wrong types, values out of range,
            contradictions.
    """
    check = OptionCheck("grid_navigation", PRESETS["train_8b"], options)
    check.integers(
        {
            "size_min": (2, MAX_SIZE),
            "size_max": (2, MAX_SIZE),
            "num_components": (2, MAX_COMPONENTS),
            "rounds_min": (1, MAX_ROUNDS),
            "rounds_max": (1, MAX_ROUNDS),
            "reveal_radius": (0, MAX_SIZE - 1),
        }
    )
    check.numbers({"scale_min": SCALE_RANGE, "scale_max": SCALE_RANGE})
    check.switches(("parity",))
    check.ordered({f"{subject}_min": f"{subject}_max" for subject in ("size", "scale", "rounds")})
    return GridOptions(**check.finish())
