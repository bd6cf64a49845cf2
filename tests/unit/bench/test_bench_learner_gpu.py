"""The GPU rows of the learner's benchmark, run on a CPU with a tiny shape, and their failures."""

from __future__ import annotations

from typing import Any

import pytest

from bench.learner import gpu

TINY = gpu.Setting("cpu", gpu.TINY, 256, 64, 128, 256, 1)


def test_every_row_runs_and_says_what_it_is() -> None:
    seen: list[int] = []
    results = gpu.measure(TINY, 120.0, lambda rows: seen.append(len(rows)))
    assert list(results) == list(gpu.ROWS) and seen == list(range(1, len(gpu.ROWS) + 1))
    assert not [row for row in results.values() if "error" in row]
    packed = results["packed_64k"]
    assert packed["tokens"] == 256 and packed["row_tokens"] == [64] and packed["grad_norm"] > 0
    assert packed["mfu"] is None and packed["peak_bytes"] is None and packed["forecast_bytes"] > 0
    assert packed["is_deterministic"] and not results["packed_64k_not_deterministic"]["is_deterministic"]
    assert results["long_row_256k"]["row_tokens"] == [128]
    assert "not a full step" in results["longest_row_1m_few_layers"]["label"]
    assert results["attention_errors"]["is_within_bfloat16"]
    assert results["checkpoint_pause"]["lost_frac_of_a_step"] > 0


def test_a_failure_is_recorded_and_the_next_row_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(setting: gpu.Setting) -> Any:
        raise RuntimeError("no kernel\nof that kind")

    fine = {"broken": (broken, 9.0), "attention_errors": gpu.ROWS["attention_errors"]}
    monkeypatch.setattr(gpu, "ROWS", fine)
    results = gpu.measure(TINY, 60.0, lambda rows: None)
    assert results["broken"]["error"] == "RuntimeError: no kernel"
    assert results["attention_errors"]["is_within_bfloat16"]
    assert gpu.measure(TINY, 0.5, lambda rows: None)["broken"]["error"] == "TimeoutError: no time was left"
