"""What changed between two published versions, in a small file beside the newer one.

A training step in bfloat16 with a small learning rate leaves most elements as they were, to the bit; then a
host that has the version before needs the changed ones only. Everything here works on the bytes of the
published files: elements are compared as bit patterns (so NaN, -0.0 and every dtype, known to numpy or not,
come out right), and the rebuilt file takes its header from the publisher, so that it is the published file
byte for byte, which its SHA-256 in the manifest proves.

``delta.data`` is a safetensors file under a name that no inference server takes for weights. For every
shard it has ``header/<i>``, the shard's own header; for tensor ``k`` (in name order) that changed either
``dense/<k>``, its bytes, or ``gaps/<k>`` and ``bits/<k>``: how far each changed element is behind the one
before (uint16, or uint32 where one does not fit), and its new bit pattern. ``delta.json`` says what it
belongs to; it is written last, so a delta is there when its JSON is.

Memory: both versions' files are mapped, not read, and nothing is kept between versions, so writing a delta
needs what the delta itself needs (at most ``max_share`` of the weights), and a mask over four million
elements. Rebuilding needs one tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cod_async.durable import fsync_path, write_atomic
from cod_async.errors import WeightsError
from cod_async.lifecycle.segment import Version
from cod_async.weights.folders import file_sha256, version_folder
from cod_async.weights.manifest import Manifest

DELTA_FILE = "delta.data"
DELTA_INFO_FILE = "delta.json"
DEFAULT_MAX_SHARE = 0.5
MAX_INFO_BYTES = 4 << 20
_MAX_HEADER_BYTES = 64 << 20
_SLICE_ELEMENTS = 1 << 22
_BITS = {1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Change = Literal["unchanged", "sparse", "dense"]


class DeltaInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a delta is: ``delta.json``.

    Attributes:
        base: version that it changes; ``base_digest`` is that version's digest.
        version: version that results; ``digest`` is its digest.
        sha256: of ``delta.data``, which has ``num_bytes`` bytes.
        tensors: by name, how each tensor comes about: as in the base, by changed elements, or whole.
    """

    base: Version
    base_digest: Sha256
    version: Version
    digest: Sha256
    sha256: Sha256
    num_bytes: Annotated[int, Meta(ge=0, le=(1 << 53) - 1)]
    tensors: dict[str, Change]


@dataclass(frozen=True)
class _Tensor:
    """One tensor in a mapped file: raw bytes, bytes per element (0: no whole number), and its type."""

    data: Bytes
    item_bytes: int
    kind: tuple[str, tuple[int, ...]]

    def bits(self) -> np.ndarray[Any, Any]:
        """Return the elements as unsigned integers of their size."""
        return self.data.view(_BITS[self.item_bytes])


def decode_info(data: bytes) -> DeltaInfo:
    """Return what ``delta.json`` says.

    Raises:
        WeightsError: it is not the description of a delta.
    """
    if len(data) > MAX_INFO_BYTES:
        raise WeightsError(f"{DELTA_INFO_FILE} has {len(data)} bytes, more than {MAX_INFO_BYTES}")
    try:
        return msgspec.json.decode(data, type=DeltaInfo)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WeightsError(f"{DELTA_INFO_FILE} is damaged: {error}") from None


def write_delta(
    run_dir: Path, base: Manifest, manifest: Manifest, *, max_share: float = DEFAULT_MAX_SHARE
) -> DeltaInfo | None:
    """Write the difference between two published versions beside the newer one.

    Args:
        run_dir: the run folder, with both versions in it.
        base: the older version, which hosts are expected to have.
        manifest: the newer version.
        max_share: a delta larger than this share of the shards, in (0, 1], is not written.

    Returns:
        What was written; None if it would be too large.

    Raises:
        WeightsError: a file of either version is missing or is not safetensors; nothing was written.
        OSError: the disk is full; nothing was written.
    """
    limit = max_share * sum(shard.num_bytes for shard in manifest.shards)
    parts: dict[str, np.ndarray[Any, Any]] = {}
    old: dict[str, _Tensor] = {}
    new: dict[str, _Tensor] = {}
    for shard in base.shards:
        old |= _tensors(*_map_shard(run_dir / shard.file))
    for index, shard in enumerate(manifest.shards):
        header, data = _map_shard(run_dir / shard.file)
        parts[f"header/{index}"] = np.frombuffer(header, dtype=np.uint8)
        new |= _tensors(header, data)
    tensors: dict[str, Change] = {}
    num_bytes = sum(part.nbytes for part in parts.values())
    for number, name in enumerate(sorted(new)):
        found = _difference(old.get(name), new[name])
        tensors[name] = "unchanged" if not found else "dense" if "dense" in found else "sparse"
        parts |= {f"{part}/{number}": array for part, array in found.items()}
        num_bytes += sum(array.nbytes for array in found.values())
        if num_bytes > limit:
            return None
    folder = run_dir / version_folder(manifest.version)
    temporary = folder / f".{DELTA_FILE}.{os.getpid()}.tmp"
    try:
        try:
            save_file(parts, temporary)
        except SafetensorError as error:  # its word for every OSError
            raise OSError(f"{temporary} cannot be written: {error}") from None
        if temporary.stat().st_size > limit:
            return None
        fsync_path(temporary)
        info = DeltaInfo(
            base=base.version,
            base_digest=base.digest,
            version=manifest.version,
            digest=manifest.digest,
            sha256=file_sha256(temporary),
            num_bytes=temporary.stat().st_size,
            tensors=tensors,
        )
        said = msgspec.json.encode(info)
        if len(said) > MAX_INFO_BYTES:
            return None
        os.replace(temporary, folder / DELTA_FILE)
    finally:
        temporary.unlink(missing_ok=True)
    write_atomic(folder / DELTA_INFO_FILE, said)
    return info


def apply_delta(
    root: Path,
    base: Manifest,
    manifest: Manifest,
    info: DeltaInfo,
    delta: Path,
    out: Path,
    check_wish: Callable[[], None] = lambda: None,
) -> None:
    """Rebuild the shards of ``manifest`` from a base and a delta, as files in the folder ``out``.

    Args:
        root: run folder or cache with the base in it.
        base: manifest of the base.
        manifest: of the version to make.
        info: what the delta says of itself.
        delta: the delta's file. Its bytes are not trusted: they are checked, and so is what comes out.
        out: where the shards go, under their names.
        check_wish: called for every tensor; may raise to stop.

    Raises:
        WeightsError: the base is another one, the delta is damaged, or the result is not byte for byte what
            the manifest says; pull the version in full. Nothing is left in ``out``.
        OSError: the disk is full.
    """
    if (info.base, info.base_digest) != (base.version, base.digest):
        raise WeightsError(f"the delta changes {info.base} ({info.base_digest[:12]}), not {base.version}")
    if (info.version, info.digest) != (manifest.version, manifest.digest):
        raise WeightsError(f"the delta makes {info.version} ({info.digest[:12]}), not {manifest.version}")
    old: dict[str, _Tensor] = {}
    for shard in base.shards:
        old |= _tensors(*_map_shard(root / shard.file))
    numbers = {name: number for number, name in enumerate(sorted(info.tensors))}
    done: list[Path] = []
    try:
        with safe_open(delta, framework="numpy") as parts:
            for index, shard in enumerate(manifest.shards):
                path = out / Path(shard.file).name
                rebuilt = path.with_name(f"{path.name}.rebuilt")
                done.append(rebuilt)
                header = _part(parts, f"header/{index}").tobytes()
                digest = hashlib.sha256()
                with rebuilt.open("wb") as file:
                    for piece in _pieces(header, old, info, numbers, parts, shard.num_bytes):
                        check_wish()
                        digest.update(piece)
                        file.write(piece)
                if digest.hexdigest() != shard.sha256:
                    raise WeightsError(f"{path.name}: what the delta makes of {base.version} is not it")
        for shard in manifest.shards:
            path = out / Path(shard.file).name
            os.replace(path.with_name(f"{path.name}.rebuilt"), path)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{delta.name} is damaged: {error}") from None
    finally:
        for path in done:
            path.unlink(missing_ok=True)


def _pieces(
    header: bytes,
    old: Mapping[str, _Tensor],
    info: DeltaInfo,
    numbers: Mapping[str, int],
    parts: Any,
    num_bytes: int,
) -> Iterator[bytes | memoryview]:
    """Yield a shard's bytes, a tensor at a time."""
    entries = sorted(_entries(header, num_bytes - len(header)).items(), key=lambda item: item[1][2:])
    yield header
    position = 0
    for name, (kind, shape, begin, end) in entries:
        if begin != position:
            raise WeightsError(f"tensor {name!r} begins at {begin} instead of {position}")
        position = end
        change, number, before = info.tensors[name], numbers[name], old.get(name)
        if change == "dense":
            data = _part(parts, f"dense/{number}")
        elif before is None or before.kind != (kind, shape):
            raise WeightsError(f"tensor {name!r} is not in the base as it should be")
        elif change == "unchanged":
            data = before.data
        else:
            data = _patched(
                before, parts.get_tensor(f"gaps/{number}"), parts.get_tensor(f"bits/{number}"), name
            )
        if data.nbytes != end - begin:
            raise WeightsError(f"tensor {name!r} comes out with {data.nbytes} bytes instead of {end - begin}")
        yield data.data if data.nbytes else b""


def _patched(before: _Tensor, gaps: np.ndarray[Any, Any], bits: np.ndarray[Any, Any], name: str) -> Bytes:
    """Return the bytes of a tensor with some elements replaced."""
    result = before.bits().copy()
    if gaps.dtype not in (np.uint16, np.uint32) or gaps.ndim != 1 or gaps.shape != bits.shape:
        raise WeightsError(f"tensor {name!r}: the positions of its changes are damaged")
    if bits.dtype != result.dtype:
        raise WeightsError(f"tensor {name!r}: its changes are {bits.dtype}, its elements {result.dtype}")
    positions = np.cumsum(gaps, dtype=np.int64)
    if len(positions) and not 0 <= positions[-1] < result.size:  # gaps are not negative: the last is largest
        raise WeightsError(f"tensor {name!r}: changes element {positions[-1]} of {result.size}")
    result[positions] = bits
    return result.view(np.uint8)


def _difference(old: _Tensor | None, new: _Tensor) -> dict[str, np.ndarray[Any, Any]]:
    """Return the parts that make ``new`` out of ``old``: none, ``gaps`` and ``bits``, or ``dense``."""
    dense: dict[str, np.ndarray[Any, Any]] = {"dense": new.data}
    if old is None or old.kind != new.kind or new.item_bytes not in _BITS:
        is_same = old is not None and old.kind == new.kind and bool(np.array_equal(old.data, new.data))
        return {} if is_same else dense
    before, after = old.bits(), new.bits()
    found = [
        np.flatnonzero(before[at : at + _SLICE_ELEMENTS] != after[at : at + _SLICE_ELEMENTS]) + at
        for at in range(0, after.size, _SLICE_ELEMENTS)
    ]
    positions = np.concatenate(found) if found else np.empty(0, np.int64)
    if not len(positions):
        return {}
    gaps = np.diff(positions, prepend=0)
    largest = int(gaps.max())
    if largest >= 1 << 32:
        return dense
    width = np.dtype("<u2") if largest < 1 << 16 else np.dtype("<u4")
    if len(positions) * (width.itemsize + new.item_bytes) >= new.data.nbytes:
        return dense
    return {"gaps": gaps.astype(width), "bits": after[positions]}


def _map_shard(path: Path) -> tuple[bytes, Bytes]:
    """Return (header, data) of a safetensors file, the data mapped."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(_MAX_HEADER_BYTES, size - 8):
                raise WeightsError(f"{path} is not safetensors: a header of {length} bytes in {size}")
            header = length.to_bytes(8, "little") + file.read(length)
        if size == len(header):
            return header, np.empty(0, np.uint8)
        return header, np.memmap(path, np.uint8, "r", offset=len(header))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error}); it was pruned") from None


def _entries(header: bytes, data_bytes: int) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Return (dtype, shape, begin, end) by tensor name of a safetensors header with its length before it.

    Raises:
        WeightsError: it is not one, or speaks of more than ``data_bytes`` bytes of data.
    """
    found: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    try:
        if int.from_bytes(header[:8], "little") != len(header) - 8:
            raise WeightsError("a shard's header is cut off")
        for name, entry in json.loads(header[8:]).items():
            if name != "__metadata__":
                begin, end = map(int, entry["data_offsets"])
                found[name] = (str(entry["dtype"]), tuple(map(int, entry["shape"])), begin, end)
                if not 0 <= begin <= end <= data_bytes:
                    raise WeightsError(f"tensor {name!r} lies outside its file")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"a shard's header is damaged: {error!r}"[:500]) from None
    return found


def _tensors(header: bytes, data: Bytes) -> dict[str, _Tensor]:
    found = {}
    for name, (kind, shape, begin, end) in _entries(header, data.nbytes).items():
        size = math.prod(shape)
        item_bytes, rest = divmod(end - begin, size) if size else (0, 0)
        found[name] = _Tensor(data[begin:end], 0 if rest else item_bytes, (kind, shape))
    return found


def _part(parts: Any, name: str) -> Bytes:
    part: Bytes = parts.get_tensor(name)
    if part.dtype != np.uint8 or part.ndim != 1:
        raise WeightsError(f"{name} is {part.dtype}{list(part.shape)} instead of bytes")
    return part
