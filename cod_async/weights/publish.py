"""Publication: a policy version exists from the moment its manifest is durable.

The folder is written beside its place, flushed and renamed, so a reader sees either nothing or the whole
version. Old versions are removed after the new one stands; a reader that loses this race gets a named error
and takes a newer one.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file

from cod_async.durable import commit_folder, remove_folder
from cod_async.errors import WeightsError
from cod_async.lifecycle.segment import Version
from cod_async.weights.digest import file_sha256, tensors_digest
from cod_async.weights.manifest import Manifest, Shard

WEIGHTS_FOLDER = "weights"
SHARD_FILE = "model.safetensors"
MANIFEST_FILE = "manifest.json"

_FOLDER = re.compile(r"^L(\d{4,})-S(\d{8,})$")
_TEMPORARY = re.compile(r"^L\d{4,}-S\d{8,}\.tmp$")


def version_folder(version: Version) -> str:
    """Return the folder of a version, relative to the run folder: ``weights/L0000-S00000012``."""
    return f"{WEIGHTS_FOLDER}/L{version.lineage:04d}-S{version.step:08d}"


def published_versions(run_dir: Path) -> list[Version]:
    """Return every published version, oldest first (by lineage, then step)."""
    root = run_dir / WEIGHTS_FOLDER
    if not root.is_dir():
        return []
    found = []
    for path in root.iterdir():
        if (match := _FOLDER.match(path.name)) and (path / MANIFEST_FILE).is_file():
            found.append(Version(lineage=int(match[1]), step=int(match[2])))
    return sorted(found)


def read_manifest(run_dir: Path, version: Version) -> Manifest:
    """Read the manifest of a published version.

    Raises:
        WeightsError: it is missing (pruned or never published) or does not parse; take another version.
    """
    path = run_dir / version_folder(version) / MANIFEST_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except OSError as error:
        raise WeightsError(
            f"version {version}: no manifest at {path} ({error}); take a newer version"
        ) from None
    except msgspec.MsgspecError as error:
        raise WeightsError(f"version {version}: {path} is damaged ({error}); take another version") from None


def publish(
    run_dir: Path,
    run: str,
    version: Version,
    tensors: Mapping[str, torch.Tensor],
    keep_versions: int,
) -> Manifest:
    """Write a policy version durably and prune old ones.

    Args:
        run_dir: the run folder.
        run: run id, part of the manifest.
        version: what to call it. Publishing a version again with equal weights returns the first manifest.
        tensors: parameters by Hugging Face name; tied tensors once.
        keep_versions: newest versions left on disk (>= 2); the one being published always stays.

    Raises:
        WeightsError: the version was published before with other weights; open a new lineage.
        OSError: the disk is full or not writable; nothing was published.
    """
    digest = tensors_digest(tensors)
    folder = run_dir / version_folder(version)
    if folder.exists():
        try:
            existing = read_manifest(run_dir, version)
        except WeightsError:
            remove_folder(folder)
        else:
            if existing.digest == digest and existing.run == run:
                return existing
            raise WeightsError(
                f"version {version} was published before with other weights "
                f"({existing.digest[:12]} instead of {digest[:12]}); open a new lineage "
                "instead of publishing it again"
            )
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    shard = temporary / SHARD_FILE
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, shard)
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


def prune(run_dir: Path, keep_versions: int) -> list[Version]:
    """Remove all but the newest ``keep_versions`` versions and every half-written one; return what was
    removed.
    """
    root = run_dir / WEIGHTS_FOLDER
    for path in root.iterdir():
        if _TEMPORARY.match(path.name):
            shutil.rmtree(path, ignore_errors=True)
    doomed = published_versions(run_dir)[: -max(keep_versions, 1)]
    for version in doomed:
        remove_folder(run_dir / version_folder(version))
    return doomed
