"""Which trained groups a step uses once more.

A group may be used while its segments are within the lag bound and until ``replay.max_uses`` steps have used
it. Of those that may, the ones with the highest priority are: the step that the group's oldest token counts
as, minus ``use_penalty`` for every earlier use, plus normal noise of ``sigma`` steps. That is the rule of the
paper's reference implementation (``decay_limit_randomization``: recency that decays linearly with staleness
and use, 2.0 steps per use, sigma 2.0), with the use limit counted exactly. The noise is drawn from the run's
seed, the step and the group, so a resumed run draws the same.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec

from cod_async.config.schema import ReplayConfig
from cod_async.lifecycle.seeds import stable_seed


class Used(msgspec.Struct, frozen=True):
    """A trained group that may be used again.

    Attributes:
        group: index.
        birth: step that its oldest usable token counts as.
        num_uses: steps of the surviving history that used it, at least 1.
    """

    group: int
    birth: int
    num_uses: int


def priority(used: Used, config: ReplayConfig, seed: int, step: int) -> float:
    """Return a group's priority, in steps; higher is used first."""
    noise = random.Random(stable_seed("replay", seed, step, used.group)).gauss(0.0, 1.0)
    return used.birth - config.use_penalty * used.num_uses + config.sigma * noise


def choose_replays(
    pool: Sequence[Used], config: ReplayConfig, seed: int, step: int, max_lag: int
) -> tuple[int, ...]:
    """Return the groups that ``step`` uses again, at most ``groups_per_step``, by index.

    Args:
        pool: trained groups with what is left of them.
        config: the section ``[replay]``.
        seed: of the run.
        step: the step being planned.
        max_lag: bound on ``step`` minus birth.
    """
    usable = [used for used in pool if used.num_uses < config.max_uses and step - used.birth <= max_lag]
    ranked = sorted(usable, key=lambda used: (-priority(used, config, seed, step), used.group))
    return tuple(sorted(used.group for used in ranked[: config.groups_per_step]))
