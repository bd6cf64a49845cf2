"""Terminal: file tasks on a simulated Windows, macOS or Linux machine and a remote Linux host."""

from __future__ import annotations

from cod_async.envs.base import EnvironmentSpec
from cod_async.envs.terminal.dataset import num_records, pack_seed_for, record_at, records
from cod_async.envs.terminal.env import TerminalSimulator
from cod_async.envs.terminal.options import PRESETS
from cod_async.envs.terminal.oracle import oracle_policy, random_policy

SPEC = EnvironmentSpec(
    name="terminal",
    presets=PRESETS,
    hidden="nothing by pack; how the simulated terminals behave is what can be learned",
    default_preset="default",
    default_pack_size=8,
    make=TerminalSimulator,
    records=records,
    pack_seed_for=pack_seed_for,
    policies={"random": random_policy, "oracle": oracle_policy},
    record_at=record_at,
    num_records=num_records,
)
"""How Terminal registers itself."""

__all__ = ["SPEC"]
