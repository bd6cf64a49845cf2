"""Packs: which tasks a lifecycle goes through, and the seed of the world they share.

A plan is a pure function of (mixture, pack size, run seed, group, split): no generator is replayed, no state
is kept, so the coordinator can plan group one million as cheaply as group zero, and a restarted coordinator
plans the same packs. The pack seed is stable in the sense of the paper's reference: it is derived from the
identities of the records, not from a process-dependent hash, and mixed with the run seed and the group so
that a second epoch over the same records meets new hidden worlds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, Literal

import msgspec

from cod_async.config.schema import EnvironmentConfig
from cod_async.envs import registry
from cod_async.envs.base import TaskSpec
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.seeds import hash64
from cod_async.lifecycle.seeds import stable_seed as stable_seed

Split = Literal["train", "held_out"]


class PackPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One pack, as every lifecycle of its group plays it.

    Attributes:
        environment, preset: registry name and preset.
        options: preset overrides from the config, as JSON-able values.
        records: one data record per position; its length is the pack size.
        pack_seed: seed of the hidden world, 0 .. 2^64-1.
    """

    environment: str
    preset: str
    options: dict[str, Any]
    records: tuple[dict[str, Any], ...]
    pack_seed: int

    @property
    def pack_size(self) -> int:
        """Tasks in the pack (S)."""
        return len(self.records)

    def tasks(self) -> tuple[TaskSpec, ...]:
        """Return the tasks of the pack in the order of their positions."""
        return tuple(
            TaskSpec(
                environment=self.environment,
                preset=self.preset,
                options=self.options,
                record=record,
                pack_seed=self.pack_seed,
                position=position,
                pack_size=self.pack_size,
            )
            for position, record in enumerate(self.records)
        )


def stable_pack_seed(pairs: Iterable[tuple[int, int]]) -> int:
    """Hash the identities of a pack's records, whatever their order (the reference's ``stable_pack_seed``).

    Args:
        pairs: (taskset id, row index in its data set) of each task; a multiset, so repeats count.

    Returns:
        The first 8 bytes, big-endian, of the SHA-256 of the sorted pairs as compact JSON lists: 0 .. 2^64-1.
        For example (0,0), (0,1), (0,2), (0,3) gives 15069623396018555611.
    """
    text = json.dumps(sorted([int(a), int(b)] for a, b in pairs), separators=(",", ":"))
    return hash64(text)


def plan_pack(
    environments: Sequence[EnvironmentConfig],
    pack_size: int,
    run_seed: int,
    group: int,
    split: Split = "train",
) -> PackPlan:
    """Plan the pack of one group; equal arguments give equal plans, at a cost independent of ``group``.

    Environments with a data set of their own order (``record_at``) give group g the rows g*S .. g*S+S-1, as
    the paper consumes them; the others draw S records from a stream seeded for this group.

    Args:
        environments: the mixture; ``weight`` is the relative share of packs.
        pack_size: tasks per pack (S >= 1).
        run_seed: seed of the run; data sets and hidden worlds depend on it.
        group: index of the group, 0-based.
        split: ``train``, or ``held_out`` for worlds and records that training never meets (how strict that
            is, the environment's README says).

    Raises:
        EnvironmentInputError: unknown environment, preset, option or split, an empty mixture, a pack size
            below 1, or a data set with fewer records than the pack has tasks.
    """
    if split not in ("train", "held_out"):
        raise EnvironmentInputError(f"no split {split!r}; splits are train, held_out")
    if not environments:
        raise EnvironmentInputError("the mixture is empty; give at least one [[environments]] entry")
    if pack_size < 1:
        raise EnvironmentInputError(f"pack_size is {pack_size}; a pack has at least 1 task")
    if group < 0:
        raise EnvironmentInputError(f"group is {group}; groups are counted from 0")
    index = _choose(environments, stable_seed("mixture", run_seed, split, group))
    chosen = environments[index]
    spec = registry.get(chosen.name)
    options = spec.options(chosen.preset, chosen.options)
    rows = range(group * pack_size, (group + 1) * pack_size)
    if spec.record_at is not None:
        records = tuple(spec.record_at(options, split, run_seed, row) for row in rows)
    else:
        stream = spec.records(options, split, stable_seed("records", run_seed, split, group, index))
        records = tuple(islice(stream, pack_size))
    if len(records) < pack_size:
        raise EnvironmentInputError(
            f"environment {chosen.name}: its {split} data has {len(records)} records, "
            f"the pack needs {pack_size}"
        )
    identity = stable_pack_seed((index, row) for row in rows)
    pack_seed = spec.pack_seed_for(options, split, stable_seed("world", run_seed, split, group, identity))
    return PackPlan(
        environment=chosen.name,
        preset=chosen.preset,
        options=dict(chosen.options),
        records=records,
        pack_seed=pack_seed,
    )


def _choose(environments: Sequence[EnvironmentConfig], seed: int) -> int:
    """Return the index of the environment whose weight interval holds ``seed`` / 2^64."""
    point = seed / 2.0**64 * sum(environment.weight for environment in environments)
    for index, environment in enumerate(environments):
        point -= environment.weight
        if point < 0:
            return index
    return len(environments) - 1  # rounding at the far end
