"""Every op folder is complete, and the package stands on torch, Triton and numpy alone."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPS = sorted(p.parent for p in (ROOT / "kernels" / "cod_kernels").glob("*/op.py"))


@pytest.mark.parametrize("folder", OPS, ids=lambda path: path.name)
def test_op_folder_is_complete(folder: Path) -> None:
    for name in ("reference.py", "kernel.py", "op.py", "README.md"):
        assert (folder / name).is_file(), f"{folder.name} lacks {name}"
    assert (ROOT / "tests" / "kernels" / f"test_{folder.name}.py").is_file()
    assert (ROOT / "bench" / "kernels" / f"{folder.name}.py").is_file()
    for script in ("interpreter_cases.py", "aot_compile.py"):
        assert f"{folder.name}" in (ROOT / "tests" / "kernels" / script).read_text(), (
            f"{script} lacks {folder.name}"
        )


def test_every_folder_with_a_kernel_is_an_op() -> None:
    assert {p.parent for p in (ROOT / "kernels" / "cod_kernels").glob("*/kernel.py")} == set(OPS)
    assert len(OPS) == 3


def test_importing_the_package_loads_neither_triton_nor_a_framework() -> None:
    names = ("triton", "cod_async", "transformers", "msgspec")
    code = f"import sys, cod_kernels; sys.exit(any(m.split('.')[0] in {names!r} for m in sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels")}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_tests_and_benches_need_torch_triton_numpy_and_pytest_alone() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "triton", "numpy", "pytest", "cod_kernels", "bench"}
    for path in [*(ROOT / "tests" / "kernels").glob("*.py"), *(ROOT / "bench" / "kernels").glob("*.py")]:
        tree = ast.parse(path.read_text())
        found = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
        found |= {n.module or "" for n in tree.body if isinstance(n, ast.ImportFrom)}
        own = {p.stem for p in path.parent.glob("*.py")}
        assert {name.split(".")[0] for name in found} - allowed - own == set(), path


def test_kernels_is_a_source_root_and_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
