"""A relay hands on what it has while it pulls the rest, and asks for nothing twice."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
from pull_world import (
    CHUNK,
    RUN,
    OddSource,
    Serving,
    make_tensors,
    publish_version,
    pulling,
    relay_source,
    same_files,
    serving,
)

from cod_async.errors import InputError, WeightsError, WireError
from cod_async.lifecycle.segment import Version
from cod_async.weights.delta import write_delta
from cod_async.weights.publish import publish
from cod_async.weights.pull.folder_source import FolderSource
from cod_async.weights.pull.protocol import RETRYABLE, AskChunk, AskFiles, num_chunks, sha256
from cod_async.weights.pull.server import Later


def test_a_tree_of_relays_takes_every_chunk_from_the_origin_once(tmp_path: Path) -> None:
    """origin → relay → two relays → eight clients at once."""
    run = tmp_path / "run"
    run.mkdir()
    manifest = publish_version(run, 1)
    source = OddSource(run)
    with ExitStack() as stack:
        origin = stack.enter_context(serving(source))
        top = stack.enter_context(serving(relay_source(tmp_path / "top", origin.address)))
        below = [
            stack.enter_context(serving(relay_source(tmp_path / f"low{i}", top.address))) for i in range(2)
        ]
        pullers = [
            stack.enter_context(pulling(tmp_path / f"cache{i}", below[i % 2].address)) for i in range(8)
        ]
        threads = [threading.Thread(target=puller.pull, args=(manifest,)) for puller in pullers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number in range(8):
        assert same_files(run, tmp_path / f"cache{number}", manifest)
    assert len(source.asked) == num_chunks(manifest.shards[0].num_bytes, CHUNK)
    assert len(set(source.asked)) == len(source.asked)
    assert top.server.counters["chunks"] == 2 * len(source.asked)


def test_chunks_pass_through_before_the_version_is_whole(tmp_path: Path) -> None:
    manifest = publish_version(tmp_path, 1)
    source = OddSource(tmp_path, allowed=6)
    with (
        serving(source) as origin,
        serving(relay_source(tmp_path / "relay", origin.address)) as relay,
        pulling(tmp_path / "cache", relay.address) as puller,
    ):
        thread = threading.Thread(target=puller.pull, args=(manifest,))
        thread.start()
        while puller.counters.pulled_bytes < 6 * CHUNK:  # they are here, and the origin holds the rest
            thread.join(0.005)
        assert len(source.asked) == 6
        source.allowed = None
        thread.join()
    assert same_files(tmp_path, tmp_path / "cache", manifest)


def test_a_relay_that_is_started_again_still_has_its_chunks(tmp_path: Path) -> None:
    manifest = publish_version(tmp_path, 1)
    with serving(FolderSource(tmp_path, RUN, CHUNK)) as origin:
        with (
            serving(relay_source(tmp_path / "relay", origin.address)) as relay,
            pulling(tmp_path / "one", relay.address) as puller,
        ):
            puller.pull(manifest)
        nowhere = relay_source(tmp_path / "relay", lambda: None)
        with serving(nowhere) as relay, pulling(tmp_path / "two", relay.address) as puller:
            puller.pull(manifest)
            assert nowhere.counters["pulled_chunks"] == 0
    assert same_files(tmp_path, tmp_path / "two", manifest)


def test_what_rots_in_a_relay_is_pulled_again(tmp_path: Path) -> None:
    manifest = publish_version(tmp_path, 1)
    origin_source = OddSource(tmp_path)
    with serving(origin_source) as origin:
        source = relay_source(tmp_path / "relay", origin.address)
        with serving(source) as relay:
            with pulling(tmp_path / "one", relay.address) as puller:
                puller.pull(manifest)
            part = next((tmp_path / "relay" / "weights").glob("*.part/model.safetensors"))
            with part.open("r+b") as file:
                file.seek(3 * CHUNK)
                file.write(b"rot")
            num_asked = len(origin_source.asked)
            with pulling(tmp_path / "two", relay.address) as puller:
                puller.pull(manifest)
            assert origin_source.asked[num_asked:] == [
                AskChunk(manifest.version, "model.safetensors", 3 * CHUNK, CHUNK)
            ]
    assert same_files(tmp_path, tmp_path / "two", manifest)


def test_a_chunk_misread_at_the_origin_heals_through_a_relay(tmp_path: Path) -> None:
    manifest = publish_version(tmp_path, 1)
    source = OddSource(tmp_path)
    misread: list[AskChunk] = []

    def change(ask: AskChunk, data: bytes, digest: bytes) -> tuple[bytes, bytes]:
        if ask.offset != 4 * CHUNK or misread:
            return data, digest
        misread.append(ask)
        return bytes(len(data)), sha256(bytes(len(data)))

    source.change = change
    with (
        serving(source) as origin,
        serving(relay_source(tmp_path / "relay", origin.address), kept_bytes=1 << 20) as relay,
        pulling(tmp_path / "cache", relay.address) as puller,
    ):
        puller.pull(manifest)
        assert puller.counters.bad_chunks == 1
    assert same_files(tmp_path, tmp_path / "cache", manifest)


def test_refusals_pass_through_and_old_versions_go(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    manifests = [publish_version(run, step) for step in (1, 2, 3)]
    gone = publish_version(tmp_path, 9)
    with (
        serving(FolderSource(run, RUN, CHUNK)) as origin,
        serving(relay_source(tmp_path / "relay", origin.address)) as relay,
        pulling(tmp_path / "cache", relay.address) as puller,
    ):
        with pytest.raises(WeightsError, match="no_version"):
            puller.pull(gone)
        for manifest in manifests:
            puller.pull(manifest)
            assert same_files(run, tmp_path / "cache", manifest)
        parts = sorted(path.name for path in (tmp_path / "relay" / "weights").iterdir())
        assert parts == ["L0000-S00000002.part", "L0000-S00000003.part"]


def test_a_relay_passes_deltas_on(tmp_path: Path) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    run.mkdir()
    tensors = make_tensors(0)
    changed = dict(tensors)
    changed["a.half"] = -tensors["a.half"]
    base, manifest = publish_version(run, 1, tensors), publish_version(run, 2, changed)
    info = write_delta(run, base, manifest)
    assert info is not None
    with (
        serving(FolderSource(run, RUN, CHUNK)) as origin,
        serving(relay_source(tmp_path / "relay", origin.address)) as relay,
        pulling(cache, relay.address) as puller,
    ):
        puller.pull(base)
        puller.pull(manifest)
        assert puller.counters.delta_hits == 1
        with pulling(tmp_path / "other", relay.address) as newcomer:
            newcomer.pull(manifest)  # has no base: through the same relay, in full
    assert same_files(run, cache, manifest)
    assert same_files(run, tmp_path / "other", manifest)


def test_what_is_left_of_another_run_stands_in_nobodys_way(tmp_path: Path) -> None:
    """The relay's cache is from a server of run "s"; the version has the same number in this run."""
    old, run = tmp_path / "old", tmp_path / "run"
    for folder in (old, run):
        folder.mkdir()
    theirs = publish(old, "s", Version(0, 1), make_tensors(7), 3)
    with (
        serving(FolderSource(old, "s", CHUNK)) as origin,
        serving(relay_source(tmp_path / "relay", origin.address)) as relay,
        pulling(tmp_path / "cache", relay.address) as puller,
    ):
        puller.pull(theirs)
    manifest = publish_version(run, 1)
    with (
        serving(FolderSource(run, RUN, CHUNK)) as origin,
        serving(relay_source(tmp_path / "relay", origin.address)) as relay,
        pulling(tmp_path / "cache2", relay.address) as puller,
    ):
        puller.pull(manifest)
        with pytest.raises(WeightsError, match="wrong_run"):
            puller.pull(msgspec.structs.replace(theirs, version=Version(0, 2), shards=()))
    assert same_files(run, tmp_path / "cache2", manifest)


def test_questions_above_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cod_async.weights.pull.relay._MAX_ASKED", 3)
    relay = relay_source(tmp_path, lambda: None)
    for step in (0, 1, 2, 1):
        assert isinstance(relay.files(AskFiles(RUN, Version(0, step))), Later)
    with pytest.raises(WireError, match="3 questions are open") as refused:
        relay.files(AskFiles(RUN, Version(0, 3)))
    assert refused.value.code in RETRYABLE
    relay.close()


def test_the_origin_dies_and_comes_back_elsewhere(tmp_path: Path) -> None:
    manifest = publish_version(tmp_path, 1)
    source = OddSource(tmp_path, allowed=5)
    first = Serving(source)
    addresses = [first.address]
    with (
        serving(relay_source(tmp_path / "relay", lambda: addresses[-1])) as relay,
        pulling(tmp_path / "cache", relay.address) as puller,
    ):
        thread = threading.Thread(target=puller.pull, args=(manifest,))
        thread.start()
        source.is_held.wait()
        first.close()
        with serving(FolderSource(tmp_path, RUN, CHUNK)) as second:
            addresses.append(second.address)
            thread.join()
    assert same_files(tmp_path, tmp_path / "cache", manifest)


def test_who_waits_too_long_is_told_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cod_async.weights.pull.server.SET_ASIDE_S", 0.05)
    from cod_async.weights.pull.fetch import Patience

    manifest = publish_version(tmp_path, 1)
    patience = Patience(retry_s=0.1, reconnect_s=5.0, max_reconnect_s=5.0, deadline_s=1.6)
    with (
        serving(relay_source(tmp_path / "relay", lambda: None)) as relay,
        pulling(tmp_path / "cache", relay.address, patience=patience) as puller,
        pytest.raises(WeightsError, match="upstream: the server has no address"),
    ):
        puller.pull(manifest)


def test_two_relays_cannot_share_a_cache(tmp_path: Path) -> None:
    one = relay_source(tmp_path, lambda: None)
    with pytest.raises(InputError, match="cache of its own"):
        relay_source(tmp_path, lambda: None)
    one.close()
    relay_source(tmp_path, lambda: None).close()
