"""Timing in alternating rounds, device facts, and the file format of results."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
BASELINES = Path(__file__).resolve().parents[1] / "baselines"


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


def peak_bytes(run: Callable[[], Any], device: torch.device, gradient_bytes: int) -> int | None:
    """Return the most memory a call held beyond what was there before and its gradients; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before - gradient_bytes)


def compare(
    contestants: dict[str, Callable[[], Any]], device: torch.device, *, seconds: float, max_rounds: int = 41
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time contestants in alternating rounds, so that noise hits all alike.

    Returns:
        (milliseconds of every round by name; reason by name for those that failed).
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    failed: dict[str, str] = {}
    for name, run in contestants.items():
        try:
            for _ in range(2):
                _once(run, device)
        except Exception as error:  # whatever a peer, a compiler or a full memory may raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
            del times[name]
    began = time.perf_counter()
    for number in range(max_rounds):
        if number >= 5 and time.perf_counter() - began > seconds:
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
    return {
        "device": device_name(device),
        "versions": versions(),
        "num_threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
