"""Suites: what one evaluation command plays, as a typed TOML file with every problem reported at once.

A suite is a list of entries. An entry is one environment under a pack size and a set of lengths; its
strategies, splits and controls span the curves that come out. Whatever an entry leaves open is taken from
``[defaults]``, then from the configuration of the run or model that is evaluated. :func:`resolve` makes
an entry into *settings*: one complete configuration per strategy and split, which is all that a lifecycle's
outcome depends on beside weights and seeds.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from cod_async.config.schema import Config, Count, EnvironmentConfig, Fraction, PackStrategy, Positive
from cod_async.config.validate import find_problems
from cod_async.envs import registry
from cod_async.envs.base import EnvironmentSpec
from cod_async.errors import EnvironmentInputError, InputError
from cod_async.lifecycle.packs import Split

Control = Literal["normal", "blanked", "swapped", "truth"]
Carry = Literal["hint", "transcript", "none"]
CONTROLS: tuple[Control, ...] = ("normal", "blanked", "swapped", "truth")
CARRIES: tuple[Carry, ...] = ("hint", "transcript", "none")
AD_HOC = "deploy"
"""Name of the suite that flags make."""
SPLITS: tuple[Split, ...] = ("train", "held_out")
_MAX_FILE_BYTES = 1 << 20
_NO_ENTRIES = "entries: none"


class EntryDefaults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an entry is played; in ``[defaults]`` for all entries, or in an entry for itself.

    Attributes:
        pack_size: tasks per lifecycle (S); None: the configuration's.
        strategies: ``cod`` plays packs of S tasks, ``ralph_sample`` the first task of each pack S times,
            ``ralph_full`` every task S times.
        carry: what goes from task to task; None: the configuration's.
        splits: ``held_out`` worlds and records, or those of ``train``.
        num_packs: packs per curve and seed; 0: the whole data set, cut into packs; None: the configuration's
            ``evaluation.num_packs``.
        lifecycles_per_pack: lifecycles per pack; None: the configuration's
            ``evaluation.lifecycles_per_pack``.
        is_shuffled: shuffle the rows of the data set by the seed before they are cut into packs.
        data_seed: draw data and hidden worlds from this seed; None: the suite's.
        controls: what the solver is shown: its hint (``normal``), the placeholder (``blanked``), the hint of
            a pack with another hidden world (``swapped``), or the hidden world itself (``truth``).
        max_response_tokens, max_hint_tokens, length_notice_tokens, max_context_tokens, solve_penalty: as in
            the configuration's ``lifecycle`` and ``model``; None: the configuration's.
    """

    pack_size: Positive | None = None
    strategies: tuple[PackStrategy, ...] = ("cod",)
    carry: Carry | None = None
    splits: tuple[Split, ...] = ("held_out",)
    num_packs: Count | None = None
    lifecycles_per_pack: Positive | None = None
    is_shuffled: bool = False
    data_seed: Count | None = None
    controls: tuple[Control, ...] = ("normal",)
    max_response_tokens: Positive | None = None
    max_hint_tokens: Positive | None = None
    length_notice_tokens: Count | None = None
    max_context_tokens: Positive | None = None
    solve_penalty: Fraction | None = None


class SuiteEntry(EntryDefaults, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One environment of a suite.

    Attributes:
        environment, preset, options: the environment; ``options`` override the preset's.
        name: what tables and plots call it, unique in the suite; empty: environment and preset.
    """

    environment: str
    preset: str
    name: str = ""
    options: dict[str, Any] = {}

    @property
    def label(self) -> str:
        """The entry's name."""
        return self.name or f"{self.environment} {self.preset}"


class Suite(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to play.

    Attributes:
        name: names the folder of results.
        seeds: every curve is played once per seed and the packs of all seeds are pooled; a seed stands for
            data, hidden worlds and sampling.
        data_seed: draw data and hidden worlds from this seed whatever the seed of the sampling, so that all
            seeds play the same packs; None: every seed has its own.
        entries: what to play, at least one.
    """

    name: str
    entries: tuple[SuiteEntry, ...]
    seeds: tuple[Count, ...] = (0,)
    data_seed: Count | None = None


class _SuiteFile(Suite, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file: a suite and defaults that are merged into its entries."""

    defaults: EntryDefaults = EntryDefaults()


class Setting(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One curve's worth of play: an entry under one strategy and one split, with nothing left open.

    Attributes:
        label: name of the entry.
        config: complete; its only environment is the entry's, and ``lifecycle`` and ``model`` are the
            entry's.
        split: which worlds and records.
        num_packs: packs per seed; 0: the whole data set.
        lifecycles_per_pack: lifecycles per pack.
        is_shuffled: whether rows are shuffled before they are cut into packs.
        data_seed: of this entry's data and worlds; None: the suite's.
        controls: which controls are played, ``normal`` first when ``swapped`` needs it.
        reported: which of them were asked for.
        unavailable: control -> why it cannot be played here.
    """

    label: str
    config: Config
    split: Split
    num_packs: int
    lifecycles_per_pack: int
    is_shuffled: bool
    data_seed: int | None
    controls: tuple[Control, ...]
    reported: tuple[Control, ...]
    unavailable: dict[str, str] = {}

    @property
    def environment(self) -> EnvironmentConfig:
        """The environment."""
        return self.config.environments[0]

    @property
    def mode(self) -> str:
        """``none`` for tasks one by one, else the strategy of the packs."""
        lifecycle = self.config.lifecycle
        return "none" if lifecycle.carry == "none" and lifecycle.packs == "cod" else lifecycle.packs

    def identity(self) -> dict[str, Any]:
        """Return everything but packs, weights and seeds that a lifecycle's outcome depends on."""
        config = self.config
        lifecycle = msgspec.to_builtins(config.lifecycle)
        del lifecycle["group_size"]
        return {
            "environment": [self.environment.name, self.environment.preset, self.environment.options],
            "lifecycle": lifecycle,
            "renderer": config.model.renderer,
            "max_context_tokens": config.model.max_context_tokens,
            "temperature": config.engine.temperature,
            "top_p": config.engine.top_p,
            "split": self.split,
        }


def load_suite(
    path: Path, base: Config, adapt: Callable[[Suite], Suite] = lambda suite: suite
) -> tuple[Suite, list[Setting]]:
    """Read and check a suite file, and resolve its entries against a configuration.

    Args:
        path: a TOML file.
        base: see :func:`resolve`.
        adapt: changes the suite before it is resolved (flags of a command).

    Raises:
        InputError: with every problem of the file: unknown keys and choices, wrong types, unknown
            environments, presets and options, controls that the carry forbids, lengths that do not fit,
            packs larger than the data.
    """
    tree = _read(path)
    tree.setdefault("name", path.stem)
    problems = find_problems(tree, _SuiteFile)
    if problems:  # look at the rest without what was refused, so that one reading names everything
        tree = _without_refused(tree, problems)
    defaults, entries = tree.pop("defaults", {}), tree.get("entries", [])
    tree["entries"] = [{**defaults, **entry} for entry in entries if entry is not None]
    suite = adapt(msgspec.convert(tree, Suite, strict=True))
    numbers = [index for index, entry in enumerate(entries) if entry is not None]
    settings, found = resolve(suite, base, numbers)
    problems += [problem for problem in found if not (problems and problem.startswith(_NO_ENTRIES))]
    if problems:
        raise InputError([f"{path}: {problem}" for problem in problems])
    return suite, settings


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
        if len(raw) > _MAX_FILE_BYTES:
            raise InputError(f"{path}: larger than {_MAX_FILE_BYTES} bytes; this is not a suite")
        return tomllib.loads(raw.decode())
    except OSError as error:
        raise InputError(f"{path}: cannot be read, {error.strerror or error}; give a suite file") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid TOML, {error}; correct the file") from error


def _without_refused(tree: dict[str, Any], problems: Sequence[str]) -> dict[str, Any]:
    """Return the suite without the sections in which something was refused, and None for such entries."""
    refused = {tuple(problem.partition(":")[0].split(".")[:2]) for problem in problems}
    sections = {path[0] for path in refused}
    rest = {key: value for key, value in tree.items() if key not in sections}
    entries = tree.get("entries")
    if isinstance(entries, list):
        bad = {path[1] for path in refused if path[0] == "entries" and len(path) > 1}
        rest["entries"] = [None if str(index) in bad else entry for index, entry in enumerate(entries)]
    rest.setdefault("name", "suite")
    return rest


def resolve(suite: Suite, base: Config, numbers: Sequence[int] = ()) -> tuple[list[Setting], list[str]]:
    """Resolve every entry of a suite against a configuration, in the order of entries, strategies, splits.

    Args:
        suite: what to play.
        base: supplies what entries leave open; its environments are not read.
        numbers: what messages call the entries; counted from 0 when not given.

    Returns:
        The settings of the entries that can be played, and every problem of the others and of the suite.
    """
    problems = []
    if not suite.name or any(character in suite.name for character in "/\\\0") or suite.name[0] == ".":
        problems.append(f'name: "{suite.name}" cannot name a folder; use letters, digits, dash, underscore')
    if not suite.seeds or len(set(suite.seeds)) < len(suite.seeds):
        problems.append(f"seeds: {list(suite.seeds)}; name at least one, each once")
    if not suite.entries:
        problems.append(f"{_NO_ENTRIES}; add at least one [[entries]] table with an environment and a preset")
    labels = [entry.label for entry in suite.entries]
    problems += [
        f'entries: {labels.count(label)} are called "{label}"; give each a name of its own'
        for label in dict.fromkeys(labels)
        if labels.count(label) > 1
    ]
    settings: list[Setting] = []
    for index, entry in enumerate(suite.entries):
        made, found = _resolve_entry(entry, base)
        settings += made
        number = numbers[index] if numbers else index
        problems += [f"entries.{number}: {problem}" for problem in dict.fromkeys(found)]
    return settings, problems


def _resolve_entry(entry: SuiteEntry, base: Config) -> tuple[list[Setting], list[str]]:
    problems = []
    for field in ("strategies", "splits", "controls"):
        values: tuple[str, ...] = getattr(entry, field)
        if not values or len(set(values)) < len(values):
            problems.append(f"{field}: {list(values)}; name at least one, each once")
    try:
        spec = registry.get(entry.environment)
        spec.make(spec.options(entry.preset, entry.options))
    except EnvironmentInputError as error:
        problems += carry_problems(entry.carry or base.lifecycle.carry, entry.controls)
        return [], problems + list(error.problems)
    settings = [
        _setting(entry, base, strategy, split)
        for strategy in dict.fromkeys(entry.strategies)
        for split in dict.fromkeys(entry.splits)
    ]
    for setting in settings:
        problems += _setting_problems(setting, entry.controls)
    return ([], problems) if problems else (settings, [])


def ad_hoc_suite(
    config: Config,
    strategies: Sequence[str],
    splits: Sequence[str],
    controls: Sequence[str] = ("normal",),
    seeds: Sequence[int] = (0,),
) -> Suite:
    """Return the suite that plays the environments of a configuration as the configuration says."""
    entries: list[dict[str, Any]] = []
    for environment in config.environments:
        name = f"{environment.name} {environment.preset}"
        num_same = sum(entry["name"].startswith(name) for entry in entries)
        entries.append(
            {
                "environment": environment.name,
                "preset": environment.preset,
                "options": environment.options,
                "name": f"{name} {num_same + 1}" if num_same else name,
                "strategies": list(strategies),
                "splits": list(splits),
                "controls": list(controls),
            }
        )
    return msgspec.convert({"name": AD_HOC, "entries": entries, "seeds": list(seeds)}, Suite)


def carry_problems(carry: str, controls: Sequence[str]) -> list[str]:
    """List the controls that make no sense with a carry: without a hint there is nothing to exchange."""
    if carry == "hint":
        return []
    return [
        f'controls: {control} needs a hint to replace, and carry "{carry}" shows none; leave it out'
        for control in controls
        if control != "normal"
    ]


def has_finite_data(spec: EnvironmentSpec) -> bool:
    """Whether an environment has a data set of rows that can be counted and addressed."""
    return spec.num_records is not None and spec.record_at is not None


def _setting(entry: SuiteEntry, base: Config, strategy: PackStrategy, split: Split) -> Setting:
    spec = registry.get(entry.environment)
    lengths = {
        name: value
        for name in ("max_response_tokens", "max_hint_tokens", "length_notice_tokens", "solve_penalty")
        if (value := getattr(entry, name)) is not None
    }
    carry = entry.carry or base.lifecycle.carry
    lifecycle = msgspec.structs.replace(
        base.lifecycle,
        pack_size=entry.pack_size or base.lifecycle.pack_size,
        packs=strategy,
        carry=carry,
        has_transcript_updates=base.lifecycle.has_transcript_updates and carry == "transcript",
        **lengths,
    )
    model = base.model
    if entry.max_context_tokens is not None:
        model = msgspec.structs.replace(model, max_context_tokens=entry.max_context_tokens)
    environment = EnvironmentConfig(name=entry.environment, preset=entry.preset)
    for known in base.environments:  # the limits that its code stands under
        environment = known if known.name == entry.environment else environment
    environment = msgspec.structs.replace(
        environment, preset=entry.preset, options=dict(entry.options), weight=1.0
    )
    controls = [control for control in CONTROLS if control in entry.controls]
    unavailable = {}
    if "truth" in controls and spec.truth_hint is None:
        unavailable["truth"] = f"environment {spec.name} has no hint that tells its hidden world"
        controls.remove("truth")
    reported = tuple(controls)
    if "swapped" in controls and "normal" not in controls:
        controls.insert(0, "normal")
    return Setting(
        label=entry.label,
        config=msgspec.structs.replace(base, environments=(environment,), lifecycle=lifecycle, model=model),
        split=split,
        num_packs=base.evaluation.num_packs if entry.num_packs is None else entry.num_packs,
        lifecycles_per_pack=entry.lifecycles_per_pack or base.evaluation.lifecycles_per_pack,
        is_shuffled=entry.is_shuffled,
        data_seed=entry.data_seed,
        controls=tuple(controls),
        reported=reported,
        unavailable=unavailable,
    )


def _setting_problems(setting: Setting, controls: Sequence[str]) -> list[str]:
    lifecycle, context = setting.config.lifecycle, setting.config.model.max_context_tokens
    problems = carry_problems(lifecycle.carry, controls)
    lengths = ["max_response_tokens"] + (["max_hint_tokens"] if lifecycle.has_updates else [])
    for name in lengths:
        if getattr(lifecycle, name) >= context:
            problems.append(
                f"{name}: {getattr(lifecycle, name)} leaves no room for a prompt in max_context_tokens = "
                f"{context}; lower the first or raise the second"
            )
    if setting.num_packs == 1 and "swapped" in setting.controls:
        problems.append("num_packs: 1 leaves no other pack for the control swapped; use at least 2")
    spec = registry.get(setting.environment.name)
    if not has_finite_data(spec):
        if setting.num_packs == 0:
            problems.append(
                f"num_packs: 0 means the whole data set, but that of {spec.name} has no end; give a number"
            )
        if setting.is_shuffled:
            problems.append(f"is_shuffled: the data of {spec.name} has no end and no order; leave it out")
    if spec.num_records is not None:
        options = spec.options(setting.environment.preset, setting.environment.options)
        try:
            num_records = spec.num_records(options, setting.split)
        except EnvironmentInputError as error:
            return problems + list(error.problems)
        num_needed = 1 if lifecycle.packs == "ralph_full" else lifecycle.pack_size
        if num_records < num_needed:
            problems.append(
                f"pack_size: {lifecycle.pack_size}, but the {setting.split} data of {spec.name} has "
                f"{num_records} records; give it more, or use smaller packs"
            )
    return problems
