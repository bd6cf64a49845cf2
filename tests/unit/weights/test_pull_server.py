"""The weight server hands out what was published and nothing else, to all who ask, in turn."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.auth
from pull_world import CHUNK, LOOPBACK, RUN, OddSource, Serving, publish_version, pulling, same_files, serving

from cod_async.commands.serving import ServingRequest, run_weights
from cod_async.errors import InputError, WeightsError, WireError
from cod_async.lifecycle.segment import Version
from cod_async.weights.folders import MANIFEST_FILE, version_folder
from cod_async.weights.manifest import Shard
from cod_async.weights.pull.fetch import Patience
from cod_async.weights.pull.folder_source import FolderSource
from cod_async.weights.pull.keys import ClientKeys, ServerKeys
from cod_async.weights.pull.protocol import (
    AskChunk,
    AskDigests,
    AskFiles,
    Chunk,
    Files,
    Refusal,
    Reply,
    Request,
    decode_reply,
    encode,
    sha256,
)
from cod_async.weights.pull.server import MAX_OPEN, MAX_UNDER_WAY, WeightServer

V1 = Version(0, 1)
SHARD = "model.safetensors"


class Asker:
    """A client that says what a test wants."""

    def __init__(self, address: str) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.socket: zmq.Socket[bytes] = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(address)

    def send(self, *parts: bytes) -> None:
        self.socket.send_multipart(parts)

    def hear(self, timeout_s: float = 10.0) -> tuple[Reply, bytes] | None:
        if not self.socket.poll(round(1000 * timeout_s)):
            return None
        return decode_reply(self.socket.recv_multipart())

    def ask(self, request: Request) -> tuple[Reply, bytes]:
        self.send(encode(request))
        answer = self.hear()
        assert answer is not None
        return answer

    def close(self) -> None:
        self.socket.close()
        self.context.term()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Serving]:
    publish_version(tmp_path, 1)
    with serving(FolderSource(tmp_path, RUN, CHUNK)) as serving_:
        yield serving_


@pytest.fixture
def asker(served: Serving) -> Iterator[Asker]:
    asker_ = Asker(served.address)
    yield asker_
    asker_.close()


def test_chunks_and_digests_are_the_files(tmp_path: Path, asker: Asker) -> None:
    files, _ = asker.ask(AskFiles(RUN, V1))
    assert isinstance(files, Files)
    assert [entry.name for entry in files.files] == [SHARD]
    assert [companion.name for companion in files.companions] == ["config.json"]
    content = (tmp_path / version_folder(V1) / SHARD).read_bytes()
    chunk, data = asker.ask(AskChunk(V1, SHARD, 2 * CHUNK, CHUNK))
    assert data == content[2 * CHUNK : 3 * CHUNK]
    assert isinstance(chunk, Chunk)
    assert chunk.sha256 == sha256(data)
    digests, _ = asker.ask(AskDigests(V1, SHARD, 1, 2))
    expected = sha256(content[CHUNK : 2 * CHUNK]) + sha256(content[2 * CHUNK : 3 * CHUNK])
    assert getattr(digests, "digests", None) == expected


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (AskFiles("other", V1), "wrong_run"),
        (AskFiles(RUN, Version(0, 2)), "no_version"),
        (AskChunk(Version(7, 1), SHARD, 0, CHUNK), "no_version"),
        (AskChunk(V1, "manifest.json", 0, 10), "no_file"),
        (AskChunk(V1, "config.json", 0, 10), "no_file"),
        (AskChunk(V1, "..", 0, 10), "bad_message"),
        (AskChunk(V1, "../../model_config.json", 0, 10), "bad_message"),
        (AskChunk(V1, "/etc/passwd", 0, 10), "bad_message"),
        (AskChunk(V1, SHARD, 1, CHUNK), "bad_range"),
        (AskChunk(V1, SHARD, 1 << 40, CHUNK), "bad_range"),
        (AskChunk(V1, SHARD, 0, 8 << 20), "bad_range"),
        (AskDigests(V1, SHARD, 1 << 40, 1), "bad_range"),
        (AskDigests(V1, "model_config.json", 0, 1), "no_file"),
    ],
)
def test_what_is_refused(asker: Asker, request_: Request, code: str) -> None:
    refusal, _ = asker.ask(request_)
    assert isinstance(refusal, Refusal)
    assert refusal.code == code
    assert refusal.about in (request_, None)


def test_shards_that_lead_out_of_the_folder_are_not_served(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    manifest = publish_version(run, 1)
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * 100)
    folder = run / version_folder(V1)
    (folder / "link.safetensors").symlink_to(secret)
    (folder / "leak.json").symlink_to(secret)
    paths = ["../secret", "weights/../../secret", str(secret), f"{version_folder(V1)}/link.safetensors"]
    shards = tuple(Shard(path, "0" * 64, 100) for path in paths)

    forged = msgspec.structs.replace(manifest, shards=(*manifest.shards, *shards))
    (folder / MANIFEST_FILE).write_bytes(msgspec.json.encode(forged))
    with serving(FolderSource(run, RUN, CHUNK)) as served:
        asker = Asker(served.address)
        files, _ = asker.ask(AskFiles(RUN, V1))
        assert isinstance(files, Files)
        assert {entry.name for entry in files.files} == {SHARD, "link.safetensors"}
        assert [companion.name for companion in files.companions] == ["config.json"]
        for name in ("secret", "link.safetensors"):
            refusal, data = asker.ask(AskChunk(V1, name, 0, 100))
            assert isinstance(refusal, Refusal)
            assert (refusal.code, data) == ("no_file", b"")
        asker.close()


def test_rubbish_is_refused_and_logged_once(
    asker: Asker, served: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(20):
            asker.send(b"\xc1rubbish")
            answer = asker.hear()
            assert answer is not None
            assert answer[0] == Refusal("bad_message", getattr(answer[0], "detail", ""))
        asker.send(b"x", b"y", b"z")
        assert asker.hear() is not None
    assert sum("bad_message" in record.getMessage() for record in caplog.records) == 1
    assert served.server.counters["refused_bad_message"] == 21


def test_an_enormous_frame_costs_its_sender_the_connection(asker: Asker, served: Serving) -> None:
    asker.send(bytes(1 << 20))
    other = Asker(served.address)
    assert isinstance(other.ask(AskFiles(RUN, V1))[0], Files)
    other.close()
    assert served.server.counters["requests"] == 1


def test_clients_are_served_in_turn(tmp_path: Path) -> None:
    """A greedy client has asked for everything before a modest one asks for one chunk."""
    manifest = publish_version(tmp_path, 1)
    source = OddSource(tmp_path)
    server = WeightServer(source, LOOPBACK, kept_bytes=0)
    greedy, modest = Asker(server.address), Asker(server.address)
    num_all = manifest.shards[0].num_bytes // CHUNK
    for index in range(num_all):
        greedy.send(encode(AskChunk(V1, SHARD, index * CHUNK, CHUNK)))
    while server.counters["requests"] < num_all:
        server._receive()
    modest.send(encode(AskChunk(V1, SHARD, 5 * CHUNK, CHUNK)))
    while server.counters["requests"] < num_all + 1:
        server._receive()
    while not modest.socket.poll(0):
        server.turn(0.0)
    position = source.asked.index(AskChunk(V1, SHARD, 5 * CHUNK, CHUNK))
    assert position <= 1
    for asker_ in (greedy, modest):
        asker_.close()
    server.close()


def test_who_asks_without_reading_is_bounded(tmp_path: Path) -> None:
    from pull_world import make_tensors

    chunk_bytes = 1 << 20
    publish_version(tmp_path, 1, make_tensors(1, 24 << 18))  # 24 MiB
    source = OddSource(tmp_path, chunk_bytes=chunk_bytes)
    server = WeightServer(source, LOOPBACK)
    asker = Asker(server.address)
    asker.socket.setsockopt(zmq.RCVHWM, 1)
    for index in range(24):
        asker.send(encode(AskChunk(V1, SHARD, index * chunk_bytes, chunk_bytes)))
    for index in range(MAX_OPEN + 10):
        asker.send(encode(AskDigests(V1, SHARD, index, 1)))
    while server.counters["requests"] < 24 + MAX_OPEN + 10:
        server._receive()
    assert server.counters["refused_busy"] == 24 + 10
    client = next(iter(server._clients.values()))
    for _ in range(50):
        server._answer_all()
        assert len(client.under_way) <= MAX_UNDER_WAY
    asker.close()
    server.close()


def test_chunks_read_lately_are_read_once(tmp_path: Path) -> None:
    manifest = publish_version(tmp_path, 1)
    source = OddSource(tmp_path)
    with serving(source, kept_bytes=1 << 20) as served:
        for number in range(3):
            with pulling(tmp_path / f"cache{number}", served.address) as puller:
                puller.pull(manifest)
            assert same_files(tmp_path, tmp_path / f"cache{number}", manifest)
    assert len(source.asked) == len(set(source.asked))


@pytest.mark.parametrize(
    ("bind", "message"),
    [
        ("tcp://0.0.0.0:0", "needs keys"),
        ("tcp://192.168.1.5:5000", "needs keys"),
        ("tcp://example.org:5000", "needs keys"),
        ("tcp://[::]:0", "needs keys"),
        ("http://127.0.0.1:5", "not an address"),
        ("tcp://127.0.0.1", "not an address"),
        ("tcp://127.0.0.1:99999", "not an address"),
    ],
)
def test_addresses_that_are_refused(tmp_path: Path, bind: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        WeightServer(FolderSource(tmp_path, RUN), bind)


def make_keys(folder: Path) -> tuple[ServerKeys, ClientKeys, ClientKeys]:
    """A server's keys, those of a client that it knows, and those of one that it does not."""
    made, known = folder / "made", folder / "known"
    made.mkdir()
    known.mkdir()
    for name in ("server", "friend", "stranger"):
        zmq.auth.create_certificates(made, name)
        (made / f"{name}.key_secret").chmod(0o600)
    (made / "friend.key").rename(known / "friend.key")
    server = ServerKeys(made / "server.key_secret", known)
    friend, stranger = (
        ClientKeys(made / f"{name}.key_secret", made / "server.key") for name in ("friend", "stranger")
    )
    return server, friend, stranger


def test_only_known_keys_get_anything(tmp_path: Path) -> None:
    manifest = publish_version(tmp_path, 1)
    server_keys, friend, stranger = make_keys(tmp_path)
    source = FolderSource(tmp_path, RUN, CHUNK)
    impatient = Patience(retry_s=0.1, reconnect_s=0.2, max_reconnect_s=0.2, deadline_s=0.6)
    with serving(source, bind="tcp://0.0.0.0:0", keys=server_keys) as served:
        address = f"tcp://127.0.0.1:{served.address.rpartition(':')[2]}"
        for number, keys in enumerate((None, stranger)):
            with (
                pulling(tmp_path / f"c{number}", address, keys=keys, patience=impatient) as puller,
                pytest.raises(WeightsError, match="no answer"),
            ):
                puller.pull(manifest)
        assert served.server.counters["requests"] == 0
        with pulling(tmp_path / "cache", address, keys=friend) as puller:
            puller.pull(manifest)
    assert same_files(tmp_path, tmp_path / "cache", manifest)


def test_bad_keys_are_named(tmp_path: Path) -> None:
    server_keys, _, _ = make_keys(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    public = tmp_path / "made" / "server.key"
    for keys, message in (
        (ServerKeys(public, server_keys.authorized_keys_dir), "no secret key"),
        (ServerKeys(tmp_path / "absent", server_keys.authorized_keys_dir), "not a key file"),
        (ServerKeys(server_keys.secret_key_file, tmp_path / "absent"), "no such folder"),
        (ServerKeys(server_keys.secret_key_file, empty), "nobody could connect"),
    ):
        with pytest.raises(InputError, match=message):
            WeightServer(FolderSource(tmp_path, RUN), "tcp://0.0.0.0:0", keys=keys)
    server_keys.secret_key_file.chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        WeightServer(FolderSource(tmp_path, RUN), LOOPBACK, keys=server_keys)


def test_a_port_that_is_taken(tmp_path: Path, served: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cod_async.weights.pull.server._BIND_WAIT_S", 0.1)
    with pytest.raises(InputError, match="cannot listen"):
        WeightServer(FolderSource(tmp_path, RUN), served.address)
    other = WeightServer(FolderSource(tmp_path, RUN), LOOPBACK, preferred=served.address)
    assert other.address != served.address
    other.close()


@pytest.mark.parametrize(
    "request_",
    [
        ServingRequest(),
        ServingRequest(run=Path("r"), upstream="tcp://127.0.0.1:1", cache=Path("c")),
        ServingRequest(upstream="tcp://127.0.0.1:1"),
        ServingRequest(run=Path("r"), cache=Path("c")),
        ServingRequest(run=Path("r"), server_key=Path("k")),
        ServingRequest(run=Path("r"), client_key=Path("k"), upstream_key=Path("k")),
        ServingRequest(upstream="tcp://127.0.0.1:1", cache=Path("c"), keep_versions=0),
    ],
)
def test_flags_that_do_not_go_together(request_: ServingRequest) -> None:
    with pytest.raises(InputError):
        run_weights(request_)


def test_a_version_that_is_pruned_between_two_looks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest was read, then the folder went: a no by name, not the end of the server."""
    publish_version(tmp_path, 1)

    def gone(folder: Path, pattern: str) -> Iterator[Path]:
        raise FileNotFoundError(folder / pattern)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "glob", gone)
        with pytest.raises(WireError) as refused:
            FolderSource(tmp_path, RUN, CHUNK).files(AskFiles(RUN, V1))
    assert refused.value.code == "no_version"
