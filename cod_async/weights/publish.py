"""Publication: a policy version exists from the moment its manifest is durable.

The folder is written beside its place, flushed and renamed, so a reader sees either nothing or the whole
version. Old versions are removed after the new one stands; a reader that loses this race gets a named error
and takes a newer one.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file

from cod_async.durable import commit_folder, remove_folder
from cod_async.errors import WeightsError
from cod_async.lifecycle.segment import Version
from cod_async.weights.digest import tensors_digest
from cod_async.weights.folders import (
    MANIFEST_FILE,
    WEIGHTS_FOLDER,
    file_sha256,
    prune,
    published_versions,
    read_manifest,
    version_folder,
)
from cod_async.weights.manifest import Manifest, Shard

__all__ = [
    "CONFIG_FILE",
    "MANIFEST_FILE",
    "SHARD_FILE",
    "WEIGHTS_FOLDER",
    "prune",
    "publish",
    "published_versions",
    "read_manifest",
    "version_folder",
]

SHARD_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def publish(
    run_dir: Path,
    run: str,
    version: Version,
    tensors: Mapping[str, torch.Tensor],
    keep_versions: int,
    *,
    config_file: Path | None = None,
) -> Manifest:
    """Write a policy version durably and prune old ones.

    Args:
        run_dir: the run folder.
        run: run id, part of the manifest.
        version: what to call it. Publishing a version again with equal weights returns the first manifest.
        tensors: parameters by Hugging Face name; tied tensors once.
        keep_versions: newest versions left on disk (>= 2); the one being published always stays.
        config_file: the model's ``config.json``; with it the version's folder is a model directory, which
            inference servers and transformers load as it is.

    Raises:
        WeightsError: the version was published before with other weights; open a new lineage.
        OSError: the disk is full or not writable; nothing was published.
    """
    digest = tensors_digest(tensors)
    existing = published_before(run_dir, run, version, digest)
    if existing is not None:
        return existing
    folder = run_dir / version_folder(version)
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    shard = temporary / SHARD_FILE
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, shard, {"format": "pt"})
    if config_file is not None:
        (temporary / CONFIG_FILE).write_bytes(config_file.read_bytes())
    manifest = Manifest(
        run=run,
        version=version,
        digest=digest,
        shards=(
            Shard(
                file=f"{version_folder(version)}/{SHARD_FILE}",
                sha256=file_sha256(shard),
                num_bytes=shard.stat().st_size,
            ),
        ),
    )
    (temporary / MANIFEST_FILE).write_bytes(msgspec.json.encode(manifest))
    commit_folder(temporary, folder)
    prune(run_dir, keep_versions)
    return manifest


def published_before(run_dir: Path, run: str, version: Version, digest: str) -> Manifest | None:
    """Return the manifest of a version that was published before; None, and its place free, if it was not.

    Raises:
        WeightsError: it was published with other weights than those of ``digest``.
    """
    folder = run_dir / version_folder(version)
    if not folder.exists():
        return None
    try:
        existing = read_manifest(run_dir, version)
    except WeightsError:
        remove_folder(folder)
        return None
    if existing.digest == digest and existing.run == run:
        return existing
    raise WeightsError(
        f"version {version} was published before with other weights ({existing.digest[:12]} instead of "
        f"{digest[:12]}); open a new lineage instead of publishing it again"
    )
