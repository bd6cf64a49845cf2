"""Alchemy-Random: elements in tiers, a target to make, and a hidden book of two-input recipes."""

from __future__ import annotations

from cod_async.envs.alchemy_random.dataset import num_records, pack_seed_for, record_at, records
from cod_async.envs.alchemy_random.env import AlchemyRandom
from cod_async.envs.alchemy_random.options import PRESETS
from cod_async.envs.alchemy_random.oracle import (
    explorer_policy,
    oracle_policy,
    random_policy,
    truth_hint,
)
from cod_async.envs.base import EnvironmentSpec

SPEC = EnvironmentSpec(
    name="alchemy_random",
    presets=PRESETS,
    hidden="which pairs of elements make which element; one recipe book per pack",
    default_preset="easy",
    default_pack_size=4,
    make=AlchemyRandom,
    records=records,
    pack_seed_for=pack_seed_for,
    policies={"random": random_policy, "oracle": oracle_policy, "explorer": explorer_policy},
    record_at=record_at,
    num_records=num_records,
    truth_hint=truth_hint,
    has_held_out_worlds=lambda options: True,  # every pack has a seed, names and recipes of its own
)
"""How Alchemy-Random registers itself."""

__all__ = ["SPEC"]
