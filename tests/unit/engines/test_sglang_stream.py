"""Reading event streams: the same result however the bytes are cut, and no endless buffers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cod_async.engines.sglang.stream import EventStream, StreamOverflowError

EVENTS = st.lists(st.dictionaries(st.text(max_size=8), st.text(max_size=20), max_size=3), max_size=6)


def _bytes_of(events: list[dict[str, str]], *, has_comments: bool = False) -> bytes:
    comment = b": still here\n\n" if has_comments else b""
    return b"".join(
        comment + b"data: " + json.dumps(event, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n\n"
        for event in events
    )


@settings(max_examples=200, deadline=None)
@given(EVENTS, st.booleans(), st.lists(st.integers(0, 400), max_size=12))
def test_cuts_anywhere_change_nothing(
    events: list[dict[str, str]], has_comments: bool, places: list[int]
) -> None:
    blob = _bytes_of(events, has_comments=has_comments) + b"data: [DONE]\n\n"
    stream = EventStream(1 << 16)
    cuts = sorted({min(place, len(blob)) for place in places})
    for begin, end in zip([0, *cuts], [*cuts, len(blob)], strict=True):
        stream.feed(blob[begin:end])
    assert stream.is_done
    assert stream.newest == (_bytes_of(events[-1:])[6:-2] if events else b"")


@settings(max_examples=100, deadline=None)
@given(EVENTS, st.integers(0, 400))
def test_a_stream_that_breaks_off_keeps_its_last_whole_event(
    events: list[dict[str, str]], place: int
) -> None:
    blob = _bytes_of(events)[:place]
    stream = EventStream(1 << 16)
    for index in range(len(blob)):  # byte by byte
        stream.feed(blob[index : index + 1])
    whole = [part[6:] for part in blob.split(b"\n\n")[:-1]]
    assert stream.newest == (whole[-1] if whole else b"")
    assert not stream.is_done


def test_what_follows_the_end_mark_is_ignored() -> None:
    stream = EventStream(100)
    stream.feed(b"data: 1\n\ndata: [DONE]\n\ndata: 2\n\n")
    stream.feed(b"data: 3\n\n" + b"x" * 1000)
    assert stream.newest == b"1"


@pytest.mark.parametrize("blob", [b"data: " + b"x" * 200, b"data: " + b"x" * 200 + b"\n\n", b"x" * 200])
def test_an_endless_event_is_refused(blob: bytes) -> None:
    stream = EventStream(100)
    with pytest.raises(StreamOverflowError, match="100 bytes"):
        for index in range(0, len(blob), 7):
            stream.feed(blob[index : index + 7])


def test_many_events_are_fine_as_long_as_each_is_short() -> None:
    stream = EventStream(100)
    for _ in range(1000):
        stream.feed(b"data: 12345678901234567890\n\n")
    assert stream.newest == b"12345678901234567890"


def test_a_plain_answer_is_one_event_and_bounded() -> None:
    stream = EventStream(10)
    stream.feed_plain(b"{}")
    stream.feed_plain(b"\n\n")
    stream.finish_plain()
    assert (stream.newest, stream.is_done) == (b"{}\n\n", True)
    with pytest.raises(StreamOverflowError):
        stream.feed_plain(b"x" * 10)
