"""Policies back into model directories that transformers and inference servers load unchanged.

A policy is saved as a copy of the directory it came from: the same ``config.json``, tokenizer and other
files, the same tensor names in the same order and types, with the trained values in place of the old ones.
What was not loaded (vision towers, draft heads) is copied byte by byte. Files are written tensor by tensor,
so that saving needs room for one tensor, into a folder that gets its name when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cod_async.durable import commit_folder
from cod_async.errors import InputError
from cod_async.models.loading import is_ignored, stored_names, tied_names
from cod_async.models.lora import merged
from cod_async.models.stored import DTYPES, INDEX_FILE, WEIGHTS_FILE, StoredWeights, compare, raise_problems

MAX_SHARD_BYTES = 5_000_000_000
"""Largest safetensors file, unless one tensor is larger."""
_ELEMENT_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_NOT_COPIED = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt",
               ".gguf", ".h5", ".msgpack", ".onnx", ".py", ".tmp")  # fmt: skip


def policy_weights(policy: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the stored tensors by Hugging Face name, one by one.

    Detached; they share memory with the policy's parameters, but for those with an adapter, whose sum is
    made as it is asked for. A tied head is left out. A sharded policy gives sharded tensors.
    """
    tensors = policy.state_dict()
    for name, stored_name in stored_names(policy).items():
        yield stored_name, merged(policy, name, tensors[name].detach())


def weights_of(policy: Any) -> dict[str, Tensor]:
    """Return the stored tensors by Hugging Face name, as :func:`policy_weights` yields them."""
    return dict(policy_weights(policy))


def save_policy(
    path: Path,
    policy: Any,
    *,
    source: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a policy as a model directory, adapters merged into the weights.

    Args:
        path: directory that does not exist yet, or is empty.
        policy: loaded from ``source``, trained or not; whole, not sharded.
        source: model directory; names, types, ``config.json``, tokenizer and everything that was not loaded
            come from there.
        max_shard_bytes: with more, weights go to several files with an index.

    Raises:
        InputError: the source does not fit the policy, or ``path`` is in use or cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: exists and is not empty; name a new folder")
    stored = StoredWeights(source)
    tensors = policy.state_dict()
    names = {theirs: ours for ours, theirs in stored_names(policy).items()}
    tied = tied_names(policy)
    expected = {theirs: tuple(tensors[ours].shape) for theirs, ours in names.items()}
    raise_problems(source, compare(stored.tensors, expected, lambda name: is_ignored(name) or name in tied))

    def value(name: str) -> Tensor:
        """Return what is written for one stored name."""
        if name in tied and name not in names:
            name = tied[1]
        if name not in names:
            return next(stored.read([name]))[1]
        ours = names[name]
        return merged(policy, ours, tensors[ours].detach())

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _copy_files(source, temporary)
        _write_shards(temporary, stored, value, max_shard_bytes)
        commit_folder(temporary, path)
    except OSError as error:
        raise InputError(
            f"cannot write the model directory {path}: {error}; choose another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy_files(source: Path, target: Path) -> None:
    """Copy everything beside the weights: configuration, tokenizer, template, license."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(_NOT_COPIED):
            shutil.copyfile(file, target / file.name)


def _write_shards(
    folder: Path, stored: StoredWeights, value: Callable[[str], Tensor], max_shard_bytes: int
) -> None:
    shards: list[list[str]] = [[]]
    size = total = 0
    for name in stored.tensors:
        num_bytes = _num_bytes(stored, name)
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
        total += num_bytes
    if len(shards) == 1:
        _write_file(folder / WEIGHTS_FILE, stored, shards[0], value)
        return
    weight_map = {}
    for index, names in enumerate(shards, start=1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, stored, names, value)
        weight_map.update(dict.fromkeys(names, file))
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _write_file(
    path: Path, stored: StoredWeights, names: Sequence[str], value: Callable[[str], Tensor]
) -> None:
    """Write one safetensors file: length of the header (8 bytes), the header as JSON, then the tensors.

    The library's own writer wants all tensors of a file in memory at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        end = offset + _num_bytes(stored, name)
        entry = stored.tensors[name]
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in names:
            tensor = value(name)
            dtype = DTYPES.get(stored.tensors[name].dtype, tensor.dtype)
            plain = tensor.detach().to("cpu", dtype).contiguous()
            file.write(plain.reshape(-1).view(torch.uint8).numpy().data)


def _num_bytes(stored: StoredWeights, name: str) -> int:
    """Return the bytes of one stored tensor."""
    tensor = stored.tensors[name]
    if tensor.dtype not in _ELEMENT_BYTES:
        return next(stored.read([name]))[1].nbytes
    num = 1
    for size in tensor.shape:
        num *= size
    return num * _ELEMENT_BYTES[tensor.dtype]
