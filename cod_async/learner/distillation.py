"""What a step that distills needs beside the fused loss: bounded teachers, and divergences by environment.

On-policy distillation (arXiv 2606.20002, the recipe with several teachers; the loss follows from the policy
gradient of a reverse divergence): the student's own tokens carry the token advantage
a = log teacher - log behaviour, corrected for stale data by + log behaviour - sg(log current). What is left
is a = log teacher - sg(log current), and the loss -mean(a * log current). Its gradient is that of the
estimator k2 of the divergence to the teacher, mean((log current - log teacher)^2 / 2), token by token, so the
fused loss is given the teachers as its reference and no advantages.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from msgspec import UNSET
from torch import Tensor

from cod_async.wire.messages import TrainItem

MAX_TEACHER_GAP_NATS = 16.0
"""Most that a teacher may differ from the behaviour policy on one token: one that it would never have written
pulls no harder than this, and stays inside the range (20) in which the fused loss has a gradient."""

MAX_NAME_CHARS = 100
"""Of an environment, in the name of a metric, which the wire bounds."""


def bounded_teacher(teacher: Tensor, behavior: Tensor) -> Tensor:
    """Return the teachers' log-probs, at most :data:`MAX_TEACHER_GAP_NATS` away from the behaviour policy's.

    Args:
        teacher: [A].
        behavior: [A], of whoever sampled the tokens.
    """
    return behavior + (teacher - behavior).clamp(-MAX_TEACHER_GAP_NATS, MAX_TEACHER_GAP_NATS)


def divergence_by_environment(items: Sequence[TrainItem]) -> dict[str, float]:
    """Return how far the policies that spoke were from their teachers, ``distillation_kl_nats_ENVIRONMENT``.

    It is the mean of log behaviour - log teacher over the action tokens of the items, an unbiased estimate of
    the reverse divergence per token of whoever generated them; empty without teachers.
    """
    gaps: dict[str, list[npt.NDArray[np.float64]]] = {}
    for item in items:
        for row in item.rows:
            if row.teacher_logprobs is UNSET or item.environment is UNSET or item.is_context:
                continue
            behavior = row.behavior_logprobs.numpy().astype(np.float64)
            gaps.setdefault(item.environment, []).append(behavior - row.teacher_logprobs.numpy())
    return {
        f"distillation_kl_nats_{name[:MAX_NAME_CHARS]}": float(np.concatenate(parts).mean())
        for name, parts in sorted(gaps.items())
        if sum(part.size for part in parts)
    }
