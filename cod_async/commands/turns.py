"""How long lifecycles of an environment are: turns and prompts, counted while scripted policies play it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cod_async.config.schema import Config, EnvironmentConfig
from cod_async.envs import registry
from cod_async.envs.base import Environment, Policy, TaskSpec
from cod_async.errors import CodError, EnvironmentInputError, WorkError
from cod_async.lifecycle.hint import HintPrompts, prompts_for
from cod_async.lifecycle.packs import plan_pack
from cod_async.lifecycle.seeds import stable_seed

NUM_TASKS = 64
"""Tasks that each policy plays, in whole packs, at least one."""
POLICIES = ("random", "oracle")
"""Every environment has these two."""
_RESPONSE = "<response>"
_MESSAGE_TOKENS = {"full": 5, "terse": 1}
"""What a template adds to a message."""
_PIECE = re.compile(r"[^\r\n\w]?[^\W\d_]{1,8}|\d| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+|\s+")


@dataclass(frozen=True)
class Estimate:
    """What a lifecycle of one environment comes to.

    Attributes:
        turns_by_policy: mean responses per solve episode, by policy; empty for an environment that is not
            played because it needs a network.
        max_turns: most responses that a solve episode of these tasks may have.
        tokens_per_lifecycle: tokens of all its rows, mean over the policies.
    """

    turns_by_policy: dict[str, float]
    max_turns: int
    tokens_per_lifecycle: float

    @property
    def turns(self) -> float:
        """Mean responses per solve episode over the policies; the most there can be if none played."""
        turns = self.turns_by_policy.values()
        return sum(turns) / len(turns) if turns else float(self.max_turns)


@dataclass(frozen=True)
class _Lengths:
    """Tokens of what is generated, and of what a context holds at most."""

    response: int
    hint: int
    limit: int

    @classmethod
    def of(cls, config: Config) -> _Lengths:
        lifecycle = config.lifecycle
        notice = lifecycle.length_notice_tokens
        response, hint = lifecycle.max_response_tokens, lifecycle.max_hint_tokens
        if notice:
            response, hint = min(response, notice), min(hint, notice)
        return cls(response, hint, config.model.max_context_tokens)


@dataclass(frozen=True)
class _Walk:
    """One task as it was played."""

    turns: int
    max_turns: int
    observed: int
    rules: int
    update: int


def count_tokens(text: str) -> int:
    """Return roughly how many tokens a tokenizer with a large vocabulary makes of a text.

    It cuts text into words, single digits, runs of signs and white space, as those of Qwen, Llama 3 and GPT-4
    do first, and takes each piece of up to eight letters for one token.
    """
    return sum(1 for _ in _PIECE.finditer(text))


def estimate(config: Config, index: int) -> Estimate:
    """Play environment ``index`` of the mixture with its scripted policies and count.

    Raises:
        EnvironmentInputError: it refuses the packs that were planned for it.
        WorkError: it failed.
    """
    chosen = config.environments[index]
    spec = registry.get(chosen.name)
    options = spec.options(chosen.preset, chosen.options)
    is_played = spec.needs_network is None or not spec.needs_network(options)
    try:
        if not is_played:
            walks = asyncio.run(_play(config, chosen, None))
            return Estimate({}, max(walk.max_turns for walk in walks), _tokens(config, walks))
        by_policy = {policy: asyncio.run(_play(config, chosen, policy)) for policy in POLICIES}
    except EnvironmentInputError as error:
        raise EnvironmentInputError([f"environments.{index}: {line}" for line in error.problems]) from error
    except CodError:
        raise
    except Exception as error:  # whatever third-party code raises, the user needs to know whose it is
        raise WorkError(
            f"environments.{index}: {chosen.name} failed while it was played for the plan, "
            f"{type(error).__name__}: {error}; play it with: cod env play {chosen.name}"
        ) from error
    return Estimate(
        {name: round(sum(w.turns for w in walks) / len(walks), 3) for name, walks in by_policy.items()},
        max(walk.max_turns for walks in by_policy.values() for walk in walks),
        sum(_tokens(config, walks) for walks in by_policy.values()) / len(by_policy),
    )


async def _play(config: Config, chosen: EnvironmentConfig, policy: str | None) -> list[_Walk]:
    """Play whole packs with one policy, or (None) only open their tasks."""
    spec = registry.get(chosen.name)
    options = spec.options(chosen.preset, chosen.options)
    pack_size, seed = config.lifecycle.pack_size, config.run.seed
    walks = []
    for group in range(max(1, NUM_TASKS // pack_size)):
        pack = plan_pack([chosen], pack_size, seed, group, strategy=config.lifecycle.packs)
        environment = spec.make(options)
        act = None if policy is None else spec.policies[policy](stable_seed("plan", seed, group))
        memory: dict[str, object] = {}
        for task in pack.tasks():
            walks.append(await _walk(config, environment, task, act, memory))
    return walks


async def _walk(
    config: Config, environment: Environment, task: TaskSpec, act: Policy | None, memory: dict[str, object]
) -> _Walk:
    """Play one task and count what its prompts hold, the hint apart."""
    messages = [("user", environment.reset(task))]
    system = environment.system_prompt()
    turns = 0 if act is not None else environment.max_steps
    while act is not None:
        result = await environment.step(act(environment, messages[-1][1], memory))
        turns += 1
        messages.append(("assistant", _RESPONSE))
        if result.is_done:
            break
        messages.append(("user", result.observation))
    feedback = "" if act is None else environment.feedback()
    memory["feedback"] = feedback
    prompts = prompts_for(environment.prompt_style)
    notice = config.lifecycle.length_notice_tokens
    per_message = _MESSAGE_TOKENS[environment.prompt_style]
    observed = [text for role, text in messages if role == "user"]
    unseen = turns - len(observed)  # not played: every turn is taken to be told as much as the first
    return _Walk(
        turns=turns,
        max_turns=environment.max_steps,
        observed=sum(map(count_tokens, observed))
        + unseen * count_tokens(observed[0])
        + 2 * turns * per_message,
        rules=count_tokens(prompts.solve_system(system, prompts.initial, notice)) + per_message,
        update=_update_context(config, environment, prompts, system, messages, feedback)
        if config.lifecycle.has_updates
        else 0,
    )


def _update_context(
    config: Config,
    environment: Environment,
    prompts: HintPrompts,
    system: str,
    messages: list[tuple[str, str]],
    feedback: str,
) -> int:
    """Return the tokens of the update prompt with the responses it quotes, without the previous hint."""
    notice = config.lifecycle.length_notice_tokens
    update = environment.update_prompts() or prompts
    if config.lifecycle.carry == "transcript":  # a turn of the conversation, which has the record
        return count_tokens(update.update_messages("", "", 0.0, feedback, notice)[1])
    record = environment.trajectory(messages)
    if record is None:
        record = prompts.trajectory(system, messages)
    told = update.update_messages(update.initial, record, 0.0, feedback, notice)
    quoted = sum(text.count(_RESPONSE) for text in told) * _Lengths.of(config).response
    return sum(map(count_tokens, told)) + quoted


def _tokens(config: Config, walks: Sequence[_Walk]) -> float:
    """Return the mean tokens of a lifecycle's rows over packs that were played one after the other."""
    lengths, lifecycle = _Lengths.of(config), config.lifecycle
    size = lifecycle.pack_size
    packs = [walks[start : start + size] for start in range(0, len(walks), size)]
    if lifecycle.carry == "transcript":
        return sum(_conversation(lengths, pack, lifecycle.has_updates) for pack in packs) / len(packs)
    total = 0
    for pack in packs:
        for position, walk in enumerate(pack):
            hint = lengths.hint if position and lifecycle.has_updates else 0
            total += min(lengths.limit, walk.rules + hint + walk.observed + walk.turns * lengths.response)
            if lifecycle.has_updates and position < size - 1:
                total += min(lengths.limit, walk.update + hint + lengths.hint)
    return total / len(packs)


def _conversation(lengths: _Lengths, pack: Sequence[_Walk], has_updates: bool) -> int:
    """Return the tokens of a lifecycle that is one conversation."""
    total = pack[0].rules + sum(walk.observed + walk.turns * lengths.response for walk in pack)
    if has_updates:
        total += sum(walk.update + lengths.hint for walk in pack[:-1])
    return min(lengths.limit, total)
