"""Every kernel compiles ahead of time for Hopper and Blackwell, inside the limits, without spilling."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
MAX_SHARED_BYTES = 232_448  # of one block on sm_90 and sm_100
MAX_REGISTERS = 65_536

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed; it brings the compiler"
    ),
]


def check_tiles(result: dict[str, Any]) -> None:
    """Tensor cores of the generation (wgmma, tcgen05), tiles moved by the copy engine, warps as asked for."""
    assert result["tensor_core_products"] > 0, f"not on the tensor cores: {result}"
    assert result["tile_loads"] > 0, f"factors do not come through the copy engine: {result}"
    has_out = result["name"].endswith("1")
    assert (result["tile_stores"] > 0) == has_out, f"exponentials leave another way: {result}"
    assert f".w{result['num_warps']}." in result["name"], f"the compiler chose other warps: {result}"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", [90, 100])
def test_every_configuration(arch: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # Fused multiply-add on or off by our choice, not by the default of the Triton version.
    environment |= {"PYTHONPATH": str(HERE.parents[1] / "kernels"), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / "aot_compile.py"), str(arch)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    kinds = {result["name"].split(".")[0] for result in found}
    assert kinds == {"linear_logprob", "segment_loss", "segment_reduce"}
    for result in found:
        if result["name"] != "segment_loss.finish":  # one block, a few bytes; it claims nothing
            assert result["stack_bytes"] == 0 and result["local_memory"] == 0, f"spills: {result}"
        assert result["registers"] * result["num_warps"] * 32 <= MAX_REGISTERS, result
        assert result["shared_bytes"] <= MAX_SHARED_BYTES, result
        assert result["atomics"] == 0, f"a sum would depend on scheduling: {result}"
        if result["name"].startswith("linear_logprob.exponentials"):
            check_tiles(result)
        elif result["name"].startswith("linear_logprob"):
            assert result["wide_loads"] > 0, f"logits are not read 16 bytes at a time: {result}"
