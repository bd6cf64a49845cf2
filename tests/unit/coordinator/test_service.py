"""What the process around the brain decides by itself."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import pytest
from coordinator_world import make_config

from cod_async.coordinator.service import Service


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
