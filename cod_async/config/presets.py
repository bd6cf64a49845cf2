"""The loss recipes: what ``loss.preset`` fills in where a configuration says nothing else.

A preset is a set of overrides of :data:`NEUTRAL`, which is the policy gradient without any correction. The
reasons, costs and sources of every preset stand in docs/losses/, what each field means in
:class:`cod_async.config.schema.LossConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NEUTRAL: Mapping[str, Any] = {
    "clip": "none",
    "ratio": "token",
    "proximal": "none",
    "eps_low": 0.2,
    "eps_high": 0.2,
    "dual_clip": 0.0,
    "tv_bound": 0.2,
    "second_moment": 0.04,
    "narrowest_low": 0.7,
    "narrowest_high": 1.5,
    "log_ratio_coef": 0.0,
    "behavior_weight": "none",
    "weight_level": "token",
    "segment_weight": "geometric_mean",
    "weight_floor": 0.0,
    "weight_cap": 2.0,
    "segment_mask": "none",
    "mask_floor": 0.8,
    "mask_cap": 1.25,
    "mask_drift": 1e-4,
    "ess_lr_power": 0.0,
    "aggregation": "token_mean",
    "fixed_length_tokens": 0,
    "kl_coef": 0.0,
    "kl": "k3",
}
"""Every field but the preset itself; fields that a recipe does not use keep these values."""

_DECOUPLED = {"clip": "ppo", "proximal": "start"}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {"clip": "one_side"},
    "ppo": {"clip": "ppo"},
    "decoupled": _DECOUPLED | {"behavior_weight": "masked", "weight_cap": 5.0},
    "a3po": {"clip": "ppo", "proximal": "interpolated", "behavior_weight": "masked", "weight_cap": 5.0},
    "tis_token": _DECOUPLED | {"behavior_weight": "truncated", "weight_cap": 2.0},
    "tis_segment": _DECOUPLED
    | {"behavior_weight": "truncated", "weight_level": "segment", "weight_cap": 2.0},
    "icepop": _DECOUPLED | {"behavior_weight": "masked", "weight_floor": 0.5, "weight_cap": 5.0},
    "geo_mask": _DECOUPLED
    | {"behavior_weight": "truncated", "weight_cap": 5.0, "segment_mask": "geometric_mean"},
    "gspo": {
        "clip": "ppo",
        "ratio": "segment",
        "eps_low": 3e-4,
        "eps_high": 4e-4,
        "aggregation": "segment_mean",
    },
    "cispo": {"clip": "cispo", "eps_low": 1.0},
    "dppo_tv": {"clip": "dppo_tv", "log_ratio_coef": 1e-3},
    "m2po": {"clip": "m2po"},
    "topr": {"clip": "topr"},
    "opsm": {"clip": "ppo", "segment_mask": "negative_drift"},
    "opd": {"kl_coef": 1.0, "kl": "k2"},
}


def preset_values(name: str) -> dict[str, Any]:
    """Return every field of a recipe.

    Raises:
        KeyError: there is no such preset.
    """
    return dict(NEUTRAL) | dict(PRESETS[name])


def own_values(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a ``[loss]`` table says beyond its preset, so that another preset can take its place.

    Args:
        section: plain values; without ``preset`` it is that of the schema's default, ``paper``.
    """
    name = section.get("preset", "paper")
    says = preset_values(name) if isinstance(name, str) and name in PRESETS else {}
    return {
        key: value
        for key, value in section.items()
        if key != "preset" and not (key in says and says[key] == value)
    }
