"""Grid Navigation: rook walks of a fixed number of moves over a hidden, gradually revealed cost map."""

from __future__ import annotations

from cod_async.envs.base import EnvironmentSpec
from cod_async.envs.grid_navigation.dataset import num_records, pack_seed_for, record_at, records
from cod_async.envs.grid_navigation.env import GridNavigation
from cod_async.envs.grid_navigation.options import PRESETS
from cod_async.envs.grid_navigation.oracle import (
    oracle_policy,
    planner_policy,
    random_policy,
    truth_hint,
    uniform_policy,
)

SPEC = EnvironmentSpec(
    name="grid_navigation",
    presets=PRESETS,
    hidden="what each cell of a square grid costs; one cost map per pack",
    default_preset="train_8b",
    default_pack_size=4,
    make=GridNavigation,
    records=records,
    pack_seed_for=pack_seed_for,
    policies={
        "random": random_policy,
        "oracle": oracle_policy,
        "planner": planner_policy,
        "uniform": uniform_policy,
    },
    record_at=record_at,
    num_records=num_records,
    truth_hint=truth_hint,
    has_held_out_worlds=lambda options: True,  # no pack seed, so no map, is of both splits
)
"""How Grid Navigation registers itself."""

__all__ = ["SPEC"]
