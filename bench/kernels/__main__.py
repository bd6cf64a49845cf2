"""``python -m bench.kernels``: correctness first, then times; under eight minutes.

Runs on the CUDA device where there is one, otherwise on one thread of the CPU with smaller shapes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from bench.kernels import linear_logprob, segment_loss, segment_reduce
from bench.kernels.measure import BASELINES, device_name, header, slug, write

BOUNDS = {"cpu": {"logprob": 1e-5, "gradient": 3e-3}, "cuda": {"logprob": 1e-4, "gradient": 3e-3}}


def _number(value: float | None) -> str:
    return "      -" if value is None else f"{value:7.2f}"


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


def main() -> int:
    """Run everything; return 1 when a number is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=150.0, help="budget of the timed rounds")
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=Path(),
        help="write results, to bench/baselines/<device>/ by default",
    )
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    print(f"{device_name(device)}, torch {torch.__version__}\ncorrectness against fp64")
    errors = linear_logprob.correctness(device)
    problems = _check(errors, device.type)
    if problems:
        print("wrong: " + "; ".join(problems))
        return 1
    print("linear_logprob, forward and backward")
    rows, missing = linear_logprob.speed(device, arguments.seconds * 0.8)
    _show_speed(rows, missing)
    small = {}
    for name, module in (("segment_loss", segment_loss), ("segment_reduce", segment_reduce)):
        small[name] = module.run(device, arguments.seconds * 0.1)
        print(name)
        for row in small[name]:
            print("  " + ", ".join(f"{key} {value}" for key, value in row.items() if value))
    not_measured = []
    if device.type != "cuda":
        not_measured = [
            {"shape_tvh": shape, "device": "cuda", "ms": None} for shape in linear_logprob.CUDA_SHAPES
        ]
        print("no CUDA device: the GPU rows stay empty")
    if arguments.json is not None:
        path = arguments.json
        if path == Path():
            path = BASELINES / slug(device_name(device)) / "kernels.json"
        logprob = {
            "correctness": errors,
            "speed": rows,
            "missing_peers": missing,
            "not_measured": not_measured,
        }
        write(path, header(device) | {"linear_logprob": logprob} | small)
        print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
