"""No kernel is compiled anew for a new length: whatever the lengths, Triton's key of a call is the same."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed; it makes the key"
)


def test_one_variant_for_all_lengths() -> None:
    """In a process of its own, because Triton decides at import whether kernels are compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{HERE.parents[1] / 'kernels'}{os.pathsep}{HERE}"}
    done = subprocess.run(
        [sys.executable, str(HERE / "specialization_keys.py")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {"segment_loss", "segment_loss.finish", "segment_reduce", "control"}
    assert found.pop("control") == 3, "lengths 1, 16 and others differ where nothing is said against it"
    assert set(found.values()) == {1}, found
