"""What the process around the brain decides by itself."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import msgspec
import pytest
from coordinator_world import make_config
from wire_samples import make_segment

from cod_async.coordinator.service import Service
from cod_async.errors import StoreError
from cod_async.lifecycle.segment import Version
from cod_async.store.work import NewGroup
from cod_async.wire.messages import Hello, SegmentData
from cod_async.wire.session import Received, Session


def test_a_full_database_withdraws_credit_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service(tmp_path, make_config(store={"max_database_bytes": 1}))
    try:
        with caplog.at_level(logging.INFO):
            for _ in range(3):
                service._give_or_withdraw_credit()
        (record,) = [r for r in caplog.records if "max_database_bytes" in r.getMessage()]
        assert record.levelno == logging.ERROR and not service._link._sessions._is_credit_open
        service._config = make_config()
        service._give_or_withdraw_credit()
        assert service._link._sessions._is_credit_open
    finally:
        service.close()
    lines = [msgspec.json.decode(line) for line in (tmp_path / "metrics.jsonl").read_bytes().splitlines()]
    assert lines[-1]["kind"] == "status" and lines[-1]["is_credit_open"]


@pytest.mark.parametrize("is_told_to_stop", [False, True])
def test_a_finished_run_is_closed_however_the_process_ends(tmp_path: Path, is_told_to_stop: bool) -> None:
    service = Service(tmp_path, make_config(transport={"heartbeat_s": 0.1, "session_timeout_s": 0.5}))
    try:
        core = service._brain._core
        new = NewGroup(
            environment="hidden_buttons",
            preset="door",
            options_json="{}",
            records_json=("{}", "{}"),
            pack_seed=1,
            num_members=2,
            planned_at=Version(0, 0),
        )
        with core.store.transaction():
            core.store.work.add_group(0, new)
            core.store.set_meta("finished", "all steps are done")
        core.finished = "all steps are done"
        if is_told_to_stop:
            service.stop(15, None)
        assert service.run() == 0
        assert core.store.work.untrained() == []
        assert core.store.work.count_groups() == {"dropped": 1}
    finally:
        service.close()


def test_acknowledgements_wait_for_the_flush_and_a_failed_one_ends_the_process(tmp_path: Path) -> None:
    """While a commit is being flushed the loop receives; nothing of it is told before it is on the disk."""
    service = Service(tmp_path, make_config())
    flushing, may_end = threading.Event(), threading.Event()
    commit, told = service._store.commit, []

    def slow_commit() -> None:
        flushing.set()
        assert may_end.wait(20)
        commit()

    service._link.settle = lambda *settled: told.append(settled)  # type: ignore[method-assign]
    session = Session(service._brain.allocate(hello()), "actor", "actor-0", 0.0)
    bad = SegmentData(seq=4, segment=make_segment())
    service._link.poll = lambda *_, **__: []  # type: ignore[method-assign]
    try:
        service._store.commit = slow_commit  # type: ignore[method-assign]
        service._collect = lambda: [Received(session, bad, 1)]  # type: ignore[method-assign]
        service.turn()
        assert flushing.wait(20) and told == []
        may_end.set()
        service._store.commit = disk_is_full  # type: ignore[method-assign]
        service.turn()  # ends the first commit, and begins one that will fail
        assert told == [(session.session, 4, "unknown_lease")]
        with pytest.raises(StoreError):
            service.turn()
        assert len(told) == 1
    finally:
        service.close()


def hello() -> Hello:
    return Hello(role="actor", name="actor-0", protocol=2, pid=1, host="h", instance=1)


def disk_is_full() -> None:
    raise StoreError("the disk is full")
