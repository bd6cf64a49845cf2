"""``python -m bench.kernels``: correctness first, then times; under eight minutes.

Runs on the CUDA device where there is one, otherwise on one thread of the CPU with smaller shapes. On a GPU
this one command is a whole session: it begins with the tests that need the device (``pytest tests/kernels -m
gpu``), keeps to its budget whatever a peer compiles or tunes, and writes what it has after every part.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.kernels import linear_logprob, segment_loss, segment_reduce
from bench.kernels.measure import BASELINES, Row, device_name, header, slug, write

ROOT = Path(__file__).resolve().parents[2]
BOUNDS = {"cpu": {"logprob": 1e-5, "gradient": 3e-3}, "cuda": {"logprob": 1e-4, "gradient": 3e-3}}


def _number(value: float | None) -> str:
    return "      -" if value is None else f"{value:7.2f}"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_short(inner)}" for key, inner in value.items()) + ")"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _check(rows: list[dict[str, Any]], kind: str) -> list[str]:
    """Print the errors; return what is out of bounds."""
    problems = []
    for row in rows:
        print(
            f"  T,V,H {row['shape']} {row['dtype']}: log-prob max {row['logprob_max_error']:.2e} "
            f"rms {row['logprob_rms_error']:.2e} (float32 log_softmax max {row['plain_max_error']:.2e}), "
            f"dX {row['d_hidden_relative']:.2e}, dW {row['d_weight_relative']:.2e}, "
            f"repeats to the bit: {row['is_bitwise_repeatable']}"
        )
        bound = BOUNDS[kind]
        if not row["logprob_max_error"] <= bound["logprob"]:
            problems.append(f"log-prob error at {row['shape']}")
        if kind == "cuda" and not row["logprob_max_error"] <= 2 * row["plain_max_error"] + 1e-6:
            problems.append(f"log-prob error above twice the plain one at {row['shape']}")
        if not max(row["d_hidden_relative"], row["d_weight_relative"]) <= bound["gradient"]:
            problems.append(f"gradient error at {row['shape']}")
        if not row["is_bitwise_repeatable"]:
            problems.append(f"not repeatable at {row['shape']}")
    return problems


def _show_speed(rows: list[dict[str, Any]], missing: list[str]) -> None:
    for row in rows:
        print(f"  T,V,H {row['shape_tvh']} {row['dtype']}, {row['num_rounds']} rounds, medians")
        ratios = row["times_faster_than"]
        for name, milliseconds in sorted(row["ms"].items(), key=lambda item: item[1]):
            print(
                f"    {name:40} {milliseconds:10.2f} ms   in-chunk loss {_number(ratios.get(name))} x as fast"
            )
        for name, reason in row["failed"].items():
            print(f"    {name:40}     failed: {reason}")
        print(
            f"    share of the bare products: in-chunk loss {_number(row['share_of_3_gemms'])} of 3, "
            f"plain autograd {_number(row['share_of_4_gemms'])} of 4"
        )
        peak = row["peak_bytes_beyond_inputs_and_gradients"]
        if peak is not None:
            print(f"    peak memory beyond inputs and gradients: {peak / 2**30:.2f} GiB")
    for name in missing:
        print(f"  missing: {name} is not installed")


def _device_tests(device: torch.device, seconds: float) -> dict[str, Any] | None:
    """Run the tests that need the device, in a process of their own; None where there are none (a CPU)."""
    if device.type != "cuda":
        return None
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"passed": False, "summary": f"took longer than {seconds:.0f} s", "failed": []}
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"passed": done.returncode == 0, "summary": lines[-1], "failed": failed}


def _json_path(given: Path, device: torch.device) -> Path:
    return BASELINES / slug(device_name(device)) / "kernels.json" if given == Path() else given


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--seconds", type=float, help="budget of everything, compiling included; 420 on CUDA, 180 on a CPU"
    )
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=Path(),
        help="write results after every part, to bench/baselines/<device>/ by default",
    )
    return parser.parse_args()


def main() -> int:
    """Run everything; return 1 when a number is wrong."""
    arguments = _arguments()
    device = torch.device(arguments.device)
    began = time.monotonic()
    seconds = arguments.seconds or (420.0 if device.type == "cuda" else 180.0)
    if device.type == "cpu":
        torch.set_num_threads(1)
    results = header(device)

    def keep(**parts: Any) -> None:
        results.update(parts)
        if arguments.json is not None:
            write(_json_path(arguments.json, device), results)

    print(f"{device_name(device)}, torch {torch.__version__}")
    tests = _device_tests(device, 0.3 * seconds)
    if tests is not None:
        print("\n".join([f"tests on the device: {tests['summary']}", *tests["failed"]]))
    print("correctness against fp64")
    errors = linear_logprob.correctness(device)
    problems = _check(errors, device.type)
    if tests is not None and not tests["passed"]:
        problems.append(f"tests on the device: {tests['summary']}")
    logprob: dict[str, Any] = {"correctness": errors}
    keep(device_tests=tests, problems=problems, linear_logprob=logprob)
    if problems:
        print("WRONG: " + "; ".join(problems) + "\nthe times below are those of wrong kernels")
    small_s = 0.05 * seconds
    for name, module in (("segment_loss", segment_loss), ("segment_reduce", segment_reduce)):
        print(name)
        rows = module.run(device, small_s)
        keep(**{name: rows})
        for row in rows:
            print("  " + ", ".join(f"{key} {_short(value)}" for key, value in row.items() if value))
    print("linear_logprob, forward and backward")
    rows, missing = linear_logprob.speed(device, seconds - (time.monotonic() - began))
    _show_speed(rows, missing)
    not_measured: list[Row] = []
    if device.type != "cuda":
        not_measured = [
            {"shape_tvh": shape, "device": "cuda", "ms": None} for shape in linear_logprob.CUDA_SHAPES
        ]
        print("no CUDA device: the GPU rows stay empty")
    logprob |= {"speed": rows, "missing_peers": missing, "not_measured": not_measured}
    keep(linear_logprob=logprob, wall_s=round(time.monotonic() - began, 1))
    if arguments.json is not None:
        print(f"written to {_json_path(arguments.json, device)}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
