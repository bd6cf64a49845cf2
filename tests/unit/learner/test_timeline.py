"""The seconds of a step, by a clock that the test turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cod_async.learner import timeline as module
from cod_async.learner.timeline import Timeline


class Clock:
    """Nanoseconds; moved by hand."""

    def __init__(self) -> None:
        self.now_ns = 5_000_000_000

    def __call__(self) -> int:
        return self.now_ns

    def move(self, seconds: float) -> None:
        self.now_ns += round(seconds * 1e9)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timeline(clock: Clock) -> Timeline:
    return Timeline(clock_ns=clock)


def take_step(timeline: Timeline, clock: Clock) -> None:
    """0.5 s of waiting, two micro-batches, 0.25 s that nobody claims."""
    with timeline.span("wait"):
        clock.move(0.5)
    clock.move(0.25)
    for number in range(2):
        with timeline.span("forward", micro_batch=number, num_tokens=100):
            clock.move(1.0)
        with timeline.span("backward", micro_batch=number):
            clock.move(2.0)


def test_every_second_is_counted_once(timeline: Timeline, clock: Clock) -> None:
    take_step(timeline, clock)
    with timeline.span("optimizer"):
        clock.move(0.1)
        with timeline.span("digest"):
            clock.move(0.3)
            with timeline.span("records"):
                clock.move(0.7)
        clock.move(0.2)
    found = timeline.metrics()
    assert found == pytest.approx(
        {
            "time_wait_s": 0.5,
            "time_forward_s": 2.0,
            "time_backward_s": 4.0,
            "time_optimizer_s": 0.3,
            "time_digest_s": 0.3,
            "time_records_s": 0.7,
            "time_other_s": 0.25,
        }
    )
    assert sum(found.values()) == pytest.approx(timeline.elapsed_s())
    assert timeline.spent_s("forward") == pytest.approx(2.0) and timeline.spent_s("pack") == 0.0


def test_a_period_knows_nothing_of_the_one_before(timeline: Timeline, clock: Clock) -> None:
    take_step(timeline, clock)
    timeline.begin(is_traced=False)
    with timeline.span("publish"):
        clock.move(0.125)
    assert timeline.metrics() == pytest.approx({"time_publish_s": 0.125, "time_other_s": 0.0})


def test_a_span_that_raises_is_closed(timeline: Timeline, clock: Clock) -> None:
    with pytest.raises(ValueError, match="broken"), timeline.span("forward"):
        clock.move(1.0)
        raise ValueError("broken")
    with timeline.span("wait"):
        clock.move(1.0)
    assert timeline.metrics() == pytest.approx(
        {"time_wait_s": 1.0, "time_forward_s": 1.0, "time_other_s": 0.0}
    )


def test_without_a_trace_no_span_is_kept(timeline: Timeline, clock: Clock) -> None:
    take_step(timeline, clock)
    assert timeline._spans == []


def trace_of(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def test_a_trace_is_what_perfetto_reads(timeline: Timeline, clock: Clock, tmp_path: Path) -> None:
    timeline.begin(is_traced=True)
    take_step(timeline, clock)
    with timeline.span("optimizer"):
        clock.move(0.1)
        with timeline.span("digest"):
            clock.move(0.3)
    path = timeline.write_trace(tmp_path, 12, {"run": "t", "lineage": 1})
    assert path == tmp_path / "traces" / "step_00000012.json"
    document = trace_of(path)
    assert document["displayTimeUnit"] == "ms"
    assert document["otherData"]["run"] == "t" and document["otherData"]["step"] == 12
    names = [event["args"]["name"] for event in document["traceEvents"] if event["ph"] == "M"]
    assert names == ["learner", "host"]
    spans = [event for event in document["traceEvents"] if event["ph"] == "X"]
    assert [(span["name"], span["ts"] / 1e6, span["dur"] / 1e6, span["args"]) for span in spans] == [
        ("wait", pytest.approx(0.0), pytest.approx(0.5), {}),
        ("forward", pytest.approx(0.75), pytest.approx(1.0), {"micro_batch": 0, "num_tokens": 100}),
        ("backward", pytest.approx(1.75), pytest.approx(2.0), {"micro_batch": 0}),
        ("forward", pytest.approx(3.75), pytest.approx(1.0), {"micro_batch": 1, "num_tokens": 100}),
        ("backward", pytest.approx(4.75), pytest.approx(2.0), {"micro_batch": 1}),
        ("optimizer", pytest.approx(6.75), pytest.approx(0.4), {}),
        ("digest", pytest.approx(6.85), pytest.approx(0.3), {}),
    ]
    assert all(span["pid"] == 1 and span["tid"] == 1 and span["cat"] == "step" for span in spans)


def test_traces_and_their_spans_are_bounded(
    timeline: Timeline, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_TRACES", 3)
    monkeypatch.setattr(module, "MAX_SPANS", 4)
    for step in (8, 9, 10, 11, 9):
        timeline.begin(is_traced=True)
        take_step(timeline, clock)
        timeline.write_trace(tmp_path, step, {})
        assert timeline.metrics()["time_backward_s"] == pytest.approx(4.0)
    kept = sorted(path.name for path in (tmp_path / "traces").iterdir())
    assert kept == ["step_00000009.json", "step_00000010.json", "step_00000011.json"]
    spans = [event for event in trace_of(tmp_path / "traces" / kept[0])["traceEvents"] if event["ph"] == "X"]
    assert len(spans) == 4


class Device:
    """A device that works behind the host: its clock is moved by hand, and events note it."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self.num_waits = 0
        self.num_events = 0

    def event(self, *, enable_timing: bool) -> DeviceEvent:
        assert enable_timing
        self.num_events += 1
        return DeviceEvent(self)


class DeviceEvent:
    def __init__(self, device: Device) -> None:
        self.device, self.at_ms = device, 0.0

    def record(self) -> None:
        self.at_ms = self.device.now_ms

    def synchronize(self) -> None:
        self.device.num_waits += 1

    def elapsed_time(self, end: DeviceEvent) -> float:
        return end.at_ms - self.at_ms


def test_on_cuda_the_device_s_own_time_counts(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    timeline = Timeline("cuda", clock_ns=clock)

    def work(name: str, host_s: float, device_s: float) -> None:
        with timeline.span(name):
            clock.move(host_s)
            device.now_ms += 1e3 * device_s

    for _ in range(2):
        timeline.begin(is_traced=True)
        work("wait", 0.5, 0.0)
        for _ in range(3):
            work("forward", 0.001, 0.25)
        with timeline.span("optimizer"):
            device.now_ms += 100
            work("digest", 0.125, 0.0)
            work("records", 0.001, 0.5)
        clock.move(1.0)
        device.num_waits = 0
        assert timeline.metrics() == pytest.approx(
            {
                "time_wait_s": 0.5,
                "time_forward_s": 0.75,
                "time_optimizer_s": 0.1,
                "time_digest_s": 0.125,
                "time_records_s": 0.5,
                "time_other_s": 0.0,
            }
        )
        assert device.num_waits == 1
    # events are used again: an anchor, and two for each of five spans
    assert device.num_events == 11
    document = trace_of(timeline.write_trace(tmp_path, 0, {}))
    on_device = [event for event in document["traceEvents"] if event["ph"] == "X" and event["tid"] == 2]
    assert [(event["name"], round(event["ts"] / 1e3), round(event["dur"] / 1e3)) for event in on_device] == [
        ("forward", 0, 250),
        ("forward", 250, 250),
        ("forward", 500, 250),
        ("optimizer", 750, 600),
        ("records", 850, 500),
    ]
