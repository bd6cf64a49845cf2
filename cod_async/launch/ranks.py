"""A learner of several ranks on one machine: a small parent that starts them and ends with them.

``cod learner RUN`` becomes this parent when the configuration has more than one rank. It loads no torch. The
ranks meet through a file in a folder that only their owner can read, and talk over loopback. A signal goes to
rank 0, which leads the others out. When a rank ends with an error or is killed, the others cannot go on: they
get a few seconds to end by themselves, are killed, and the parent ends with the code of the first failure, so
that whoever supervises it starts the whole learner again. No rank outlives the parent: they are in its
process group, and each watches it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cod_async.config.learner import LearnerConfig
from cod_async.config.load import load_resolved
from cod_async.launch.interrupts import Interrupts
from cod_async.launch.parent import PARENT_VARIABLE
from cod_async.launch.run_folder import cod_command
from cod_async.launch.supervisor import ENDED_RUN_CODE, INPUT_ERROR_CODE, LOST_CODE

RENDEZVOUS_VARIABLE = "COD_RENDEZVOUS"
"""Environment variable with the meeting place of the ranks, read by ``cod_async.learner.parallel.world``."""
LOCAL_RANK_VARIABLE = "LOCAL_RANK"
"""Environment variable with a rank's number on its machine, read there too."""
AFTER_FAILURE_S = 3.0
"""Ranks that another one has left alone end within this time, or are killed."""
_FOLDER_PREFIX = ".ranks-"
_POLL_S = 0.05


def num_ranks(learner: LearnerConfig) -> int:
    """Return how many processes a learner consists of."""
    return learner.data_parallel * learner.sequence_parallel


def has_ranks(run_dir: Path) -> bool:
    """Whether the learner of a run consists of several processes."""
    return num_ranks(load_resolved(run_dir).learner) > 1


def run_ranks(run_dir: Path) -> int:
    """Start every rank of the learner of a run on this machine and wait for all of them.

    Returns:
        0: all have ended well. Otherwise the exit code of the one that explains the others' end;
        ``LOST_CODE`` if it was killed by a signal.
    """
    config = load_resolved(run_dir)
    size = num_ranks(config.learner)
    for old in run_dir.glob(f"{_FOLDER_PREFIX}*"):  # of a parent that was killed
        shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir=run_dir))  # its owner's alone
    environment = {
        **os.environ,
        RENDEZVOUS_VARIABLE: f"file:{folder / 'store'}",
        PARENT_VARIABLE: f"{os.getpid()}:{config.run.grace_s:g}",
    }
    children: list[subprocess.Popen[bytes]] = []
    try:
        with Interrupts() as interrupts:
            for rank in range(size):
                command = cod_command("learner", str(run_dir.resolve()), "--rank", str(rank))
                # What started the run may have a local rank of its own, which would be every rank's device.
                own = {**environment, LOCAL_RANK_VARIABLE: str(rank)}
                # Open files that were handed down to the learner (the lock of the run) go on to the ranks.
                children.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, env=own, close_fds=False))
            return _watch(children, interrupts, config.run.grace_s)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _watch(children: list[subprocess.Popen[bytes]], interrupts: Interrupts, grace_s: float) -> int:
    """Wait for the end; return the exit code. Who still runs then is the caller's to kill."""
    deadline = float("inf")
    is_forwarded = False
    while True:
        codes = [child.poll() for child in children]
        failed = [code for code in codes if code]
        if failed:
            return _first_failure(children)
        if all(code == 0 for code in codes):
            return 0
        if interrupts.signum is not None and not is_forwarded:
            is_forwarded, deadline = True, time.monotonic() + grace_s
            children[0].send_signal(signal.SIGTERM)
        if codes[0] == 0:  # the others have been told to leave
            deadline = min(deadline, time.monotonic() + grace_s)
        if time.monotonic() > deadline:
            left = [rank for rank, code in enumerate(codes) if code is None]
            _say(f"ranks {left} did not end in {grace_s:g} s")
            return LOST_CODE
        time.sleep(_POLL_S)


def _first_failure(children: list[subprocess.Popen[bytes]]) -> int:
    """Return the exit code of a learner one of whose ranks has failed.

    A rank that ends takes the others with it within a moment, by an error or, with NCCL, by an abort. So
    whichever was seen first, a refusal of the input or the word that the run must not go on explains the
    rest; then a death by a signal, then the lowest rank's error.
    """
    deadline = time.monotonic() + AFTER_FAILURE_S
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        time.sleep(_POLL_S)
    codes = [child.poll() for child in children]
    for own in (INPUT_ERROR_CODE, ENDED_RUN_CODE):  # nobody ends so who has only been left alone
        if own in codes:
            return own
    for rank, code in enumerate(codes):
        if code is not None and code < 0:
            _say(f"rank {rank} was killed by {signal.Signals(-code).name}; the learner ends with it")
            return LOST_CODE
    return next(code for code in codes if code)


def _say(text: str) -> None:
    sys.stderr.write(f"learner: {text}\n")
