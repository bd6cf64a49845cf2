"""What to evaluate: the request, its checks, and the packs it stands for.

Packs are planned by the function that plans training packs, under a seed of evaluation's own, so that equal
requests meet equal packs whatever the model, and training packs are not met again by number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from cod_async.config.schema import Config, EnvironmentConfig
from cod_async.envs import registry
from cod_async.envs.base import EnvironmentSpec, TaskSpec, canonical_json
from cod_async.errors import InputError
from cod_async.lifecycle.packs import plan_pack
from cod_async.lifecycle.seeds import hash64

Control = Literal["normal", "blanked", "swapped", "truth"]
Split = Literal["train", "held_out"]
CONTROLS: tuple[Control, ...] = ("normal", "blanked", "swapped", "truth")
SPLITS: tuple[Split, ...] = ("train", "held_out")

Progress = Callable[[dict[str, Any]], None]


class EvaluationRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model on one split of one environment, under one or more controls on the same packs.

    Attributes:
        environment, preset, options: the environment; ``options`` override the preset's.
        split: which hidden worlds: those of training, or those never used in it.
        controls: which controls, each a full pass (``swapped`` needs the normal pass and adds it when
            missing).
        num_packs: packs P >= 1; ``swapped`` needs at least two different hidden worlds among them.
        lifecycles_per_pack: lifecycles per pack.
        seed: seed of packs and sampling; equal seeds give equal packs.
        checkpoint: label of the weights in the rows.
    """

    environment: str
    preset: str
    options: dict[str, Any] = {}
    split: Split = "train"
    controls: tuple[Control, ...] = ("normal",)
    num_packs: int = 256
    lifecycles_per_pack: int = 2
    seed: int = 0
    checkpoint: str = "model"


def check_request(request: EvaluationRequest) -> None:
    """Check what can be known before a model is loaded.

    Raises:
        InputError: every problem of the request.
    """
    spec = registry.get(request.environment)
    spec.make(spec.options(request.preset, request.options))
    problems = []
    if request.num_packs < 1 or request.lifecycles_per_pack < 1:
        problems.append(
            f"num_packs {request.num_packs}, lifecycles_per_pack {request.lifecycles_per_pack}, needed >= 1"
        )
    if not request.controls or len(set(request.controls)) < len(request.controls):
        problems.append(f"controls {list(request.controls)}: name at least one, each once")
    if "truth" in request.controls and spec.truth_hint is None:
        problems.append(f"control 'truth': environment {spec.name} has no truth hint; leave the control out")
    if problems:
        raise InputError(problems)


def plan(request: EvaluationRequest, config: Config) -> list[tuple[TaskSpec, ...]]:
    """Return the tasks of each pack; groups are numbered from 0 under the evaluation's own seed."""
    mixture = (EnvironmentConfig(name=request.environment, preset=request.preset, options=request.options),)
    # A seed of its own kind: evaluation packs must not be the training packs of the same number.
    run_seed = hash64(f"evaluation/{request.split}/{request.seed}") >> 8
    return [
        plan_pack(mixture, config.lifecycle.pack_size, run_seed, group, request.split).tasks()
        for group in range(request.num_packs)
    ]


def world(spec: EnvironmentSpec, options: Mapping[str, Any], task: TaskSpec) -> str:
    """Return the hidden world of a pack as text, to compare packs by."""
    environment = spec.make(options)
    environment.reset(task)
    return canonical_json(environment.hidden())


def donors(worlds: Sequence[str]) -> list[int]:
    """Choose for every pack the next one (cyclically) whose hidden world differs.

    Raises:
        InputError: all packs share one hidden world; use more packs.
    """
    n = len(worlds)
    out = []
    for i, world in enumerate(worlds):
        donor = next((j % n for j in range(i + 1, i + n) if worlds[j % n] != world), None)
        if donor is None:
            raise InputError(
                f"control 'swapped' needs packs with other hidden worlds; all {n} share one, use more packs"
            )
        out.append(donor)
    return out


def sampling_seed(seed: int, pack: int, member: int) -> int:
    """Return the sampling seed (0 .. 2^63 - 1) of one lifecycle; equal for all controls, which pairs them."""
    return hash64(f"evaluate/{seed}/{pack}/{member}") >> 1
