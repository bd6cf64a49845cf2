"""A child's side of "no orphans": end when the launcher is gone, also when it was killed with SIGKILL.

Two means for our own processes, because neither is enough alone: the kernel's parent-death signal is prompt
but is Linux only and can be ignored by a hung process; a watchdog thread is portable and ends in
``os._exit``. Foreign programs get the signal alone, and then one that cannot be ignored.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

PARENT_VARIABLE = "COD_PARENT"
"""Environment variable ``pid:grace_s`` that the launcher gives to its children."""
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.5
_TIE = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Asks the kernel for SIGKILL at the parent's death, which outlives the exec."""


def follow_parent() -> None:
    """Arrange for this process to get SIGTERM when its launcher dies, and to be gone ``grace_s`` later.

    Does nothing for a process that was not started by a launcher. Must be called from the main thread, early.
    """
    value = os.environ.pop(PARENT_VARIABLE, "")
    pid_text, _, grace_text = value.partition(":")
    if not pid_text.isdigit():
        return
    parent = int(pid_text)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died before the signal was armed
        os._exit(1)
    threading.Thread(
        target=_watch, args=(parent, float(grace_text or 30.0)), daemon=True, name="parent-watch"
    ).start()


def _watch(parent: int, grace_s: float) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    os._exit(1)


def tied_command(argv: Sequence[str]) -> list[str]:
    """Return a command line that runs ``argv`` and that the kernel kills when this process is gone.

    To be started by this process itself, from its main thread. Linux only; elsewhere ``argv`` as it is.

    Args:
        argv: a program by its full path, and its arguments.
    """
    if sys.platform != "linux":
        return list(argv)
    return [sys.executable, "-I", "-S", "-c", _TIE, str(os.getpid()), *argv]
