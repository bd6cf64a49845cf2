"""Options of Alchemy-Random: what a preset fixes and a config may override, checked all at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from cod_async.envs.checks import OptionCheck

MAX_TIERS = 6
"""Most tiers; a plan for the highest one then has at most 2^5 - 1 = 31 rounds."""
MAX_BASE = 64
"""Most raw elements; keeps worlds and prompts bounded."""
MAX_ROUNDS = 10_000
"""Largest round budget that is accepted."""

MaterialMode = Literal["unlimited", "limited"]
MATERIAL_MODES = ("unlimited", "limited")


class AlchemyOptions(msgspec.Struct, frozen=True):
    """Checked options. Ranges ``_min``, ``_max`` are drawn from uniformly once per world, both inclusive.

    Attributes:
        max_rounds: most policy responses per task.
        material_mode: ``unlimited``: an element once owned is never used up; ``limited``: every attempt with
            inputs at hand uses them up, whether or not it makes something.
        num_tiers_min, num_tiers_max: tiers of elements, the raw ones included (2 .. 6).
        num_base_min, num_base_max: raw elements, tier 0 (1 .. 64).
        shrink_min, shrink_max: size of a tier relative to the one below it (0 .. 1).
        num_recipes_min, num_recipes_max: recipes of each element above tier 0; drawn per element (1 .. 8).
        max_tier_gap: how many tiers below its product an input may lie. With 1 both inputs are of the tier
            right below, whatever the probability of crossing is.
        cross_tier_prob_min, cross_tier_prob_max: probability that a recipe takes its second input from a
            lower tier than that.
        noise_ratio_min, noise_ratio_max: useless elements per useful one (0 .. 2); they have a recipe, are
            listed like all others, are never targets and never needed.
        num_noise_rounds: rounds in which useless elements are added; later ones may build on earlier ones.
        material_mult_min, material_mult_max: supply of raw elements in multiples of what a synthesis needs,
            drawn per task; ``limited`` only (1 .. 100).
        has_distinct_targets: every task of a pack has a target of its own; worlds with too few elements for
            that are drawn again. In the paper targets recur when a world has fewer than the pack has tasks.
        has_attempt_lists: whether each user message lists the recipes found and the pairs that failed so far
            in the current task. The paper's released prompts do not.
        is_last_result_told: whether the feedback to the updater also tells what the last attempt made. The
            paper leaves it out; easier, so report such runs separately.
        parity: behave like the paper's reference implementation where it has a defect: the limited supply may
            be too short for every synthesis, and an element whose recipes could not be placed may be a
            target.
    """

    max_rounds: int
    material_mode: MaterialMode
    num_tiers_min: int
    num_tiers_max: int
    num_base_min: int
    num_base_max: int
    shrink_min: float
    shrink_max: float
    num_recipes_min: int
    num_recipes_max: int
    max_tier_gap: int
    cross_tier_prob_min: float
    cross_tier_prob_max: float
    noise_ratio_min: float
    noise_ratio_max: float
    num_noise_rounds: int
    material_mult_min: float
    material_mult_max: float
    has_distinct_targets: bool
    has_attempt_lists: bool
    is_last_result_told: bool
    parity: bool


def _preset(**changes: Any) -> dict[str, Any]:
    return {
        "max_rounds": 8,
        "material_mode": "unlimited",
        "num_tiers_min": 3,
        "num_tiers_max": 4,
        "num_base_min": 3,
        "num_base_max": 4,
        "shrink_min": 0.4,
        "shrink_max": 0.6,
        "num_recipes_min": 1,
        "num_recipes_max": 1,
        "max_tier_gap": 1,
        "cross_tier_prob_min": 0.0,
        "cross_tier_prob_max": 0.1,
        "noise_ratio_min": 0.0,
        "noise_ratio_max": 0.0,
        "num_noise_rounds": 2,
        "material_mult_min": 1.5,
        "material_mult_max": 2.0,
        "has_distinct_targets": False,
        "has_attempt_lists": False,
        "is_last_result_told": False,
        "parity": False,
        **changes,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "easy": _preset(),
    "hard": _preset(
        max_rounds=15,
        material_mode="limited",
        num_base_min=4,
        num_base_max=6,
        shrink_max=0.8,
        num_recipes_max=2,
        cross_tier_prob_max=0.05,
        noise_ratio_max=0.3,
    ),
}
"""The paper's training setting and its harder evaluation setting."""

_INTEGERS = {
    "max_rounds": (1, MAX_ROUNDS),
    "num_tiers_min": (2, MAX_TIERS),
    "num_tiers_max": (2, MAX_TIERS),
    "num_base_min": (1, MAX_BASE),
    "num_base_max": (1, MAX_BASE),
    "num_recipes_min": (1, 8),
    "num_recipes_max": (1, 8),
    "max_tier_gap": (1, MAX_TIERS),
    "num_noise_rounds": (0, 8),
}
_NUMBERS = {
    "shrink_min": (0, 1),
    "shrink_max": (0, 1),
    "cross_tier_prob_min": (0, 1),
    "cross_tier_prob_max": (0, 1),
    "noise_ratio_min": (0, 2),
    "noise_ratio_max": (0, 2),
    "material_mult_min": (1, 100),
    "material_mult_max": (1, 100),
}
_SWITCHES = ("has_distinct_targets", "has_attempt_lists", "is_last_result_told", "parity")


def parse_options(options: Mapping[str, Any]) -> AlchemyOptions:
    """Check a preset merged with overrides; missing options are those of ``easy``.

    Raises:
        EnvironmentInputError: every problem at once: unknown names, wrong types, values out of range,
            contradictions.
    """
    check = OptionCheck("alchemy_random", PRESETS["easy"], options)
    check.integers(_INTEGERS)
    check.numbers(_NUMBERS)
    check.choices({"material_mode": MATERIAL_MODES})
    check.switches(_SWITCHES)
    lows = (key for key in check.values if key.endswith("_min"))
    check.ordered({low: low.removesuffix("_min") + "_max" for low in lows})
    return AlchemyOptions(**check.finish())
