"""The registry: environment names to specs, from the built-ins and from installed packages.

A package offers an environment by an entry point in the group ``cod_async.environments`` that names its
:class:`~cod_async.envs.base.EnvironmentSpec`. The built-ins are listed here as well, so that they are found
when this package runs from a source tree without being installed. Nothing is imported until its name is asked
for; one name means one environment, so a second claimant is refused instead of silently shadowing the first.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata

import msgspec

from cod_async.envs.base import EnvironmentSpec
from cod_async.errors import EnvironmentInputError

GROUP = "cod_async.environments"
"""Entry point group of third-party environments."""

BUILT_IN = {
    "alchemy_random": "cod_async.envs.alchemy_random:SPEC",
    "frozen_lake_obscure": "cod_async.envs.frozen_lake_obscure:SPEC",
    "grid_navigation": "cod_async.envs.grid_navigation:SPEC",
    "hidden_buttons": "cod_async.envs.hidden_buttons:SPEC",
    "hidden_matches": "cod_async.envs.hidden_matches:SPEC",
    "learn2ask": "cod_async.envs.learn2ask:SPEC",
    "optimal_control": "cod_async.envs.optimal_control:SPEC",
    "pde_discovery": "cod_async.envs.pde_discovery:SPEC",
    "terminal": "cod_async.envs.terminal:SPEC",
}
"""Environments of this package: name -> ``module:attribute``."""

_REQUIRED_POLICIES = ("oracle", "random")


def names() -> list[str]:
    """Return the names of all registered environments, sorted; imports none of them."""
    return sorted(_targets())


def get(name: str) -> EnvironmentSpec:
    """Return the spec of an environment, importing it on first use.

    Raises:
        EnvironmentInputError: no such name (the message lists those that exist), two packages claim the name,
            or the entry point is broken (the message names it, its target and what went wrong).
    """
    return _load(name)


def forget() -> None:
    """Drop what was found, so that newly installed environments are seen (used by tests and notebooks)."""
    _targets.cache_clear()
    _load.cache_clear()


@functools.cache
def _targets() -> dict[str, tuple[str, ...]]:
    """Return name -> distinct targets; more than one target is a conflict, reported when the name is used."""
    found: dict[str, tuple[str, ...]] = {name: (target,) for name, target in BUILT_IN.items()}
    for entry in importlib.metadata.entry_points(group=GROUP):
        known = found.get(entry.name, ())
        # An installed copy of this package lists the built-ins again, with equal targets.
        if entry.value not in known:
            found[entry.name] = (*known, entry.value)
    return found


@functools.cache
def _load(name: str) -> EnvironmentSpec:
    targets = _targets().get(name)
    if targets is None:
        raise EnvironmentInputError(f"no environment {name!r}; environments are {', '.join(names())}")
    if len(targets) > 1:
        raise EnvironmentInputError(
            f"environment {name!r} is registered {len(targets)} times ({', '.join(targets)}); "
            "uninstall or rename all but one"
        )
    target = targets[0]
    where = f"environment {name!r} (entry point {target})"
    try:
        module_name, _, attribute = target.partition(":")
        spec = importlib.import_module(module_name)
        for part in attribute.split("."):
            spec = getattr(spec, part)
    except Exception as error:  # third-party code: whatever it raises, the user needs to know whose it is
        raise EnvironmentInputError(
            f"{where} cannot be loaded: {type(error).__name__}: {error}; fix or uninstall its package"
        ) from error
    if not isinstance(spec, EnvironmentSpec):
        raise EnvironmentInputError(
            f"{where} is a {type(spec).__name__}; it must be a cod_async.envs.base.EnvironmentSpec"
        )
    _check(where, name, spec)
    if spec.needs_limits is None and BUILT_IN.get(name) != target:
        spec = msgspec.structs.replace(spec, needs_limits=True)  # code that nobody here has read
    return spec


def _check(where: str, name: str, spec: EnvironmentSpec) -> None:
    """Refuse a spec that contradicts its registration or lacks what every environment must offer."""
    problems = []
    if spec.name != name:
        problems.append(f"{where} calls itself {spec.name!r}; both names must be equal")
    if spec.default_preset not in spec.presets:
        known = ", ".join(sorted(spec.presets)) or "none"
        problems.append(f"{where} has the default preset {spec.default_preset!r}; its presets are {known}")
    missing = [policy for policy in _REQUIRED_POLICIES if policy not in spec.policies]
    if missing:
        problems.append(f"{where} lacks the scripted policies {', '.join(missing)}")
    if problems:
        raise EnvironmentInputError(problems)
