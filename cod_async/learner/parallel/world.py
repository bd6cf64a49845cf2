"""The ranks of a learner: one process, or data_parallel x sequence_parallel processes that act as one.

A :class:`World` says who this process is and holds the few collectives that a step needs. Alone, every one of
them returns its argument and torch.distributed is not touched. With several ranks there are two process
groups over all of them: the one that tensors are summed in (gloo on a CPU, NCCL on CUDA), whose timeout is
that of a step, and one of gloo for words (bytes, problems), on which ranks wait for as long as there is
nothing to do. Ranks of one machine find each other through a file in a folder that only their owner can
read, and listen on loopback; ranks of a cluster through a TCP store whose address they are given.

Rank = data rank x sequence_parallel + sequence rank: the ranks that share rows are neighbours.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cod_async.config.learner import LearnerConfig
from cod_async.errors import InputError, WorkError
from cod_async.learner.parallel.local import local, whole

RENDEZVOUS_VARIABLE = "COD_RENDEZVOUS"
"""Environment variable with the ranks' meeting place: ``file:PATH`` or ``tcp://HOST:PORT``, where rank 0
listens."""
LOCAL_RANK_VARIABLE = "LOCAL_RANK"
"""Environment variable with the number of this rank on its machine, which is its CUDA device; the rank itself
when it is not set."""
STEP_TIMEOUT_S = 1800.0
"""A rank that waits longer than this for another one inside a step gives up."""
WAIT_TIMEOUT_S = 30 * 86400.0
"""Between steps ranks wait for the next one; that a rank is gone shows at its socket, and to the parent."""
_SHARE_BYTES = 64 << 20


@dataclass
class World:
    """This process among the ranks of a learner.

    Attributes:
        data_parallel: ranks that share a step's rows.
        sequence_parallel: ranks that share each row's tokens.
        rank: of this process, in [0, size).
        device: where this rank computes.
        mesh: all ranks, one dimension; None alone.
        host_mesh: the same ranks, for tensors in host memory; None alone.
        sequence_group: process group of the ranks that share rows with this one; None without any.
        words: process group for bytes and problems; None alone.
    """

    data_parallel: int = 1
    sequence_parallel: int = 1
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: Any = None
    host_mesh: Any = None
    sequence_group: Any = None
    words: Any = None

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> World:
        """Return the world of a single process."""
        return cls(device=torch.device(device))

    @classmethod
    def join(
        cls,
        rank: int,
        data_parallel: int,
        sequence_parallel: int,
        *,
        device: torch.device | str = "cpu",
        rendezvous: str | None = None,
    ) -> World:
        """Meet the other ranks; returns when all are there.

        Args:
            rank: of this process.
            data_parallel: ranks that share rows.
            sequence_parallel: ranks that share tokens.
            device: ``cpu``, or this rank's CUDA device.
            rendezvous: ``file:PATH`` or ``tcp://HOST:PORT``; the environment variable
                ``COD_RENDEZVOUS`` when None.

        Raises:
            InputError: the rank is not one of this mesh, or there is no meeting place.
        """
        size = data_parallel * sequence_parallel
        if not 0 <= rank < size:
            raise InputError(
                f"rank {rank}: learner.data_parallel = {data_parallel} times learner.sequence_parallel = "
                f"{sequence_parallel} is {size} ranks, numbered from 0; start as many as that"
            )
        if size == 1:
            return cls.alone(device)
        from torch import distributed

        place = rendezvous if rendezvous is not None else os.environ.get(RENDEZVOUS_VARIABLE, "")
        where = torch.device(device)
        if where.type == "cuda":
            torch.cuda.set_device(where)
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo",
            store=_meet(place, rank, size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=STEP_TIMEOUT_S),
        )
        return cls.of_default_group(data_parallel, sequence_parallel, where)

    @classmethod
    def of_learner(cls, learner: LearnerConfig, rank: int = 0) -> World:
        """Meet the ranks that a configuration has, as one of them."""
        device = device_of(learner, rank)
        return cls.join(rank, learner.data_parallel, learner.sequence_parallel, device=device)

    @classmethod
    def of_default_group(
        cls, data_parallel: int, sequence_parallel: int, device: torch.device | str = "cpu"
    ) -> World:
        """Return the world over torch's default process group, which somebody has made.

        Raises:
            InputError: the group has not as many ranks as the mesh.
        """
        from torch import distributed
        from torch.distributed.device_mesh import init_device_mesh

        where, size = torch.device(device), data_parallel * sequence_parallel
        if distributed.get_world_size() != size:
            raise InputError(
                f"there are {distributed.get_world_size()} ranks, but learner.data_parallel = "
                f"{data_parallel} times learner.sequence_parallel = {sequence_parallel} is {size}; start as "
                "many as that"
            )
        if size == 1:
            return cls.alone(where)
        rows = init_device_mesh(
            where.type, (data_parallel, sequence_parallel), mesh_dim_names=("data", "sequence")
        )
        mesh = init_device_mesh(where.type, (size,), mesh_dim_names=("ranks",))
        return cls(
            data_parallel=data_parallel,
            sequence_parallel=sequence_parallel,
            rank=distributed.get_rank(),
            device=where,
            mesh=mesh,
            host_mesh=mesh if where.type == "cpu" else init_device_mesh("cpu", (size,)),
            sequence_group=rows.get_group("sequence") if sequence_parallel > 1 else None,
            words=distributed.new_group(backend="gloo", timeout=timedelta(seconds=WAIT_TIMEOUT_S)),
        )

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.data_parallel * self.sequence_parallel

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that speaks with the coordinator and commits files."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of the rows this rank computes, in [0, data_parallel)."""
        return self.rank // self.sequence_parallel

    @property
    def sequence_rank(self) -> int:
        """Which share of each row's tokens this rank computes, in [0, sequence_parallel)."""
        return self.rank % self.sequence_parallel

    def add_up(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place; every rank has the same bits afterwards."""
        if self.size > 1:
            from torch import distributed

            distributed.all_reduce(tensor)
        return tensor

    def collect(self, tensor: Tensor) -> list[Tensor]:
        """Return every rank's tensor, by rank; all have one shape and type."""
        if self.size == 1:
            return [tensor]
        from torch import distributed

        found = [torch.empty_like(tensor) for _ in range(self.size)]
        distributed.all_gather(found, tensor.contiguous())
        return found

    def largest(self, values: Sequence[int]) -> list[int]:
        """Return the elementwise maximum of some whole numbers over all ranks."""
        if self.size == 1:
            return list(values)
        from torch import distributed

        found = torch.tensor(list(values), dtype=torch.int64)
        distributed.all_reduce(found, distributed.ReduceOp.MAX, group=self.words)
        return [int(value) for value in found]

    def tell(self, data: bytes | None, source: int = 0) -> bytes:
        """Return what rank ``source`` says; the others give None. Waits for it, for days if need be."""
        if self.size == 1:
            return data or b""
        from torch import distributed

        size = torch.tensor([len(data or b"")], dtype=torch.int64)
        distributed.broadcast(size, source, group=self.words)
        buffer = torch.empty(int(size), dtype=torch.uint8)
        if self.rank == source and data:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        for start in range(0, buffer.numel(), _SHARE_BYTES):
            distributed.broadcast(buffer[start : start + _SHARE_BYTES], source, group=self.words)
        return buffer.numpy().tobytes()

    def first_problem(self, problem: str | None) -> str | None:
        """Return the problem of the lowest rank that has one, on every rank; None if none has.

        This is how ranks leave a step together: whoever finds something wrong goes on taking part in the
        collectives of the others until all come here.
        """
        if self.size == 1:
            return problem
        (found,) = self.largest([-self.size if problem is None else -self.rank])
        rank = -found
        if rank == self.size:
            return None
        text = self.tell(None if problem is None else problem.encode(), source=rank).decode()
        return text if rank == 0 else f"{text} (rank {rank})"

    def bring_together(self, tensor: Tensor, owner: int) -> Tensor | None:
        """Return a sharded tensor whole on rank ``owner``, None on the others; all must ask.

        Only the owner makes room for more than its share. A tensor that is not sharded is the owner's own.
        """
        if not hasattr(tensor, "to_local"):
            return tensor if self.rank == owner else None
        from torch import distributed
        from torch.distributed.tensor import Shard

        sharded: Any = tensor
        if tuple(sharded.placements) != (Shard(0),):
            full = whole(tensor)
            return full if self.rank == owner else None
        own, num_rows = local(tensor), tensor.shape[0]
        share = -(-num_rows // self.size)
        padded = own.new_zeros((share, *own.shape[1:]))
        padded[: own.shape[0]] = own
        parts = [torch.empty_like(padded) for _ in range(self.size)] if self.rank == owner else None
        distributed.gather(padded, parts, owner)
        if parts is None:
            return None
        # torch cuts as chunk() does: all shares but the last few are full.
        return torch.cat(parts)[:num_rows]

    def wait(self) -> None:
        """Return when every rank is here."""
        self.largest([0])

    def close(self) -> None:
        """Leave the process groups; nothing may be asked of this world afterwards."""
        if self.size > 1:
            from torch import distributed

            distributed.destroy_process_group()


def device_of(learner: LearnerConfig, rank: int = 0) -> torch.device:
    """Return where a rank computes: on CUDA each rank of a machine has a device of its own.

    Raises:
        InputError: there is no such device.
    """
    count = torch.cuda.device_count() if learner.device != "cpu" else 0
    if not count:
        if learner.device == "cuda":
            raise InputError('learner.device: "cuda", but there is no CUDA device here; use "auto" or "cpu"')
        return torch.device("cpu")
    place = int(os.environ.get(LOCAL_RANK_VARIABLE, rank))
    if place >= count:
        raise InputError(
            f"rank {rank}: learner.data_parallel = {learner.data_parallel} times learner.sequence_parallel = "
            f"{learner.sequence_parallel} needs a CUDA device for each rank, and there are {count} here"
        )
    return torch.device("cuda", place)


def check_devices(learner: LearnerConfig) -> None:
    """Refuse a learner on CUDA before anything is started, where its ranks run on this machine.

    Raises:
        InputError: there is no device, or there are fewer than ranks.
    """
    if learner.device == "cuda":
        device_of(learner, learner.data_parallel * learner.sequence_parallel - 1)


def lost_rank(error: BaseException) -> WorkError | None:
    """Return what to say of an error with which torch reports that another rank is gone; None if it is some
    other error.
    """
    from torch import distributed

    text = str(error)
    is_lost = isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in text or "Connection closed" in text)
    )
    if not is_lost:
        return None
    first = text.strip().splitlines()[0][:200] if text.strip() else type(error).__name__
    return WorkError(f"another rank of the learner is gone ({first}); the last checkpoint stands")


def _meet(place: str, rank: int, size: int) -> Any:
    """Return the store through which ranks find each other.

    Raises:
        InputError: the place is not one.
        WorkError: the others did not come.
    """
    from torch import distributed

    stores: Any = distributed
    kind, _, rest = place.partition(":")
    if kind == "file" and rest:
        name = "lo0" if sys.platform == "darwin" else "lo"
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            # Not only where it is not set: a machine's profile may name the interface of its cluster, where
            # others could connect.
            os.environ[variable] = name
        path = Path(rest)
        if path.parent.stat().st_mode & 0o077:
            raise InputError(f"{path.parent}: others can read the ranks' meeting place; chmod 700 it")
        # Told the number of ranks, the store would remove its file once it has been closed as often, counting
        # each process group's copy of it, and whoever closes the next copy would wait for the file in vain.
        return stores.FileStore(str(path), -1)
    host, _, port = rest.removeprefix("//").rpartition(":")
    if kind == "tcp" and host and port.isdigit():
        try:
            return stores.TCPStore(host, int(port), size, is_master=rank == 0)
        except (RuntimeError, ValueError) as error:
            raise WorkError(f"{place}: rank {rank} cannot meet the others there: {error}") from None
    raise InputError(
        f"{RENDEZVOUS_VARIABLE} is {place!r}; ranks meet at file:PATH or tcp://HOST:PORT (cod learner RUN "
        "without --rank starts them all on this machine)"
    )
