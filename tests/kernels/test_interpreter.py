"""Every Triton kernel in the interpreter, against fp64 and against the torch twin."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import exponential_cases
import pytest

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "kernels"


def version_of(package: str) -> tuple[int, ...]:
    """Return major and minor version, or nothing where the package is missing."""
    try:
        return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return ()


pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None,
        reason="Triton is not installed; its interpreter runs the kernels",
    ),
    pytest.mark.skipif(
        version_of("triton") < (3, 9) and version_of("numpy") >= (2, 4),
        reason="Triton's interpreter before 3.9 cannot loop with numpy 2.4 or newer",
    ),
]

BOUNDS: dict[str, dict[str, float]] = {
    "loss_modes": {"loss": 2e-6, "gradient": 2e-6, "metrics": 2e-6},
    "loss_anchors": {"loss": 2e-6, "gradient": 2e-6, "metrics": 2e-6},
    "loss_finish": {"loss": 1e-6, "metrics": 1e-6, "repeats": 0},
    "loss_lengths": {"loss_and_metrics": 2e-6},
    "loss_bad_tokens": {"wrong_cases": 0},
    "reduce": {"any_order": 1e-14, "sorted": 1e-14, "skewed": 1e-13, "one_token": 0},
    "reduce_host_reads": {"reads": 0},
    "logprob_fp32": {"logprob": 1e-5, "entropy": 1e-5, "d_hidden": 1e-5, "d_weight": 1e-5},
    "logprob_fp32_full": {
        "logprob": 1e-5,
        "entropy": 1e-5,
        "d_hidden": 1e-5,
        "d_weight": 1e-5,
        "d_bias": 1e-5,
    },
    # The interpreter truncates where hardware rounds: twice the bound of 3e-3.
    "logprob_bf16": {"logprob": 1e-5, "entropy": 1e-5, "d_hidden": 6e-3, "d_weight": 6e-3},
    "logprob_bf16_full": {
        "logprob": 1e-5,
        "entropy": 1e-5,
        "d_hidden": 6e-3,
        "d_weight": 6e-3,
        "d_bias": 6e-3,
    },
    "fused": {"loss": 1e-6, "metrics": 1e-5, "d_hidden": 1e-5, "d_weight": 1e-5, "repeats": 0},
    "host_reads": {"reads_beyond_those_of_the_cpu": 0},
    "bad_values": {"rows": 0, "value": 1e-6},
    **exponential_cases.BOUNDS,
}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{KERNELS}{os.pathsep}{HERE}"}
    done = subprocess.run(
        [sys.executable, str(HERE / "interpreter_cases.py")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("case", list(BOUNDS))
def test_kernel(case: str, results: dict[str, Any]) -> None:
    found = results[case]
    assert found.keys() == BOUNDS[case].keys()
    assert {k: v for k, v in found.items() if not v <= BOUNDS[case][k]} == {}


def test_bf16_products_cannot_be_trusted_here(results: dict[str, Any]) -> None:
    assert results["bf16_dot_is_wrong"]["distance"] > 1
