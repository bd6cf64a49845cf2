"""The game: measure a reacting and diffusing field, and commit the law behind it.

All tasks of a pack obey one hidden sparse equation; each task shows another trajectory of it. A task has few
steps and few points, its instrument is a regression that prefers too many terms, and where the field has
decayed there is nothing but noise, so finding the equation takes the data and the conclusions of several
tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cod_async.envs.base import Environment, StepResult, TaskSpec
from cod_async.envs.checks import is_int
from cod_async.envs.pde_discovery import arguments as reading
from cod_async.envs.pde_discovery import report
from cod_async.envs.pde_discovery.basis import TERMS, Array, Equation, Reaction, evaluate
from cod_async.envs.pde_discovery.equation import is_equal, render
from cod_async.envs.pde_discovery.families import eligible
from cod_async.envs.pde_discovery.options import MAX_PACK_SIZE, NAME, PdeOptions, parse_options
from cod_async.envs.pde_discovery.prompting import PdePrompts, compressed
from cod_async.envs.pde_discovery.regression import Candidate, Regression, alternative, margin, regress
from cod_async.envs.pde_discovery.scoring import Score, metrics, score
from cod_async.envs.pde_discovery.solver import interpolate
from cod_async.envs.pde_discovery.state import Commit, DataSet, PackState, decode, encode, measured
from cod_async.envs.pde_discovery.world import World, WorldKey, field, make_world
from cod_async.envs.xml_action import ActionParseError, parse_action
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.hint import HintPrompts
from cod_async.lifecycle.segment import Finish

ACTIONS = ("sample_pde_data", "run_sparse_regression", "summarize_pack_evidence", "update_scientific_context")
_UPDATE_PROMPTS = PdePrompts()
_MAX_REASON_CHARS = 300  # a reason may quote a tag of the policy's, of any length


@dataclass
class _Task:
    """The running task."""

    world: World
    number: int
    trajectory: int
    row_seed: int
    labels: dict[str, float]
    num_steps: int = 0
    num_points: int = 0
    solution: Array | None = None
    regression: Regression | None = None
    regression_data: tuple[DataSet, ...] = ()
    committed: Commit | None = None
    score: Score | None = None
    error: str = ""
    finish: Finish | None = None


class PdeDiscovery(Environment):
    """Discovery of a reaction-diffusion equation from few noisy points.

    Args:
        options: a preset merged with overrides, see :class:`~.options.PdeOptions`.

    Raises:
        EnvironmentInputError: unknown, mistyped or contradictory options.
    """

    name: ClassVar[str] = NAME
    is_step_penalized: ClassVar[bool] = False

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options: PdeOptions = parse_options(options)
        self._num_templates = len(
            eligible(self._options.family, self._options.min_terms, self._options.max_terms)
        )
        self._pack: PackState | None = None
        self._task: _Task | None = None

    @property
    def max_steps(self) -> int:
        """Most policy responses in one task."""
        return self._options.max_steps

    @property
    def num_points_left(self) -> int:
        """Points that may still be sampled in the current task."""
        return self._options.max_points - self._current.num_points

    @property
    def has_points(self) -> bool:
        """Whether something was measured in the current task."""
        return self._current.num_points > 0

    @property
    def has_regression(self) -> bool:
        """Whether a regression was run in the current task."""
        return self._current.regression is not None

    @property
    def fitted_equations(self) -> list[Equation]:
        """Equations of the current task's latest regression, best first: those that may be committed."""
        regression = self._current.regression
        return [] if regression is None else [c.equation for c in regression.candidates]

    @property
    def max_terms(self) -> int:
        """Largest number of terms of a hidden equation."""
        return self._options.max_terms

    @property
    def _current(self) -> _Task:
        if self._task is None:
            raise RuntimeError("pde_discovery: there is no task; call reset() first")
        return self._task

    @property
    def _state(self) -> PackState:
        assert self._pack is not None  # noqa: S101 - every task has one; narrows the type
        return self._pack

    def reset(self, task: TaskSpec) -> str:
        """Start a task and return the first observation.

        Raises:
            EnvironmentInputError: the record is wrong, names another world than the pack's earlier records,
                or the pack is too long.
        """
        record = task.record
        _check_task(task, self._num_templates)
        environment_seed = record.get("environment_seed", task.pack_seed)
        key = WorldKey(
            environment_seed=environment_seed,
            template_index=record.get("template_index"),
            num_trajectories=task.pack_size,
            family=self._options.family,
            min_terms=self._options.min_terms,
            max_terms=self._options.max_terms,
            state_bound=self._options.state_bound,
            min_modes=self._options.min_modes,
            max_modes=self._options.max_modes,
        )
        self._enter(task, key)
        labels = ("instance", "pack_index")
        world = make_world(key)
        self._task = _Task(
            world=world,
            number=task.position + 1,
            trajectory=task.position % task.pack_size,
            row_seed=record["seed"],
            labels={"template_index": float(world.template_index)}
            | {label: float(record[label]) for label in labels if label in record},
        )
        return self._observation("")

    def _enter(self, task: TaskSpec, key: WorldKey) -> None:
        """Make or check the state of the task's pack."""
        pack = self._pack
        if pack is None or (pack.pack_seed, pack.pack_size) != (task.pack_seed, task.pack_size):
            self._pack = PackState(
                pack_seed=task.pack_seed,
                pack_size=task.pack_size,
                environment_seed=key.environment_seed,
                template_index=key.template_index,
            )
        elif (pack.environment_seed, pack.template_index) != (key.environment_seed, key.template_index):
            raise EnvironmentInputError(
                f"environment {NAME}: the record of position {task.position} names the world "
                f"(environment_seed {key.environment_seed}, template_index {key.template_index}), but the "
                f"pack began in ({pack.environment_seed}, {pack.template_index}); rows are stratified in "
                f"packs of {self._options.rows_per_pack}: use a pack size that divides it"
            )

    def system_prompt(self) -> str:
        """Return the rules; equal for every task of a preset."""
        options = self._options
        low, high = options.min_terms, options.max_terms
        num_terms = f"{low} to {high} terms" if low < high else f"exactly {low} term{'s' if low > 1 else ''}"
        return report.prompt("system").format(
            num_terms=num_terms,
            dictionary=", ".join(TERMS),
            max_steps=options.max_steps,
            max_points=options.max_points,
            max_terms=options.max_terms,
            max_candidates=reading.MAX_CANDIDATES,
            max_uncertain=reading.MAX_UNCERTAIN_TERMS,
            condition_threshold=f"{options.condition_threshold:g}",
            alpha=report.prompt("alpha") + "\n" if options.parity else "",
        )

    async def step(self, response: str) -> StepResult:
        """Carry out one action.

        Raises:
            RuntimeError: the task is over or was never started (a caller's mistake).
        """
        task, text = self._current, report.messages()
        if task.finish is not None:
            raise RuntimeError("pde_discovery: step() after the end of a task; call reset() first")
        task.num_steps += 1
        try:
            tag, arguments = parse_action(response, reading.LIST_TAGS)
        except ActionParseError as error:
            return self._invalid(str(error))
        if tag not in ACTIONS:
            known = ", ".join(ACTIONS)
            return self._invalid(text["unknown_action"].format(tag=reading.quoted(tag), actions=known))
        if not isinstance(arguments, dict):
            return self._invalid(text["not_a_map"].format(tag=tag))
        try:
            result = self._carry_out(tag, arguments)
        except reading.ArgumentMistake as mistake:
            result = text["mistake"].format(reason=mistake)
        if task.finish is None and task.num_steps >= self.max_steps:
            task.finish = "out_of_steps"
        return self._result(self._observation(result))

    def _carry_out(self, tag: str, arguments: dict[str, Any]) -> str:
        if tag == "sample_pde_data":
            return self._sample_pde_data(arguments)
        if tag == "run_sparse_regression":
            return self._run_sparse_regression(arguments)
        if tag == "summarize_pack_evidence":
            return self._summarize_pack_evidence(arguments)
        return self._update_scientific_context(arguments)

    def _invalid(self, reason: str) -> StepResult:
        task, reason = self._current, reason[:_MAX_REASON_CHARS]
        task.finish = "format_error"
        task.error = report.messages()["invalid"].format(reason=reason)
        return self._result(task.error)

    def _result(self, observation: str) -> StepResult:
        task = self._current
        if task.finish is None:
            return StepResult(observation=observation, is_done=False)
        reward = 0.0 if task.score is None else task.score.reward
        num_terms = len(task.world.equation)
        values = metrics(task.score, self._options.parity) | task.labels
        values |= {"num_points": float(task.num_points), "num_terms": float(num_terms)}
        values[f"reward_{num_terms}_terms"] = reward
        if task.regression is not None:
            values["max_error"] = task.regression.best.max_error
        return StepResult(
            observation=observation, is_done=True, raw_reward=reward, finish=task.finish, metrics=values
        )

    def _sample_pde_data(self, arguments: dict[str, Any]) -> str:
        task, pack = self._current, self._state
        reading.check_names(arguments, ("point_grid",))
        x, t = reading.points(arguments.get("point_grid"), self.num_points_left)
        if task.solution is None:
            task.solution = field(task.world.key, task.trajectory)
        u, y = interpolate(task.solution, Reaction([task.world.equation]), x, t)
        pack.num_samplings += 1
        generator = np.random.default_rng(
            np.random.SeedSequence([task.row_seed, task.number, pack.num_samplings])
        )
        u = u + generator.normal(0.0, self._options.u_noise, len(u))
        y = y + generator.normal(0.0, self._options.u_noise / 4.0, len(y))
        data_set = DataSet(
            name=f"ds_t{task.number}_{pack.num_samplings}",
            task=task.number,
            x=tuple(x.tolist()),
            t=tuple(t.tolist()),
            u=tuple(u.tolist()),
            y=tuple(y.tolist()),
        )
        pack.data_sets.append(data_set)
        task.num_points += len(x)
        return report.sampled(data_set, self.num_points_left)

    def _run_sparse_regression(self, arguments: dict[str, Any]) -> str:
        task, options = self._current, self._options
        request = reading.regression_request(
            arguments, self._state.data_sets, options.max_terms, has_alpha=options.parity
        )
        u, y = measured(request.data_sets)
        task.regression = regress(
            u, y, request.supports, request.threshold, is_rank_checked=not options.parity
        )
        task.regression_data = request.data_sets
        return report.regression(
            task.regression,
            str(arguments.get("dataset_id", "merged_all")),
            request.data_sets,
            len(request.supports),
            options.condition_threshold,
        )

    def _summarize_pack_evidence(self, arguments: dict[str, Any]) -> str:
        reading.check_names(arguments, ("reveal_equations",))
        is_revealed = reading.is_true(arguments.get("reveal_equations", "false"), "reveal_equations")
        return report.summary(self._state.commits, is_revealed)

    def _update_scientific_context(self, arguments: dict[str, Any]) -> str:
        task, text = self._current, report.messages()
        equation = reading.preferred_equation(arguments)
        if task.num_points == 0:
            raise reading.ArgumentMistake(text["need_sample"])
        if task.regression is None:
            raise reading.ArgumentMistake(text["need_regression"])
        candidates = task.regression.candidates
        chosen = next((c for c in candidates if is_equal(c.equation, equation)), None)
        if chosen is None:
            raise reading.ArgumentMistake(text["not_scored"].format(equation=render(equation)))
        other = alternative(candidates, chosen.equation, self._options.parity)
        task.committed = self._evidence(chosen, other)
        self._state.commits.append(task.committed)
        task.score = score(chosen.equation, task.world.equation)
        task.finish = "success" if task.score.is_structure_right else "failure"
        return text["committed"].format(
            equation=task.committed.equation,
            max_error=report.digits(chosen.max_error),
            margin=report.digits(task.committed.margin),
            second=report.candidate_text(other),
        )

    def _evidence(self, chosen: Candidate, other: Candidate | None) -> Commit:
        """Describe a commit by the data of its own task (parity: by those of its last regression)."""
        task = self._current
        own = [one for one in self._state.data_sets if one.task == task.number]
        u, y = measured(task.regression_data if self._options.parity else own)
        return Commit(
            task=task.number,
            equation=render(chosen.equation),
            num_points=len(u),
            u_low=float(np.min(u)),
            u_high=float(np.max(u)),
            max_error=float(np.max(np.abs(y - evaluate(chosen.equation, u)))),
            margin=margin(chosen.max_error, other),
        )

    def _observation(self, result: str) -> str:
        """Say where the task stands, what the last action gave, and what is possible now."""
        task, pack, text = self._current, self._state, report.messages()
        if task.finish is not None:
            return result
        fields = {"task": task.number, "pack_size": pack.pack_size, "max_steps": self.max_steps}
        latest = None if task.regression is None else task.regression.best.max_error
        parts = [
            text["task"].format(step=task.num_steps + 1, **fields),
            text["state"].format(
                points_left=self.num_points_left,
                data_sets=report.data_sets_line(pack.data_sets),
                max_error=report.digits(latest),
                evidence=report.evidence_line(pack.commits),
            ),
        ]
        if result:
            parts.append(f"{text['result']}\n{result}")
        following = "next_commit" if task.regression else "next_regress"
        if task.num_points == 0:
            following = "next_sample"
        elif self.num_points_left == 0:
            following += "_all"  # all points are spent
        following = text["next_last"] if task.num_steps + 1 == self.max_steps else text[following]
        parts.append(f"{text['next']}\n{following}")
        return "\n\n".join(parts)

    def feedback(self) -> str:
        """Return what the updater is told: errors and equations found, never the reward or the truth."""
        task, text = self._current, report.messages()
        if task.finish == "format_error":
            return task.error
        best = None if task.regression is None else task.regression.best
        error = None if best is None else best.max_error
        lines = [text["feedback_max_error"].format(max_error=report.digits(error))]
        commits = self._state.commits
        if not self._options.parity and task.committed is None:
            lines.append(text["feedback_no_commit"])
        if not commits:
            lines.append(text["feedback_none_committed"])
        elif task.committed is not None and not self._options.parity:
            lines.append(text["feedback_committed"].format(equation=task.committed.equation))
        else:
            last = commits[-1]
            lines.append(text["feedback_last_committed"].format(task=last.task, equation=last.equation))
        shown = text["nothing"] if best is None else render(best.equation)
        lines.append(text["feedback_regression"].format(equation=shown))
        return "\n".join(lines)

    def trajectory(self, messages: list[tuple[str, str]]) -> str | None:
        """Return the record for the updater: the generic one, with old results left out."""
        return _UPDATE_PROMPTS.trajectory(self.system_prompt(), compressed(messages))

    def update_prompts(self) -> HintPrompts | None:
        """Return the standard prompts without the reward, with a reminder of the delimiters."""
        return _UPDATE_PROMPTS

    def snapshot(self) -> bytes:
        """Return the pack's data and commits: versioned bytes, at most some 40 bytes per measured point."""
        return encode(self._pack)

    def restore(self, state: bytes) -> None:
        """Take back a snapshot.

        Raises:
            EnvironmentInputError: another format version, or damaged bytes.
        """
        self._pack = decode(state)
        self._task = None

    def hidden(self) -> dict[str, Any]:
        """Return ``{"equation": {term: coefficient}, "amplitudes": [of each trajectory]}``."""
        world = self._current.world
        return {"equation": dict(world.equation), "amplitudes": list(world.amplitudes)}

    def task_view(self) -> dict[str, Any]:
        """Return ``{"trajectory": index of the task's trajectory}``."""
        return {"trajectory": self._current.trajectory}


_RECORD_RANGES = {
    "seed": 1 << 64,
    "environment_seed": 1 << 64,
    "template_index": 1 << 32,
    "instance": 1 << 32,
    "pack_index": 1 << 32,
}


def _check_task(task: TaskSpec, num_templates: int) -> None:
    """Refuse a record that is not exactly (seed) and, optionally, the fields of stratified rows."""
    record, problems = task.record, []
    unknown = sorted(set(record) - set(_RECORD_RANGES))
    if unknown:
        problems.append(f"record: unknown field {', '.join(unknown)}; fields are {', '.join(_RECORD_RANGES)}")
    ranges = _RECORD_RANGES | {"template_index": num_templates}
    for key, end in ranges.items():
        value = record.get(key)
        if (key in record or key == "seed") and (not is_int(value) or not 0 <= value < end):
            problems.append(f"record: {key} is {value!r}; it must be an integer from 0 to {end - 1}")
    if task.pack_size > MAX_PACK_SIZE:
        problems.append(f"pack size is {task.pack_size}; it must be at most {MAX_PACK_SIZE}")
    if problems:
        raise EnvironmentInputError([f"environment {NAME}: {problem}" for problem in problems])
