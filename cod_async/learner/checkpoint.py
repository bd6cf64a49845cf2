"""Checkpoints define the surviving history: weights, optimiser and the digest of all that was trained, in one
folder.

A checkpoint is an ordinary Hugging Face model directory plus the optimiser's tensors and ``trainer.json``,
which holds the digest of every other file and of itself. It is written beside its place, flushed and renamed;
readers take the newest one whose digests hold, so a torn or damaged one is passed over with a warning. Adam's
state is float32 in safetensors, so resuming is exact to the bit.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from cod_async.durable import commit_folder, remove_folder
from cod_async.errors import CheckpointError, InputError
from cod_async.lifecycle.segment import Version
from cod_async.models.directory import load_model, save_model
from cod_async.models.qwen3 import Qwen3
from cod_async.weights.folders import file_sha256

log = logging.getLogger(__name__)

CHECKPOINTS_FOLDER = "checkpoints"
OPTIMIZER_FILE = "optimizer.safetensors"
TRAINER_FILE = "trainer.json"

_FOLDER = re.compile(r"^step_(\d{8,})-L(\d+)$")
_TEMPORARY = re.compile(r"^step_\d{8,}-L\d+\.tmp$")
_STATE_NAMES = ("exp_avg", "exp_avg_sq", "step")
_NOT_COPIED = ("config.json", "generation_config.json", "bootstrap.json")


class TrainerRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What ``trainer.json`` says.

    Attributes:
        run: run id.
        version: of the weights inside.
        trained_digest: chained digest of every plan trained up to here.
        config_digest: of the resolved configuration.
        files: SHA-256 of every other file in the folder.
        digest: SHA-256 of this record with an empty ``digest``.
    """

    run: str
    version: Version
    trained_digest: str
    config_digest: str
    files: dict[str, str]
    digest: str = ""

    def own_digest(self) -> str:
        """Return the SHA-256 of the record without its digest."""
        bare = msgspec.structs.replace(self, digest="")
        return hashlib.sha256(msgspec.json.encode(bare, order="deterministic")).hexdigest()


def checkpoint_folder(version: Version) -> str:
    """Return the folder of a checkpoint, relative to the run folder: ``checkpoints/step_00000020-L0``."""
    return f"{CHECKPOINTS_FOLDER}/step_{version.step:08d}-L{version.lineage}"


def optimizer_tensors(model: Qwen3, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return Adam's state flat: ``exp_avg/NAME``, ``exp_avg_sq/NAME`` and ``step/NAME`` per parameter."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors


def restore_optimizer(
    model: Qwen3, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """Put flat tensors back into ``optimizer``.

    Raises:
        CheckpointError: a tensor is missing, unknown, or has another shape than its parameter.
    """
    parameters = dict(model.named_parameters())
    expected = {f"{key}/{name}" for key in _STATE_NAMES for name in parameters} if tensors else set()
    if expected != set(tensors):
        odd = sorted(expected ^ set(tensors))
        raise CheckpointError(f"optimiser state: {odd[0]} is missing or unknown; use an older checkpoint")
    for name, parameter in parameters.items():
        if not tensors:
            return
        state = {key: tensors[f"{key}/{name}"] for key in _STATE_NAMES}
        for key, value in state.items():
            if key != "step" and value.shape != parameter.shape:
                raise CheckpointError(f"optimiser state: {key}/{name} has shape {list(value.shape)}")
        optimizer.state[parameter] = {
            key: value.clone() if key == "step" else value.to(parameter.device)
            for key, value in state.items()
        }


def save_checkpoint(
    run_dir: Path,
    record: TrainerRecord,
    model: Qwen3,
    optimizer: torch.optim.Optimizer,
    keep_checkpoints: int,
) -> TrainerRecord:
    """Write a checkpoint durably and prune old ones.

    Args:
        run_dir: the run folder; tokenizer files are copied from its ``model/``.
        record: run, version, trained and config digests; files and digest are filled in here.
        model: the policy.
        optimizer: its AdamW.
        keep_checkpoints: newest checkpoints left on disk, beside the very first one.

    Returns:
        The complete record.
    """
    folder = run_dir / checkpoint_folder(record.version)
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for path in sorted((run_dir / "model").iterdir()):
        is_weights = path.suffix == ".safetensors" or path.name.endswith(".index.json")
        if path.is_file() and not is_weights and path.name not in _NOT_COPIED:
            shutil.copyfile(path, temporary / path.name)
    save_model(temporary, model)
    save_file(optimizer_tensors(model, optimizer), temporary / OPTIMIZER_FILE)
    files = {path.name: file_sha256(path) for path in sorted(temporary.iterdir())}
    record = msgspec.structs.replace(record, files=files, digest="")
    record = msgspec.structs.replace(record, digest=record.own_digest())
    (temporary / TRAINER_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1))
    if folder.exists():
        remove_folder(folder)
    commit_folder(temporary, folder)
    prune_checkpoints(run_dir, keep_checkpoints)
    return record


def all_checkpoints(run_dir: Path) -> list[Version]:
    """Return every checkpoint folder, oldest first (by lineage, then step), valid or not."""
    root = run_dir / CHECKPOINTS_FOLDER
    if not root.is_dir():
        return []
    matches = (_FOLDER.match(path.name) for path in root.iterdir())
    return sorted(Version(lineage=int(m[2]), step=int(m[1])) for m in matches if m)


def prune_checkpoints(run_dir: Path, keep_checkpoints: int) -> list[Version]:
    """Remove all but the first and the newest ``keep_checkpoints``, and half-written ones; return what was
    removed.
    """
    root = run_dir / CHECKPOINTS_FOLDER
    for path in root.iterdir():
        if _TEMPORARY.match(path.name):
            shutil.rmtree(path, ignore_errors=True)
    doomed = all_checkpoints(run_dir)[1 : -max(keep_checkpoints, 1)]
    for version in doomed:
        remove_folder(run_dir / checkpoint_folder(version))
    return doomed


def read_record(run_dir: Path, version: Version) -> TrainerRecord:
    """Read and verify a checkpoint without loading it.

    Raises:
        CheckpointError: missing, half written or damaged, with the file named.
    """
    folder = run_dir / checkpoint_folder(version)
    try:
        record = msgspec.json.decode((folder / TRAINER_FILE).read_bytes(), type=TrainerRecord)
        if record.digest != record.own_digest() or record.version != version:
            raise CheckpointError(
                f"{folder / TRAINER_FILE} does not match its digest; use an older checkpoint"
            )
        for name, digest in record.files.items():
            if "/" in name or file_sha256(folder / name) != digest:
                raise CheckpointError(f"{folder / name} does not match its digest; use an older checkpoint")
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder} cannot be read ({error}); use an older one") from None
    except msgspec.MsgspecError as error:
        raise CheckpointError(
            f"{folder / TRAINER_FILE} is damaged ({error}); use an older checkpoint"
        ) from None
    return record


def newest_checkpoint(run_dir: Path) -> TrainerRecord | None:
    """Return the newest checkpoint whose digests hold, or None; damaged ones are passed over with a
    warning.
    """
    for version in reversed(all_checkpoints(run_dir)):
        try:
            return read_record(run_dir, version)
        except CheckpointError as error:
            log.warning("passing over checkpoint %s: %s", version, error)
    return None


def load_checkpoint(run_dir: Path, record: TrainerRecord) -> tuple[Qwen3, dict[str, torch.Tensor]]:
    """Load the model and the optimiser's flat tensors of a verified checkpoint.

    Raises:
        CheckpointError: a file cannot be understood although its digest holds (written by another version).
    """
    folder = run_dir / checkpoint_folder(record.version)
    try:
        return load_model(folder), load((folder / OPTIMIZER_FILE).read_bytes())
    except (InputError, OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {folder}: {error}; use an older one") from None
