"""The pieces of pulling without a network: messages, the window of requests, and files that are not whole."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cod_async.errors import WireError
from cod_async.lifecycle.segment import Version
from cod_async.weights.manifest import Manifest
from cod_async.weights.pull.cache import PartialFile
from cod_async.weights.pull.fetch import Fetcher
from cod_async.weights.pull.protocol import (
    MAX_REQUEST_BYTES,
    AskChunk,
    AskDigests,
    AskFiles,
    Chunk,
    ChunkKey,
    Companion,
    FileEntry,
    Files,
    Refusal,
    chunk_index,
    decode_reply,
    decode_request,
    encode,
    sha256,
)

VERSION = Version(0, 1)
ASK = AskChunk(VERSION, "model.safetensors", 0, 10)
REQUESTS = [ASK, AskFiles("r", VERSION), AskDigests(VERSION, "model.safetensors", 3, 16)]


@pytest.mark.parametrize("request_", REQUESTS)
def test_requests_travel(request_: AskChunk | AskFiles | AskDigests) -> None:
    assert decode_request([encode(request_)]) == request_


def changed(**fields: object) -> bytes:
    return msgspec.msgpack.encode(msgspec.msgpack.decode(encode(ASK)) | fields)


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ([], "bad_message"),
        ([b"", b""], "bad_message"),
        ([b"x" * (MAX_REQUEST_BYTES + 1)], "too_large"),
        ([b"\xff"], "bad_message"),
        ([changed(type="steal")], "bad_message"),
        ([changed(more=1)], "bad_message"),
        ([changed(offset=-1)], "bad_message"),
        ([changed(offset=1 << 60)], "bad_message"),
        ([changed(length=0)], "bad_message"),
        ([changed(length=1 << 30)], "bad_message"),
        ([changed(version={"lineage": -1, "step": 0})], "bad_int"),
        ([changed(file="../config.json")], "bad_message"),
        ([changed(file="a/b")], "bad_message"),
        ([changed(file="/etc/passwd")], "bad_message"),
        ([changed(file=".hidden")], "bad_message"),
        ([changed(file="model\n")], "bad_message"),
        ([changed(file="m\x00")], "bad_message"),
        ([changed(file="")], "bad_message"),
        ([encode(AskFiles("r", VERSION, protocol=2))], "protocol"),
    ],
)
def test_bad_requests_are_refused_by_name(parts: list[bytes], code: str) -> None:
    with pytest.raises(WireError) as refused:
        decode_request(parts)
    assert refused.value.code == code


@given(st.lists(st.binary(max_size=80), max_size=3))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_message_or_an_error_of_ours(parts: list[bytes]) -> None:
    for decode in (decode_request, decode_reply):
        with_error = False
        try:
            decode(parts)
        except WireError as error:
            with_error = bool(error.code)
        assert with_error or len(parts) in (1, 2)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_altered_message_is_a_message_or_an_error_of_ours(data: st.DataObject) -> None:
    files = Files(
        Manifest("r", VERSION, "d", ()), 10, (FileEntry("f", 3, "0" * 64),), (Companion("c.json", b"{}"),)
    )
    frame = bytearray(encode(data.draw(st.sampled_from([*REQUESTS, files, Refusal("busy", "x", ASK)]))))
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    for decode in (decode_request, decode_reply):
        try:
            decode([bytes(frame)])
        except WireError as error:
            assert error.code in {"bad_message", "bad_int", "protocol"}


def test_replies_have_the_frames_they_should() -> None:
    chunk = Chunk(VERSION, "f", 0, bytes(32))
    assert decode_reply([encode(chunk), b"data"]) == (chunk, b"data")
    for parts in ([encode(chunk)], [encode(Refusal("busy")), b""], [encode(chunk), b"", b""]):
        with pytest.raises(WireError):
            decode_reply(parts)


@pytest.mark.parametrize(
    ("offset", "length", "index"),
    [
        (0, 10, 0),
        (20, 5, 2),
        (10, 9, None),
        (5, 10, None),
        (20, 10, None),
        (25, 5, None),
        (30, 1, None),
        (10, 11, None),
    ],
)
def test_only_whole_cells_of_the_grid_exist(offset: int, length: int, index: int | None) -> None:
    entry = FileEntry("f", 25, "0" * 64)
    ask = AskChunk(VERSION, "f", offset, length)
    if index is None:
        with pytest.raises(WireError, match="bad_range"):
            chunk_index(ask, entry, 10)
    else:
        assert chunk_index(ask, entry, 10) == index


@given(
    seed=st.integers(0, 2**31),
    num_bytes=st.integers(0, 400),
    chunk_bytes=st.integers(1, 40),
    window=st.integers(1, 9),
    loss=st.sampled_from([0.0, 0.3, 0.7]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_losses_repetitions_disorder_damage_and_kills_end_in_the_same_file(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    num_bytes: int,
    chunk_bytes: int,
    window: int,
    loss: float,
) -> None:
    """A network that does its worst, and a puller that dies now and then, against the file itself."""
    chance = random.Random(seed)
    content = chance.randbytes(num_bytes)
    entry = FileEntry("f", num_bytes, sha256(content).hex())
    path = tmp_path_factory.mktemp("part") / "f"
    partial = PartialFile(path, entry, chunk_bytes)

    def fresh(partial: PartialFile) -> Fetcher:
        fetcher = Fetcher(window, retry_s=1.0)
        for index in partial.missing():
            fetcher.want(ChunkKey(VERSION, "f", index * chunk_bytes, partial.length(index)))
        return fetcher

    fetcher, on_the_way, num_open, now = fresh(partial), [], 0, 0.0
    for _ in range(5000):
        if fetcher.is_idle:
            break
        now += 0.3
        for key in fetcher.due(now):
            if chance.random() < 0.1:
                fetcher.unsent(key)
                continue
            num_open += 1
            on_the_way += [key] * (chance.random() >= loss) + [key] * (chance.random() < 0.2)
        chance.shuffle(on_the_way)
        for key in [on_the_way.pop() for _ in range(min(len(on_the_way), chance.randint(0, 4)))]:
            data = content[key.offset : key.offset + key.length]
            if chance.random() < 0.1:
                fetcher.failed(key, now)
            elif fetcher.arrived(key, now):
                partial.write(key.offset // chunk_bytes, data, sha256(data))
        event = chance.random()
        if event < 0.03:
            fetcher.disconnected()
            on_the_way.clear()
        elif event < 0.06:  # killed: what is on disk is what there is
            partial.close()
            if chance.random() < 0.5:  # in the middle of a record
                journal = path.with_name(".f.chunks")
                journal.write_bytes(journal.read_bytes()[: -chance.randint(1, 30)])
            partial = PartialFile(path, entry, chunk_bytes)
            partial.recheck()
            fetcher = fresh(partial)
    assert fetcher.is_idle
    assert partial.is_whole
    assert path.read_bytes() == content
    assert partial.file_sha256() == entry.sha256
    partial.close()


def test_the_window_bounds_what_is_open() -> None:
    keys = [ChunkKey(VERSION, "f", 10 * index, 10) for index in range(20)]
    fetcher = Fetcher(4, retry_s=1.0)
    for key in keys + keys:
        fetcher.want(key)
    assert fetcher.due(0.0) == keys[:4]
    assert fetcher.due(0.5) == []
    assert fetcher.arrived(keys[1], 0.5)
    assert not fetcher.arrived(keys[1], 0.5)
    assert fetcher.due(0.6) == [keys[4]]
    assert fetcher.due(1.4) == []  # something was heard at 0.5: nothing is lost yet
    assert set(fetcher.due(1.7)) == {keys[0], keys[2], keys[3], keys[4]}
    fetcher.disconnected()
    assert set(fetcher.due(1.8)) == {keys[0], keys[2], keys[3], keys[4]}


def test_a_journal_of_another_file_counts_for_nothing(tmp_path: Path) -> None:
    for sha in ("0" * 64, "1" * 64):
        partial = PartialFile(tmp_path / "f", FileEntry("f", 25, sha), 10)
        assert partial.missing() == [0, 1, 2]
        partial.write(0, b"x" * 10, sha256(b"x" * 10))
        partial.close()
    again = PartialFile(tmp_path / "f", FileEntry("f", 25, "1" * 64), 10)
    assert again.missing() == [1, 2]
    assert again.read(0) == b"x" * 10
    again.close()


def test_a_chunk_that_changed_on_disk_is_forgotten_for_good(tmp_path: Path) -> None:
    entry = FileEntry("f", 20, "0" * 64)
    partial = PartialFile(tmp_path / "f", entry, 10)
    for index in (0, 1):
        partial.write(index, b"x" * 10, sha256(b"x" * 10))
    with (tmp_path / "f").open("r+b") as file:
        file.write(b"y")
    assert partial.recheck() == 10
    assert partial.missing() == [0]
    partial.close()
    again = PartialFile(tmp_path / "f", entry, 10)
    assert again.missing() == [0]
    again.close()
