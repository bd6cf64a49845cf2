"""``python -m bench.learner``: what merging, packing and trees save, and the trainer beside a plain loop.

Everything runs on one thread of the CPU, in about three minutes. The races take alternating rounds in one
process; medians and ratios are what counts. Returns 1 when a gradient differs that has to be equal. What
needs a GPU stays empty without one.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from bench.kernels.measure import BASELINES, device_name, header, slug, write
from bench.learner import measures
from bench.learner.recording import PACK_SIZE, record
from cod_async.commands.output import console_for_people

GRADIENT_BOUND = 1e-5
VOCAB_SIZE = 1024
GPU_ROWS = (
    "MFU of Qwen3-0.6B's shape at 64k tokens, full recomputation",
    "peak memory against the planner's forecast",
    "longest row as a full step",
    "pause of a checkpoint as a share of a step",
)

GPU_SECONDS = 420.0

Goal = tuple[str, str, float | None, Callable[[float], bool], str]


def verdicts(results: dict[str, Any]) -> list[Goal]:
    """Return (what, shown, value, whether it is reached, goal) of everything that has a goal."""
    merging, sharing, speed = results["merging"], results["tree"], results["speed"]
    pack, uniform = speed["recorded_pack"], speed["uniform_lengths"]

    def gap(value: float) -> str:
        return f"{value:.1e}"

    def times(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f} x"

    def percent(value: float) -> str:
        return f"{100 * value:.2f} %"

    def at_most(bound: float) -> Callable[[float], bool]:
        return lambda value: value <= bound

    def at_least(bound: float) -> Callable[[float], bool]:
        return lambda value: value >= bound

    is_equal, is_full, packing = at_most(GRADIENT_BOUND), at_least(0.95), results["packing"]
    rows: list[tuple[str, float | None, Callable[[Any], str], Callable[[float], bool], str]] = [
        ("merging: fewer forward tokens", merging["times_fewer_tokens"], times, at_least(3), "3 x"),
        ("merging: off the closed form", merging["closed_form_gap_frac"], percent, at_most(0.02), "2 %"),
        ("merging: gradients", merging["gradient_gap_relative"], gap, is_equal, "1e-5"),
        ("recorded pack: speed over transformers", pack["times_faster"], times, at_least(3), "3 x"),
        ("recorded pack: gradients", pack["gradient_gap_relative"], gap, is_equal, "1e-5"),
        ("uniform lengths: speed over transformers", uniform["times_faster"], times, at_least(0.9), "0.9 x"),
        ("uniform lengths: gradients", uniform["gradient_gap_relative"], gap, is_equal, "1e-5"),
        ("mixed lengths, packed: real tokens", packing["packing_efficiency"], percent, is_full, "95 %"),
        ("tree: fewer forward tokens of a group", sharing["times_fewer_tokens"], times, at_least(1), "1 x"),
        ("tree: gradients", sharing["gradient_gap_relative"], gap, is_equal, "1e-5"),
    ]
    return [(what, show(value), value, is_reached, goal) for what, value, show, is_reached, goal in rows]


def gpu_rows() -> dict[str, Any]:
    """Return what :mod:`bench.learner.gpu` measures; without a CUDA device everything stays empty."""
    if not torch.cuda.is_available():
        return dict.fromkeys(GPU_ROWS)
    from bench.learner import gpu

    rows = gpu.measure(gpu.Setting("cuda", gpu.SIZES), GPU_SECONDS, lambda found: None)
    packed, long = rows["packed_64k"], rows["long_row_256k"]
    values = (packed.get("mfu"), packed.get("peak_over_forecast"), (long.get("row_tokens") or [None])[0],
              rows["checkpoint_pause"].get("lost_frac_of_a_step"))  # fmt: skip
    return dict(zip(GPU_ROWS, values, strict=True)) | {"rows": rows}


def show(results: dict[str, Any]) -> list[str]:
    """Print the table and return what is wrong: gradients that differ."""
    table = Table(title="learner, one thread of a CPU")
    table.add_column("what", overflow="fold")
    for name in ("measured", "goal"):
        table.add_column(name, justify="right")
    wrong = []
    for what, shown, value, is_reached, goal in verdicts(results):
        is_fine = value is not None and is_reached(value)
        table.add_row(what, shown if is_fine or value is None else f"[bold red]{shown}[/]", goal)
        if "gradients" in what and not is_fine:
            wrong.append(f"{what}: {shown}, allowed {goal}")
    for name, race in results["speed"].items():
        if isinstance(race, dict):
            rates = ", ".join(f"{who} {rate:,.0f}" for who, rate in race["useful_tokens_per_s"].items())
            table.add_row(f"{name.replace('_', ' ')}: useful tokens/s", rates, "")
    for what in GPU_ROWS:
        value = results.get("gpu", {}).get(what)
        table.add_row(f"GPU: {what}", "-" if value is None else f"{value:.4g}", "")
    console_for_people().print(table)
    return wrong


def main() -> int:
    """Measure, print a table, write JSON if asked; return 1 when gradients differ."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.learner",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--group-size", type=int, default=4, help="lifecycles of the pack; races take one")
    parser.add_argument("--seconds", type=float, default=150.0, help="for the two races together")
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=Path(),
        help="write results, to bench/baselines/<device>/learner.json by default",
    )
    arguments = parser.parse_args()
    if arguments.group_size < 1 or not arguments.seconds > 0:
        parser.error("--group-size must be at least 1, --seconds positive")
    torch.set_num_threads(1)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    recording = record(arguments.group_size)
    model = measures.small_model(VOCAB_SIZE)
    results: dict[str, Any] = {
        "merging": measures.merging(recording, model),
        "tree": measures.sharing(recording, model),
        "packing": measures.packing(),
        "speed": measures.speed(record(1), model, arguments.seconds),
        "gpu": gpu_rows(),
    }
    wrong = show(results)
    if arguments.json is not None:
        device = torch.device("cpu")
        path = arguments.json
        if path == Path():
            path = BASELINES / slug(device_name(device)) / "learner.json"
        settings = {"group_size": arguments.group_size, "seconds": arguments.seconds, "pack_size": PACK_SIZE}
        document = {"bench": "learner", "load": round(os.getloadavg()[0], 2), "settings": settings}
        write(path, header(device) | document | results)
        print(f"written to {path}")
    if wrong:
        print("WRONG: " + "; ".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
