"""The puller: brings one version at a time into a cache, whole and verified, or says why it could not.

It waits for a server that is paused, restarted or has moved, and goes on with the chunks it has; it gives up
when not a single new chunk has come for ``deadline_s``. With a delta whose base is in the cache it asks for
the delta and rebuilds the files; whatever is wrong with that, it pulls them in full.

Used by one thread. :meth:`Puller.supersede` and :meth:`Puller.stop` may be called from others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from cod_async.errors import SupersededError, WeightsError
from cod_async.lifecycle.segment import Version
from cod_async.weights.delta import DELTA_FILE, DELTA_INFO_FILE, DeltaInfo, apply_delta, decode_info
from cod_async.weights.folders import MANIFEST_FILE, read_manifest, version_folder
from cod_async.weights.manifest import Manifest, Shard
from cod_async.weights.pull.cache import PartialFile, PullCache
from cod_async.weights.pull.fetch import DEFAULT_WINDOW, AddressSource, Fetcher, Patience, Upstream
from cod_async.weights.pull.keys import ClientKeys
from cod_async.weights.pull.protocol import (
    MAX_DIGESTS,
    RETRYABLE,
    SHA256_BYTES,
    AskChunk,
    AskDigests,
    AskFiles,
    Chunk,
    ChunkKey,
    Companion,
    Digests,
    FileEntry,
    Files,
    Refusal,
    Reply,
    Request,
    sha256,
)

log = logging.getLogger(__name__)

MAX_BAD_CHUNKS = 64
"""More damaged chunks than this in one file mean that the way, not the luck, is bad."""
_POLL_S = 0.1

R = TypeVar("R", bound=Reply)


class _PullEndedError(WeightsError):
    """This pull has ended, whichever file it was at: stopped, or silence."""


class PullCounters(msgspec.Struct):
    """What pulling has cost. All numbers only grow.

    Attributes:
        pulled_versions: versions committed.
        pulled_bytes: payload that came over the network, repetitions included.
        pull_s: seconds spent pulling.
        resumed_bytes: bytes of an earlier, interrupted pull that did not have to come again.
        repeated_chunks: chunks that came though nobody waited for them any more.
        bad_chunks: chunks that did not hash to what they should.
        delta_hits: versions rebuilt from a delta.
        delta_misses: deltas that could not be used though their base was here.
        abandoned_pulls: pulls given up for a newer version.
    """

    pulled_versions: int = 0
    pulled_bytes: int = 0
    pull_s: float = 0.0
    resumed_bytes: int = 0
    repeated_chunks: int = 0
    bad_chunks: int = 0
    delta_hits: int = 0
    delta_misses: int = 0
    abandoned_pulls: int = 0

    def named(self) -> dict[str, float]:
        """Return the counters as they ride on heartbeats: ``weights_pulled_bytes`` and so on."""
        return {f"weights_{name}": float(value) for name, value in msgspec.structs.asdict(self).items()}


class Puller:
    """Pulls versions into ``cache``.

    Args:
        cache: where they go.
        addresses: where the server is; asked anew before every connection.
        keys: for servers beyond loopback.
        window: chunks asked for ahead.
        patience: see :class:`Patience`.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        cache: PullCache,
        addresses: AddressSource,
        *,
        keys: ClientKeys | None = None,
        window: int = DEFAULT_WINDOW,
        patience: Patience | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cache = cache
        self._patience = patience or Patience()
        self._window = window
        self._clock = clock
        self._upstream = Upstream(addresses, keys, self._patience)
        self._newest: Version | None = None
        self._has_abandoned = False
        self._is_new_connection = False
        self._progress_s = 0.0
        self._stopping = threading.Event()
        self.counters = PullCounters()

    def supersede(self, version: Version) -> None:
        """A version is wanted; a pull of an older one that is going on may be given up for it.

        Never twice in a row, so that versions published faster than they can be pulled do arrive now and
        then.
        """
        if self._newest is None or version > self._newest:
            self._newest = version

    def stop(self) -> None:
        """End the pull that is going on, soon, and every later one at once."""
        self._stopping.set()

    def close(self) -> None:
        """Give up the connection; call it when no pull is going on."""
        self._upstream.close()

    def pull(self, manifest: Manifest) -> Path:
        """Bring a version into the cache.

        Returns:
            Its folder: shards, ``manifest.json`` and the other JSON files that were published with it.

        Raises:
            WeightsError: the server has it no longer, does not answer, or has other bytes than the manifest
                says; or the pull was given up for a newer version, or stopped; or the disk is full. Nothing
                was committed; what has come is kept for the next attempt.
            InputError: the address or a key file is wrong.
        """
        started = self._progress_s = self._clock()
        folder = self._cache.folder(manifest.version)
        try:
            if not self._cache.has(manifest):
                with self._cache.locked(self._is_waiting_over):
                    self._progress_s = self._clock()
                    if not self._cache.has(manifest):  # the process that had the cache did not bring it
                        self._cache.discard(manifest.version)
                        self._pull(manifest)
                self._has_abandoned = False
        except OSError as error:
            raise WeightsError(
                f"version {manifest.version}: cannot be stored below {self._cache.root} ({error}); "
                "make room there"
            ) from None
        finally:
            self.counters.pull_s += self._clock() - started
        return folder

    # ------------------------------------------------------------------------------------------- one version

    def _pull(self, manifest: Manifest) -> None:
        self._check_shards(manifest)
        files = self._ask(AskFiles(run=manifest.run, version=manifest.version), Files)
        if files.manifest != manifest:
            raise WeightsError(
                f"version {manifest.version}: the server has other weights under that name "
                f"({files.manifest.digest[:12]} instead of {manifest.digest[:12]}); is it of this run?"
            )
        self._cache.drop_parts(keep=[manifest.version])
        part = self._cache.part_folder(manifest.version)
        if not self._pull_delta(manifest, files, part):
            for shard in manifest.shards:
                name = Path(shard.file).name
                entry = FileEntry(name=name, num_bytes=shard.num_bytes, sha256=shard.sha256)
                self._pull_file(manifest.version, entry, files.chunk_bytes, part)
        self._cache.commit(manifest, _without_delta(files.companions))
        self.counters.pulled_versions += 1

    def _check_shards(self, manifest: Manifest) -> None:
        folder = version_folder(manifest.version)
        names = [shard.file.removeprefix(f"{folder}/") for shard in manifest.shards]
        for shard, name in zip(manifest.shards, names, strict=True):
            if shard.file != f"{folder}/{name}" or not _is_plain(name):
                raise WeightsError(
                    f"version {manifest.version}: shard {shard.file!r} does not lie in {folder}; the "
                    "manifest is not to be trusted"
                )
        if len(set(names)) != len(names):
            raise WeightsError(f"version {manifest.version}: two shards have one name")

    def _pull_delta(self, manifest: Manifest, files: Files, part: Path) -> bool:
        """Rebuild the version from a delta if there is one for a base that is here; return whether it was.

        A pull in full that was under way is gone on with if less of it is missing than the delta has.
        """
        info = self._usable_delta(manifest, files)
        if info is None:
            return False
        num_missing = sum(self._num_missing_bytes(shard, files, part) for shard in manifest.shards)
        if info.num_bytes >= num_missing:
            return False
        entry = FileEntry(name=DELTA_FILE, num_bytes=info.num_bytes, sha256=info.sha256)
        base = read_manifest(self._cache.root, info.base)
        try:
            self._pull_file(manifest.version, entry, files.chunk_bytes, part)
            apply_delta(self._cache.root, base, manifest, info, part / DELTA_FILE, part, self._check_wish)
        except WeightsError as error:
            if isinstance(error, _PullEndedError | SupersededError):
                raise
            self.counters.delta_misses += 1
            log.warning("version %s: its delta is of no use, pulling in full: %s", manifest.version, error)
            return False
        self.counters.delta_hits += 1
        return True

    def _usable_delta(self, manifest: Manifest, files: Files) -> DeltaInfo | None:
        data = next((c.data for c in files.companions if c.name == DELTA_INFO_FILE), None)
        if data is None:
            return None
        try:
            info = decode_info(data)
            base = read_manifest(self._cache.root, info.base)
        except WeightsError:
            return None  # damaged, or its base is not here
        if info.version != manifest.version or info.digest != manifest.digest:
            self.counters.delta_misses += 1
            return None
        if base.digest != info.base_digest or base.run != manifest.run:
            return None
        return info

    def _num_missing_bytes(self, shard: Shard, files: Files, part: Path) -> int:
        name = Path(shard.file).name
        if not (part / name).exists():
            return shard.num_bytes
        entry = FileEntry(name=name, num_bytes=shard.num_bytes, sha256=shard.sha256)
        partial = PartialFile(part / name, entry, files.chunk_bytes)
        try:
            return sum(map(partial.length, partial.missing()))
        finally:
            partial.close()

    # ---------------------------------------------------------------------------------------------- one file

    def _pull_file(self, version: Version, entry: FileEntry, chunk_bytes: int, part: Path) -> None:
        """Pull one file into the part folder, from where an earlier attempt stopped, and verify it.

        Raises:
            WeightsError: see :meth:`pull`. A file that is damaged at its source is removed.
        """
        partial = PartialFile(part / entry.name, entry, chunk_bytes)
        try:
            self.counters.resumed_bytes += partial.recheck(self._check_wish)
            is_good = False
            for _ in range(3):
                self._pull_chunks(version, partial)
                is_good = partial.file_sha256(self._check_wish) == entry.sha256
                if is_good or not self._forget_bad_chunks(version, partial):
                    break
            if not is_good:
                partial.unlink()
                raise WeightsError(
                    f"version {version}, {entry.name!r}: does not hash to what it should although every "
                    "chunk is as it was sent; it is damaged at its source, take another version"
                )
        finally:
            partial.close()

    def _pull_chunks(self, version: Version, partial: PartialFile) -> None:
        fetcher = Fetcher(self._window, self._patience.retry_s)
        entry, num_bad = partial.entry, 0
        for index in partial.missing():
            offset = index * partial.chunk_bytes
            fetcher.want(ChunkKey(version, entry.name, offset, partial.length(index)))
        while not fetcher.is_idle:
            self._check_wish()
            self._check_newest(version, len(partial.digests) / partial.num_chunks)
            now = self._turn()
            if self._is_new_connection:
                fetcher.disconnected()
            for key in fetcher.due(now):
                if not self._upstream.send(AskChunk(version, entry.name, key.offset, key.length)):
                    fetcher.unsent(key)  # and so will be the others; none may count as asked
            self._upstream.poll(_POLL_S)
            while (answer := self._upstream.receive(self._clock())) is not None:
                reply, data = answer
                if isinstance(reply, Chunk) and (reply.version, reply.file) == (version, entry.name):
                    num_bad += self._take(fetcher, partial, reply, data)
                elif isinstance(reply, Refusal):
                    self._refused_chunk(fetcher, reply, version, entry.name)
            if num_bad > MAX_BAD_CHUNKS:
                raise WeightsError(
                    f"version {version}, {entry.name!r}: {num_bad} chunks came damaged; look at the network"
                )

    def _take(self, fetcher: Fetcher, partial: PartialFile, chunk: Chunk, data: bytes) -> int:
        """Put a chunk into its place; return 1 if it is damaged, else 0."""
        now = self._clock()
        self.counters.pulled_bytes += len(data)
        index, rest = divmod(chunk.offset, partial.chunk_bytes)
        if rest or index >= partial.num_chunks:
            return 1
        key = ChunkKey(chunk.version, chunk.file, chunk.offset, partial.length(index))
        if len(data) != key.length or sha256(data) != chunk.sha256:
            self.counters.bad_chunks += 1
            fetcher.failed(key, now)
            return 1
        if fetcher.arrived(key, now):
            partial.write(index, data, chunk.sha256)
            self._progress_s = now
        else:
            self.counters.repeated_chunks += 1
        return 0

    def _refused_chunk(self, fetcher: Fetcher, refusal: Refusal, version: Version, name: str) -> None:
        about = refusal.about
        if not isinstance(about, AskChunk) or (about.version, about.file) != (version, name):
            return
        self._raise_unless_retryable(refusal, version)
        fetcher.put_off(ChunkKey(version, name, about.offset, about.length), self._clock())

    def _forget_bad_chunks(self, version: Version, partial: PartialFile) -> int:
        """Compare what is in place with what the source has; forget what differs, return how many do."""
        num_bad = 0
        for first in range(0, partial.num_chunks, MAX_DIGESTS):
            count = min(MAX_DIGESTS, partial.num_chunks - first)
            answer = self._ask(AskDigests(version, partial.entry.name, first, count), Digests)
            for index in range(first, first + count):
                at = (index - first) * SHA256_BYTES
                data = partial.read(index)
                if data is None or sha256(data) != answer.digests[at : at + SHA256_BYTES]:
                    partial.forget(index)
                    num_bad += 1
        self.counters.bad_chunks += num_bad
        return num_bad

    # ---------------------------------------------------------------------------------------- asking, waiting

    def _ask(self, request: Request, kind: type[R]) -> R:
        """Ask until the answer comes; an answer to something else is ignored."""
        asked_s = float("-inf")
        while True:
            self._check_wish()
            now = self._turn()
            if (self._is_new_connection or now - asked_s >= self._patience.retry_s) and self._upstream.send(
                request
            ):
                asked_s = now
            self._upstream.poll(_POLL_S)
            while (answer := self._upstream.receive(self._clock())) is not None:
                reply = answer[0]
                if isinstance(reply, kind) and _answers(reply, request):
                    self._progress_s = self._clock()
                    return reply
                if isinstance(reply, Refusal) and reply.about in (request, None):
                    self._raise_unless_retryable(reply, request.version)
                    asked_s = now

    def _turn(self) -> float:
        """Look after the connection; return the time."""
        now = self._clock()
        self._is_new_connection = self._upstream.turn(now, is_waiting=True)
        return now

    def _raise_unless_retryable(self, refusal: Refusal, version: Version) -> None:
        if refusal.code not in RETRYABLE:
            raise WeightsError(f"version {version}: refused by the server, {refusal.code}: {refusal.detail}")
        self._upstream.cause = f"the server says {refusal.code}: {refusal.detail}"

    def _is_silent(self) -> bool:
        return self._clock() - self._progress_s > self._patience.deadline_s

    def _is_waiting_over(self) -> bool:
        return self._stopping.is_set() or self._is_silent()

    def _check_wish(self) -> None:
        """Raise if this pull must end."""
        if self._stopping.is_set():
            raise _PullEndedError("pulling was stopped; what has come is kept")
        if self._is_silent():
            raise _PullEndedError(
                f"nothing came for {self._patience.deadline_s:g} s: {self._upstream.cause}; what has come is "
                "kept for the next attempt"
            )

    def _check_newest(self, version: Version, done_frac: float) -> None:
        """Raise if a newer version is wanted, unless it was so last time, or little is missing."""
        if self._newest is None or self._newest <= version or self._has_abandoned or done_frac > 0.5:
            return
        self._has_abandoned = True
        self.counters.abandoned_pulls += 1
        raise SupersededError(f"version {version}: given up for the newer version {self._newest}")


def _is_plain(name: str) -> bool:
    return bool(name) and "/" not in name and not name.startswith(".") and not name.endswith(".json")


def _answers(reply: Reply, request: Request) -> bool:
    match request, reply:
        case AskFiles(), Files():
            return reply.manifest.version == request.version
        case AskDigests(), Digests():
            is_same = (reply.version, reply.file, reply.first) == (
                request.version,
                request.file,
                request.first,
            )
            return is_same and len(reply.digests) == request.count * SHA256_BYTES
        case _:
            return False


def _without_delta(companions: tuple[Companion, ...]) -> list[Companion]:
    """Return the JSON files to keep: a committed version is whole, what it was made from is of no use."""
    ours = (DELTA_INFO_FILE, MANIFEST_FILE)
    return [c for c in companions if c.name.endswith(".json") and c.name not in ours]
