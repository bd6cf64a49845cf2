"""``cod credit FILE.json``: credit assignment as a command, for checks and for people.

The file holds the settings and the rewards and token counts of whole lifecycles; the answer holds return,
baseline and advantage of every episode. Everything wrong with the file is listed at once, each problem with
its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from cod_async.algo.returns import settings_problems
from cod_async.algo.stages import MemberRewards, assign_credit
from cod_async.config.schema import CreditAssignmentConfig
from cod_async.errors import InputError
from cod_async.lifecycle.segment import EpisodeKind

_CHOICES = ("style", "baseline", "std", "red", "red_level")
_SETTINGS = (*_CHOICES, "window", "gamma", "parity")
_REQUIRED = ("pack", "lifecycle", "task_rewards", "update_rewards", "solve_tokens", "update_tokens")
_MAX_REWARD = 1e9
_MAX_TOKENS = 1 << 40
_MAX_SHOWN_CHARS = 60


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """Return a value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "..."


def _settings(payload: Mapping[str, Any], problems: list[str]) -> CreditAssignmentConfig:
    hints = get_type_hints(CreditAssignmentConfig)
    values: dict[str, Any] = {}
    for name in _SETTINGS:
        if name not in payload:
            continue
        value = payload[name]
        if name in _CHOICES and value not in get_args(hints[name]):
            choices = ", ".join(get_args(hints[name]))
            problems.append(f"{name}: {_shown(value)} is not one of {choices}")
        elif name == "window" and value is not None and not (_is_integer(value) and value >= 1):
            problems.append(f"window: {_shown(value)} is not an integer of at least 1 or null")
        elif name == "gamma" and value is not None and not (_is_number(value) and 0 <= value <= 1):
            problems.append(f"gamma: {_shown(value)} is not a number from 0 to 1 or null")
        elif name == "parity" and not isinstance(value, bool):
            problems.append(f"parity: {_shown(value)} is not true or false")
        else:
            values[name] = float(value) if name == "gamma" and value is not None else value
    settings = CreditAssignmentConfig(**values)
    if not {"window", "gamma"} & {problem.split(":")[0] for problem in problems}:
        problems += settings_problems(settings)
    return settings


def _reward_problems(where: str, values: Any) -> list[str]:
    if not isinstance(values, list):
        return [f"{where}: must be a list of numbers"]
    return [
        f"{where}[{i}]: {_shown(value)} is not a finite number of size at most {_MAX_REWARD:g}"
        for i, value in enumerate(values)
        if not (_is_number(value) and abs(value) <= _MAX_REWARD)  # false for NaN as well
    ]


def _token_problems(where: str, values: Any) -> list[str]:
    if not isinstance(values, list):
        return [f"{where}: must be a list of integers"]
    return [
        f"{where}[{i}]: {_shown(value)} is not a token count (an integer from 0 to 2^40)"
        for i, value in enumerate(values)
        if not (_is_integer(value) and 0 <= value <= _MAX_TOKENS)
    ]


def _lifecycle_problems(where: str, lifecycle: Any) -> list[str]:
    if not isinstance(lifecycle, dict):
        return [f"{where}: must be an object with {', '.join(_REQUIRED)}"]
    problems = [f"{where}.{name}: is missing" for name in _REQUIRED if name not in lifecycle]
    problems += [
        f"{where}.{name}: unknown key" for name in sorted(set(lifecycle) - {*_REQUIRED, "taskset"}, key=str)
    ]
    for name in ("pack", "lifecycle", "taskset"):
        value = lifecycle.get(name, 0)
        is_absent = name == "taskset" and value is None
        if not (is_absent or _is_integer(value) or isinstance(value, str)):
            problems.append(f"{where}.{name}: {_shown(value)} is neither an integer nor a string")
    for name in ("task_rewards", "update_rewards"):
        problems += _reward_problems(f"{where}.{name}", lifecycle.get(name, []))
    for name in ("solve_tokens", "update_tokens"):
        problems += _token_problems(f"{where}.{name}", lifecycle.get(name, []))
    if problems:
        return problems
    size = len(lifecycle["task_rewards"])
    if size == 0:
        return [f"{where}.task_rewards: is empty; a lifecycle has at least one task"]
    wanted = {"update_rewards": size - 1, "solve_tokens": size, "update_tokens": size - 1}
    return [
        f"{where}.{name}: has {len(lifecycle[name])} entries; {size} tasks need {count}"
        for name, count in wanted.items()
        if len(lifecycle[name]) != count
    ]


def _checked(payload: Any) -> tuple[CreditAssignmentConfig, list[dict[str, Any]]]:
    if not isinstance(payload, dict):
        raise InputError("the file must hold one JSON object with the settings and a list of lifecycles")
    unknown = sorted(set(payload) - {*_SETTINGS, "lifecycles"}, key=str)
    problems = [f"{name}: unknown key; known are {', '.join((*_SETTINGS, 'lifecycles'))}" for name in unknown]
    settings = _settings(payload, problems)
    lifecycles = payload.get("lifecycles")
    if not isinstance(lifecycles, list) or not lifecycles:
        problems.append("lifecycles: must be a list with at least one lifecycle")
        raise InputError(problems)
    seen: dict[tuple[Any, Any], int] = {}
    sizes: dict[Any, int] = {}
    for index, lifecycle in enumerate(lifecycles):
        found = _lifecycle_problems(f"lifecycles[{index}]", lifecycle)
        problems += found
        if found:
            continue
        identity = (lifecycle["pack"], lifecycle["lifecycle"])
        if identity in seen:
            problems.append(
                f"lifecycles[{index}]: pack {_shown(identity[0])}, lifecycle {_shown(identity[1])} was given "
                f"before (lifecycles[{seen[identity]}])"
            )
        seen.setdefault(identity, index)
        size = len(lifecycle["task_rewards"])
        if sizes.setdefault(lifecycle["pack"], size) != size:
            problems.append(
                f"lifecycles[{index}].task_rewards: has {size} entries, but pack {_shown(lifecycle['pack'])} "
                f"has {sizes[lifecycle['pack']]} tasks"
            )
    if problems:
        raise InputError(problems)
    return settings, lifecycles


def credit_file(payload: Any) -> dict[str, Any]:
    """Answer ``cod credit``.

    Args:
        payload: the decoded JSON file: ``{style, window, gamma, baseline, std, red, red_level, parity,
            lifecycles}``; settings that are left out have their defaults. Each lifecycle has ``pack,
            lifecycle`` (integer or string), optionally ``taskset``, and ``task_rewards[S],
            update_rewards[S-1], solve_tokens[S], update_tokens[S-1]``.

    Returns:
        ``{red_temperatures: [{set, temperature}], episodes: [{pack, lifecycle, kind, position, return,
        baseline, advantage, weighted_advantage}]}``. Episodes are in the order of the lifecycles, then by
        ordinal. ``set`` is ``"batch"``, the pack or the taskset; the list is empty when RED is off.
        ``advantage`` is after division by the standard deviation, ``weighted_advantage`` after RED.

    Raises:
        InputError: everything that is wrong with the payload, each problem with its place.
    """
    settings, lifecycles = _checked(payload)
    members: dict[Any, list[MemberRewards]] = {}
    num_tokens: dict[tuple[Any, int, EpisodeKind, int], int] = {}
    tasksets: dict[tuple[Any, int], Any] = {}
    for index, lifecycle in enumerate(lifecycles):
        pack = lifecycle["pack"]
        rewards = [tuple(float(r) for r in lifecycle[k]) for k in ("task_rewards", "update_rewards")]
        members.setdefault(pack, []).append(MemberRewards(index, rewards[0], rewards[1]))
        tasksets[pack, index] = lifecycle.get("taskset")
        for position, count in enumerate(lifecycle["solve_tokens"]):
            num_tokens[pack, index, "solve", position] = count
        for position, count in enumerate(lifecycle["update_tokens"]):
            num_tokens[pack, index, "update", position] = count
    groups = [(pack, group, len(group[0].task_rewards)) for pack, group in members.items()]
    try:
        episodes, selection = assign_credit(groups, num_tokens, settings, tasksets=tasksets)
    except OverflowError:
        raise InputError(
            "task_rewards, update_rewards: advantages are too large for RED's exponential; "
            "scale the rewards down"
        ) from None
    answers = [
        (
            episode.member,
            {
                "pack": pack,
                "lifecycle": lifecycles[episode.member]["lifecycle"],
                "kind": episode.kind,
                "position": episode.position,
                "return": episode.return_,
                "baseline": episode.baseline,
                "advantage": selection.advantages[i],
                "weighted_advantage": selection.weighted_advantages[i],
            },
        )
        for i, (pack, episode) in enumerate(episodes)
    ]
    return {
        "red_temperatures": [
            {"set": name, "temperature": temperature} for name, temperature in selection.red_temperatures
        ],
        "episodes": [answer for _, answer in sorted(answers, key=lambda pair: pair[0])],
    }
