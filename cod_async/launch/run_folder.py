"""A run's folder before anything starts: made, locked, and described well enough to repeat the run.

The lock is a ``flock`` on an open file that every child inherits, so it lasts until the last process of a
launch is gone: a resume after ``kill -9`` of the launcher waits for the children, and two launchers can never
share a folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from cod_async.config import config_digest, save_resolved
from cod_async.config.load import write_atomic
from cod_async.config.schema import Config
from cod_async.errors import InputError

LOCK_NAME = "launcher.lock"
VERSIONS_NAME = "versions.json"
LAUNCHES_NAME = "launches.jsonl"
LIBRARIES = (
    "torch", "transformers", "tokenizers", "safetensors", "numpy", "msgspec", "pyzmq", "typer", "rich",
    "matplotlib", "tensorboardX", "triton",
)  # fmt: skip
_GIT_TIMEOUT_S = 10.0
_EXTRA_WAIT_S = 10.0
"""Children of a killed launcher end within the grace period and this much."""


class RunLock:
    """Exclusive use of a run folder by one launcher and its children.

    Attributes:
        fd: the locked file descriptor, to be inherited by every child.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / LOCK_NAME
        self.fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def acquire(self, wait_s: float, on_wait: Callable[[str], None]) -> None:
        """Take the lock, waiting for the left-over children of a dead launcher, but not for a living
        launcher.

        Raises:
            InputError: another launcher is at work in this folder, or left-over processes do not end.
        """
        deadline = time.monotonic() + wait_s + _EXTRA_WAIT_S
        has_told = False
        while True:
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder = self._holder()
                if holder is not None and _is_alive(holder):
                    raise InputError(
                        f"{self._path.parent}: in use by another launcher (pid {holder}); stop it, or choose "
                        "another --name"
                    ) from None
                if time.monotonic() > deadline:
                    raise InputError(
                        f"{self._path.parent}: processes of an earlier launch (pid {holder}) still run; end "
                        "them first"
                    ) from None
                if not has_told:
                    on_wait("waiting for the processes of the previous launch to end")
                    has_told = True
                time.sleep(0.1)
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        """Give the lock up (children that still run keep it)."""
        os.close(self.fd)

    def _holder(self) -> int | None:
        text = os.pread(self.fd, 32, 0).decode(errors="replace").strip()
        return int(text) if text.isdigit() else None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:  # a zombie has ended; only its parent has not looked yet
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return True


def describe_versions() -> dict[str, Any]:
    """Return what this run ran on: package and library versions, Python, platform, git commit of the source
    tree.
    """
    libraries = {}
    for name in LIBRARIES:
        try:
            libraries[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    from cod_async import __version__

    return {
        "cod_async": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "libraries": libraries,
        **_git_state(),
    }


def _git_state() -> dict[str, Any]:
    source = Path(__file__).resolve().parent.parent.parent
    if not (source / ".git").exists():
        return {"git_commit": None, "git_is_dirty": None}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True
        ).stdout.strip()

    try:
        return {"git_commit": git("rev-parse", "HEAD"), "git_is_dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": None, "git_is_dirty": None}


def prepare(run_dir: Path, config: Config, overrides: Sequence[str], *, is_resume: bool) -> None:
    """Write the resolved config, the versions and one line on this launch, before any process starts."""
    save_resolved(config, run_dir)
    versions = describe_versions()
    write_atomic(run_dir / VERSIONS_NAME, json.dumps(versions, indent=2).encode() + b"\n")
    line = {
        "time_s": time.time(),
        "is_resume": is_resume,
        "overrides": list(overrides),
        "config_digest": config_digest(config),
        "git_commit": versions["git_commit"],
        "pid": os.getpid(),
    }
    with (run_dir / LAUNCHES_NAME).open("ab") as file:
        file.write(msgspec.json.encode(line) + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_versions(run_dir: Path) -> dict[str, Any]:
    """Return what :func:`prepare` wrote about versions; empty if the file is missing."""
    try:
        values = json.loads((run_dir / VERSIONS_NAME).read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def child_environment(num_threads: int) -> dict[str, str]:
    """Return the environment of a child: thread counts pinned, this source tree importable.

    Two OpenMP threads on a busy core are far slower than one, so every process gets what its config says and
    no more.
    """
    roots = own_roots()
    known = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths = [*dict.fromkeys([*roots, *known])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(num_threads),
        "MKL_NUM_THREADS": str(num_threads),
        "TOKENIZERS_PARALLELISM": "false",
    }


def own_roots() -> list[str]:
    """Return the folders that make this project importable."""
    return [*_roots_of("cod_async"), *_roots_of("cod_kernels")]


def _roots_of(package: str) -> list[str]:
    spec = find_spec(package)  # looked up, not imported: the kernels would load torch into the launcher
    locations = () if spec is None else spec.submodule_search_locations or ()
    return [str(Path(entry).resolve().parent) for entry in locations]


def cod_command(*arguments: str) -> list[str]:
    """Return the command line of a ``cod`` sub-command under this very interpreter."""
    return [sys.executable, "-m", "cod_async", *arguments]
