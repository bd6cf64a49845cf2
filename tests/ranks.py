"""Runs a function as several ranks of one gloo group, in real processes over loopback, with results.

    def job(rank: int, size: int, folder: Path, scale: float) -> dict[str, Any]:
        total = torch.full((2,), float(rank))
        torch.distributed.all_reduce(total)
        return {"total": total, "scale": scale}

    results = run_ranks(2, job, 3.0)         # results[1]["total"]

One child process loads torch and the function's file once, and forks into the ranks before any thread exists.
The ranks find each other through a file, so that no port is taken. The function must stand at the top of a
module; arguments and the values it returns are what JSON knows, or tensors among the returned values. When a
rank fails, the others are killed at once and its traceback is the failure of the test.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def run_ranks(
    size: int,
    function: Callable[..., dict[str, Any]],
    *args: Any,
    timeout_s: float = 100.0,
    preload: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Call ``function(rank, size, folder, *args)`` in ``size`` processes of one gloo group.

    Args:
        size: number of ranks.
        function: at the top of its module; returns a dict of tensors and of values that JSON knows.
        args: values that JSON knows.
        preload: modules to import once before the ranks part, not in each of them: what the function imports
            late, such as ``torch._dynamo`` (seconds) under ``torch.utils.checkpoint``.
        timeout_s: after it everything is killed and the test fails. Collectives give up a little earlier.

    Returns:
        What each rank returned, by rank; tuples come back as lists.

    Raises:
        AssertionError: a rank failed or time ran out; the message holds the traceback.
    """
    with tempfile.TemporaryDirectory(prefix="cod-ranks-") as name:
        folder = Path(name)
        job: dict[str, Any] = {
            "file": inspect.getfile(function),
            "module": function.__module__,
            "function": function.__name__,
            "args": list(args),
            "size": size,
            "timeout_s": timeout_s,
            "preload": list(preload),
        }
        (folder / "job.json").write_text(json.dumps(job))
        paths = [str(TESTS.parent), str(TESTS.parent / "kernels"), str(TESTS), str(Path(job["file"]).parent)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "GLOO_SOCKET_IFNAME": LOOPBACK,
            "OMP_NUM_THREADS": "1",
        }
        _run([sys.executable, str(Path(__file__).resolve()), str(folder)], environment, folder, timeout_s)
        return [_read(folder, rank) for rank in range(size)]


def _run(command: list[str], environment: dict[str, str], folder: Path, timeout_s: float) -> None:
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout_s)
            problem = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            problem = f"not done after {timeout_s} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if problem:
        errors = "\n".join(path.read_text() for path in sorted(folder.glob("error-*.txt")))
        raise AssertionError(f"ranks: {problem}\n{errors}\n{log.read_text(errors='replace')[-8000:]}")


def _read(folder: Path, rank: int) -> dict[str, Any]:
    from safetensors.torch import load_file

    values: dict[str, Any] = json.loads((folder / f"values-{rank}.json").read_text())
    values.update(load_file(folder / f"tensors-{rank}.safetensors"))
    return values


def _write(folder: Path, rank: int, result: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {k: v.detach().cpu().contiguous() for k, v in result.items() if isinstance(v, torch.Tensor)}
    values = {name: value for name, value in result.items() if name not in tensors}
    save_file(tensors, folder / f"tensors-{rank}.safetensors")
    (folder / f"values-{rank}.json").write_text(json.dumps(values))


def _load(job: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    specification = importlib.util.spec_from_file_location(job["module"], job["file"])
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[job["module"]] = module
    specification.loader.exec_module(module)
    function: Callable[..., dict[str, Any]] = getattr(module, job["function"])
    return function


def _be_rank(rank: int, folder: Path, job: dict[str, Any], function: Callable[..., dict[str, Any]]) -> int:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    try:
        store = distributed.FileStore(  # type: ignore[attr-defined]
            str(folder / "store"), job["size"]
        )
        timeout = timedelta(seconds=0.9 * job["timeout_s"])
        distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=job["size"], timeout=timeout
        )
        _write(folder, rank, function(rank, job["size"], folder, *job["args"]))
        distributed.barrier()
        distributed.destroy_process_group()
        return 0
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        return 1


def main(folder: Path) -> int:
    """Fork into the ranks of ``folder``'s job; return 0 when all of them did their part."""
    job = json.loads((folder / "job.json").read_text())
    for module in job["preload"]:
        importlib.import_module(module)
    function = _load(job)
    ranks: set[int] = set()
    for rank in range(job["size"]):
        child = os.fork()
        if child == 0:
            os._exit(_be_rank(rank, folder, job, function))
        ranks.add(child)
    failed = False
    while ranks:
        child, status = os.wait()
        ranks.discard(child)
        if status != 0 and not failed:
            failed = True
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
