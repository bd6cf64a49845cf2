"""What a lifecycle carries from task to task beside its hint: measured data and committed equations.

Solutions are not in it: they are a function of the world's seed and are computed again where a lifecycle goes
on. Noise is drawn from (row seed, task, sample counter), so the counter is in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from cod_async.envs.pde_discovery.basis import Array
from cod_async.errors import EnvironmentInputError

FORMAT_VERSION = 1
"""First byte of a snapshot."""


class DataSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one sampling action measured.

    Attributes:
        name: ``ds_t<task>_<counter>``.
        task: number of the task, from 1.
        x, t: where, N floats each.
        u, y: noisy values, N floats each.
    """

    name: str
    task: int
    x: tuple[float, ...]
    t: tuple[float, ...]
    u: tuple[float, ...]
    y: tuple[float, ...]


class Commit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A committed equation and the evidence for it.

    Attributes:
        task: number of the task, from 1.
        equation: as text.
        num_points, u_low, u_high: how many points, and the range of measured u.
        max_error: largest absolute error of the equation on these points.
        margin: by how much it beats the best candidate with other terms, relative to its own error; it may be
            negative. Infinity is told as ``exact``.
    """

    task: int
    equation: str
    num_points: int
    u_low: float
    u_high: float
    max_error: float
    margin: float


class PackState(msgspec.Struct, forbid_unknown_fields=True):
    """State of one pack in one lifecycle.

    Attributes:
        pack_seed, pack_size: which pack.
        environment_seed, template_index: which world its rows name (template None: drawn).
        num_samplings: the sample counter: successful sampling actions so far.
        data_sets: in the order of sampling.
        commits: in the order of tasks.
    """

    pack_seed: int
    pack_size: int
    environment_seed: int
    template_index: int | None
    num_samplings: int = 0
    data_sets: list[DataSet] = []
    commits: list[Commit] = []


def encode(state: PackState | None) -> bytes:
    """Return a snapshot: the format version, then MessagePack (None before the first task)."""
    return bytes([FORMAT_VERSION]) + msgspec.msgpack.encode(state)


def decode(data: bytes) -> PackState | None:
    """Read a snapshot.

    Raises:
        EnvironmentInputError: another format version, damaged bytes, or impossible values.
    """
    if data[:1] != bytes([FORMAT_VERSION]):
        found = f"version {data[0]}" if data else "no bytes"
        raise EnvironmentInputError(
            f"pde_discovery: a snapshot has {found}; this version reads format version {FORMAT_VERSION}"
        )
    try:
        state = msgspec.msgpack.decode(data[1:], type=PackState | None, strict=True)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise EnvironmentInputError(f"pde_discovery: a snapshot is damaged: {error}") from error
    for one in state.data_sets if state else []:
        columns = (one.x, one.t, one.u, one.y)
        if not one.x or len({len(column) for column in columns}) != 1:
            raise EnvironmentInputError(f"pde_discovery: data set {one.name!r} of a snapshot is not a table")
        if not all(math.isfinite(value) for column in columns for value in column):
            raise EnvironmentInputError(f"pde_discovery: data set {one.name!r} of a snapshot is not finite")
    return state


def measured(data_sets: Sequence[DataSet]) -> tuple[Array, Array]:
    """Return the measured u and y of data sets, one after the other: float64 [N] each."""
    u = np.array([value for one in data_sets for value in one.u], dtype=np.float64)
    y = np.array([value for one in data_sets for value in one.y], dtype=np.float64)
    return u, y
