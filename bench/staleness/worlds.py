"""What a run of the learning grid is: a world, a loss recipe, a forced lag, a seed.

What two runs of one world and seed share (starting model, training packs, sampling seeds, evaluation packs)
depends on world and seed alone, so that lags and recipes are compared in pairs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from cod_async.config.check import check
from cod_async.config.load import load_config
from cod_async.config.presets import PRESETS
from cod_async.config.schema import Config
from cod_async.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


class World(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration of the repository, made cheap.

    Attributes:
        config: file, from the root of the repository.
        overrides: settings of the grid; the rate is the run's own.
        lr: learning rate of the grid.
        min_steps: steps of a run with little lag; others take :data:`STEPS_PER_LAG` times their lag.
        bar: late-position reward that counts as learned.
        num_eval_packs: packs of the evaluation at the end, one lifecycle each.
    """

    config: str
    overrides: tuple[str, ...]
    lr: float
    min_steps: int
    bar: float
    num_eval_packs: int


STEPS_PER_LAG = 10
"""Shortest run in multiples of its lag, so that most of a run is the steady state of that lag."""

WORLDS = {
    "door": World(
        config="configs/ci/door.toml",
        overrides=("learner.groups_per_step=4", "engine.max_running=128"),
        lr=5e-4,
        min_steps=120,
        bar=0.6,
        num_eval_packs=128,
    ),
    "cross": World(
        config="configs/quickstart.toml",
        overrides=("learner.groups_per_step=8", "engine.max_running=128"),
        lr=5e-4,
        min_steps=160,
        bar=0.5,
        num_eval_packs=256,
    ),
}


RECIPES = tuple(name for name in PRESETS if name != "opd")
"""The presets that learn from rewards; ``opd`` learns from a teacher."""


class RunSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run.

    Attributes:
        world: name in :data:`WORLDS`.
        preset: of the loss.
        lag: steps between the version that generated a batch and the version that is trained on it.
        seed: of everything.
        lr: peak learning rate.
        num_steps: optimizer steps.
        num_eval_packs: evaluation packs at the end.
        changes: further overrides of the configuration, sorted; they tell variants of a preset apart.
    """

    world: str
    preset: str
    lag: int
    seed: int
    lr: float
    num_steps: int
    num_eval_packs: int
    changes: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Return what identifies the run: all of its fields as compact JSON."""
        return json.dumps(msgspec.to_builtins(self), sort_keys=True, separators=(",", ":"))

    @property
    def recipe(self) -> str:
        """Return the name of what is compared: the preset, with what was changed about it."""
        return " ".join([self.preset, *self.changes])


def make_spec(
    world: str,
    preset: str,
    lag: int,
    seed: int,
    *,
    lr: float | None = None,
    num_steps: int | None = None,
    num_eval_packs: int | None = None,
    changes: Sequence[str] = (),
) -> RunSpec:
    """Return a run with the world's values where nothing else is asked for."""
    of = WORLDS[world]
    return RunSpec(
        world=world,
        preset=preset,
        lag=lag,
        seed=seed,
        lr=of.lr if lr is None else lr,
        num_steps=max(of.min_steps, STEPS_PER_LAG * lag) if num_steps is None else num_steps,
        num_eval_packs=of.num_eval_packs if num_eval_packs is None else num_eval_packs,
        changes=tuple(sorted(changes)),
    )


def config_of(spec: RunSpec) -> Config:
    """Return the complete configuration of a run.

    Raises:
        ConfigError: changes that the configuration does not take, or that contradict each other.
    """
    world = WORLDS[spec.world]
    config = load_config(
        [ROOT / world.config],
        [
            *world.overrides,
            f"run.seed={spec.seed}",
            f"run.num_steps={spec.num_steps}",
            f"staleness.max_lag={spec.lag}",
            f"loss.preset={spec.preset}",
            f"learner.lr={spec.lr!r}",
            *spec.changes,
        ],
    )
    problems = check(config, for_train=False)
    if problems:
        raise ConfigError(problems)
    return config


def grid_specs(
    world: str, presets: Sequence[str], lags: Sequence[int], seeds: Sequence[int], **fixed: Any
) -> list[RunSpec]:
    """Return the runs of a grid, one seed after the other, so that half a grid says something already."""
    return [
        make_spec(world, preset, lag, seed, **fixed) for seed in seeds for preset in presets for lag in lags
    ]
