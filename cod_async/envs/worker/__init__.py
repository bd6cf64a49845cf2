"""Environments under limits: worker processes that time out, run out of memory or crash without taking an
actor with them.

:func:`make_environment` is the one way in which rollouts get their environments, in actors as in evaluation.
"""

from __future__ import annotations

from cod_async.envs.worker.hosting import make_environment, settings_for
from cod_async.envs.worker.pool import WorkerPool

__all__ = ["WorkerPool", "make_environment", "settings_for"]
