"""Packs: which tasks a lifecycle goes through, and the seed of the world they share.

A plan is a pure function of (mixture, pack size, run seed, group, split, strategy): no generator is replayed,
no state is kept, so the coordinator can plan group one million as cheaply as group zero, and a restarted
coordinator plans the same packs. The pack seed is stable in the sense of the paper's reference: it is derived
from the identities of the records, not from a process-dependent hash, and mixed with the environment, the
split, the run seed and the group, so that training and evaluation never share a hidden world by accident and
a second epoch over the same records meets new ones. Beside packs of S different tasks (``cod``) there are
*Ralph* packs, which repeat one task S times.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, Literal

import msgspec

from cod_async.config.schema import EnvironmentConfig, PackStrategy
from cod_async.envs import registry
from cod_async.envs.base import TaskSpec
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.seeds import hash64
from cod_async.lifecycle.seeds import stable_seed as stable_seed

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
STRATEGIES: tuple[PackStrategy, ...] = ("cod", "ralph_sample", "ralph_full")


class PackPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One pack, as every lifecycle of its group plays it.

    Attributes:
        environment, preset: registry name and preset.
        options: preset overrides from the config, as JSON-able values.
        records: one data record per position; its length is the pack size.
        pack_seed: seed of the hidden world, 0 .. 2^64-1.
        strategy, group: how the pack was planned; they decide which position its tasks are told.
    """

    environment: str
    preset: str
    options: dict[str, Any]
    records: tuple[dict[str, Any], ...]
    pack_seed: int
    strategy: PackStrategy = "cod"
    group: int = 0

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
                position=told_position(self.strategy, self.group, self.pack_size, position),
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


def told_position(strategy: PackStrategy, group: int, pack_size: int, position: int) -> int:
    """Return the position that a task is told: its own, or the one position of all tasks of a Ralph pack.

    Args:
        strategy: ``ralph_sample`` packs are told 0, ``ralph_full`` packs their group modulo S.
        group: index of the group, 0-based.
        pack_size: S.
        position: where the task stands in the lifecycle, 0-based.
    """
    return {"cod": position, "ralph_sample": 0, "ralph_full": group % pack_size}[strategy]


class PackRows(msgspec.Struct, frozen=True):
    """The rows of one pack, before their records are looked up.

    Attributes:
        taskset: index of the environment in the mixture.
        rows: one row of its data set per position.
    """

    taskset: int
    rows: tuple[int, ...]


def cut_packs(
    tasks: Sequence[tuple[int, int]],
    pack_size: int,
    strategy: PackStrategy = "cod",
    *,
    is_padded: bool = True,
) -> list[PackRows]:
    """Cut a finite list of tasks into packs, as the paper's reference does with a batch.

    Tasks are grouped by taskset, in order. For ``cod`` a group with fewer than S tasks is dropped (padded
    or not); otherwise it is padded with its own first tasks to a multiple of S, or its remainder is dropped;
    then it is cut into consecutive packs. ``ralph_sample`` repeats the first task of each such pack S times.
    ``ralph_full`` makes a Ralph pack of every task; nothing is padded or dropped.

    Args:
        tasks: (taskset, row) of each task.
        pack_size: S >= 1.
        strategy: see above.
        is_padded: pad an incomplete last pack instead of dropping it.
    """
    groups: dict[int, list[int]] = {}
    for taskset, row in tasks:
        groups.setdefault(taskset, []).append(row)
    packs: list[PackRows] = []
    for taskset, rows in groups.items():
        if strategy == "ralph_full":
            packs += [PackRows(taskset, (row,) * pack_size) for row in rows]
            continue
        if len(rows) < pack_size:
            continue
        missing = -len(rows) % pack_size
        rows = [*rows, *rows[:missing]] if is_padded else rows[: len(rows) - len(rows) % pack_size]
        for start in range(0, len(rows), pack_size):
            pack = tuple(rows[start : start + pack_size])
            packs.append(PackRows(taskset, pack if strategy == "cod" else pack[:1] * pack_size))
    return packs


def plan_pack(
    environments: Sequence[EnvironmentConfig],
    pack_size: int,
    run_seed: int,
    group: int,
    split: Split = "train",
    *,
    strategy: PackStrategy = "cod",
    has_plain_seeds: bool = False,
) -> PackPlan:
    """Plan the pack of one group; equal arguments give equal plans, at a cost independent of ``group``.

    Environments with a data set of their own order (``record_at``) give group g the rows g*S .. g*S+S-1, as
    the paper consumes them, from the start again at the end; the others draw S records from a stream seeded
    for this group. Ralph packs repeat the first of these rows (``ralph_sample``), or row g (``ralph_full``).

    Args:
        environments: the mixture; ``weight`` is the relative share of packs.
        pack_size: tasks per pack (S >= 1).
        run_seed: seed of the run; data sets and hidden worlds depend on it.
        group: index of the group, 0-based.
        split: ``train``, or ``held_out`` for worlds and records that training never meets (how strict that
            is, the environment's README says).
        strategy: packs of different tasks, or of one task again and again.
        has_plain_seeds: the pack seed is :func:`stable_pack_seed` of the rows and nothing else, as in the
            reference: a second epoch meets the same worlds again, and splits may share some.

    Raises:
        EnvironmentInputError: unknown environment, preset, option, split or strategy, an empty mixture, a
            pack size below 1, or a data set with fewer records than the pack has tasks.
    """
    if split not in SPLITS:
        raise EnvironmentInputError(f"no split {split!r}; splits are {', '.join(SPLITS)}")
    if strategy not in STRATEGIES:
        raise EnvironmentInputError(f"no pack strategy {strategy!r}; strategies are {', '.join(STRATEGIES)}")
    if not environments:
        raise EnvironmentInputError("the mixture is empty; give at least one [[environments]] entry")
    if pack_size < 1:
        raise EnvironmentInputError(f"pack_size is {pack_size}; a pack has at least 1 task")
    if group < 0:
        raise EnvironmentInputError(f"group is {group}; groups are counted from 0")
    index = _choose(environments, stable_seed("mixture", run_seed, split, group))
    if strategy == "ralph_full":
        pack = PackRows(index, (group,) * pack_size)
    else:
        rows = tuple(range(group * pack_size, (group + 1) * pack_size))
        pack = PackRows(index, rows if strategy == "cod" else rows[:1] * pack_size)
    return plan_rows(
        environments, pack, run_seed, group, split, strategy=strategy, has_plain_seeds=has_plain_seeds
    )


def plan_rows(
    environments: Sequence[EnvironmentConfig],
    pack: PackRows,
    run_seed: int,
    group: int,
    split: Split = "train",
    *,
    strategy: PackStrategy = "cod",
    has_plain_seeds: bool = False,
) -> PackPlan:
    """Plan the pack with these rows; arguments and errors as for :func:`plan_pack`."""
    chosen = environments[pack.taskset]
    spec = registry.get(chosen.name)
    options = spec.options(chosen.preset, chosen.options)
    pack_size = len(pack.rows)
    num_records = None if spec.num_records is None else spec.num_records(options, split)
    num_needed = len(set(pack.rows))
    if num_records is not None and num_records < num_needed:
        raise EnvironmentInputError(
            f"environment {chosen.name}: its {split} data has {num_records} records, "
            f"the pack needs {num_needed}"
        )
    rows = pack.rows if num_records is None else tuple(row % num_records for row in pack.rows)
    if spec.record_at is not None:
        records = tuple(spec.record_at(options, split, run_seed, row) for row in rows)
    else:
        stream = spec.records(options, split, stable_seed("records", run_seed, split, group, pack.taskset))
        drawn = tuple(islice(stream, num_needed))
        if len(drawn) < num_needed:
            raise EnvironmentInputError(
                f"environment {chosen.name}: its {split} data has {len(drawn)} records, "
                f"the pack needs {num_needed}"
            )
        records = drawn if len(drawn) == pack_size else tuple(drawn[0] for _ in range(pack_size))
    if has_plain_seeds:
        pack_seed = stable_pack_seed((pack.taskset, row) for row in rows)
    else:
        identity = stable_pack_seed((pack.taskset, row) for row in pack.rows)
        mixed = stable_seed("world", run_seed, split, group, identity)
        pack_seed = spec.pack_seed_for(options, split, mixed)
    return PackPlan(
        environment=chosen.name,
        preset=chosen.preset,
        options=dict(chosen.options),
        records=records,
        pack_seed=pack_seed,
        strategy=strategy,
        group=group,
    )


def _choose(environments: Sequence[EnvironmentConfig], seed: int) -> int:
    """Return the index of the environment whose weight interval holds ``seed`` / 2^64."""
    point = seed / 2.0**64 * sum(environment.weight for environment in environments)
    for index, environment in enumerate(environments):
        point -= environment.weight
        if point < 0:
            return index
    return len(environments) - 1  # rounding at the far end
