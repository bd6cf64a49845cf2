"""The kernels, their tests and their benchmark run where only torch, triton, numpy and pytest are installed.

Every other package of this environment is hidden from a child process and from its children.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENOUGH = ("torch", "triton", "numpy", "pytest")
HIDE = """
import sys
from importlib.machinery import PathFinder

names = {names!r}
find = PathFinder.find_spec

class Hide:
    def __call__(self, name, path=None, target=None):
        return None if name.split(".")[0] in names else find(name, path, target)

PathFinder.find_spec = Hide()
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
"""


def needed() -> set[str]:
    """Return the names of the four distributions and of what they require."""
    found: set[str] = set()
    waiting = list(ENOUGH)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting += [re.split(r"[^A-Za-z0-9._-]", r)[0] for r in requirements if "extra ==" not in r]
    return found


def hidden() -> set[str]:
    """Return the import names of everything else."""
    keep = needed()
    names = {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not any(re.sub(r"[-_.]+", "-", owner).lower() in keep for owner in owners)
    }
    return (names | {"cod_async"}) - {"cod_kernels", "setuptools", "_distutils_hack", "pkg_resources", "pip"}


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(HIDE.format(names=hidden()))
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTEST_ADDOPTS", "TRITON_INTERPRET")}
    environment |= {
        "PYTHONPATH": str(folder),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_other_packages_are_hidden_indeed(tmp_path: Path) -> None:
    assert {"cod_async", "_pytest", "torch"} & hidden() == {"cod_async"}
    names = ["cod_async", "cod_kernels", *(hidden() & {"msgspec", "zmq", "transformers", "hypothesis"})]
    probe = f"import importlib.util, sys; sys.exit(any(map(importlib.util.find_spec, {names!r})))"
    assert run(tmp_path, "-c", probe).returncode == 0


def test_every_test_is_collected_and_some_run(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "pytest", "tests/kernels", "--collect-only", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout + done.stderr
    files = {line.split("::")[0].split("/")[-1] for line in done.stdout.splitlines() if "::" in line}
    assert files == {path.name for path in (ROOT / "tests" / "kernels").glob("test_*.py")}
    chosen = [f"tests/kernels/{name}" for name in ("test_faults.py", "test_segment_reduce.py")]
    done = run(tmp_path, "-m", "pytest", *chosen, "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import bench.kernels.__main__",
        "import torch; from bench.kernels import segment_reduce; segment_reduce.run(torch.device('cpu'), 0)",
        "import torch; from bench.kernels import segment_loss; segment_loss.run(torch.device('cpu'), 0)",
    ],
)
def test_the_benchmark_runs(tmp_path: Path, code: str) -> None:
    done = run(tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
