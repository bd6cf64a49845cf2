"""Where each second of a step goes.

The loop and the step put spans around what they do::

    with timeline.span("forward", micro_batch=3, num_tokens=2048):
        hidden = model(...)

Spans nest; a span's time is its own, without that of the spans inside it, so the times of a step add up to no
more than the step. A step's period begins when the one before it was reported and ends when its own is: it
holds the publication of the weights it starts from, the wait for its data, and its computation, and no second
is counted twice. On CUDA a span of device work is measured by two events, which cost the device nothing and
are read once, when the step is over. Everything runs on the learner's own thread: no spans inside modules,
whose recomputation runs on autograd's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import msgspec
import torch

from cod_async.durable import write_atomic

DEVICE_SPANS = frozenset({"survey", "forward", "head_loss", "backward", "optimizer", "records"})
"""Names of spans whose work a device does while the host goes on; all others are the host's own."""
NAMES = (
    *("wait", "broadcast", "pack", "survey", "forward", "head_loss", "backward", "optimizer"),
    *("digest", "records", "report", "publish", "checkpoint"),
)
"""The spans that a step may have, in the order of a step; each is a metric ``time_NAME_s``."""
TRACES_FOLDER = "traces"
MAX_TRACES = 200
"""Trace files kept; older steps' are removed."""
MAX_SPANS = 100_000
"""Spans of one step that a trace lists; further ones count in the times only."""
_NS = 1e-9
_TRACE = re.compile(r"step_(\d{8,})\.json")
_HOST_TRACK, _DEVICE_TRACK = 1, 2


class Recorded(NamedTuple):
    """One finished span.

    Attributes:
        name: one of ``NAMES``.
        start_s, end_s: since the beginning of the step's period, on the host.
        depth: number of spans around it.
        arguments: micro-batch, tokens.
        events: on CUDA, where the device began and ended it.
    """

    name: str
    start_s: float
    end_s: float
    depth: int
    arguments: dict[str, int]
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None


class Span:
    """One span as a context manager; made by :meth:`Timeline.span`."""

    __slots__ = ("_arguments", "_begun", "_inner_ns", "_name", "_start_ns", "_timeline")

    def __init__(self, timeline: Timeline, name: str, arguments: dict[str, int]) -> None:
        self._timeline = timeline
        self._name = name
        self._arguments = arguments
        self._inner_ns = 0
        self._start_ns = 0
        self._begun: torch.cuda.Event | None = None

    def __enter__(self) -> Span:
        self._begun = self._timeline._event(self._name)
        self._timeline._stack.append(self)
        self._start_ns = self._timeline._clock_ns()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        timeline = self._timeline
        end_ns = timeline._clock_ns()
        timeline._stack.pop()
        spent = end_ns - self._start_ns
        timeline._own_ns[self._name] = timeline._own_ns.get(self._name, 0) + spent - self._inner_ns
        if timeline._stack:
            timeline._stack[-1]._inner_ns += spent
        ended = None if self._begun is None else timeline._event(self._name)
        if (timeline.is_traced or ended is not None) and len(timeline._spans) < MAX_SPANS:
            timeline._spans.append(
                Recorded(
                    self._name,
                    (self._start_ns - timeline._began_ns) * _NS,
                    (end_ns - timeline._began_ns) * _NS,
                    len(timeline._stack),
                    self._arguments,
                    None if self._begun is None or ended is None else (self._begun, ended),
                )
            )


class Timeline:
    """The spans of one step after the other.

    Args:
        device: of the model; on CUDA device work is timed by events.
        clock_ns: monotonic nanoseconds.

    Attributes:
        is_traced: keep every span of the present step, for :meth:`write_trace`.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        clock_ns: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self._clock_ns = clock_ns
        self._is_cuda = torch.device(device).type == "cuda"
        self._stack: list[Span] = []
        self._own_ns: dict[str, int] = {}
        self._spans: list[Recorded] = []
        self._free: list[torch.cuda.Event] = []
        self._began_ns = clock_ns()
        self._anchor: torch.cuda.Event | None = None
        self.is_traced = False
        self.begin(is_traced=False)

    def begin(self, *, is_traced: bool) -> None:
        """Begin the period of the next step; what was measured before is forgotten."""
        for one in self._spans:
            self._free += one.events or ()
        self._own_ns, self._spans = {}, []
        self.is_traced = is_traced
        self._began_ns = self._clock_ns()
        if self._is_cuda:
            self._anchor = self._anchor or torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._anchor.record()

    def span(self, name: str, *, micro_batch: int | None = None, num_tokens: int | None = None) -> Span:
        """Return a context manager that measures what runs inside it.

        Args:
            name: one of ``NAMES``.
            micro_batch: number of the micro-batch in its optimizer step.
            num_tokens: tokens that it computes on.
        """
        arguments = {}
        if micro_batch is not None:
            arguments["micro_batch"] = micro_batch
        if num_tokens is not None:
            arguments["num_tokens"] = num_tokens
        return Span(self, name, arguments)

    def elapsed_s(self) -> float:
        """Return the seconds since the period began."""
        return (self._clock_ns() - self._began_ns) * _NS

    def spent_s(self, name: str) -> float:
        """Return the host's seconds in spans of this name since the period began."""
        return self._own_ns.get(name, 0) * _NS

    def metrics(self) -> dict[str, float]:
        """Return ``time_NAME_s`` for every span of the period, and ``time_other_s``, what none of them holds.

        On CUDA this waits for the device's last span: the one wait of a timeline. A span of device work then
        counts with the device's time, which runs beside the host's, so that ``time_other_s`` is at least 0
        but the sum may be more than the step.
        """
        total_s = self.elapsed_s()
        own = {name: value * _NS for name, value in self._own_ns.items()}
        own |= self._device_times()
        numbers = {f"time_{name}_s": own[name] for name in NAMES if name in own}
        numbers |= {f"time_{name}_s": value for name, value in own.items() if name not in NAMES}
        numbers["time_other_s"] = max(0.0, total_s - sum(own.values()))
        return numbers

    def _event(self, name: str) -> torch.cuda.Event | None:
        """Return a recorded event for a span of device work, None where there is no device."""
        if not self._is_cuda or name not in DEVICE_SPANS:
            return None
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _device_times(self) -> dict[str, float]:
        """Return the device's own seconds per name, waiting for its last span."""
        timed = [(one, one.events) for one in self._spans if one.events is not None]
        if not timed:
            return {}
        timed[-1][1][1].synchronize()
        own: dict[str, float] = {}
        inner = [0.0] * (max(one.depth for one, _ in timed) + 2)  # a span ends after those inside it
        for one, (begun, ended) in timed:
            spent = begun.elapsed_time(ended) * 1e-3
            own[one.name] = own.get(one.name, 0.0) + spent - inner[one.depth + 1]
            inner[one.depth + 1] = 0.0
            inner[one.depth] += spent
        return own

    # ------------------------------------------------------------------------------------------------------
    # traces

    def write_trace(self, run_dir: Path, step: int, about: dict[str, Any]) -> Path:
        """Write the period's spans as Chrome trace events, which Perfetto and chrome://tracing open.

        Args:
            run_dir: the run folder; the file is ``traces/step_NNNNNNNN.json``, in place of one of a history
                that was rolled back.
            step: of the version that was trained from.
            about: what else to say of the step; JSON values.

        Returns:
            The file. Timestamps are microseconds since the period began, ``otherData.began_unix_s`` says
            when that was, in seconds since 1970.
        """
        folder = run_dir / TRACES_FOLDER
        folder.mkdir(exist_ok=True)
        began = time.time() - self.elapsed_s()
        document = {
            "displayTimeUnit": "ms",
            "otherData": {"step": step, "began_unix_s": began, **about},
            "traceEvents": [*self._tracks(), *self._events()],
        }
        path = folder / f"step_{step:08d}.json"
        write_atomic(path, msgspec.json.encode(document))
        found = ((_TRACE.fullmatch(one.name), one) for one in folder.iterdir())
        known = sorted((int(match[1]), one) for match, one in found if match)
        for _, old in known[:-MAX_TRACES]:
            old.unlink(missing_ok=True)
        return path

    def _tracks(self) -> list[dict[str, Any]]:
        names = {_HOST_TRACK: "host"} | ({_DEVICE_TRACK: "device"} if self._is_cuda else {})
        head = {"ph": "M", "pid": 1}
        return [{**head, "name": "process_name", "args": {"name": "learner"}}] + [
            {**head, "name": "thread_name", "tid": track, "args": {"name": name}}
            for track, name in names.items()
        ]

    def _events(self) -> list[dict[str, Any]]:
        events = []
        for one in sorted(self._spans, key=lambda span: (span.start_s, -span.end_s)):
            places = [(_HOST_TRACK, one.start_s, one.end_s)]
            if one.events is not None and self._anchor is not None:
                one.events[1].synchronize()
                start_s, end_s = (self._anchor.elapsed_time(event) * 1e-3 for event in one.events)
                places.append((_DEVICE_TRACK, start_s, end_s))
            events += [
                {
                    "name": one.name,
                    "cat": "step",
                    "ph": "X",
                    "pid": 1,
                    "tid": track,
                    "ts": start_s * 1e6,
                    "dur": (end_s - start_s) * 1e6,
                    "args": one.arguments,
                }
                for track, start_s, end_s in places
            ]
        return events
