"""A relay's source: chunks that are here, and the rest from another server, each asked for once.

A chunk is passed on as soon as it is there, long before its version is whole, so a tree of relays adds the
delay of a chunk per level, and the learner's host sends every chunk once to each of its own clients, however
many hundreds are behind them. Chunks are asked for when the first client wants them; nothing is pulled for
nobody. What a relay hands on it has checked against the digest that came with it, and checks again when it
reads it back; whether the file is the published one is for the client to see.

The newest versions stay on disk, chunk by chunk, also over a restart.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable

import zmq

from cod_async.durable import write_atomic
from cod_async.errors import InputError, WeightsError, WireError
from cod_async.lifecycle.segment import Version
from cod_async.weights.folders import WEIGHTS_FOLDER
from cod_async.weights.pull.cache import PartialFile, PullCache
from cod_async.weights.pull.fetch import AddressSource, Fetcher, Patience, Upstream
from cod_async.weights.pull.keys import ClientKeys
from cod_async.weights.pull.protocol import (
    RETRYABLE,
    SHA256_BYTES,
    AskChunk,
    AskDigests,
    AskFiles,
    Chunk,
    ChunkKey,
    Digests,
    Files,
    Refusal,
    Reply,
    Request,
    chunk_index,
    decode_reply,
    encode,
    sha256,
)
from cod_async.weights.pull.server import Later

log = logging.getLogger(__name__)

FILES_NAME = ".files"
DEFAULT_WINDOW = 32
_MAX_RECEIVED_PER_TURN = 64
_MAX_ASKED = 4096
"""Most questions about files and digests that are open above; more are refused as ``busy``."""
_REMEMBERED_S = 1.0
"""An answer that is not kept on disk serves all who waited for it, and nobody later."""


class RelaySource:
    """Serves what another server has.

    Args:
        cache: the relay's own; no other process may use it.
        addresses: where the other server is; asked anew before every connection.
        keys: for servers beyond loopback.
        window: chunks asked for at once.
        patience: see :class:`Patience`.
        clock: monotonic seconds.

    Attributes:
        counters: ``pulled_bytes``, ``pulled_chunks``, ``bad_chunks``, ``repeated_chunks``.
        cause: why an answer is late.

    Raises:
        InputError: the cache is in use.
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
        self._cache, self._clock = cache, clock
        self._patience = patience or Patience()
        self._stack = contextlib.ExitStack()
        try:
            self._stack.enter_context(cache.locked(lambda: True))
        except WeightsError as error:
            raise InputError(f"{error}; give every relay a cache of its own") from None
        self._upstream = Upstream(addresses, keys, self._patience)
        self._fetcher = Fetcher(window, self._patience.retry_s)
        self._files: dict[Version, Files] = {}
        self._partials: dict[tuple[Version, str], PartialFile] = {}
        self._asked: dict[AskFiles | AskDigests, float] = {}
        self._answers: dict[Request, tuple[bytes | WireError, float]] = {}
        self.counters: Counter[str] = Counter()
        self._read_back()

    @property
    def cause(self) -> str:
        """Why an answer is late."""
        return self._upstream.cause

    @property
    def socket(self) -> zmq.Socket[bytes] | None:
        """The connection to the other server."""
        return self._upstream.socket

    def close(self) -> None:
        """Let go of the files and of the connection."""
        for partial in self._partials.values():
            partial.close()
        self._upstream.close()
        self._stack.close()

    # ----------------------------------------------------------------------------------------- for the server

    def files(self, ask: AskFiles) -> Files | Later:
        """Return the files of a version, from here if it is known."""
        known = self._files.get(ask.version)
        if known is not None and known.manifest.run == ask.run:
            return known  # of another run it may be left over from an earlier server: the one above knows
        return self._ask_above(ask)

    def chunk(self, ask: AskChunk) -> tuple[bytes, bytes] | Later:
        """Return (bytes, SHA-256) of a chunk that is here, or ask for it."""
        known = self._known(ask)
        entry = known.entry(ask.file)
        if entry is None:
            raise WireError("no_file", f"version {ask.version} has no file {ask.file!r}")
        index = chunk_index(ask, entry, known.chunk_bytes)
        self._raise_if_refused(ask)
        partial = self._partials.get((ask.version, ask.file))
        if partial is None:
            path = self._cache.part_folder(ask.version) / ask.file
            try:
                partial = PartialFile(path, entry, known.chunk_bytes)
            except OSError as error:
                raise WireError("upstream", f"the relay cannot store {ask.file!r}: {error}") from None
            self._partials[ask.version, ask.file] = partial
        data = partial.read(index)
        if data is not None:
            return data, partial.digests[index]
        key = ChunkKey(ask.version, ask.file, ask.offset, ask.length)
        self._fetcher.want(key)
        return Later(ask)

    def digests(self, ask: AskDigests) -> bytes | Later:
        """Return chunk digests as the other server reads them now; what differs here is forgotten."""
        self._known(ask)
        answer = self._answers.get(ask)
        if answer is not None and isinstance(answer[0], bytes):
            return answer[0]
        return self._ask_above(ask)

    def turn(self, now: float) -> list[Hashable]:
        """Ask for what is wanted, take in what has come; return the requests that can be answered."""
        for request, (_, at) in list(self._answers.items()):
            if now - at > _REMEMBERED_S:
                del self._answers[request]
        is_waiting = bool(self._asked) or not self._fetcher.is_idle
        if self._upstream.turn(now, is_waiting=is_waiting):
            self._fetcher.disconnected()
            self._asked = dict.fromkeys(self._asked, float("-inf"))
        for request, at in self._asked.items():
            if now - at >= self._patience.retry_s and self._upstream.send(request):
                self._asked[request] = now
        for key in self._fetcher.due(now):
            if not self._upstream.send(AskChunk(*key)):
                self._fetcher.unsent(key)
        woken: list[Hashable] = []
        for _ in range(_MAX_RECEIVED_PER_TURN):
            answer = self._upstream.receive(now)
            if answer is None:
                break
            found = self._take(*answer, now)
            if found is not None:
                woken.append(found)
        return woken

    # ------------------------------------------------------------------------------------ from the other side

    def _take(self, reply: Reply, data: bytes, now: float) -> Request | None:
        """Take an answer in; return the request that it answers, None if nobody need be told."""
        match reply:
            case Chunk():
                return self._take_chunk(reply, data, now)
            case Files():
                ask = AskFiles(run=reply.manifest.run, version=reply.manifest.version)
                if self._asked.pop(ask, None) is None:
                    return None
                self._learn(reply, now)
                return ask
            case Digests():
                count, rest = divmod(len(reply.digests), SHA256_BYTES)
                if rest or count < 1:
                    return None
                about = AskDigests(reply.version, reply.file, reply.first, count)
                if self._asked.pop(about, None) is None:
                    return None
                self._compare(about, reply.digests)
                self._answers[about] = (reply.digests, now)
                return about
            case Refusal():
                return self._take_refusal(reply, now)

    def _take_chunk(self, chunk: Chunk, data: bytes, now: float) -> AskChunk | None:
        self.counters["pulled_chunks"] += 1
        self.counters["pulled_bytes"] += len(data)
        partial = self._partials.get((chunk.version, chunk.file))
        if partial is None:
            return None
        index, rest = divmod(chunk.offset, partial.chunk_bytes)
        if rest or index >= partial.num_chunks:
            return None
        key = ChunkKey(chunk.version, chunk.file, chunk.offset, partial.length(index))
        if len(data) != key.length or sha256(data) != chunk.sha256:
            self.counters["bad_chunks"] += 1
            self._fetcher.failed(key, now)
            return None
        if not self._fetcher.arrived(key, now):
            self.counters["repeated_chunks"] += 1
            return None
        try:
            partial.write(index, data, chunk.sha256)
        except OSError as error:
            log.error("cannot store a chunk in %s: %s", partial.path, error)
            self._answers[AskChunk(*key)] = (WireError("upstream", f"the relay's disk: {error}"), now)
        return AskChunk(*key)

    def _take_refusal(self, refusal: Refusal, now: float) -> Request | None:
        about = refusal.about
        if about is None or refusal.code in RETRYABLE:
            self._upstream.cause = f"the server above says {refusal.code}: {refusal.detail}"
        if about is None:
            return None
        if refusal.code in RETRYABLE:
            if isinstance(about, AskChunk):
                self._fetcher.put_off(ChunkKey(about.version, about.file, about.offset, about.length), now)
            return None
        if isinstance(about, AskChunk):
            self._fetcher.drop(ChunkKey(about.version, about.file, about.offset, about.length))
        else:
            self._asked.pop(about, None)
        self._answers[about] = (WireError(refusal.code, refusal.detail), now)
        return about

    def _compare(self, about: AskDigests, digests: bytes) -> None:
        partial = self._partials.get((about.version, about.file))
        if partial is None:
            return
        for index in range(about.first, min(about.first + about.count, partial.num_chunks)):
            at = (index - about.first) * SHA256_BYTES
            if partial.digests.get(index) != digests[at : at + SHA256_BYTES]:
                partial.forget(index)

    # ------------------------------------------------------------------------------------------- what is here

    def _known(self, ask: AskChunk | AskDigests) -> Files:
        known = self._files.get(ask.version)
        if known is None:
            raise WireError("no_version", f"this relay has no version {ask.version}; ask for its files first")
        return known

    def _ask_above(self, ask: AskFiles | AskDigests) -> Later:
        self._raise_if_refused(ask)
        if ask not in self._asked and len(self._asked) >= _MAX_ASKED:
            raise WireError("busy", f"{_MAX_ASKED} questions are open; {self.cause}")
        self._asked.setdefault(ask, float("-inf"))
        return Later(ask)

    def _raise_if_refused(self, ask: Request) -> None:
        answer = self._answers.get(ask)
        if answer is not None and isinstance(answer[0], WireError):
            raise answer[0]

    def _learn(self, files: Files, now: float) -> None:
        """A version is known from now on; the oldest beyond ``keep_versions`` go."""
        version = files.manifest.version
        try:
            write_atomic(self._cache.part_folder(version) / FILES_NAME, encode(files))
        except OSError as error:
            ask = AskFiles(run=files.manifest.run, version=version)
            self._answers[ask] = (WireError("upstream", f"the relay cannot store: {error}"), now)
            return
        if version in self._files:  # of another run: its bytes are not this one's
            self._let_go(version)
        self._files[version] = files
        others = sorted(known for known in self._files if known != version)
        for old in others[: max(0, len(self._files) - self._cache.keep_versions)]:
            self._let_go(old)
        self._cache.drop_parts(keep=self._files)

    def _let_go(self, version: Version) -> None:
        del self._files[version]
        for key in [key for key in self._partials if key[0] == version]:
            self._fetcher_forget(key)
            self._partials.pop(key).close()

    def _fetcher_forget(self, key: tuple[Version, str]) -> None:
        partial = self._partials[key]
        for index in partial.missing():
            offset = index * partial.chunk_bytes
            self._fetcher.drop(ChunkKey(*key, offset, partial.length(index)))

    def _read_back(self) -> None:
        """Learn what an earlier process of this relay had."""
        found: dict[Version, Files] = {}
        for path in (self._cache.root / WEIGHTS_FOLDER).glob(f"*.part/{FILES_NAME}"):
            with contextlib.suppress(OSError, WireError):
                files = decode_reply([path.read_bytes()])[0]
                if isinstance(files, Files):
                    found[files.manifest.version] = files
        newest = sorted(found)[-self._cache.keep_versions :]
        self._files = {version: found[version] for version in newest}
        self._cache.drop_parts(keep=self._files)
