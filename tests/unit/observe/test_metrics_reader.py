"""Following a metrics file that is being written, torn, rolled back and replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cod_async.observe.metrics import (
    History,
    MetricsReader,
    lag_statistics,
    mean_by_position,
    position_gap,
    read_history,
    window_gap,
)


def step(number: int, lineage: int = 0, **values: Any) -> dict[str, Any]:
    return {"kind": "step", "step": number, "lineage": lineage, **values}


def lines(*records: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_a_missing_file_has_no_records(tmp_path: Path) -> None:
    assert MetricsReader(tmp_path / "metrics.jsonl").poll() == []


def test_a_torn_last_line_waits_for_its_rest(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = lines(step(0), step(1))
    path.write_bytes(whole[:-5])
    reader = MetricsReader(path)
    assert [record["step"] for record in reader.poll()] == [0]
    assert reader.poll() == []
    path.write_bytes(whole)
    assert [record["step"] for record in reader.poll()] == [1]
    assert reader.num_bad_lines == 0


def test_a_line_torn_by_a_crash_is_counted_and_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(step(0)) + b'{"kind": "ste\n[1]\n\n' + lines(step(1)))
    reader = MetricsReader(path)
    assert [record["step"] for record in reader.poll()] == [0, 1]
    assert reader.num_bad_lines == 2


def test_a_replaced_file_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(step(0), step(1)))
    reader = MetricsReader(path)
    reader.poll()
    path.write_bytes(lines(step(7)))
    assert [record["step"] for record in reader.poll()] == [7]


@given(st.data())
@settings(deadline=None)
def test_any_cut_of_the_bytes_gives_the_same_records(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    records = [step(number, value="é" * number) for number in range(5)]
    whole = lines(*records)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    reader, seen = MetricsReader(path), []
    for cut in [*cuts, len(whole)]:
        path.write_bytes(whole[:cut])
        seen += reader.poll()
    assert seen == records


def test_what_a_rollback_undid_is_not_history() -> None:
    history = History()
    history.add([step(n) for n in range(6)])
    history.add([step(3, 1), step(4, 1)])  # resumed from the checkpoint before step 3
    assert [(r["step"], r["lineage"]) for r in history.steps] == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1)]
    history.add(
        [step(5, 0)]
    )  # a late line of the abandoned lineage comes after its branch, so it is kept out below
    history.add([step(5, 1)])
    assert [(r["step"], r["lineage"]) for r in history.steps][-1] == (5, 1)
    history.add([step(4, 0)])
    assert history.steps[4]["lineage"] == 1


def test_status_records_and_unknown_kinds(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(
        lines(
            {"kind": "status", "leases": 1},
            {"kind": "new"},
            step(0),
            {"kind": "status", "leases": 2},
            {"kind": "step"},
        )
    )
    history = read_history(tmp_path)
    assert history.status == {"kind": "status", "leases": 2}
    assert [record["step"] for record in history.steps] == [0]


def test_gap_is_the_mean_of_later_positions_minus_the_first() -> None:
    assert position_gap([0.25, 0.5, 0.75]) == pytest.approx(0.375)
    assert position_gap([0.25, None, 0.75]) == pytest.approx(0.5)
    assert position_gap([0.25]) is None
    assert position_gap([None, 0.5]) is None
    assert position_gap([]) is None


def test_means_skip_what_is_missing() -> None:
    steps = [step(0, reward_by_position=[0.0, None]), step(1, reward_by_position=[1.0, 0.5, 0.25]), step(2)]
    assert mean_by_position(steps) == [0.5, 0.5, 0.25]
    assert window_gap(steps, 2) == pytest.approx(0.375 - 1.0)


def test_lag_is_weighted_by_tokens() -> None:
    steps = [step(0, lag_histogram={"0": 30, "2": 10}), step(1, lag_histogram={"2": 20, "3": 40})]
    assert lag_statistics(steps) == {"mean": pytest.approx((2 * 30 + 3 * 40) / 100), "max": 3.0}
    assert lag_statistics([step(0, lag_mean=1.0, lag_max=2), step(1, lag_mean=2.0, lag_max=1)]) == {
        "mean": 1.5,
        "max": 2.0,
    }
    assert lag_statistics([]) == {"mean": 0.0, "max": 0.0}
