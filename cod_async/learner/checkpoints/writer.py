"""Checkpoints are written beside training: the loop waits for a copy in host memory, a thread does the rest.

The thread writes this rank's files, and when every rank has, rank 0 writes the record, renames the folder and
tells the coordinator, which forgets nothing before that. One checkpoint is under way at a time: the next one
waits. A checkpoint that cannot be written (disk full, folder gone) is named in the log and counted; its
leavings are removed, the one before it stands, training goes on, and the next due one tries again.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from cod_async.config.learner import LearnerConfig
from cod_async.durable import commit_folder, remove_folder
from cod_async.errors import CheckpointError
from cod_async.learner.checkpoints.files import Piece, pieces_of, write_pieces
from cod_async.learner.checkpoints.record import (
    GENERATORS_KIND,
    KINDS,
    PARTIAL,
    TRAINER_FILE,
    TrainerRecord,
    checkpoint_folder,
    prune_checkpoints,
)
from cod_async.learner.checkpoints.staging import StagedPieces, Staging
from cod_async.learner.checkpoints.state import generator_state, host_mesh_of, named_state
from cod_async.learner.parallel.world import World
from cod_async.lifecycle.segment import Version
from cod_async.weights.folders import file_sha256

log = logging.getLogger(__name__)

_NOT_COPIED = ("bootstrap.json",)
_DIGESTS_FILE = "digests-{rank:05d}.json"
_PROBLEM_BYTES = 1024


class CheckpointWriter:
    """Writes the checkpoints of one learner. All ranks make one, and call it in the same order.

    Args:
        run_dir: the run folder; what describes the model is copied from its ``model/``.
        model: the policy, whole or sharded.
        optimizer: of its parameters.
        learner: how often, how many, and whether beside training.
        world: the ranks.
        on_durable: called on rank 0 when a checkpoint is durable, on the thread that wrote it.
        on_point: called with the name of each point that writing has come to, for tests that end the process
            there.

    Attributes:
        pause_s: seconds that the loop waited for the last checkpoint to begin.
        num_failed: checkpoints that could not be written.
        problem: why the last one failed; empty if it did not.
    """

    def __init__(
        self,
        run_dir: Path,
        model: torch.nn.Module,
        optimizer: Any,
        learner: LearnerConfig,
        *,
        world: World | None = None,
        on_durable: Callable[[TrainerRecord], None] = lambda record: None,
        on_point: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._run_dir = run_dir
        self._model = model
        self._optimizer = optimizer
        self._learner = learner
        self._world = world if world is not None else World.alone()
        self._on_durable = on_durable
        self._on_point = on_point
        self._device = next(model.parameters()).device
        self._staging = Staging(self._device, optimizer)
        self._group = _own_group(self._world)
        self._host_mesh = host_mesh_of(self._world)
        self._thread: threading.Thread | None = None
        self._crash: BaseException | None = None
        self._durable: Version | None = None
        self.pause_s = 0.0
        self.num_failed = 0
        self.problem = ""

    def begin(self, record: TrainerRecord) -> None:
        """Begin a checkpoint of the present state; returns when training may go on.

        Without ``learner.has_async_checkpoints`` that is when it is durable, or has failed.

        Args:
            record: run, version, trained and config digests; the rest is filled in here.
        """
        started = time.perf_counter()
        self.wait()
        state = named_state(self._model, self._optimizer, host_mesh=self._host_mesh)
        rank = self._world.rank
        pieces = {kind: pieces_of(tensors, rank) for kind, tensors in state.items()}
        pieces[GENERATORS_KIND] = pieces_of(generator_state(rank, self._device), 0)
        staged = self._staging.take(pieces)
        record = msgspec.structs.replace(
            record,
            data_parallel=self._world.data_parallel,
            sequence_parallel=self._world.sequence_parallel,
            created_at=time.time(),
        )
        self._thread = threading.Thread(target=self._write, args=(record, staged), name="checkpoint")
        self._thread.start()
        if not self._learner.has_async_checkpoints:
            self.wait()
        self.pause_s = time.perf_counter() - started

    def wait(self) -> Version | None:
        """Wait until nothing is being written; return the version of the last durable checkpoint, None if
        there was none yet.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        crash, self._crash = self._crash, None
        if crash is not None:
            raise crash
        return self._durable

    def settle(self) -> None:
        """Wait until nothing is being written, whatever became of it."""
        if self._thread is not None:
            self._thread.join()

    def _write(self, record: TrainerRecord, staged: StagedPieces) -> None:
        started = time.perf_counter()
        version = record.version
        try:
            self._staging.finish()
            done = self._write_folder(record, staged)
        except (OSError, CheckpointError) as error:
            self.num_failed += 1
            self.problem = str(error)
            log.error(
                "checkpoint of version %s was NOT written: %s; the one before it stands, training goes on, "
                "the next one is due in %d steps",
                *(version, error, self._learner.checkpoint_every_steps),
            )
            return
        except BaseException as error:  # raised where the loop comes next
            self._crash = error
            return
        self.problem, self._durable = "", version
        log.info(
            "checkpoint of version %s is durable, %.1f s after it began",
            *(version, time.perf_counter() - started),
        )
        try:
            if done is not None:
                self._on_durable(done)
            self._on_point("announced")
        except BaseException as error:
            self._crash = error

    def _write_folder(self, record: TrainerRecord, staged: StagedPieces) -> TrainerRecord | None:
        """Write one checkpoint, with the other ranks; return its record, on rank 0 only.

        Raises:
            OSError: this rank could not write; nothing is left but what was there before.
            CheckpointError: another rank could not.
        """
        folder = self._run_dir / checkpoint_folder(record.version)
        temporary = folder.with_name(f"{folder.name}{PARTIAL}")
        done: TrainerRecord | None = None
        try:
            with self._together():
                if self._world.is_main:
                    self._make_folder(temporary)
            with self._together():
                self._write_own(temporary, staged)
            with self._together():
                if self._world.is_main:
                    done = self._commit(temporary, folder, record)
        except (OSError, CheckpointError):
            if self._world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if self._world.is_main:
            learner = self._learner
            prune_checkpoints(self._run_dir, learner.keep_checkpoints, learner.keep_checkpoint_every_steps)
            self._on_point("pruned")
        return done

    def _make_folder(self, temporary: Path) -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.parent.mkdir(mode=0o700, exist_ok=True)
        temporary.mkdir(mode=0o700)
        for path in sorted((self._run_dir / "model").iterdir()):
            is_weights = path.suffix == ".safetensors" or path.name.endswith(".index.json")
            if path.is_file() and not is_weights and path.name not in _NOT_COPIED:
                shutil.copyfile(path, temporary / path.name)
        for kind in KINDS:
            (temporary / kind).mkdir(mode=0o700)
        self._on_point("made")

    def _write_own(self, temporary: Path, staged: Mapping[str, list[Piece]]) -> None:
        """Write this rank's files and their digests."""
        rank = self._world.rank
        digests: dict[str, str] = {}
        for kind in KINDS:
            files = write_pieces(temporary / kind, staged[kind], rank)
            digests |= {f"{kind}/{name}": digest for name, digest in files.items()}
            self._on_point(kind)
        (temporary / _DIGESTS_FILE.format(rank=rank)).write_bytes(msgspec.json.encode(digests))
        self._on_point("written")

    def _commit(self, temporary: Path, folder: Path, record: TrainerRecord) -> TrainerRecord:
        """Gather the ranks' digests, write the record last, and give the folder its name."""
        files: dict[str, str] = {}
        for rank in range(self._world.size):
            path = temporary / _DIGESTS_FILE.format(rank=rank)
            files |= msgspec.json.decode(path.read_bytes(), type=dict[str, str])
            path.unlink()
        files |= {path.name: file_sha256(path) for path in sorted(temporary.iterdir()) if path.is_file()}
        record = msgspec.structs.replace(record, files=dict(sorted(files.items())), digest="")
        record = msgspec.structs.replace(record, digest=record.own_digest())
        (temporary / TRAINER_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1))
        self._on_point("recorded")
        if folder.exists():
            remove_folder(folder)
        commit_folder(temporary, folder)
        self._on_point("renamed")
        return record

    def _together(self) -> _Together:
        return _Together(self._group, self._world.size)


class _Together:
    """A block that succeeds on all ranks or fails on all: who fails says why, and the others raise it too."""

    def __init__(self, group: Any, size: int) -> None:
        self._group = group
        self._size = size

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._size == 1 or (error is not None and not isinstance(error, OSError | CheckpointError)):
            return
        from torch import distributed

        own = torch.zeros(_PROBLEM_BYTES, dtype=torch.uint8)
        if error is not None:
            text = (str(error) or type(error).__name__).encode()[:_PROBLEM_BYTES]
            own[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        found = [torch.empty_like(own) for _ in range(self._size)]
        distributed.all_gather(found, own, group=self._group)
        if error is not None:
            return
        for rank, said in enumerate(found):
            text = said.numpy().tobytes().rstrip(b"\0")
            if text:
                raise CheckpointError(f"rank {rank}: {text.decode(errors='replace')}")


def _own_group(world: World) -> Any:
    """Return a process group of the writers' own, so that they do not come between the steps' collectives."""
    if world.size == 1:
        return None
    from datetime import timedelta

    from torch import distributed

    from cod_async.learner.parallel.world import WAIT_TIMEOUT_S

    return distributed.new_group(backend="gloo", timeout=timedelta(seconds=WAIT_TIMEOUT_S))


def write_checkpoint(
    run_dir: Path, record: TrainerRecord, model: torch.nn.Module, optimizer: Any, learner: LearnerConfig
) -> TrainerRecord:
    """Write one checkpoint of a single process and wait for it.

    Returns:
        The complete record.

    Raises:
        CheckpointError: it could not be written.
    """
    done: list[TrainerRecord] = []
    writer = CheckpointWriter(run_dir, model, optimizer, learner, on_durable=done.append)
    writer.begin(record)
    writer.wait()
    if not done:
        raise CheckpointError(f"checkpoint of version {record.version}: {writer.problem}")
    return done[0]
