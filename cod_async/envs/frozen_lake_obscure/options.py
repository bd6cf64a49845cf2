"""Options of FrozenLake-Obscure: what a preset fixes and a config may override, checked all at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from cod_async.envs.checks import OptionCheck

MAX_SIZE = 32
"""Largest grid side; keeps map generation and prompts bounded."""
MAX_STEPS = 10_000
"""Largest step budget that is accepted."""
NUM_MAPPINGS = 24
"""Permutations of the four moves."""

MappingMode = Literal["per_pack", "global", "per_task"]
MAPPING_MODES = ("per_pack", "global", "per_task")


class FrozenLakeOptions(msgspec.Struct, frozen=True):
    """Checked options.

    Attributes:
        size_min, size_max: grid side of the data records, drawn uniformly, both inclusive (2 .. 32 cells).
        p_min, p_max: probability of a frozen cell of the data records, drawn uniformly from [p_min, p_max).
        env_max_steps: maps are accepted when their goal is found within this many steps (plus one, see
            ``mapgen``).
        agent_max_steps: most policy responses per task.
        mapping_mode: ``per_pack``: one hidden mapping per pack, from its seed; ``global``: mapping
            ``mapping_index`` everywhere; ``per_task``: a fresh mapping per task, from the record (nothing to
            carry over).
        mapping_index: which of the 24 mappings ``global`` means (0 = Down, Right, Up, Left; lexicographic
            order).
        is_last_move_told: whether the feedback to the updater also tells where the last action led. The paper
            leaves it out; with it a pack is easier, so report such runs separately.
        num_held_out_mappings: how many of the 24 mappings only occur in held-out packs (``per_pack`` only).
            The paper holds none out: 0.
    """

    size_min: int
    size_max: int
    p_min: float
    p_max: float
    env_max_steps: int
    agent_max_steps: int
    mapping_mode: MappingMode
    mapping_index: int
    is_last_move_told: bool
    num_held_out_mappings: int


def _preset(**changes: Any) -> dict[str, Any]:
    return {
        "size_min": 4,
        "size_max": 5,
        "p_min": 0.6,
        "p_max": 0.7,
        "env_max_steps": 6,
        "agent_max_steps": 8,
        "mapping_mode": "per_pack",
        "mapping_index": 0,
        "is_last_move_told": False,
        "num_held_out_mappings": 0,
        **changes,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "easy": _preset(),
    "hard": _preset(size_min=6, size_max=7, env_max_steps=8, agent_max_steps=10),
}
"""The paper's training setting and its harder evaluation setting."""


def parse_options(options: Mapping[str, Any]) -> FrozenLakeOptions:
    """Check a preset merged with overrides; missing options are those of ``easy``.

    Raises:
        EnvironmentInputError: every problem at once: unknown names, wrong types, values out of range,
            contradictions.
    """
    check = OptionCheck("frozen_lake_obscure", PRESETS["easy"], options)
    check.integers(
        {
            "size_min": (2, MAX_SIZE),
            "size_max": (2, MAX_SIZE),
            "env_max_steps": (1, MAX_STEPS),
            "agent_max_steps": (1, MAX_STEPS),
            "mapping_index": (0, NUM_MAPPINGS - 1),
            "num_held_out_mappings": (0, NUM_MAPPINGS - 1),
        }
    )
    check.numbers({"p_min": (0, 1), "p_max": (0, 1)})
    check.choices({"mapping_mode": MAPPING_MODES})
    check.switches(("is_last_move_told",))
    has_right_types = not check.problems
    check.ordered({"size_min": "size_max", "p_min": "p_max"})
    values = check.values
    if has_right_types and values["num_held_out_mappings"] and values["mapping_mode"] != "per_pack":
        check.problems.append(
            f"num_held_out_mappings is {values['num_held_out_mappings']} but mapping_mode is "
            f"{values['mapping_mode']}; mappings can only be held out with mapping_mode per_pack"
        )
    return FrozenLakeOptions(**check.finish())
