"""What is said between a puller and a weight server: few messages, strictly decoded, none with a state.

A request names exactly what it wants (version, file, offset), and the answer repeats the name, so requests
may be repeated, answered twice or in any order. Offsets lie on a grid of ``chunk_bytes``, which the server
chooses and says with a version's list of files. Every chunk comes with its SHA-256, so that damage is found
where it happened; the whole file is checked against the manifest in any case.

A request is one frame of MessagePack; an answer is one such frame, and a second one with the raw bytes if it
is a :class:`Chunk`. Answers that are no are a :class:`Refusal` with one of these codes:

===============  ======================================================================================
``bad_message``  not one of the requests, unknown or missing fields, values out of range
``too_large``    a request beyond ``MAX_REQUEST_BYTES``
``protocol``     another protocol version (both are named)
``wrong_run``    the server serves another run
``no_version``   never published, or pruned meanwhile: take a newer version
``no_file``      not a file of that version
``bad_range``    not a chunk of that file
``busy``         more unanswered requests than a client may have, or too many clients: ask again later
``upstream``     a relay got no answer from its own server: ask again later
===============  ======================================================================================
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from cod_async.errors import WireError
from cod_async.lifecycle.segment import Version
from cod_async.weights.manifest import Manifest
from cod_async.wire.checks import compile_checks

PROTOCOL_VERSION = 1
CHUNK_BYTES = 1 << 20
"""Chunks that a server cuts files into unless told otherwise."""
MAX_CHUNK_BYTES = 8 << 20
MAX_REQUEST_BYTES = 4096
MAX_REPLY_BYTES = 16 << 20
"""Most bytes of an answer's first frame; a list of files with what goes along is the longest."""
MAX_FILES = 4096
MAX_COMPANIONS = 16
MAX_COMPANION_BYTES = 8 << 20
"""All of them together."""
MAX_DIGESTS = 16
"""Most chunk digests per answer; the server reads and hashes the chunks for it."""
SHA256_BYTES = 32
RETRYABLE = frozenset({"busy", "upstream"})

FileName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_][A-Za-z0-9._-]{0,126}\Z")]
Count = Annotated[int, Meta(ge=0, le=(1 << 53) - 1)]
Sha256Bytes = Annotated[bytes, Meta(min_length=SHA256_BYTES, max_length=SHA256_BYTES)]
Sha256Hex = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of all messages."""


class AskFiles(_Message, frozen=True, tag="ask_files"):
    """Which files does a version have?"""

    run: Annotated[str, Meta(max_length=256)]
    version: Version
    protocol: Count = PROTOCOL_VERSION


class AskChunk(_Message, frozen=True, tag="ask_chunk"):
    """Send ``length`` bytes of a version's file from ``offset``: one whole cell of the grid."""

    version: Version
    file: FileName
    offset: Count
    length: Annotated[int, Meta(ge=1, le=MAX_CHUNK_BYTES)]


class AskDigests(_Message, frozen=True, tag="ask_digests"):
    """Read chunks ``first .. first+count-1`` of a file again and say what they hash to."""

    version: Version
    file: FileName
    first: Count
    count: Annotated[int, Meta(ge=1, le=MAX_DIGESTS)]


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file that can be asked for, by its name inside the version's folder."""

    name: FileName
    num_bytes: Count
    sha256: Sha256Hex


class Companion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One small JSON file of a version, whole."""

    name: FileName
    data: Annotated[bytes, Meta(max_length=MAX_COMPANION_BYTES)]


class Files(_Message, frozen=True, tag="files"):
    """The files of a version.

    Attributes:
        manifest: of the version.
        chunk_bytes: the grid: file offsets that can be asked for are its multiples.
        files: shards, and a delta if there is one.
        companions: other JSON files of the folder, without the manifest.
    """

    manifest: Manifest
    chunk_bytes: Annotated[int, Meta(ge=1, le=MAX_CHUNK_BYTES)]
    files: Annotated[tuple[FileEntry, ...], Meta(max_length=MAX_FILES)]
    companions: Annotated[tuple[Companion, ...], Meta(max_length=MAX_COMPANIONS)] = ()
    protocol: Count = PROTOCOL_VERSION

    def entry(self, name: str) -> FileEntry | None:
        """Return the entry of a file, None if the version has no such file."""
        return next((entry for entry in self.files if entry.name == name), None)


class Chunk(_Message, frozen=True, tag="chunk"):
    """A chunk; its bytes are the second frame."""

    version: Version
    file: FileName
    offset: Count
    sha256: Sha256Bytes


class Digests(_Message, frozen=True, tag="digests"):
    """SHA-256 of chunks from ``first`` on, 32 bytes each, one after the other."""

    version: Version
    file: FileName
    first: Count
    digests: Annotated[bytes, Meta(max_length=MAX_DIGESTS * SHA256_BYTES)]


class Refusal(_Message, frozen=True, tag="refusal"):
    """No, and why. ``about`` is the request; None if it could not be read."""

    code: Annotated[str, Meta(max_length=64)]
    detail: Annotated[str, Meta(max_length=1000)] = ""
    about: AskFiles | AskChunk | AskDigests | None = None


Request = AskFiles | AskChunk | AskDigests
Reply = Files | Chunk | Digests | Refusal


class ChunkKey(NamedTuple):
    """One chunk: ``length`` is what :class:`AskChunk` must ask for."""

    version: Version
    file: str
    offset: int
    length: int


T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_check_request = compile_checks(Request)
_check_reply = compile_checks(Files | Chunk | Digests)


def encode(message: Request | Reply) -> bytes:
    """Return the frame of a message."""
    return _encoder.encode(message)


def decode_request(parts: Sequence[bytes]) -> Request:
    """Return the request in ``parts``, the frames of a message.

    Raises:
        WireError: ``bad_message``, ``too_large`` or ``protocol``.
    """
    if len(parts) != 1:
        raise WireError("bad_message", f"{len(parts)} frames, must be 1")
    if len(parts[0]) > MAX_REQUEST_BYTES:
        raise WireError("too_large", f"{len(parts[0])} bytes, at most {MAX_REQUEST_BYTES} are allowed")
    request = _decode(_requests, parts[0])
    _check_request(request)
    if isinstance(request, AskFiles) and request.protocol != PROTOCOL_VERSION:
        raise WireError(
            "protocol", f"client speaks protocol {request.protocol}, this server {PROTOCOL_VERSION}"
        )
    return request


def decode_reply(parts: Sequence[bytes]) -> tuple[Reply, bytes]:
    """Return (reply, payload); the payload of anything but a chunk is empty.

    Raises:
        WireError: not a reply of this protocol. That a chunk hashes to its digest is not checked here.
    """
    if not 1 <= len(parts) <= 2:
        raise WireError("bad_message", f"{len(parts)} frames, must be 1 or 2")
    if len(parts[0]) > MAX_REPLY_BYTES:
        raise WireError("too_large", f"{len(parts[0])} bytes, at most {MAX_REPLY_BYTES} are allowed")
    reply = _decode(_replies, parts[0])
    if not isinstance(reply, Refusal):
        _check_reply(reply)
    if isinstance(reply, Chunk) != (len(parts) == 2):
        raise WireError("bad_message", f"{type(reply).__name__} with {len(parts)} frames")
    if isinstance(reply, Files) and reply.protocol != PROTOCOL_VERSION:
        raise WireError(
            "protocol", f"server speaks protocol {reply.protocol}, this client {PROTOCOL_VERSION}"
        )
    return reply, parts[1] if len(parts) == 2 else b""


def num_chunks(num_bytes: int, chunk_bytes: int) -> int:
    """Return into how many chunks a file is cut (an empty one into none)."""
    return -(-num_bytes // chunk_bytes)


def chunk_length(index: int, num_bytes: int, chunk_bytes: int) -> int:
    """Return the bytes of chunk ``index``; the last one may be short."""
    return min(chunk_bytes, num_bytes - index * chunk_bytes)


def chunk_index(ask: AskChunk, entry: FileEntry, chunk_bytes: int) -> int:
    """Return which chunk of the file is asked for.

    Raises:
        WireError: ``bad_range``: not exactly one cell of the grid.
    """
    index, rest = divmod(ask.offset, chunk_bytes)
    is_inside = rest == 0 and ask.offset < entry.num_bytes
    if not is_inside or ask.length != chunk_length(index, entry.num_bytes, chunk_bytes):
        raise WireError(
            "bad_range",
            f"{ask.length} bytes from {ask.offset} of {entry.name!r} are not a chunk: it has "
            f"{entry.num_bytes} bytes in chunks of {chunk_bytes}",
        )
    return index


def sha256(data: bytes) -> bytes:
    """Return the SHA-256 of a chunk as 32 bytes."""
    return hashlib.sha256(data).digest()


def _decode(decoder: msgspec.msgpack.Decoder[T], frame: bytes) -> T:
    try:
        return decoder.decode(frame)
    except Exception as error:  # whatever hostile bytes raise must not end the receiver's loop
        raise WireError("bad_message", f"{type(error).__name__}: {error}"[:500]) from None
