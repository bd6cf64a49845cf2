"""Tensors in files, in the layout of torch.distributed.checkpoint (DCP) with safetensors.

DCP's planner says which part of a sharded tensor lies on this rank and where it belongs; DCP's reader puts
parts together for any other number of ranks. Each rank plans and writes for itself, so nothing is exchanged,
and neither pickled objects nor a metadata file are needed: a part's offsets stand in the header of its file.

Files are written here and not by DCP's writer, which puts a whole file together in memory and holds Python's
lock meanwhile: the training loop beside it would stand still. Here bytes go from the tensor to the file and
into the digest, a piece at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from cod_async.errors import CheckpointError

MAX_FILE_BYTES = 4 << 30
"""A rank begins another file after this many bytes."""
_CHUNK_BYTES = 8 << 20
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


class Piece(NamedTuple):
    """This rank's part of a tensor, or a whole one.

    Attributes:
        name: of the tensor.
        offsets: where the part begins in the whole, per dimension.
        data: the part.
    """

    name: str
    offsets: tuple[int, ...]
    data: Tensor


def pieces_of(tensors: Mapping[str, Tensor], rank: int) -> list[Piece]:
    """Return the parts that this rank has to store, sharing memory with ``tensors``.

    Of a tensor that every rank holds whole, only one rank stores it.

    Args:
        tensors: plain or sharded (DTensor), by name.
        rank: of this process.
    """
    found: list[Piece] = []
    sharded: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if hasattr(tensor, "placements"):
            sharded[name] = tensor
        elif rank == 0:
            found.append(Piece(name, (0,) * tensor.dim(), tensor.detach()))
    return sorted(found + _shards_of(sharded), key=lambda piece: piece.name)


def _shards_of(tensors: dict[str, Any]) -> list[Piece]:
    """Return this rank's parts of sharded tensors, as DCP's planner places them."""
    own = {name: tensor for name, tensor in tensors.items() if _is_first_copy(tensor)}
    if not own:
        return []
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(own, is_coordinator=True)
    found = []
    for item in planner.finish_plan(planner.create_local_plan()).items:
        data: Tensor = planner.resolve_data(item)  # type: ignore[assignment]
        offsets = tuple(item.index.offset or (0,) * data.dim())
        found.append(Piece(item.index.fqn, offsets, data.detach()))
    return found


def _is_first_copy(tensor: Any) -> bool:
    """Whether this rank's part is the one to store, of parts that several ranks have alike."""
    at = tensor.device_mesh.get_coordinate()
    return at is not None and all(
        not placement.is_replicate() or place == 0
        for placement, place in zip(tensor.placements, at, strict=True)
    )


def write_pieces(
    folder: Path, pieces: Sequence[Piece], rank: int, max_file_bytes: int = MAX_FILE_BYTES
) -> dict[str, str]:
    """Write this rank's parts durably.

    Args:
        folder: exists; other ranks write there too.
        pieces: in host memory.
        rank: of this process.
        max_file_bytes: a further file is begun after so many.

    Returns:
        SHA-256 of each file by its name.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    digests: dict[str, str] = {}
    group: list[Piece] = []
    size = 0
    for piece in [*pieces, None]:
        if group and (piece is None or size + piece.data.nbytes > max_file_bytes):
            name = f"rank-{rank:05d}-{len(digests):05d}.safetensors"
            digests[name] = _write_file(folder / name, group)
            group, size = [], 0
        if piece is not None:
            group.append(piece)
            size += piece.data.nbytes
    return digests


def _write_file(path: Path, pieces: Sequence[Piece]) -> str:
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for data in _content(pieces):
            view = memoryview(data)
            digest.update(view)
            while view:
                view = view[file.write(view) or 0 :]
        os.fsync(file.fileno())
    return digest.hexdigest()


def _content(pieces: Sequence[Piece]) -> Iterator[Any]:
    """Yield the bytes of a safetensors file: length of the header (8 bytes), the header as JSON, the data."""
    header: dict[str, Any] = {}
    end = 0
    for name, _, data in pieces:
        start, end = end, end + data.nbytes
        header[name] = {
            "dtype": _DTYPES[data.dtype], "shape": list(data.shape), "data_offsets": [start, end]
        }  # fmt: skip
    places = {name: {"saved_offsets": list(offsets)} for name, offsets, _ in pieces}
    header["__metadata__"] = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(places)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for _, _, data in pieces:
        flat = data.contiguous().reshape(-1).view(torch.uint8).numpy()
        for start in range(0, flat.size, _CHUNK_BYTES):
            yield flat[start : start + _CHUNK_BYTES]


class StoredTensors:
    """The tensors in a folder of files, each put together from the parts that ranks have written.

    Args:
        folder: of files that were verified, because they are believed here.

    Attributes:
        shapes: (shape, dtype) of each tensor by name.

    Raises:
        CheckpointError: a file cannot be understood.
    """

    def __init__(self, folder: Path) -> None:
        # A run that was never interrupted reads nothing, and importing DCP takes most of a second.
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        self._folder = folder
        self._reader = HuggingFaceStorageReader(str(folder))
        try:
            self._metadata = self._reader.read_metadata()
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder}: {error}; use an older checkpoint") from None
        self.shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, entry in self._metadata.state_dict_metadata.items():
            stored: Any = entry
            self.shapes[name] = (tuple(stored.size), stored.properties.dtype)

    def read(self, tensors: dict[str, Tensor]) -> None:
        """Fill tensors in place; of a sharded one this rank's part, which reads no more than it needs.

        Args:
            tensors: by name; all must be stored, with these shapes.

        Raises:
            CheckpointError: one is not stored, or a file cannot be read.
        """
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

        missing = sorted(tensors.keys() - self.shapes.keys())
        if missing:
            raise CheckpointError(f"{self._folder}: {missing[0]} is not stored; use another checkpoint")
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            planner.set_up_planner(tensors, self._metadata, is_coordinator=True)
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            plan = planner.finish_plan(self._reader.prepare_local_plan(planner.create_local_plan()))
            with torch.no_grad():
                self._reader.read_data(plan, planner).wait()
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self._folder}: {error}; use an older checkpoint") from None
