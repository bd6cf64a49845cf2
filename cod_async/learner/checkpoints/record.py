"""Checkpoint folders: how they are named, what their record says, which are kept. Loads no torch, so that the
launcher and ``cod export`` can look.

A checkpoint is ``checkpoints/step_00000020-L0/`` with ``trainer.json``, which holds the digest of every other
file and of itself. It is written under a temporary name, its record last, flushed and renamed; so a folder
under its final name is whole unless something damaged it later, and readers notice that by the digests. A
damaged checkpoint is passed over with a warning; when not one is left that can be loaded, that is an error
and never a fresh start.

A step's learning rate is a function of its number, so ``version`` is the state of the scheduler too.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import msgspec

from cod_async.durable import remove_folder
from cod_async.errors import CheckpointError, InputError
from cod_async.lifecycle.segment import Version
from cod_async.weights.folders import file_sha256

log = logging.getLogger(__name__)

CHECKPOINTS_FOLDER = "checkpoints"
TRAINER_FILE = "trainer.json"
WEIGHTS_KIND, OPTIMIZER_KIND, GENERATORS_KIND = "weights", "optimizer", "generators"
KINDS = (WEIGHTS_KIND, OPTIMIZER_KIND, GENERATORS_KIND)
"""Folders of tensors inside a checkpoint."""
FORMAT = 2
"""Of the folder; format 1 held one ``model.safetensors`` and one ``optimizer.safetensors``."""

PARTIAL = ".partial"
"""Ending of a folder that is being written; one that is being removed ends in ``.tmp``."""

_FOLDER = re.compile(r"^step_(\d{8,})-L(\d+)\Z")
_AGES = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))
_TEMPORARY = re.compile(r"^step_\d{8,}-L\d+\.(tmp|partial)\Z")


class TrainerRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``trainer.json`` says.

    Attributes:
        run: run id.
        version: of the weights inside; its step is that of the learning-rate schedule.
        trained_digest: chained digest of every plan trained up to here: with the run database it says which
            steps are the surviving history.
        config_digest: of the resolved configuration.
        data_parallel, sequence_parallel: ranks that wrote it.
        created_at: seconds since the epoch, for people.
        files: SHA-256 of every other file, by its path in the folder.
        format: of the folder.
        digest: SHA-256 of this record with an empty ``digest``.
    """

    run: str
    version: Version
    trained_digest: str
    config_digest: str
    data_parallel: int = 1
    sequence_parallel: int = 1
    created_at: float = 0.0
    files: dict[str, str] = {}
    format: int = FORMAT
    digest: str = ""

    def own_digest(self) -> str:
        """Return the SHA-256 of the record without its digest."""
        bare = msgspec.structs.replace(self, digest="")
        return hashlib.sha256(msgspec.json.encode(bare, order="deterministic")).hexdigest()

    @property
    def num_ranks(self) -> int:
        """Ranks that wrote it."""
        return self.data_parallel * self.sequence_parallel


def checkpoint_folder(version: Version) -> str:
    """Return the folder of a checkpoint, relative to the run folder: ``checkpoints/step_00000020-L0``."""
    return f"{CHECKPOINTS_FOLDER}/step_{version.step:08d}-L{version.lineage}"


def version_of_folder(name: str) -> Version | None:
    """Return the version that a folder's name stands for; None if it is no checkpoint's."""
    match = _FOLDER.match(name)
    return None if match is None else Version(lineage=int(match[2]), step=int(match[1]))


def all_checkpoints(run_dir: Path) -> list[Version]:
    """Return every checkpoint folder, oldest first (by lineage, then step), whole or not."""
    root = run_dir / CHECKPOINTS_FOLDER
    if not root.is_dir():
        return []
    versions = (version_of_folder(path.name) for path in root.iterdir())
    return sorted(version for version in versions if version is not None)


def prune_checkpoints(run_dir: Path, keep_checkpoints: int, keep_every_steps: int = 0) -> list[Version]:
    """Remove checkpoints that are not kept, and half-written ones.

    Call it when a new checkpoint is durable and no other is being written: the newest, which always stays, is
    then one that can be loaded.

    Args:
        run_dir: the run folder.
        keep_checkpoints: newest ones left, beside the very first one; at least one is.
        keep_every_steps: those at multiples of so many steps stay too; 0: none.

    Returns:
        What was removed.
    """
    root = run_dir / CHECKPOINTS_FOLDER
    for path in root.iterdir():
        if _TEMPORARY.match(path.name):
            shutil.rmtree(path, ignore_errors=True)
    doomed = [
        version
        for version in all_checkpoints(run_dir)[1 : -max(keep_checkpoints, 1)]
        if not keep_every_steps or version.step % keep_every_steps
    ]
    for version in doomed:
        remove_folder(run_dir / checkpoint_folder(version))
    return doomed


def read_record(run_dir: Path, version: Version, kinds: Iterable[str] = KINDS) -> TrainerRecord:
    """Read and verify a checkpoint without loading it.

    Args:
        run_dir: the run folder.
        version: which one.
        kinds: folders of tensors whose files are verified, which reads every byte of them; files that belong
            to none are always verified.

    Raises:
        CheckpointError: missing, half-written, damaged, or of another format, with the file named.
    """
    folder = run_dir / checkpoint_folder(version)
    path = folder / TRAINER_FILE
    try:
        raw = path.read_bytes()
        _check_format(path, raw)
        record = msgspec.json.decode(raw, type=TrainerRecord)
        if record.digest != record.own_digest() or record.version != version:
            raise CheckpointError(f"{path} does not match its digest; use an older checkpoint")
        wanted = set(kinds)
        for name, digest in record.files.items():
            parts = PurePosixPath(name).parts
            if not parts or len(parts) > 2 or ".." in parts or parts[0] == "/":
                raise CheckpointError(
                    f"{path} names the file {name!r} outside its folder; use an older checkpoint"
                )
            if parts[0] in KINDS and parts[0] not in wanted:
                continue
            if file_sha256(folder / name) != digest:
                raise CheckpointError(f"{folder / name} does not match its digest; use an older checkpoint")
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder} cannot be read ({error}); use an older one") from None
    except (msgspec.MsgspecError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); use an older checkpoint") from None
    return record


def _check_format(path: Path, raw: bytes) -> None:
    """Refuse a record of another format by name, before its fields are looked at."""
    found = msgspec.json.decode(raw)
    number = found.get("format", 1) if isinstance(found, dict) else None
    if number != FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {number}, this program reads {FORMAT}; go on with the cod-async that "
            "wrote it"
        )


def newest_checkpoint(run_dir: Path, run: str | None = None) -> TrainerRecord | None:
    """Return the newest checkpoint that can be loaded; None only if there is no checkpoint folder at all.

    Damaged ones, and those of another run, are passed over with a warning.

    Args:
        run_dir: the run folder.
        run: run id that the checkpoint must be of; None: any.

    Raises:
        InputError: there are checkpoints, and none of them can be loaded.
    """
    problems: list[str] = []
    for version in reversed(all_checkpoints(run_dir)):
        try:
            record = read_record(run_dir, version)
            if run is not None and record.run != run:
                raise CheckpointError(
                    f"checkpoint {run_dir / checkpoint_folder(version)} is of run {record.run!r}, not {run!r}"
                )
        except CheckpointError as error:
            problems.append(str(error))
            log.warning("passing over checkpoint %s: %s", version, error)
        else:
            return record
    if problems:
        problems.append(
            f"{run_dir / CHECKPOINTS_FOLDER}: no checkpoint can be loaded; put back one that can, or move "
            "the folder away to begin anew from the starting model"
        )
        raise InputError(problems)
    return None


def describe(
    record: TrainerRecord, data_parallel: int, sequence_parallel: int, now_s: float | None = None
) -> str:
    """Return one line about a checkpoint: version, age, the ranks that wrote it and those that will read it.

    Args:
        record: of the checkpoint.
        data_parallel: ranks that share a step's rows now.
        sequence_parallel: ranks that share a row's tokens now.
        now_s: seconds since the epoch; None: now.
    """
    age_s = max(0.0, (time.time() if now_s is None else now_s) - record.created_at)
    unit, seconds = next(pair for pair in _AGES if age_s >= 2 * pair[1] or pair[1] == 1)
    text = f"checkpoint {record.version} (step {record.version.step}), {age_s / seconds:.0f} {unit} old, "
    then, now = (record.data_parallel, record.sequence_parallel), (data_parallel, sequence_parallel)
    if then == now:
        return f"{text}written by {_ranks(*then)}, as many as now"
    return f"{text}written by {_ranks(*then)}; now {_ranks(*now)}"


def _ranks(data_parallel: int, sequence_parallel: int) -> str:
    num = data_parallel * sequence_parallel
    if num == 1:
        return "1 rank"
    return f"{num} ranks ({data_parallel} data x {sequence_parallel} sequence)"
