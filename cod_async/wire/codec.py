"""Messages to bytes and back, with limits: every byte string is a message or a WireError, never anything
else.

A message travels as exactly two frames. The *envelope* is a small MessagePack map (protocol, run, session,
length and checksum); the *body* is the tagged message. The checksum is the CRC-32 of the body continued over
the envelope's other fields, so a flipped bit is found wherever it is. msgspec is strict about types and
lengths; what it lets through is
checked here: numbers that are not finite, integers beyond 62 bits, deep nesting and bad text (which it
reports by exceptions of their own), repeated keys. The same checks run when a message is encoded, so that a
bug shows at the sender, where its cause is, and not as a refusal at the receiver.

Codes of refused frames:

==================  ====================================================================================
``bad_parts``       not exactly two frames
``too_large``       a frame beyond its limit
``bad_envelope``    the envelope does not decode, or is not in its one canonical form
``protocol``        another protocol version (both are named)
``wrong_run``       a message of another run
``bad_length``      the body is not as long as the envelope says
``bad_checksum``    the frames were altered on the way
``bad_message``     unknown type, unknown or missing field, wrong type, value out of its declared range
``bad_text``        text that is not UTF-8
``too_deep``        nested beyond what a message needs
``not_finite``      NaN or infinity
``bad_int``         a negative or huge integer
``not_canonical``   longer than its own encoding: repeated keys or padded numbers
``unencodable``     (sender only) a value that no message can hold
==================  ====================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar
from zlib import crc32

import msgspec

from cod_async.errors import WireError
from cod_async.lifecycle.segment import Segment
from cod_async.wire.checks import compile_checks
from cod_async.wire.messages import (
    PROTOCOL_VERSION,
    Count,
    Name,
    Refused,
    SegmentData,
    StepBatch,
    ToClient,
    ToCoordinator,
)
from cod_async.wire.validate import validate_segment

__all__ = [
    "DEFAULT_MAX_MESSAGE_BYTES",
    "Envelope",
    "decode_for_client",
    "decode_for_coordinator",
    "encode",
    "encode_body",
    "encode_segment",
    "frame_body",
    "refusal",
    "segment_body",
    "validate_segment",
]

DEFAULT_MAX_MESSAGE_BYTES = 64 << 20
MAX_ENVELOPE_BYTES = 512
NUM_PARTS = 2

AnyMessage = ToCoordinator | ToClient
M = TypeVar("M")
Part = bytes | bytearray | memoryview


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """First frame of every message.

    Attributes:
        protocol: version of the protocol.
        run: run id; messages of other runs are refused.
        session: session epoch the message belongs to; 0 before Welcome.
        length: bytes of the body.
        crc32: CRC-32 of the body, continued over ``protocol:run:session:length``.
    """

    protocol: Count
    run: Name
    session: Count
    length: Count
    crc32: Count


class _Peek(msgspec.Struct):
    """The one field that every past and future envelope has."""

    protocol: int


class _SegmentBody(msgspec.Struct, tag_field="type", tag="segment"):
    """The same bytes as :class:`SegmentData`, around a segment that is already encoded."""

    seq: int
    segment: msgspec.Raw


_encoder = msgspec.msgpack.Encoder()
_envelopes = msgspec.msgpack.Decoder(Envelope)
_peeks = msgspec.msgpack.Decoder(_Peek)
_for_coordinator: msgspec.msgpack.Decoder[ToCoordinator] = msgspec.msgpack.Decoder(ToCoordinator)
_for_client: msgspec.msgpack.Decoder[ToClient] = msgspec.msgpack.Decoder(ToClient)
_any: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)
_check_message = compile_checks(AnyMessage)
_check_segment = compile_checks(Segment)


def encode(
    message: AnyMessage, *, run: str, session: int, max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
) -> list[bytes]:
    """Return the two frames of a message.

    Args:
        message: any message of the protocol.
        run: run id.
        session: session epoch, 0 before Welcome.
        max_message_bytes: limit of the body.

    Raises:
        WireError: the message would be refused by its receiver, with the code it would be refused with, or
            ``unencodable``. The bug is in the caller.
    """
    return frame_body(encode_body(message, max_message_bytes=max_message_bytes), run=run, session=session)


def encode_body(message: AnyMessage, *, max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES) -> bytes:
    """Return the body frame of a message, checked as its receiver will check it. Raises as :func:`encode`."""
    body = _encode(message, max_message_bytes)
    _check_message(message)
    if not isinstance(
        message, SegmentData | StepBatch
    ):  # the two large ones hold only what the check above covers
        _typed(_any, body)
    return body


def encode_segment(segment: Segment, *, max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES) -> bytes:
    """Return a segment's own bytes, for :func:`segment_body`, so that it is encoded once however often it is
    sent.

    Raises:
        WireError: not finite, bad integers, or too large together with its frame.
    """
    raw = _encode(segment, max_message_bytes - 64)
    _check_segment(segment)
    return raw


def segment_body(seq: int, raw_segment: bytes) -> bytes:
    """Return the body frame of ``SegmentData(seq, segment)`` from the segment's own bytes."""
    return _encoder.encode(_SegmentBody(seq, msgspec.Raw(raw_segment)))


def frame_body(body: bytes, *, run: str, session: int) -> list[bytes]:
    """Put an envelope before a body."""
    checksum = _checksum(PROTOCOL_VERSION, run, session, body)
    return [_encoder.encode(Envelope(PROTOCOL_VERSION, run, session, len(body), checksum)), body]


def refusal(code: str, detail: str, *, is_fatal: bool = False) -> Refused:
    """Return a Refused whose detail fits, whatever it quotes."""
    return Refused(code=code, detail=detail[:4000], is_fatal=is_fatal)


def decode_for_coordinator(
    parts: Sequence[Part], *, run: str | None = None, max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
) -> tuple[Envelope, ToCoordinator]:
    """Return (envelope, message) of frames sent to the coordinator.

    Args:
        parts: the message's frames without the routing id.
        run: refuse messages of any other run; None accepts all.
        max_message_bytes: limit of the body.

    Raises:
        WireError: for any bytes that are not one message; codes in the module text. Nothing else is ever
            raised.
    """
    envelope, body = _open(parts, run, max_message_bytes)
    message = _typed(_for_coordinator, body)
    _check_message(message)
    # A repeated key or a padded number is the only way to be longer than one's own encoding. Shorter is fine:
    # an older sender leaves out fields that have got defaults since.
    if len(_encoder.encode(message)) < len(body):
        raise WireError("not_canonical", "repeated keys or padded numbers")
    return envelope, message


def decode_for_client(
    parts: Sequence[Part], *, run: str | None = None, max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
) -> tuple[Envelope, ToClient]:
    """Return (envelope, message) of frames sent to an actor or learner. Arguments and errors as above."""
    envelope, body = _open(parts, run, max_message_bytes)
    message = _typed(_for_client, body)
    _check_message(message)
    return envelope, message


def _encode(value: object, limit: int) -> bytes:
    try:
        encoded = _encoder.encode(value)
    except RecursionError:
        raise WireError("too_deep", "nested too deeply") from None
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
        raise WireError("unencodable", str(error)) from None
    if len(encoded) > limit:
        raise WireError("too_large", f"{len(encoded)} bytes, at most {limit} are allowed")
    return encoded


def _open(parts: Sequence[Part], run: str | None, max_message_bytes: int) -> tuple[Envelope, Part]:
    """Check everything that can be checked without looking into the body."""
    if len(parts) != NUM_PARTS:
        raise WireError("bad_parts", f"{len(parts)} frames, must be {NUM_PARTS}")
    head, body = parts
    if len(head) > MAX_ENVELOPE_BYTES:
        raise WireError(
            "too_large", f"envelope of {len(head)} bytes, at most {MAX_ENVELOPE_BYTES} are allowed"
        )
    if len(body) > max_message_bytes:
        raise WireError("too_large", f"{len(body)} bytes, at most {max_message_bytes} are allowed")
    envelope = _envelope(head)
    if run is not None and envelope.run != run:
        raise WireError("wrong_run", f"message of run {envelope.run!r}, this is run {run!r}")
    if envelope.length != len(body):
        raise WireError("bad_length", f"envelope says {envelope.length} bytes, body has {len(body)}")
    if envelope.crc32 != _checksum(envelope.protocol, envelope.run, envelope.session, body):
        raise WireError("bad_checksum", f"altered on the way, {len(body)} bytes")
    return envelope, body


def _envelope(head: Part) -> Envelope:
    try:
        envelope = _typed(_envelopes, head)
    except WireError as error:
        # A future protocol may have another envelope: both numbers must still be named.
        try:
            peeked = _typed(_peeks, head).protocol
        except WireError:
            peeked = PROTOCOL_VERSION
        if peeked != PROTOCOL_VERSION:
            raise _wrong_protocol(peeked) from None
        raise WireError("bad_envelope", str(error)) from None
    if envelope.protocol != PROTOCOL_VERSION:
        raise _wrong_protocol(envelope.protocol)
    if _encoder.encode(envelope) != bytes(head):
        raise WireError("bad_envelope", "not in canonical form")
    return envelope


def _wrong_protocol(theirs: int) -> WireError:
    return WireError("protocol", f"peer speaks protocol {theirs}, this side speaks {PROTOCOL_VERSION}")


def _checksum(protocol: int, run: str, session: int, body: Part) -> int:
    return crc32(f"{protocol}:{run}:{session}:{len(body)}".encode("utf-8", "surrogatepass"), crc32(body))


def _typed(decoder: msgspec.msgpack.Decoder[M], body: Part) -> M:
    try:
        return decoder.decode(body)
    except UnicodeDecodeError as error:
        raise WireError("bad_text", str(error)[:200]) from None
    except RecursionError:
        raise WireError("too_deep", "nested too deeply") from None
    except Exception as error:
        # Whatever a decoder raises for hostile bytes must not end the receiver's loop; the fuzz tests list
        # what is seen.
        raise WireError("bad_message", str(error)[:1000]) from None
