"""Timing in alternating rounds, device facts, and the file format of results."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import platform
import re
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

Row = dict[str, Any]
BASELINES = Path(__file__).resolve().parents[1] / "baselines"
MIN_ROUNDS = 3


def device_name(device: torch.device) -> str:
    """Return the name of the accelerator, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "cpu"
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found.group(1) if found else "cpu"


def slug(text: str) -> str:
    """Return a folder name for ``text``."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def versions() -> dict[str, str | None]:
    """Return the versions that a result depends on; None where a package is missing."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("torch", "triton", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _once(run: Callable[[], Any], device: torch.device) -> float:
    """Return milliseconds of one call."""
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(stop))
    began = time.perf_counter()
    run()
    return (time.perf_counter() - began) * 1e3


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside the block when it has run that long; a peer may tune or compile for minutes.

    Works on the main thread of POSIX systems, between two Python instructions; an alarm that was set before
    gets its time back.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took longer than the {seconds:.0f} s that were left")

    previous = signal.signal(signal.SIGALRM, stop)
    began = time.monotonic()
    waiting, interval = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if waiting:
            left = max(waiting - (time.monotonic() - began), 1e-3)
            signal.setitimer(signal.ITIMER_REAL, left, interval)


def peak_bytes(
    run: Callable[[], Any],
    device: torch.device,
    gradient_bytes: int,
    clear: Callable[[], None] | None = None,
) -> int | None:
    """Return the most memory a call held beyond what was there before and its gradients; None on a CPU.

    Args:
        run: the call.
        device: where it runs.
        gradient_bytes: counted as the call's result.
        clear: drops gradients of earlier calls, which would otherwise count as there before.
    """
    if device.type != "cuda":
        return None
    run()  # compiled, tuned, workspaces allocated
    if clear is not None:
        clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before - gradient_bytes)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


def compare(
    contestants: dict[str, Callable[[], Any]], device: torch.device, *, seconds: float, max_rounds: int = 41
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time contestants in alternating rounds, so that noise hits all alike.

    Args:
        contestants: by name, the most important first.
        device: where they run.
        seconds: for everything, compiling and tuning included. What does not fit is left out and named: late
            contestants first; those that are left have at least three rounds.
        max_rounds: most rounds.

    Returns:
        (milliseconds of every round by name; reason by name for those that failed or did not fit).
    """
    times: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    round_ms = 0.0
    began = time.perf_counter()
    for name, run in contestants.items():
        left = seconds - (time.perf_counter() - began) - MIN_ROUNDS * round_ms / 1e3
        try:
            if times and left <= 0:
                raise TimeoutError("no time was left")
            with time_limit(max(left, seconds / 4)):
                _once(run, device)
                lasted = _once(run, device)
            if times and MIN_ROUNDS * lasted / 1e3 > left:
                raise TimeoutError(f"one call takes {lasted:.0f} ms; no time was left for rounds of it")
            times[name] = []
            round_ms += lasted
        except Exception as error:  # whatever a peer, a compiler or a full memory may raise
            failed[name] = _reason(error)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    for number in range(max_rounds):
        if number >= MIN_ROUNDS and time.perf_counter() - began + round_ms / 1e3 > seconds:
            break
        for name in times:
            times[name].append(_once(contestants[name], device))
    return times, failed


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float | None:
    """Return the median over rounds of time(slow) / time(fast)."""
    if slow not in times or fast not in times:
        return None
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def write(path: Path, results: dict[str, Any]) -> None:
    """Write results as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)


def header(device: torch.device) -> dict[str, Any]:
    """Return what every result file begins with."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return {
        "device": device_name(device),
        "compute_capability": capability,
        "versions": versions(),
        "num_threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
