"""Which packs a setting plays under a seed, and what identifies one lifecycle of them.

Packs are planned by the functions that plan training packs, under a seed of evaluation's own, so that equal
settings meet equal packs whatever the model, and training packs are not met again by number. A data set that
ends is cut into packs as the paper's reference cuts a batch (optionally shuffled before); of one without end
every pack draws its own rows. A lifecycle is identified by all that its outcome depends on beside the
weights, so a result can be kept and found again whatever else in a suite has changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from cod_async import __version__
from cod_async.envs import registry
from cod_async.errors import EnvironmentInputError
from cod_async.evaluate.suite import Control, Setting, has_finite_data
from cod_async.lifecycle.packs import PackPlan, PackRows, cut_packs, plan_pack, plan_rows
from cod_async.lifecycle.seeds import hash64, stable_seed

_FORMAT = 1
"""Raised when what a lifecycle's key stands for changes."""


class Packs:
    """The packs of one setting under one seed, planned when they are asked for.

    Args:
        setting: what is played.
        data_seed: seed of data sets and hidden worlds.

    Raises:
        EnvironmentInputError: the data set is wrong, or too small for a single pack.
    """

    def __init__(self, setting: Setting, data_seed: int) -> None:
        self._setting = setting
        environment, spec = setting.environment, registry.get(setting.environment.name)
        is_finite = has_finite_data(spec)
        # A seed of its own kind: evaluation packs must not be the training packs of the same number. The
        # held-out rows of a data set are kept apart from its training rows by its own seed, and only by that.
        is_apart = is_finite and setting.split == "held_out"
        self._run_seed = data_seed if is_apart else hash64(f"evaluation/{setting.split}/{data_seed}") >> 8
        self._cut: list[PackRows] = []
        if is_finite:
            assert spec.num_records is not None  # noqa: S101
            num_records = spec.num_records(
                spec.options(environment.preset, environment.options), setting.split
            )
            rows: Sequence[int] = range(num_records)
            if setting.is_shuffled:
                rows = sorted(rows, key=lambda row: stable_seed("shuffle", data_seed, row))
            lifecycle = setting.config.lifecycle
            self._cut = cut_packs([(0, row) for row in rows], lifecycle.pack_size, lifecycle.packs)
            if not self._cut:
                raise EnvironmentInputError(
                    f"environment {environment.name}: {num_records} records make no pack of "
                    f"{lifecycle.pack_size}"
                )
        self.num_packs = setting.num_packs or len(self._cut)

    def plan(self, index: int) -> PackPlan:
        """Return pack ``index``; a data set that was used up starts over, with new hidden worlds."""
        lifecycle = self._setting.config.lifecycle
        mixture = (self._setting.environment,)
        if not self._cut:
            return plan_pack(
                mixture,
                lifecycle.pack_size,
                self._run_seed,
                index,
                self._setting.split,
                strategy=lifecycle.packs,
                has_plain_seeds=lifecycle.has_plain_pack_seeds,
            )
        return plan_rows(
            mixture,
            self._cut[index % len(self._cut)],
            self._run_seed,
            index,
            self._setting.split,
            strategy=lifecycle.packs,
            has_plain_seeds=lifecycle.has_plain_pack_seeds,
        )


def setting_digest(setting: Setting) -> str:
    """Return the SHA-256 (hex) of what all lifecycles of a setting have in common, this package included."""
    identity = [_FORMAT, __version__, setting.identity()]
    return hashlib.sha256(msgspec.json.encode(identity, order="deterministic")).hexdigest()


def pack_digest(plan: PackPlan) -> str:
    """Return the SHA-256 (hex) of a pack's tasks; equal digests mean the same tasks in the same world."""
    return hashlib.sha256(msgspec.json.encode(plan.tasks(), order="deterministic")).hexdigest()


def lifecycle_key(
    of_setting: str, of_pack: str, seed: int, member: int, control: Control, hints: Sequence[str] | None
) -> str:
    """Return what identifies one lifecycle of a model: 32 hexadecimal digits.

    Args:
        of_setting: from :func:`setting_digest`.
        of_pack: from :func:`pack_digest`.
        seed: sampling seed of the lifecycle.
        member: which lifecycle of the pack.
        control: what its solver is shown.
        hints: the hints of another pack that it is shown, by position; None without.
    """
    parts = [of_setting, of_pack, seed, member, control, None if hints is None else list(hints)]
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:32]


def sampling_seed(seed: int, pack: int, member: int) -> int:
    """Return the sampling seed (0 .. 2^63 - 1) of one lifecycle; equal for all controls, which pairs them."""
    return hash64(f"evaluate/{seed}/{pack}/{member}") >> 1


def donors(worlds: Sequence[str]) -> list[int] | None:
    """Choose for every pack the next one (cyclically) whose hidden world differs; None if all are equal."""
    n = len(worlds)
    out = []
    for i, world in enumerate(worlds):
        donor = next((j % n for j in range(i + 1, i + n) if worlds[j % n] != world), None)
        if donor is None:
            return None
        out.append(donor)
    return out
