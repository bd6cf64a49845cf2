"""The files of published versions in a run folder, and nothing else of it.

What can be asked for is what a version's manifest names in the version's own folder, and a delta that lies
there. Names come from the network only as keys into that list; a path is never made from them. Links that
lead out of ``RUN/weights`` are not followed.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path

import zmq

from cod_async.errors import WeightsError, WireError
from cod_async.lifecycle.segment import Version
from cod_async.weights.delta import DELTA_FILE, DELTA_INFO_FILE, decode_info
from cod_async.weights.folders import MANIFEST_FILE, WEIGHTS_FOLDER, read_manifest, version_folder
from cod_async.weights.pull.protocol import (
    CHUNK_BYTES,
    MAX_COMPANION_BYTES,
    MAX_COMPANIONS,
    AskChunk,
    AskDigests,
    AskFiles,
    Companion,
    FileEntry,
    Files,
    chunk_index,
    chunk_length,
    num_chunks,
    sha256,
)

_MAX_LISTED = 16
"""So many versions' lists of files are remembered."""
_COMPANION = re.compile(r"^\w[\w.-]{0,120}\.json\Z", re.ASCII)


class FolderSource:
    """Serves ``RUN/weights``.

    Args:
        run_dir: the run folder.
        run: run id; requests for another are refused.
        chunk_bytes: the grid that files are cut by.
    """

    cause = "reading takes long"

    def __init__(self, run_dir: Path, run: str, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._run_dir, self._run, self._chunk_bytes = run_dir, run, chunk_bytes
        self._listed: OrderedDict[Version, Files] = OrderedDict()

    @property
    def socket(self) -> zmq.Socket[bytes] | None:
        """Nothing to poll."""
        return None

    def turn(self, now: float) -> list[Hashable]:
        """Nothing ever comes late."""
        return []

    def close(self) -> None:
        """Nothing to let go of."""

    def files(self, ask: AskFiles) -> Files:
        """Return the files of a version, read anew."""
        if ask.run != self._run:
            raise WireError("wrong_run", f"this server has the weights of {self._run!r}, not of {ask.run!r}")
        return self._list(ask.version)

    def chunk(self, ask: AskChunk) -> tuple[bytes, bytes]:
        """Return (bytes, SHA-256) of a chunk."""
        entry = self._entry(ask.version, ask.file)
        chunk_index(ask, entry, self._chunk_bytes)
        data = self._read(ask.version, entry, ask.offset, ask.length)
        return data, sha256(data)

    def digests(self, ask: AskDigests) -> bytes:
        """Return the SHA-256 of chunks as they lie on disk."""
        entry = self._entry(ask.version, ask.file)
        if ask.first + ask.count > num_chunks(entry.num_bytes, self._chunk_bytes):
            raise WireError("bad_range", f"{entry.name!r} has no {ask.count} chunks from {ask.first} on")
        return b"".join(
            sha256(
                self._read(
                    ask.version,
                    entry,
                    index * self._chunk_bytes,
                    chunk_length(index, entry.num_bytes, self._chunk_bytes),
                )
            )
            for index in range(ask.first, ask.first + ask.count)
        )

    def _list(self, version: Version) -> Files:
        folder = self._run_dir / version_folder(version)
        try:
            manifest = read_manifest(self._run_dir, version)
        except WeightsError as error:
            self._listed.pop(version, None)
            raise WireError("no_version", str(error)) from None
        if manifest.version != version or manifest.run != self._run:
            raise WireError("no_version", f"{folder} holds version {manifest.version} of {manifest.run!r}")
        prefix = f"{version_folder(version)}/"
        entries = [
            FileEntry(name=shard.file.removeprefix(prefix), num_bytes=shard.num_bytes, sha256=shard.sha256)
            for shard in manifest.shards
            if shard.file.startswith(prefix) and "/" not in shard.file.removeprefix(prefix)
        ]
        try:
            companions = _companions(folder)
        except OSError:  # between two looks at the folder
            raise WireError("no_version", f"version {version} was pruned; take a newer version") from None
        for companion in companions:
            if companion.name == DELTA_INFO_FILE:
                entries += _delta_entry(folder, companion.data)
        listed = Files(manifest, self._chunk_bytes, tuple(entries), tuple(companions))
        self._listed[version] = listed
        self._listed.move_to_end(version)
        while len(self._listed) > _MAX_LISTED:
            self._listed.popitem(last=False)
        return listed

    def _entry(self, version: Version, name: str) -> FileEntry:
        listed = self._listed.get(version)
        found = None if listed is None else listed.entry(name)
        found = found or self._list(version).entry(name)
        if found is None:
            raise WireError("no_file", f"version {version} has no file {name!r}")
        return found

    def _read(self, version: Version, entry: FileEntry, offset: int, length: int) -> bytes:
        path = self._run_dir / version_folder(version) / entry.name
        root = (self._run_dir / WEIGHTS_FOLDER).resolve()
        if not path.resolve().is_relative_to(root):
            raise WireError("no_file", f"version {version}: {entry.name!r} lies outside the weights folder")
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._listed.pop(version, None)
            raise WireError(
                "no_version", f"version {version} was pruned while it was read; take a newer version"
            ) from None
        try:
            data = os.pread(fd, length, offset)
        finally:
            os.close(fd)
        if len(data) != length:
            raise WireError("no_file", f"version {version}: {entry.name!r} is shorter than its manifest says")
        return data


def _companions(folder: Path) -> list[Companion]:
    """Return the version's small JSON files; those beyond the limits are left out."""
    found: list[Companion] = []
    num_bytes = 0
    for path in sorted(folder.glob("*.json")):
        is_ours = _COMPANION.match(path.name) and path.name != MANIFEST_FILE
        if not is_ours or path.is_symlink() or not path.is_file():
            continue
        try:
            with path.open("rb") as file:
                data = file.read(MAX_COMPANION_BYTES + 1)
        except OSError:
            continue  # pruned meanwhile; whoever asks for a chunk is told
        num_bytes += len(data)
        if num_bytes <= MAX_COMPANION_BYTES and len(found) < MAX_COMPANIONS:
            found.append(Companion(path.name, data))
    return found


def _delta_entry(folder: Path, data: bytes) -> list[FileEntry]:
    try:
        info = decode_info(data)
    except WeightsError:
        return []
    if not (folder / DELTA_FILE).is_file():
        return []
    return [FileEntry(name=DELTA_FILE, num_bytes=info.num_bytes, sha256=info.sha256)]
