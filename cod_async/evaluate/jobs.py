"""Several evaluations over several processes.

Every job is one (model, request) pair. With one process they run one after the other right here; with more,
each worker is a fresh interpreter that reads its job as one line of JSON and answers with lines of JSON
(progress, then reports), so nothing is pickled and a crash of one worker has a name. Torch threads are
pinned to one per worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import msgspec

from cod_async.config.schema import Config
from cod_async.errors import InputError, WorkError
from cod_async.evaluate.deploy import EvaluationRequest, Progress, check_request, evaluate_request
from cod_async.evaluate.report import Report

_MAX_ERROR_CHARS = 4000


class EvaluationJob(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model directory and what to evaluate it on."""

    model_dir: str
    config: Config
    request: EvaluationRequest


def run_jobs(
    jobs: Sequence[EvaluationJob], *, num_processes: int = 1, on_progress: Progress | None = None
) -> list[list[Report]]:
    """Run all jobs and return their reports in the order of the jobs.

    Args:
        jobs: what to run; jobs on the same packs but other controls belong into one request, which shares
            passes.
        num_processes: worker processes at once; 1 runs everything in this process.
        on_progress: called with ``{job, split, control, done, total}``, from any thread, one call at a time.

    Raises:
        InputError: requests are wrong (all problems at once, nothing was started), or a model directory is.
        WorkError: a worker failed; the message ends with what it wrote.
    """
    problems: list[str] = []
    for job in jobs:
        try:
            check_request(job.request)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(list(dict.fromkeys(problems)))
    tell = _locked(on_progress)
    if num_processes <= 1 or len(jobs) <= 1:
        return [
            evaluate_request(Path(job.model_dir), job.config, job.request, _labeled(tell, index))
            for index, job in enumerate(jobs)
        ]
    workers: list[subprocess.Popen[bytes]] = []
    try:
        with ThreadPoolExecutor(max_workers=num_processes) as pool:
            futures = [
                pool.submit(_run_worker, job, _labeled(tell, i), workers) for i, job in enumerate(jobs)
            ]
            try:
                return [future.result() for future in futures]
            except BaseException:
                for future in futures:
                    future.cancel()
                _kill(workers)
                raise
    finally:
        _kill(workers)


def _locked(on_progress: Progress | None) -> Progress | None:
    if on_progress is None:
        return None
    lock = threading.Lock()

    def tell(values: dict[str, Any]) -> None:
        with lock:
            on_progress(values)

    return tell


def _labeled(tell: Progress | None, index: int) -> Callable[[dict[str, Any]], None] | None:
    return None if tell is None else lambda values: tell({"job": index, **values})


def _kill(workers: list[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
            worker.wait()


def _run_worker(
    job: EvaluationJob, on_progress: Progress | None, workers: list[subprocess.Popen[bytes]]
) -> list[Report]:
    """Run one job in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # The checkout or the installed package, whichever this process was loaded from.
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    with subprocess.Popen(
        [sys.executable, "-m", "cod_async.evaluate.jobs"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as worker:
        workers.append(worker)
        stdin, stdout, stderr = cast(Any, worker.stdin), cast(Any, worker.stdout), cast(Any, worker.stderr)
        errors = bytearray()
        drain = threading.Thread(target=_drain, args=(stderr, errors), daemon=True)
        drain.start()
        with contextlib.suppress(BrokenPipeError):
            stdin.write(msgspec.json.encode(job))
            stdin.close()
        answer: dict[str, Any] = {}
        for line in stdout:
            answer = json.loads(line)
            if "progress" in answer and on_progress is not None:
                on_progress(answer["progress"])
        worker.wait()
        drain.join()
    if "problems" in answer:
        raise InputError(answer["problems"])
    if "reports" not in answer:
        told = errors.decode(errors="replace")[-_MAX_ERROR_CHARS:]
        raise WorkError(f"evaluation worker ended with code {worker.returncode} and no report:\n{told}")
    return msgspec.convert(answer["reports"], list[Report])


def _drain(stream: Any, into: bytearray) -> None:
    """Keep the end of a stream, so that a full pipe never blocks the worker."""
    for line in stream:
        into += line
        del into[:-_MAX_ERROR_CHARS]


def _main() -> int:
    """Read a job from standard input; write progress and reports to standard output as lines of JSON."""
    out = sys.stdout

    def say(values: dict[str, Any]) -> None:
        out.write(json.dumps(values) + "\n")
        out.flush()

    job = msgspec.json.decode(sys.stdin.buffer.read(), type=EvaluationJob)
    import torch

    torch.set_num_threads(1)
    try:
        reports = evaluate_request(
            Path(job.model_dir), job.config, job.request, lambda values: say({"progress": values})
        )
    except InputError as error:
        say({"problems": list(error.problems)})
        return 2
    say({"reports": msgspec.to_builtins(reports)})
    return 0


if __name__ == "__main__":
    sys.exit(_main())
