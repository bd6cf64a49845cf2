"""Publication by several ranks that each hold a part of every tensor: no rank ever has the whole model.

Whole tensors are dealt to the ranks, about as many bytes to each. One tensor after the other comes together
on its rank, which appends it to a safetensors file of its own, so that no rank needs more room than the
largest tensor. Rank 0 then takes the digest over all files, in name order and mapped, not read; it writes the
index by which transformers and inference servers find tensors in several files, and the manifest, and gives
the folder its name. A problem on one rank is every rank's, and nothing is published.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import struct
from collections.abc import Mapping, Sequence
from io import BufferedWriter
from pathlib import Path
from typing import Protocol

import msgspec
import torch
from safetensors import safe_open
from torch import Tensor

from cod_async.durable import commit_folder, fsync_path
from cod_async.errors import CodError, WeightsError
from cod_async.lifecycle.segment import Version
from cod_async.weights.digest import tensor_bytes, tensors_digest
from cod_async.weights.manifest import Manifest, Shard
from cod_async.weights.publish import (
    CONFIG_FILE,
    MANIFEST_FILE,
    SHARD_FILE,
    prune,
    published_before,
    version_folder,
)

INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Ranks(Protocol):
    """What publication asks of the ranks; every call is made by all of them in the same order."""

    @property
    def rank(self) -> int:
        """Of this process."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def tell(self, data: bytes | None, source: int = 0) -> bytes:
        """Return what rank ``source`` says."""

    def first_problem(self, problem: str | None) -> str | None:
        """Return the problem of the lowest rank that has one."""

    def bring_together(self, tensor: Tensor, owner: int) -> Tensor | None:
        """Return a sharded tensor whole on rank ``owner``, None on the others."""


def deal(sizes: Mapping[str, int], num_ranks: int) -> dict[str, int]:
    """Return the rank that writes each tensor: the largest first, each to the rank with the fewest bytes.

    Args:
        sizes: bytes of each tensor.
        num_ranks: ranks; those behind the number of tensors get none.
    """
    loads = [0] * num_ranks
    owners: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return owners


def publish_sharded(
    run_dir: Path,
    run: str,
    version: Version,
    tensors: Mapping[str, Tensor],
    keep_versions: int,
    ranks: Ranks,
    *,
    config_file: Path | None = None,
) -> Manifest:
    """Write a policy version durably, by all ranks together; arguments as of :func:`.publish.publish`.

    Args:
        run_dir: the run folder, which all ranks write to.
        run: run id.
        version: what to call it.
        tensors: parameters by Hugging Face name, whole or sharded over the ranks.
        keep_versions: newest versions left on disk.
        ranks: the ranks.
        config_file: the model's ``config.json``.

    Returns:
        The manifest, on every rank.

    Raises:
        WeightsError: the version was published before with other weights, or a rank could not write; nothing
            was published.
        OSError: this rank could not write; nothing was published.
    """
    folder = run_dir / version_folder(version)
    temporary = folder.with_name(f"{folder.name}.tmp")
    with _Together(ranks, version):
        if ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    owners = deal({name: t.numel() * t.element_size() for name, t in tensors.items()}, ranks.size)
    files = [
        f"model-{rank + 1:05d}-of-{max(owners.values()) + 1:05d}.safetensors" for rank in range(ranks.size)
    ]
    own: dict[str, str | int] = {}
    with _Together(ranks, version) as failed:
        shard = _write_own(temporary / files[ranks.rank], tensors, owners, ranks, failed)
        if shard is not None:
            own = {"sha256": shard.sha256, "num_bytes": shard.num_bytes}
    shards = _collect(own, [f"{version_folder(version)}/{name}" for name in files], ranks)
    said = b""
    with _Together(ranks, version):
        if ranks.rank == 0:
            where = {name: files[owner] for name, owner in owners.items()}
            manifest = _commit(run_dir, run, version, temporary, shards, where, config_file)
            prune(run_dir, keep_versions)
            said = msgspec.json.encode(manifest)
    return msgspec.json.decode(ranks.tell(said if ranks.rank == 0 else None), type=Manifest)


class _Together:
    """Runs a block on every rank; if it fails on one, it has failed on all.

    Attributes:
        error: put here by a block that went on for the others' sake.
    """

    def __init__(self, ranks: Ranks, version: Version) -> None:
        self._ranks = ranks
        self._version = version
        self.error: OSError | CodError | None = None

    def __enter__(self) -> _Together:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and not isinstance(error, OSError | CodError):
            return
        own = self.error if error is None else error
        problem = self._ranks.first_problem(None if own is None else f"{type(own).__name__}: {own}")
        if own is not None:
            raise own
        if problem is not None:
            raise WeightsError(f"version {self._version} was not published: {problem}")


def _write_own(
    path: Path, tensors: Mapping[str, Tensor], owners: Mapping[str, int], ranks: Ranks, failed: _Together
) -> Shard | None:
    """Take part in bringing every tensor together; write this rank's file and return what is in it.

    A rank that cannot write goes on taking part, and leaves its error in ``failed``.
    """
    names = sorted(tensors)
    mine = [name for name in names if owners[name] == ranks.rank]
    digest, num_bytes = hashlib.sha256(), 0
    with contextlib.ExitStack() as stack:
        file: BufferedWriter | None = None

        def write(piece: bytes | memoryview) -> None:
            nonlocal file, num_bytes
            if failed.error is not None:
                return
            try:
                file = file or stack.enter_context(path.open("wb"))
                file.write(piece)
            except OSError as error:
                failed.error = error
            digest.update(piece)
            num_bytes += len(piece)

        if mine:
            write(_header({name: tensors[name] for name in mine}))
        for name in names:
            found = ranks.bring_together(tensors[name].detach(), owners[name])
            if found is not None:
                write(tensor_bytes(found))
        try:
            if file is not None:
                file.flush()
                fsync_path(path)
        except OSError as error:
            failed.error = error
    if not mine or failed.error is not None:
        return None
    return Shard(file=path.name, sha256=digest.hexdigest(), num_bytes=num_bytes)


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the length and the header of a safetensors file of these tensors, in this order."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _collect(own: dict[str, str | int], files: Sequence[str], ranks: Ranks) -> tuple[Shard, ...]:
    """Return the files of all ranks that wrote one."""
    found = []
    for rank, file in enumerate(files):
        said = json.loads(ranks.tell(json.dumps(own).encode() if rank == ranks.rank else None, rank))
        if said:
            found.append(Shard(file=file, **said))
    return tuple(found)


def _commit(
    run_dir: Path,
    run: str,
    version: Version,
    temporary: Path,
    shards: tuple[Shard, ...],
    where: Mapping[str, str],
    config_file: Path | None,
) -> Manifest:
    """Write what belongs beside the shards and give the folder its name.

    Args:
        run_dir: the run folder.
        run: run id.
        version: what to call it.
        temporary: the folder.
        shards: its files.
        where: file of each tensor.
        config_file: the model's ``config.json``.
    """
    mapped: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for shard in shards:
            file = stack.enter_context(safe_open(temporary / Path(shard.file).name, framework="pt"))
            mapped |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        digest = tensors_digest(mapped)
        total = sum(t.numel() * t.element_size() for t in mapped.values())
        mapped.clear()
    existing = published_before(run_dir, run, version, digest)
    if existing is not None:
        shutil.rmtree(temporary, ignore_errors=True)
        return existing
    if len(shards) == 1:  # a single file has the name that needs no index
        name = f"{version_folder(version)}/{SHARD_FILE}"
        (temporary / Path(shards[0].file).name).rename(temporary / SHARD_FILE)
        shards = (msgspec.structs.replace(shards[0], file=name),)
    else:
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (temporary / INDEX_FILE).write_text(json.dumps(content, indent=2) + "\n")
    if config_file is not None:
        (temporary / CONFIG_FILE).write_bytes(config_file.read_bytes())
    manifest = Manifest(run=run, version=version, digest=digest, shards=shards)
    (temporary / MANIFEST_FILE).write_bytes(msgspec.json.encode(manifest))
    commit_folder(temporary, run_dir / version_folder(version))
    return manifest
