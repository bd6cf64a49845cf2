"""What the launcher tells its children, and what it must not load to say it."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
from cod_async.launch.run_folder import child_environment
import os
paths = child_environment(3)["PYTHONPATH"].split(os.pathsep)
assert any(os.path.isfile(os.path.join(path, "cod_async", "cli.py")) for path in paths), paths
assert any(os.path.isdir(os.path.join(path, "cod_kernels", "segment_loss")) for path in paths), paths
assert child_environment(3)["OMP_NUM_THREADS"] == "3"
assert "torch" not in sys.modules
"""


def test_the_source_tree_is_importable_and_torch_is_not_loaded() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True, timeout=60)
