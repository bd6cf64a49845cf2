"""One process, the real parts without the pipeline: rollouts, embedded engine, credit assignment, trainer.

What a pipeline leaves to chance is fixed here: which version generated what. A :class:`Student` plays packs
under its newest weights (:meth:`Student.generate`), trains on any batch that was played
(:meth:`Student.train`), and is evaluated on fresh packs (:meth:`Student.evaluate`). This is the one module of
the grid that touches the parts themselves.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from cod_async.algo.credit import MemberRewards, SelectedEpisode, credit_group, weigh_selection
from cod_async.bootstrap.run import run_bootstrap
from cod_async.config.load import to_tree
from cod_async.config.schema import Config
from cod_async.engines.embedded import EmbeddedEngine
from cod_async.envs.worker import WorkerPool, make_environment
from cod_async.errors import CodError
from cod_async.learner.packing import flatten
from cod_async.learner.step import Trainer
from cod_async.lifecycle.packs import PackPlan, plan_pack
from cod_async.lifecycle.rendering import load_renderer
from cod_async.lifecycle.rollout import LifecycleSpec, initial_state, play
from cod_async.lifecycle.seeds import hash64, stable_seed
from cod_async.lifecycle.segment import Segment, Version
from cod_async.models.directory import load_model, weights_of
from cod_async.wire.messages import TrainItem

NUM_THREADS = 1
"""Threads of torch: a model this small is slower on two."""


class Played(NamedTuple):
    """The lifecycles of some groups, played and credited.

    Attributes:
        items: what is trained, sorted by key; ``lag_steps`` is 0 until the step is known.
        rewards: mean reward of the solve episodes by position.
        update_reward: mean reward of the update episodes; 0: all hints parse.
        version: step of the weights that generated it.
    """

    items: list[TrainItem]
    rewards: list[float]
    update_reward: float
    version: int


def starting_model(config: Config, folder: Path) -> Path:
    """Return the model that all runs with this world and seed start from, made once.

    Args:
        config: of any of these runs; only what the bootstrap reads decides.
        folder: where starting models are kept; may be shared by processes.
    """
    tree = to_tree(config)
    of = {name: tree[name] for name in ("environments", "bootstrap", "model", "lifecycle")}
    path = folder / f"start-{hash64(repr((of, config.run.seed))):016x}"
    if not (path / "bootstrap.json").exists():
        # Two processes may both make it: each in a folder of its own, and they are equal.
        own = folder / f"{path.name}.{os.getpid()}"
        run_bootstrap(config, own)
        try:
            own.rename(path)
        except OSError:  # the other one was faster
            if not (path / "bootstrap.json").exists():
                raise
    return path


class Student:
    """A policy that is played and trained in this process. Close it after use.

    Args:
        config: complete; one environment.
        model_dir: the starting model.
    """

    def __init__(self, config: Config, model_dir: Path) -> None:
        torch.set_num_threads(NUM_THREADS)
        self._config = config
        self._model = load_model(model_dir)
        reference = load_model(model_dir) if config.loss.kl_coef > 0 else None
        self._trainer = Trainer.create(
            self._model, config.learner, config.loss, config.engine.temperature, reference
        )
        self._vocab_size = int(self._model.head_weight.shape[0])
        self._renderer = load_renderer(model_dir, config.model.renderer)
        self._engine = EmbeddedEngine(
            self._model,
            config.engine,
            max_context_tokens=config.model.max_context_tokens,
            version=Version(lineage=0, step=0),
            run_dir=model_dir,
        )
        self._workers = WorkerPool()
        self._runner = asyncio.Runner()
        self.step = 0

    def close(self) -> None:
        """End the engine and its loop."""
        self._runner.run(self._engine.aclose())
        self._runner.close()

    # --------------------------------------------------------------------------------------------- playing

    def generate(self, groups: Sequence[int]) -> Played:
        """Play and credit whole training groups under the newest weights.

        Args:
            groups: indices of the groups; each becomes ``lifecycle.group_size`` lifecycles.
        """
        seed = self._config.run.seed
        lives = [
            (plan, member, stable_seed("sampling", seed, plan.group, member) >> 2)
            for plan in (self._plan(seed, group) for group in groups)
            for member in range(self._config.lifecycle.group_size)
        ]
        return self._credit(self._play(lives))

    def evaluate(self, num_packs: int) -> tuple[list[list[float]], float]:
        """Play fresh packs under the newest weights, one lifecycle each.

        Returns:
            Rewards of the solve episodes [num_packs][positions], and the mean reward of the updates. Packs
            and sampling seeds depend on the run's seed alone.
        """
        seed = hash64(f"evaluation/train/{self._config.run.seed}") >> 8
        lives = [
            (self._plan(seed, group), 0, stable_seed("sampling", seed, group, 0) >> 2)
            for group in range(num_packs)
        ]
        played = self._play(lives)
        rewards = [[s.reward for s in life if s.kind == "solve"] for life in played]
        return rewards, _update_reward(played)

    def _plan(self, seed: int, group: int) -> PackPlan:
        lifecycle = self._config.lifecycle
        return plan_pack(
            self._config.environments, lifecycle.pack_size, seed, group, strategy=lifecycle.packs
        )

    def _play(self, lives: Sequence[tuple[PackPlan, int, int]]) -> list[list[Segment]]:
        """Play lifecycles side by side, at most the engine's batch at a time, in the order given."""
        size, played = self._config.engine.max_running, []
        for start in range(0, len(lives), size):
            played += self._runner.run(self._play_together(lives[start : start + size]))
        return played

    async def _play_together(self, lives: Sequence[tuple[PackPlan, int, int]]) -> list[list[Segment]]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._life(*life)) for life in lives]
        except* CodError as failed:
            raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _life(self, plan: PackPlan, member: int, sampling_seed: int) -> list[Segment]:
        config, tasks = self._config, plan.tasks()
        environment = await make_environment(tasks[0], config.environments, self._workers)
        spec = LifecycleSpec(
            run=config.run.name,
            group=plan.group,
            member=member,
            lease_epoch=0,
            actor="harness",
            tasks=tasks,
            sampling_seed=sampling_seed,
        )
        try:
            return [
                segment
                async for segment in play(
                    spec,
                    initial_state(environment),
                    engine=self._engine,
                    environment=environment,
                    renderer=self._renderer,
                    config=config.lifecycle,
                    temperature=config.engine.temperature,
                    top_p=config.engine.top_p,
                    max_context_tokens=config.model.max_context_tokens,
                )
            ]
        finally:
            await environment.close()

    def _credit(self, played: Sequence[list[Segment]]) -> Played:
        """Credit whole groups as the coordinator does: both stages, in the order of keys."""
        settings, lifecycle = self._config.credit_assignment, self._config.lifecycle
        by_group: dict[int, list[list[Segment]]] = {}
        for life in played:
            by_group.setdefault(life[0].key.group, []).append(life)
        segments = sorted((s for life in played for s in life), key=lambda segment: segment.key)
        credits = {}
        for group, lives in by_group.items():
            members = [
                MemberRewards(
                    life[0].key.member,
                    tuple(s.reward for s in life if s.kind == "solve"),
                    tuple(s.reward for s in life if s.kind == "update"),
                )
                for life in lives
            ]
            for credit in credit_group(members, lifecycle.pack_size, settings).episodes:
                credits[group, credit.member, credit.kind, credit.position] = credit
        credited = [
            (segment, credits[segment.key.group, segment.key.member, segment.kind, segment.position])
            for segment in segments
            if segment.num_action_tokens > 0
        ]
        weighted = weigh_selection(
            [
                SelectedEpisode(
                    return_=credit.return_,
                    advantage=credit.advantage,
                    num_tokens=segment.num_action_tokens,
                    pack=segment.key.group,
                    taskset=segment.environment,
                    lifecycle=segment.key.member,
                )
                for segment, credit in credited
            ],
            settings,
        )
        items = [
            TrainItem(
                key=segment.key,
                kind=segment.kind,
                position=segment.position,
                rows=segment.rows,
                advantage=advantage,
                lag_steps=0.0,
            )
            for (segment, _), advantage in zip(credited, weighted.weighted_advantages, strict=True)
        ]
        return Played(items, mean_by_position(played), _update_reward(played), self.step)

    # -------------------------------------------------------------------------------------------- training

    def train(self, batch: Played) -> dict[str, float]:
        """Take one optimizer step, and give the engine the new weights.

        Returns:
            The metrics of the step.

        Raises:
            NumericsError: see :meth:`cod_async.learner.step.Trainer.take_step`.
            WeightsError: the engine refused the weights.
        """
        lag = float(self.step - batch.version)
        flat = flatten(
            [msgspec.structs.replace(item, lag_steps=lag) for item in batch.items],
            vocab_size=self._vocab_size,
            max_row_tokens=self._config.model.max_context_tokens,
            version=Version(lineage=0, step=self.step),
        )
        metrics = self._trainer.take_step(flat, self.step)
        self.step += 1
        # The engine copies what it is given; the trainer goes on writing into its own.
        self._engine.swap_weights(weights_of(self._model), Version(lineage=0, step=self.step))
        return metrics


def mean_by_position(played: Sequence[Sequence[Segment]]) -> list[float]:
    """Return the mean reward of the solve episodes at each position."""
    rewards = [[segment.reward for segment in life if segment.kind == "solve"] for life in played]
    return [sum(column) / len(column) for column in zip(*rewards, strict=True)]


def _update_reward(played: Sequence[Sequence[Segment]]) -> float:
    """Return the mean reward of the update episodes, 0 without any."""
    rewards = [segment.reward for life in played for segment in life if segment.kind == "update"]
    return sum(rewards) / len(rewards) if rewards else 0.0
