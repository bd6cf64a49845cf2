"""Optimal Control: steer a point to a target with one expression while its dynamics are hidden."""

from __future__ import annotations

from cod_async.envs.base import EnvironmentSpec
from cod_async.envs.optimal_control.dataset import (
    has_held_out_worlds,
    num_records,
    pack_seed_for,
    record_at,
    records,
)
from cod_async.envs.optimal_control.env import OptimalControl
from cod_async.envs.optimal_control.options import PRESETS
from cod_async.envs.optimal_control.oracle import (
    explorer_policy,
    lqr_policy,
    oracle_policy,
    random_policy,
    truth_hint,
    zero_policy,
)

SPEC = EnvironmentSpec(
    name="optimal_control",
    presets=PRESETS,
    hidden="how velocity carries over (a) and how the control acts (b, of either sign); one pair per pack",
    default_preset="hard",
    default_pack_size=4,
    make=OptimalControl,
    records=records,
    pack_seed_for=pack_seed_for,
    policies={
        "random": random_policy,
        "oracle": oracle_policy,
        "explorer": explorer_policy,
        "lqr": lqr_policy,
        "zero": zero_policy,
    },
    record_at=record_at,
    num_records=num_records,
    truth_hint=truth_hint,
    has_held_out_worlds=has_held_out_worlds,
)
"""How Optimal Control registers itself."""

__all__ = ["SPEC"]
