"""A published version on this host, checked, as a model directory that inference servers load as it is.

The tensors are mapped, not read: they are hashed once from the very pages that are handed on later, cost no
memory of their own, and stay valid when the version is pruned, since a mapped file outlives its name. What a
server reads from the folder by itself is the same file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cod_async.errors import WeightsError
from cod_async.lifecycle.segment import Version
from cod_async.weights.digest import tensors_digest
from cod_async.weights.manifest import Manifest, Shard
from cod_async.weights.publish import CONFIG_FILE, version_folder


class PublishedWeights:
    """A verified version.

    Attributes:
        manifest: what was published.
        folder: its model directory: ``config.json`` and safetensors.
        config: the contents of ``config.json``.
    """

    def __init__(
        self, manifest: Manifest, folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]
    ) -> None:
        self.manifest, self.folder, self.config = manifest, folder, config
        self._tensors = tensors

    @property
    def version(self) -> Version:
        """The policy version."""
        return self.manifest.version

    @property
    def label(self) -> str:
        """What servers are told that their weights are called: ``L<lineage>-S<step>``."""
        return f"L{self.version.lineage}-S{self.version.step}"

    @property
    def architecture(self) -> str:
        """The model class that ``config.json`` names first, for example ``Qwen3ForCausalLM``."""
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else ""

    @property
    def is_tied(self) -> bool:
        """Whether the output head is the embedding."""
        return bool(self.config.get("tie_word_embeddings", False))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the CPU tensors by Hugging Face name. They are shared: do not write into them."""
        return self._tensors

    @classmethod
    def open(cls, root: Path, manifest: Manifest) -> PublishedWeights:
        """Map and check a version; takes as long as reading and hashing it, so call it in a thread.

        Args:
            root: the run folder, or a cache of pulled versions.
            manifest: which version.

        Raises:
            WeightsError: a file is missing (pruned: take a newer version), damaged, outside the version's
                folder or there although the manifest does not name it; the digest differs; ``config.json``
                is missing or no JSON object.
        """
        name = f"version {manifest.version}"
        folder = root.resolve() / version_folder(manifest.version)
        config = _read_config(folder / CONFIG_FILE, name)
        named = {_shard_name(shard, manifest) for shard in manifest.shards}
        for path in sorted(folder.glob("*.safetensors")):
            # A server that is given the folder loads every such file.
            if path.name not in named:
                raise WeightsError(f"{name}: {path} is not in the manifest; remove it")
        tensors: dict[str, torch.Tensor] = {}
        for shard in manifest.shards:
            part = _map_shard(folder, shard, name)
            if twice := sorted(set(part) & set(tensors)):
                raise WeightsError(f"{name}: tensor {twice[0]!r} is in two shards")
            tensors.update(part)
        if (found := tensors_digest(tensors)) != manifest.digest:
            raise WeightsError(
                f"{name}: tensors hash to {found[:12]} instead of {manifest.digest[:12]}; a file is damaged, "
                "take another version"
            )
        return cls(manifest, folder, config, tensors)


def _shard_name(shard: Shard, manifest: Manifest) -> str:
    """Return a shard's file name; it must lie right in the version's folder."""
    expected = f"{version_folder(manifest.version)}/"
    name = shard.file.removeprefix(expected)
    if not shard.file.startswith(expected) or Path(name).name != name or not name.endswith(".safetensors"):
        raise WeightsError(
            f"version {manifest.version}, shard {shard.file!r}: is no safetensors file of {expected}; "
            "the manifest is not to be trusted"
        )
    return name


def _map_shard(folder: Path, shard: Shard, name: str) -> dict[str, torch.Tensor]:
    path = folder / Path(shard.file).name
    try:
        size = path.stat().st_size
        if path.is_symlink() or size != shard.num_bytes:
            raise WeightsError(f"{name}: {path} has {size} bytes instead of {shard.num_bytes}, or is a link")
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise WeightsError(
            f"{name}: {path} cannot be read ({error.strerror or error}); it was pruned, take a newer version"
        ) from None
    except SafetensorError as error:
        raise WeightsError(f"{name}: {path} is not safetensors ({error})") from None


def _read_config(path: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise WeightsError(
            f"{name}: {path} is missing; the version was pruned, or published without the model's config"
        ) from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{name}: {path} cannot be read as JSON ({error})") from None
    if not isinstance(config, dict):
        raise WeightsError(f"{name}: {path} holds no JSON object")
    return config
