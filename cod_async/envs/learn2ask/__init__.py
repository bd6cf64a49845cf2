"""Learn2Ask: one turn of a medical consultation, ask one good question or stop."""

from __future__ import annotations

from cod_async.envs.base import EnvironmentSpec
from cod_async.envs.learn2ask.dataset import num_records, pack_seed_for, record_at, records
from cod_async.envs.learn2ask.env import Learn2Ask
from cod_async.envs.learn2ask.options import PRESETS
from cod_async.envs.learn2ask.oracle import always_ask_policy, oracle_policy, random_policy

SPEC = EnvironmentSpec(
    name="learn2ask",
    presets=PRESETS,
    hidden="nothing; what carries over is when to stop asking and how to ask",
    default_preset="default",
    default_pack_size=4,
    make=Learn2Ask,
    records=records,
    pack_seed_for=pack_seed_for,
    policies={"random": random_policy, "oracle": oracle_policy, "always_ask": always_ask_policy},
    record_at=record_at,
    num_records=num_records,
    # Held-out tasks are of diagnoses or sessions that training never meets.
    has_held_out_worlds=lambda options: True,
    needs_network=lambda options: options["judge"] != "rules",
)
"""How Learn2Ask registers itself."""

__all__ = ["SPEC"]
