"""What an actor and its environment workers say to each other, and how it is framed.

Requests go to the worker, answers come back, each naming the call that it answers; ``Began`` tells when a
call got its turn, because the clock of its time limit starts there and not while it waits behind others. A
frame is its length in four little-endian bytes and a msgpack map; unknown fields and too long frames are
refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import msgspec

from cod_async.envs.base import Closing, Opening, PromptStyle, StepResult, TaskSpec
from cod_async.errors import InfrastructureError

MAX_FRAME_BYTES = 64 << 20
"""As much as the largest segment may have on the wire by default; an episode's texts must fit in there."""
_HEADER = struct.Struct("<I")


class _Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Make(_Message, frozen=True, kw_only=True):
    """Make an environment object. ``options`` are merged already; ``instance`` is its number from now on."""

    call: int
    instance: int
    environment: str
    options: dict[str, Any]


class Start(_Message, frozen=True, kw_only=True):
    """Start a task."""

    call: int
    instance: int
    task: TaskSpec
    state: bytes


class Step(_Message, frozen=True, kw_only=True):
    """Apply a response."""

    call: int
    instance: int
    response: str
    is_response_cut: bool


class Finish(_Message, frozen=True, kw_only=True):
    """End a task."""

    call: int
    instance: int
    messages: list[tuple[str, str]] | None
    has_feedback: bool


class Close(_Message, frozen=True, kw_only=True):
    """Forget an environment object, and whatever it is doing; not answered."""

    instance: int


class Began(_Message, frozen=True, kw_only=True):
    """A call has its turn."""

    call: int


class Made(_Message, frozen=True, kw_only=True):
    """The object stands; what the rollout wants to know of it before the first task."""

    call: int
    name: str
    prompt_style: PromptStyle
    is_resumable: bool
    is_step_penalized: bool
    has_update_prompts: bool
    snapshot: bytes


class Started(_Message, frozen=True, kw_only=True):
    """The answer to :class:`Start`."""

    call: int
    opening: Opening


class Stepped(_Message, frozen=True, kw_only=True):
    """The answer to :class:`Step`."""

    call: int
    result: StepResult


class Finished(_Message, frozen=True, kw_only=True):
    """The answer to :class:`Finish`."""

    call: int
    closing: Closing


class Failed(_Message, frozen=True, kw_only=True):
    """The environment raised.

    Attributes:
        is_input: it found its record, preset or options wrong.
        is_out_of_memory: the worker's memory limit was hit; the worker ends itself after saying so.
    """

    call: int
    problems: tuple[str, ...]
    is_input: bool = False
    is_out_of_memory: bool = False


Call = Make | Start | Step | Finish
Answer = Made | Started | Stepped | Finished | Failed
ToWorker = Call | Close
FromWorker = Began | Answer

_encoder = msgspec.msgpack.Encoder()
decode_request = msgspec.msgpack.Decoder(ToWorker).decode
decode_answer = msgspec.msgpack.Decoder(FromWorker).decode


def encode_frame(message: ToWorker | FromWorker) -> bytes:
    """Return a message as a frame.

    Raises:
        InfrastructureError: it is too long, or holds something that cannot be sent (half a surrogate pair, a
            number beyond 64 bits).
    """
    try:
        payload = _encoder.encode(message)
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
        raise InfrastructureError(f"{type(message).__name__} cannot be sent to its peer: {error}") from error
    if len(payload) > MAX_FRAME_BYTES:
        raise InfrastructureError(
            f"{type(message).__name__} has {len(payload)} bytes, more than the {MAX_FRAME_BYTES} that an "
            "environment worker may say or be told at once; shorten observations, trajectories or snapshots"
        )
    return _HEADER.pack(len(payload)) + payload


class FrameReader:
    """Cuts a byte stream into the payloads of its frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take bytes and yield what is complete.

        Raises:
            InfrastructureError: a frame announces more than :data:`MAX_FRAME_BYTES`.
        """
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                raise InfrastructureError(f"a frame announces {length} bytes; at most {MAX_FRAME_BYTES} pass")
            stop = _HEADER.size + length
            if len(self._buffer) < stop:
                return
            payload = bytes(self._buffer[_HEADER.size : stop])
            del self._buffer[:stop]
            yield payload
