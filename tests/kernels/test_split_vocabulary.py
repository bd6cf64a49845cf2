"""A vocabulary split over two ranks gives what the whole head gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def test_two_ranks_equal_the_whole_head(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1] / "kernels"), "OMP_NUM_THREADS": "1"}
    script = str(HERE / "split_vocabulary.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=100) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for out, err in outputs:
        assert out, err
        found = json.loads(out)
        assert len(found) == 2 * (2 * 5 + 3 + 2 + 1)
        assert {k: v for k, v in found.items() if not v < 1e-5} == {}
