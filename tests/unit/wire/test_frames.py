"""Each way in which frames can be wrong has its own code."""

from __future__ import annotations

import math

import msgspec
import pytest
from wire_samples import MANIFEST, RUN, TO_CLIENT, TO_COORDINATOR, make_segment

from cod_async.errors import WireError
from cod_async.lifecycle.segment import Version
from cod_async.wire import codec
from cod_async.wire import messages as m
from cod_async.wire.codec import Envelope, decode_for_client, decode_for_coordinator, encode, frame_body


def code_of(parts: list[bytes], **options: object) -> str:
    with pytest.raises(WireError) as caught:
        decode_for_coordinator(parts, **options)  # type: ignore[arg-type]
    return caught.value.code


def framed(body: bytes) -> list[bytes]:
    return frame_body(body, run=RUN, session=1)


def body_of(value: object) -> bytes:
    return msgspec.msgpack.encode(value)


@pytest.mark.parametrize("name", sorted(TO_COORDINATOR))
def test_round_trip_to_the_coordinator(name: str) -> None:
    parts = encode(TO_COORDINATOR[name], run=RUN, session=7)
    envelope, message = decode_for_coordinator(parts, run=RUN)
    assert message == TO_COORDINATOR[name]
    assert (envelope.session, envelope.length) == (7, len(parts[1]))


@pytest.mark.parametrize("name", sorted(TO_CLIENT))
def test_round_trip_to_a_client(name: str) -> None:
    assert decode_for_client(encode(TO_CLIENT[name], run=RUN, session=7), run=RUN)[1] == TO_CLIENT[name]


def test_a_segment_encoded_once_gives_the_same_body() -> None:
    segment = make_segment()
    whole = encode(m.SegmentData(seq=300, segment=segment), run=RUN, session=1)
    assert codec.segment_body(300, codec.encode_segment(segment)) == whole[1]


@pytest.mark.parametrize("num_parts", [0, 1, 3, 10_000])
def test_part_count(num_parts: int) -> None:
    assert code_of([b"x"] * num_parts) == "bad_parts"


def test_limits_of_both_frames() -> None:
    parts = encode(TO_COORDINATOR["bye"], run=RUN, session=1)
    assert code_of(parts, max_message_bytes=len(parts[1]) - 1) == "too_large"
    decode_for_coordinator(parts, max_message_bytes=len(parts[1]))
    assert code_of([b"x" * 513, parts[1]]) == "too_large"
    with pytest.raises(WireError, match="too_large"):
        encode(TO_COORDINATOR["bye"], run=RUN, session=1, max_message_bytes=len(parts[1]) - 1)


def test_empty_frames() -> None:
    assert code_of([b"", b""]) == "bad_envelope"
    assert code_of(framed(b"")) == "bad_message"


def test_another_run() -> None:
    assert code_of(encode(m.Bye(), run="other", session=1), run=RUN) == "wrong_run"


@pytest.mark.parametrize("theirs", [0, 1, 9])
def test_another_protocol_names_both_numbers(theirs: int) -> None:
    body = body_of({"type": "bye"})
    with pytest.raises(WireError, match=f"peer speaks protocol {theirs}, this side speaks 2") as caught:
        decode_for_coordinator([body_of(Envelope(theirs, RUN, 1, len(body), 0)), body])
    assert caught.value.code == "protocol"
    # a future envelope may have other fields: still the numbers, not "bad_envelope"
    assert code_of([body_of({"protocol": theirs, "zone": "b"}), body]) == "protocol"


def test_lengths_and_checksums_that_lie() -> None:
    head, body = encode(m.Bye(counters={"a": 1.0}), run=RUN, session=1)
    assert code_of([head, body + b"\x00"]) == "bad_length"
    assert code_of([head, body[:-1]]) == "bad_length"
    envelope = msgspec.msgpack.decode(head, type=Envelope)
    lying = msgspec.structs.replace(envelope, crc32=envelope.crc32 ^ 1)
    assert code_of([body_of(lying), body]) == "bad_checksum"
    other_session = msgspec.structs.replace(envelope, session=2)
    assert code_of([body_of(other_session), body]) == "bad_checksum"


def test_an_envelope_has_one_form() -> None:
    head, body = encode(m.Bye(), run=RUN, session=1)
    fields = msgspec.msgpack.decode(head)
    swapped = dict(reversed(fields.items()))
    assert code_of([body_of(swapped), body]) == "bad_envelope"
    assert code_of([body_of(fields | {"more": 1}), body]) == "bad_envelope"
    assert code_of([body_of(fields | {"run": "a/b"}), body]) == "bad_envelope"
    assert code_of([body_of(fields | {"run": "run-1\n"}), body]) == "bad_envelope"


@pytest.mark.parametrize(
    "value",
    [
        {"type": "nothing"},
        {"type": "bye", "more": 1},
        {"type": "lease_request", "request": 1},
        {"type": "lease_request", "request": "1", "num_lifecycles": 1},
        {"type": "lease_request", "request": 1.0, "num_lifecycles": 1},
        {"type": "lease_request", "request": -1, "num_lifecycles": 1},
        {"type": "lease_request", "request": 1 << 63, "num_lifecycles": 1},
        {"type": "pong"},
        [1, 2],
        None,
        {1: 2},
        {"type": 3},
    ],
)
def test_messages_that_are_none(value: object) -> None:
    assert code_of(framed(body_of(value))) == "bad_message"


def test_trailing_and_truncated_bytes() -> None:
    body = body_of({"type": "bye"})
    assert code_of(framed(body + b"\xc0")) == "bad_message"
    for stop in range(len(body)):
        assert code_of(framed(body[:stop])) == "bad_message"


def test_lying_length_headers() -> None:
    for header in (
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
    ):
        assert code_of(framed(header)) == "bad_message"
        assert code_of(framed(b"\x82\xa4type\xa3bye\xa8counters" + header)) == "bad_message"


def test_nesting_bomb_before_the_tag() -> None:
    bomb = b"\x82\xa8counters" + b"\x91" * 1_000_000 + b"\xc0" + b"\xa4type\xa3bye"
    assert code_of(framed(bomb)) == "too_deep"


def test_bad_text() -> None:
    body = b"\x83\xa4type\xacstep_request\xa7version\x82\xa7lineage\x00\xa4step\x00"
    assert code_of(framed(body)) == "bad_message"
    assert code_of(framed(b"\x82\xa4type\xa3bye\xa8counters\x81\xa2\xff\xfe\xcb" + b"\0" * 8)) == "bad_text"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite(value: float) -> None:
    for bad in (
        {"type": "bye", "counters": {"a": value}},
        {"type": "heartbeat", "counters": {"a": 1.0, "b": value}},
        {
            "type": "step_done",
            "version": {"lineage": 0, "step": 1},
            "plan_digest": "",
            "metrics": {"x": value},
        },
    ):
        assert code_of(framed(body_of(bad))) == "not_finite"
    plain = msgspec.to_builtins(m.SegmentData(seq=1, segment=make_segment()), builtin_types=(bytes,))
    for path in (
        ("reward",),
        ("raw_reward",),
        ("wall_s",),
        ("metrics", "num_steps"),
        ("state_after", "pending", "reward"),
    ):
        hostile = msgspec.msgpack.decode(body_of(plain))
        target = hostile["segment"]
        for step in path[:-1]:
            target = target[step]
        target[path[-1]] = value
        assert code_of(framed(body_of(hostile))) == "not_finite", path
    with pytest.raises(WireError, match=r"not_finite: bye\.counters"):
        encode(m.Bye(counters={"a": value}), run=RUN, session=1)
    with pytest.raises(WireError, match="not_finite"):
        codec.encode_segment(make_segment(reward=value))


@pytest.mark.parametrize("value", [-1, (1 << 62) + 1, (1 << 64) - 1])
def test_integers_out_of_range(value: int) -> None:
    for bad in (
        {"type": "step_request", "version": {"lineage": 0, "step": value}},
        {"type": "heartbeat", "engine_version": {"lineage": value, "step": 0}},
    ):
        assert code_of(framed(body_of(bad))) == "bad_int"
    with pytest.raises(WireError, match="bad_int"):
        encode(m.StepRequest(version=Version(0, value)), run=RUN, session=1)


def test_repeated_keys() -> None:
    assert code_of(framed(b"\x83\xa4type\xa3bye\xa8counters\x80\xa8counters\x80")) == "not_canonical"
    # but an older sender may leave out what has a default
    assert decode_for_coordinator(framed(body_of({"type": "bye"})))[1] == m.Bye()


def test_an_array_that_lies_about_its_length() -> None:
    plain = msgspec.to_builtins(m.SegmentData(seq=1, segment=make_segment()), builtin_types=(bytes,))
    plain["segment"]["rows"][0]["token_ids"]["length"] = 1 << 40
    assert code_of(framed(body_of(plain))) == "bad_message"


def test_what_cannot_be_received_is_not_sent() -> None:
    for bad in (
        m.Fence(leases=[], reason="has blanks"),
        m.Stop(reason="x" * 5000),
        m.LeaseRequest(request=-1, num_lifecycles=1),
    ):
        with pytest.raises(WireError, match="bad_message"):
            encode(bad, run=RUN, session=1)
    with pytest.raises(WireError, match="unencodable"):
        encode(m.Bye(counters={"a": object()}), run=RUN, session=1)  # type: ignore[dict-item]
    with pytest.raises(WireError, match="unencodable"):
        encode(m.LeaseRequest(request=1 << 80, num_lifecycles=1), run=RUN, session=1)


def test_a_refusal_always_fits() -> None:
    refused = codec.refusal("bad_message", "x" * 100_000)
    assert decode_for_client(encode(refused, run=RUN, session=0))[1] == refused


def test_messages_of_the_other_direction() -> None:
    assert code_of(encode(m.NewVersion(manifest=MANIFEST), run=RUN, session=1)) == "bad_message"
    with pytest.raises(WireError, match="bad_message"):
        decode_for_client(encode(TO_COORDINATOR["hello"], run=RUN, session=1))
