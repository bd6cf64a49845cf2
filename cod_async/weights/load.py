"""Loading a published version: nothing reaches a model that does not hash to what its manifest says.

Bytes are read once, hashed, and parsed from memory, so what was checked is what is used. Shard paths come
over the wire and are resolved only inside the run folder.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from cod_async.errors import WeightsError
from cod_async.weights.digest import tensors_digest
from cod_async.weights.manifest import Manifest, Shard


def _read_shard(run_dir: Path, manifest: Manifest, shard: Shard) -> bytes:
    name = f"version {manifest.version}, shard {shard.file!r}"
    root = run_dir.resolve()
    path = (root / shard.file).resolve()
    if not path.is_relative_to(root):
        raise WeightsError(f"{name}: lies outside the run folder {root}; the manifest is not to be trusted")
    try:
        with open(path, "rb") as handle:
            data = handle.read(shard.num_bytes + 1)
    except OSError as error:
        raise WeightsError(
            f"{name}: cannot be read ({error.strerror}); it was pruned, take a newer version"
        ) from None
    if len(data) != shard.num_bytes:
        size = f"more than {shard.num_bytes}" if len(data) > shard.num_bytes else str(len(data))
        raise WeightsError(f"{name}: has {size} bytes instead of {shard.num_bytes}; take another version")
    found = hashlib.sha256(data).hexdigest()
    if found != shard.sha256:
        raise WeightsError(
            f"{name}: hashes to {found[:12]} instead of {shard.sha256[:12]}; the file is damaged, "
            "take another version"
        )
    return data


def load_weights(
    run_dir: Path, manifest: Manifest, *, is_digest_checked: bool = True
) -> dict[str, torch.Tensor]:
    """Load and verify a published version.

    Args:
        run_dir: the run folder that the manifest's shard names are relative to.
        manifest: from :func:`cod_async.weights.publish.publish` or from the wire.
        is_digest_checked: also compare the digest over all tensors (a second hash over the bytes).

    Returns:
        CPU tensors by name, owned by the caller.

    Raises:
        WeightsError: a shard is missing, short, damaged, outside the run folder, or the digest differs;
            nothing was loaded. A version that was pruned meanwhile looks missing: take a newer one.
    """
    tensors: dict[str, torch.Tensor] = {}
    for shard in manifest.shards:
        data = _read_shard(run_dir, manifest, shard)
        try:
            part = load(data)
        except (SafetensorError, ValueError, KeyError) as error:
            raise WeightsError(
                f"version {manifest.version}, shard {shard.file!r}: is not safetensors ({error})"
            ) from None
        twice = sorted(set(part) & set(tensors))
        if twice:
            raise WeightsError(f"version {manifest.version}: tensor {twice[0]!r} is in two shards")
        tensors.update(part)
    if is_digest_checked and (found := tensors_digest(tensors)) != manifest.digest:
        raise WeightsError(
            f"version {manifest.version}: tensors hash to {found[:12]} instead of {manifest.digest[:12]}; "
            "manifest and shards do not belong together, take another version"
        )
    return tensors
