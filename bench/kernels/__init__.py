"""Speed, memory and correctness of the kernels beside yardsticks and peers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("cod_kernels") is None:  # a machine with torch and triton, nothing installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))
