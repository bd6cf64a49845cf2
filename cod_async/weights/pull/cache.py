"""A folder of pulled versions, laid out like a run folder, and the files that are not whole yet.

``ROOT/weights/L0000-S00000012/`` appears by one rename when every file in it has the digest that its manifest
says. Until then files lie in ``L0000-S00000012.part/``, each beside a journal of the chunks that are in place
and what they hash to. A puller that is killed goes on from the journal; it believes nothing of it that the
file does not bear out, so neither a torn journal nor a lost page matters.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

import msgspec

from cod_async.durable import commit_folder, remove_folder
from cod_async.errors import WeightsError
from cod_async.lifecycle.segment import Version
from cod_async.weights.folders import MANIFEST_FILE, WEIGHTS_FOLDER, prune, read_manifest, version_folder
from cod_async.weights.manifest import Manifest
from cod_async.weights.pull.protocol import (
    SHA256_BYTES,
    Companion,
    FileEntry,
    chunk_length,
    num_chunks,
    sha256,
)

JOURNAL_SUFFIX = ".chunks"
LOCK_NAME = "pull.lock"
_PART = re.compile(r"^L\d{4,}-S\d{8,}\.part\Z")
_RECORD = struct.Struct(f"<I{SHA256_BYTES}sI")
_READ_BYTES = 1 << 20
_LOCK_POLL_S = 0.05


class PartialFile:
    """A file that is being pulled: its bytes, and which chunks of it are in place.

    Args:
        path: the file; its journal lies beside it. Made if missing.
        entry: what it must become.
        chunk_bytes: the grid.

    Attributes:
        digests: of the chunks that are in place, by index.
    """

    def __init__(self, path: Path, entry: FileEntry, chunk_bytes: int) -> None:
        self.path, self.entry, self.chunk_bytes = path, entry, chunk_bytes
        self.num_chunks = num_chunks(entry.num_bytes, chunk_bytes)
        self.digests: dict[int, bytes] = {}
        # No file that can be asked for begins with a dot.
        self._journal_path = path.with_name(f".{path.name}{JOURNAL_SUFFIX}")
        header = f"{entry.sha256} {entry.num_bytes} {chunk_bytes}\n".encode()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._journal = os.open(self._journal_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:
            os.close(self._fd)
            raise
        try:
            self._read_journal(header)
            os.ftruncate(self._fd, entry.num_bytes)
        except OSError:
            self.close()
            raise

    @property
    def is_whole(self) -> bool:
        """Whether every chunk is in place."""
        return len(self.digests) == self.num_chunks

    def missing(self) -> list[int]:
        """Return the indices of the chunks that are not in place, in order."""
        return [index for index in range(self.num_chunks) if index not in self.digests]

    def length(self, index: int) -> int:
        """Return the bytes of a chunk."""
        return chunk_length(index, self.entry.num_bytes, self.chunk_bytes)

    def write(self, index: int, data: bytes, digest: bytes) -> None:
        """Put a chunk, known to hash to ``digest``, in its place. Raises OSError when the disk is full."""
        _write_at(self._fd, data, index * self.chunk_bytes)
        self._note(index, digest)
        self.digests[index] = digest

    def read(self, index: int) -> bytes | None:
        """Return a chunk, or None if it is not in place or no longer what it was (then it is forgotten)."""
        digest = self.digests.get(index)
        if digest is None:
            return None
        data = os.pread(self._fd, self.length(index), index * self.chunk_bytes)
        if sha256(data) != digest:
            self.forget(index)
            return None
        return data

    def recheck(self, check_wish: Callable[[], None] = lambda: None) -> int:
        """Read every chunk that the journal speaks of again; return the bytes that are as it says.

        ``check_wish`` is called now and then and may raise.
        """
        found = 0
        for index in sorted(self.digests):
            check_wish()
            found += self.length(index) if self.read(index) is not None else 0
        return found

    def forget(self, index: int) -> None:
        """A chunk is not in place after all."""
        if self.digests.pop(index, None) is not None:
            self._note(index, bytes(SHA256_BYTES))

    def file_sha256(self, check_wish: Callable[[], None] = lambda: None) -> str:
        """Return the SHA-256 of the whole file as it lies on disk; ``check_wish`` as above."""
        digest, offset = hashlib.sha256(), 0
        while data := os.pread(self._fd, _READ_BYTES, offset):
            check_wish()
            digest.update(data)
            offset += len(data)
        return digest.hexdigest()

    def close(self) -> None:
        """Let go of the file; what is in place stays."""
        os.close(self._fd)
        os.close(self._journal)

    def unlink(self) -> None:
        """Remove the file and its journal; it must be closed all the same."""
        self._journal_path.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def _note(self, index: int, digest: bytes) -> None:
        head = struct.pack(f"<I{SHA256_BYTES}s", index, digest)
        _write_all(self._journal, head + struct.pack("<I", crc32(head)))

    def _read_journal(self, header: bytes) -> None:
        """Read what is in place; a journal of another file is begun anew, a torn end is cut off."""
        size = os.fstat(self._journal).st_size
        if os.pread(self._journal, len(header), 0) != header:
            os.ftruncate(self._journal, 0)
            os.ftruncate(self._fd, 0)
            _write_all(self._journal, header)
            return
        end = len(header)
        while end + _RECORD.size <= size:
            record = os.pread(self._journal, _RECORD.size, end)
            index, digest, check = _RECORD.unpack(record)
            if crc32(record[:-4]) != check or index >= self.num_chunks:
                break
            if any(digest):
                self.digests[index] = digest
            else:
                self.digests.pop(index, None)
            end += _RECORD.size
        os.ftruncate(self._journal, end)
        os.lseek(self._journal, end, os.SEEK_SET)


class PullCache:
    """A cache of versions at ``root``; several processes may share one, they take turns.

    Args:
        root: made if missing.
        keep_versions: newest versions kept (>= 2).
    """

    def __init__(self, root: Path, keep_versions: int) -> None:
        self.root, self.keep_versions = root, keep_versions
        (root / WEIGHTS_FOLDER).mkdir(parents=True, exist_ok=True)

    def folder(self, version: Version) -> Path:
        """Return where a version lies once it is whole."""
        return self.root / version_folder(version)

    def has(self, manifest: Manifest) -> bool:
        """Whether exactly this version is here."""
        try:
            return read_manifest(self.root, manifest.version) == manifest and all(
                (self.root / shard.file).stat().st_size == shard.num_bytes for shard in manifest.shards
            )
        except (WeightsError, OSError):
            return False

    def discard(self, version: Version) -> None:
        """Remove a version; only while the cache is locked."""
        remove_folder(self.folder(version))

    @contextmanager
    def locked(self, is_over: Callable[[], bool]) -> Iterator[None]:
        """Have the cache alone; waits for the process that has it.

        Raises:
            WeightsError: ``is_over`` said so while waiting.
        """
        fd = os.open(self.root / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if is_over():
                        raise WeightsError(
                            f"{self.root}: another process pulls into this cache and does not end"
                        ) from None
                    time.sleep(_LOCK_POLL_S)
            yield
        finally:
            os.close(fd)

    def part_folder(self, version: Version) -> Path:
        """Return the folder of a version's files that are not whole; made if missing."""
        folder = self.folder(version)
        part = folder.with_name(f"{folder.name}.part")
        part.mkdir(exist_ok=True)
        return part

    def drop_parts(self, *, keep: Iterable[Version]) -> None:
        """Remove the unfinished files of all versions but these."""
        kept = {f"{self.folder(version).name}.part" for version in keep}
        for path in (self.root / WEIGHTS_FOLDER).iterdir():
            if _PART.match(path.name) and path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def commit(self, manifest: Manifest, companions: Iterable[Companion]) -> Path:
        """Make the verified files in the part folder the version, atomically, and prune.

        Returns:
            The version's folder.

        Raises:
            OSError: the disk is full; nothing was committed.
        """
        part, folder = self.part_folder(manifest.version), self.folder(manifest.version)
        wanted = {Path(shard.file).name for shard in manifest.shards}
        for path in part.iterdir():
            if path.name not in wanted:
                path.unlink()
        for companion in companions:
            (part / companion.name).write_bytes(companion.data)
        (part / MANIFEST_FILE).write_bytes(msgspec.json.encode(manifest))
        commit_folder(part, folder)
        prune(self.root, self.keep_versions)
        return folder


def _write_at(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        num_written = os.pwrite(fd, view, offset)
        view, offset = view[num_written:], offset + num_written


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
