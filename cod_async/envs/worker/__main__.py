"""``python -m cod_async.envs.worker SOCKET LIFELINE MEMORY_BYTES``: one environment worker.

Started by :mod:`cod_async.envs.worker.process` only. Limits are set before any environment is imported.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import signal
import socket
import sys

from cod_async.envs.worker.serving import serve

_PR_SET_CHILD_SUBREAPER = 36


def main(arguments: list[str]) -> None:
    """Limit this process, then serve until the actor hangs up."""
    connection_fd, lifeline_fd, memory_bytes = map(int, arguments)
    for inherited in (connection_fd, lifeline_fd):
        os.set_inheritable(inherited, False)  # programs that an environment starts must not hold the line
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    if sys.platform == "linux":
        _die_with(lifeline_fd)
        # Daemons that an environment leaves behind become this process's children, and are found with it.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    serve(socket.socket(fileno=connection_fd))
    os._exit(0)  # threads that an environment left behind are not waited for


def _die_with(lifeline_fd: int) -> None:
    """Have the kernel kill the process group when the lifeline breaks, because the actor died.

    No code of this process has to run for that, so it also works while an environment hangs in native code;
    and unlike a parent-death signal it reaches the processes that environments have started.
    """
    fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline_fd, fcntl.F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(lifeline_fd, fcntl.F_GETFL)
    fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, flags | os.O_ASYNC | os.O_NONBLOCK)
    try:
        is_broken = os.read(lifeline_fd, 1) == b""
    except BlockingIOError:
        is_broken = False
    if is_broken:  # it died before the signal was armed
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
