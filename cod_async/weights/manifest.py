"""A published policy version: what it is called, what it must hash to, and where its bytes are.

A version exists from the moment its manifest is durable. Manifests are small, are sent to every actor, and
never contain absolute paths: shards are resolved inside the run folder by whoever loads them.
"""

from __future__ import annotations

import msgspec

from cod_async.lifecycle.segment import Version


class Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One safetensors file, named relative to the run folder, with its SHA-256 and size."""

    file: str
    sha256: str
    num_bytes: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A policy version on disk.

    Attributes:
        run: run id.
        version: (lineage, step).
        digest: SHA-256 over (name, dtype, shape, bytes) of all tensors in name order; equal digests mean
            equal weights, also across lineages.
        shards: files, relative to the run folder.
    """

    run: str
    version: Version
    digest: str
    shards: tuple[Shard, ...]
