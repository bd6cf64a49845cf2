"""PDE Discovery: a hidden sparse reaction, found from few noisy points of several trajectories."""

from __future__ import annotations

from cod_async.envs.base import EnvironmentSpec
from cod_async.envs.pde_discovery.dataset import num_records, pack_seed_for, record_at, records
from cod_async.envs.pde_discovery.env import PdeDiscovery
from cod_async.envs.pde_discovery.options import PRESETS
from cod_async.envs.pde_discovery.oracle import (
    explorer_policy,
    oracle_policy,
    random_policy,
    tool_top_policy,
    truth_hint,
)

SPEC = EnvironmentSpec(
    name="pde_discovery",
    presets=PRESETS,
    hidden="terms and coefficients of the reaction in a partial differential equation; one equation per pack",
    default_preset="train",
    default_pack_size=4,
    make=PdeDiscovery,
    records=records,
    pack_seed_for=pack_seed_for,
    policies={
        "random": random_policy,
        "oracle": oracle_policy,
        "explorer": explorer_policy,
        "tool_top": tool_top_policy,
    },
    record_at=record_at,
    num_records=num_records,
    truth_hint=truth_hint,
)
"""How PDE Discovery registers itself."""

__all__ = ["SPEC"]
