"""FrozenLake-Obscure: a visible lake, four action codes, and a hidden mapping from codes to moves."""

from __future__ import annotations

from cod_async.envs.base import EnvironmentSpec
from cod_async.envs.frozen_lake_obscure.dataset import num_records, pack_seed_for, record_at, records
from cod_async.envs.frozen_lake_obscure.env import FrozenLakeObscure
from cod_async.envs.frozen_lake_obscure.options import PRESETS
from cod_async.envs.frozen_lake_obscure.oracle import (
    explorer_policy,
    oracle_policy,
    random_policy,
    truth_hint,
)

SPEC = EnvironmentSpec(
    name="frozen_lake_obscure",
    presets=PRESETS,
    hidden="which of the four moves each action code makes; one mapping per pack",
    default_preset="easy",
    default_pack_size=4,
    make=FrozenLakeObscure,
    records=records,
    pack_seed_for=pack_seed_for,
    policies={"random": random_policy, "oracle": oracle_policy, "explorer": explorer_policy},
    record_at=record_at,
    num_records=num_records,
    truth_hint=truth_hint,
    has_held_out_worlds=lambda options: bool(options["num_held_out_mappings"]),
)
"""How FrozenLake-Obscure registers itself."""

__all__ = ["SPEC"]
