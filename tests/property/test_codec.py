"""For any bytes the decoders give a message or a WireError, and every single flipped bit is found."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_samples import RUN, TO_CLIENT, TO_COORDINATOR

from cod_async.errors import WireError
from cod_async.wire.codec import decode_for_client, decode_for_coordinator, encode, encode_body, frame_body
from cod_async.wire.messages import Bye

MESSAGES = TO_COORDINATOR | TO_CLIENT
FRAMES = {name: encode(message, run=RUN, session=3) for name, message in MESSAGES.items()}

names = st.sampled_from(sorted(FRAMES))
scalars = (
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(max_size=8)
)
values = st.recursive(
    scalars | st.binary(max_size=16),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(scalars, inner, max_size=4),
    max_leaves=12,
)


def decode_both(parts: list[bytes]) -> None:
    """Decode as either side would; only WireError may come out."""
    for decode in (decode_for_coordinator, decode_for_client):
        try:
            decode(parts, run=RUN, max_message_bytes=1 << 16)
        except WireError as error:
            assert error.code.isidentifier()


@settings(max_examples=400, deadline=None)
@given(st.lists(st.binary(max_size=64), max_size=4))
def test_random_frames(parts: list[bytes]) -> None:
    decode_both(parts)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200))
def test_random_bodies_in_valid_envelopes(body: bytes) -> None:
    decode_both(frame_body(body, run=RUN, session=1))


@settings(max_examples=400, deadline=None)
@given(values)
def test_random_messagepack(value: Any) -> None:
    decode_both(frame_body(msgspec.msgpack.encode(value), run=RUN, session=1))


@settings(max_examples=400, deadline=None)
@given(names, st.data())
def test_one_value_replaced_anywhere(name: str, data: st.DataObject) -> None:
    """Walk to a random place in a valid message, put anything there, and give it a valid checksum."""
    plain = msgspec.msgpack.decode(FRAMES[name][1])
    place, holder, key = plain, None, None
    while isinstance(place, dict | list) and place and data.draw(st.booleans() | st.just(True)):
        holder = place
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        place = holder[key]
    if holder is not None:
        holder[key] = data.draw(values)
    decode_both(frame_body(msgspec.msgpack.encode(plain), run=RUN, session=1))


@settings(max_examples=400, deadline=None)
@given(names, st.data())
def test_mutated_bodies_with_valid_checksums(name: str, data: st.DataObject) -> None:
    body = bytearray(FRAMES[name][1])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body)))
        body[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=5))
    decode_both(frame_body(bytes(body), run=RUN, session=1))


@pytest.mark.parametrize("name", ["bye", "ack", "lease_request"])
def test_every_flipped_bit_is_found(name: str) -> None:
    decode = decode_for_coordinator if name in TO_COORDINATOR else decode_for_client
    head, body = FRAMES[name]
    for which, frame in enumerate((head, body)):
        for bit in range(8 * len(frame)):
            flipped = bytearray(frame)
            flipped[bit // 8] ^= 1 << bit % 8
            with pytest.raises(WireError):
                decode([bytes(flipped), body] if which == 0 else [head, bytes(flipped)], run=RUN)  # type: ignore[operator]


@settings(max_examples=200, deadline=None)
@given(names, st.data())
def test_a_flipped_bit_in_any_message_is_found(name: str, data: st.DataObject) -> None:
    frames = list(FRAMES[name])
    which = data.draw(st.integers(0, 1))
    bit = data.draw(st.integers(0, 8 * len(frames[which]) - 1))
    flipped = bytearray(frames[which])
    flipped[bit // 8] ^= 1 << bit % 8
    frames[which] = bytes(flipped)
    decode = decode_for_coordinator if name in TO_COORDINATOR else decode_for_client
    with pytest.raises(WireError):
        decode(frames, run=RUN)  # type: ignore[operator]


@pytest.mark.parametrize("name", sorted(FRAMES))
def test_truncated_at_every_offset(name: str) -> None:
    decode = decode_for_coordinator if name in TO_COORDINATOR else decode_for_client
    head, body = FRAMES[name]
    for stop in range(len(body)):
        with pytest.raises(WireError):
            decode([head, body[:stop]], run=RUN)  # type: ignore[operator]
    for stop in range(len(head)):
        with pytest.raises(WireError):
            decode([head[:stop], body], run=RUN)  # type: ignore[operator]


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=20), st.floats(allow_nan=False, allow_infinity=False), max_size=8))
def test_what_is_encoded_decodes_to_the_same(counters: dict[str, float]) -> None:
    assert decode_for_coordinator(encode(Bye(counters=counters), run=RUN, session=1))[1] == Bye(
        counters=counters
    )
    assert len(encode_body(Bye(counters=counters))) == len(
        encode(Bye(counters=counters), run=RUN, session=1)[1]
    )
