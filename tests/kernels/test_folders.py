"""Every op folder is complete, and the package stands on torch alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPS = sorted(p.parent for p in (ROOT / "kernels" / "cod_kernels").glob("*/op.py"))


@pytest.mark.parametrize("folder", OPS, ids=lambda path: path.name)
def test_op_folder_is_complete(folder: Path) -> None:
    for name in ("reference.py", "op.py", "README.md"):
        assert (folder / name).is_file()
    assert (ROOT / "tests" / "kernels" / f"test_{folder.name}.py").is_file()


def test_kernels_is_a_source_root_and_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_package_knows_nothing_of_cod_async() -> None:
    probe = "any(m.startswith(('cod_async', 'transformers')) for m in sys.modules)"
    code = f"import sys, cod_kernels; sys.exit({probe})"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
