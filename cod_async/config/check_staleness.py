"""Cross-field rules on staleness: what would have no effect, or stop a run, is said before it starts."""

from __future__ import annotations

from collections.abc import Iterator

from cod_async.config.schema import Config


def staleness_problems(config: Config) -> Iterator[str]:
    """List what contradicts itself in the sections on staleness, late members, replay and the autopilot."""
    yield from _window(config)
    yield from _late_and_overdue(config)
    yield from _replay(config)
    yield from _autopilot(config)


def _window(config: Config) -> Iterator[str]:
    staleness, per_step = config.staleness, config.learner.groups_per_step
    if 0 < staleness.window_groups < per_step:
        yield (
            f"staleness.window_groups: {staleness.window_groups} holds less than a step of "
            f"learner.groups_per_step = {per_step}; use at least that, or 0"
        )
    spread = staleness.max_version_spread
    if spread is not None and spread > staleness.max_lag:
        yield (
            f"staleness.max_version_spread: {spread} never drops anything, staleness.max_lag = "
            f"{staleness.max_lag} comes first; lower it, or remove it"
        )


def _late_and_overdue(config: Config) -> Iterator[str]:
    groups = config.groups
    if groups.close == "all" and groups.late == "drop":
        yield 'groups.late: "drop" has no effect with groups.close = "all", where nobody is late; remove it'
    if 0 < groups.overdue_factor < 1:
        yield (
            f"groups.overdue_factor: {groups.overdue_factor:g} gives up lifecycles of usual length; use at "
            "least 1, or 0"
        )


def _replay(config: Config) -> Iterator[str]:
    replay = config.replay
    if (replay.max_uses > 1) != (replay.groups_per_step > 0):
        yield (
            f"replay.max_uses: {replay.max_uses} contradicts replay.groups_per_step = "
            f"{replay.groups_per_step}; for replay set both above 1 and 0, for none leave both out"
        )
    elif replay.max_uses > 1 and config.staleness.max_lag == 0:
        yield (
            f"replay.max_uses: {replay.max_uses}, but with staleness.max_lag = 0 nothing may be used after "
            "its own step; raise max_lag, or set max_uses to 1"
        )


def _autopilot(config: Config) -> Iterator[str]:
    pilot, max_lag = config.autopilot, config.staleness.max_lag
    if not pilot.is_enabled:
        return
    if pilot.min_lag >= max_lag:
        yield (
            f"autopilot.min_lag: {pilot.min_lag} leaves nothing to steer below staleness.max_lag = "
            f"{max_lag}; lower it, or disable the autopilot"
        )
    needed = config.weights.publish_every_steps - 1
    if pilot.min_lag < needed:
        yield (
            f"autopilot.min_lag: {pilot.min_lag} could stop the run, because with "
            f"weights.publish_every_steps = {needed + 1} data lags by {needed}; use at least {needed}"
        )
    if pilot.min_ess_frac + pilot.ess_margin_frac > 1:
        yield (
            f"autopilot.ess_margin_frac: {pilot.ess_margin_frac:g} above min_ess_frac = "
            f"{pilot.min_ess_frac:g} is never reached; lower it"
        )
