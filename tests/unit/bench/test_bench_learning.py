"""The learning grid: the lag is exact, runs are paired and repeatable, and the numbers are what they say.

The schedule is tested with a recorder in the place of the student, the harness with a real model after two
steps of bootstrap, the analysis with values worked by hand.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.staleness import analysis
from bench.staleness.grid import append_result, read_results, run_grid
from bench.staleness.harness import Played
from bench.staleness.learning import Evaluation, RunResult, Steps, evaluation, run, train_at_lag
from bench.staleness.report import baseline, blocks, draw, failures_table, fill
from bench.staleness.worlds import RECIPES, WORLDS, RunSpec, config_of, grid_specs, make_spec
from cod_async.errors import ConfigError, NumericsError

SMALL = (
    "bootstrap.num_steps=2",
    "bootstrap.warmup_steps=1",
    "learner.groups_per_step=1",
    "lifecycle.group_size=2",
)


class Recorder:
    """Plays nothing, and writes down what it was asked for."""

    def __init__(self, fails_at: int = -1) -> None:
        self.step = 0
        self.fails_at = fails_at
        self.generated: list[tuple[int, tuple[int, ...]]] = []

    def generate(self, groups: Sequence[int]) -> Played:
        self.generated.append((self.step, tuple(groups)))
        return Played([], [0.25, float(groups[0])], 0.0, self.step)

    def train(self, batch: Played) -> dict[str, float]:
        if self.step == self.fails_at:
            raise NumericsError("loss is nan")
        self.step += 1
        return {"ess_frac": 1.0, "unknown": 2.0}


@settings(max_examples=60, deadline=None)
@given(lag=st.integers(0, 9), num_steps=st.integers(1, 24), groups=st.integers(1, 3))
def test_the_batch_of_every_step_is_exactly_as_old_as_the_lag(lag: int, num_steps: int, groups: int) -> None:
    recorder = Recorder()
    steps, error = train_at_lag(recorder, lag, num_steps, groups)
    assert error == "" and recorder.step == num_steps
    assert steps.versions == [max(step - lag, 0) for step in range(num_steps)]
    # The same groups in the same order at every lag, each of them once, none for steps behind the end.
    assert list(itertools.chain.from_iterable(found for _, found in recorder.generated)) == list(
        range(num_steps * groups)
    )
    assert [row[1] for row in steps.rewards] == [float(step * groups) for step in range(num_steps)]


def test_a_run_that_ends_early_is_a_result() -> None:
    steps, error = train_at_lag(Recorder(fails_at=3), lag=2, num_steps=9, groups_per_step=1)
    assert error == "NumericsError: loss is nan"
    assert steps.versions == [0, 0, 0] and steps.metrics["ess_frac"] == [1.0] * 3
    assert steps.metrics["kl_drift_per_version_nats"] == [None] * 3 and "unknown" not in steps.metrics


def spec_of(lag: int, **changes: Any) -> RunSpec:
    values: dict[str, Any] = {"num_steps": 4, "num_eval_packs": 3, "changes": SMALL, **changes}
    return make_spec("door", values.pop("preset", "paper"), lag, values.pop("seed", 0), **values)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def test_runs_are_repeatable_and_paired_over_lags_and_recipes(models: Path) -> None:
    fresh, stale, again = (run(spec_of(lag), models) for lag in (0, 2, 2))
    assert (stale.steps, stale.before, stale.after) == (again.steps, again.before, again.after)
    other = run(spec_of(2, preset="topr"), models)
    for result in (fresh, stale, other):
        assert result.error == "" and len(result.steps.rewards) == 4
        assert result.before == fresh.before and result.steps.rewards[0] == fresh.steps.rewards[0]
    assert len(list(models.iterdir())) == 1  # one starting model for all of them
    # At lag 0 engine and trainer have the same weights. Later every token is as old as it should be.
    assert all(value is not None and abs(value) < 1e-6 for value in fresh.steps.metrics["mismatch_k3_nats"])
    assert fresh.steps.metrics["kl_drift_per_version_nats"] == [None] * 4
    assert stale.steps.versions == [0, 0, 0, 1]
    drift, kl = (stale.steps.metrics[name] for name in ("kl_drift_per_version_nats", "staleness_k3_nats"))
    assert drift[0] is None
    for step, lag in ((1, 1), (2, 2), (3, 2)):
        one, whole = drift[step], kl[step]
        assert one is not None and whole is not None and one * lag == pytest.approx(whole, rel=1e-3)


def test_another_seed_is_another_model_and_other_packs(models: Path) -> None:
    first, second = (run(spec_of(0, num_steps=1, seed=seed), models) for seed in (0, 7))
    assert first.steps != second.steps and len(list(models.glob("start-*"))) >= 2


def test_a_grid_goes_on_where_it_stopped_and_survives_a_dying_worker(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.jsonl"
    good = spec_of(0, num_steps=1)
    bad = msgspec.structs.replace(good, world="nowhere")
    assert run_grid([bad, good], out, models, num_jobs=1) == 1
    (line,) = read_results(out)
    assert line.spec == good and msgspec.structs.replace(line, wall_s=0, cpu_s=0) == msgspec.structs.replace(
        run(good, models), wall_s=0, cpu_s=0
    )
    before = out.read_bytes()
    assert run_grid([good], out, models, num_jobs=1) == 0 and out.read_bytes() == before


def test_configurations_are_those_of_the_repository() -> None:
    specs = grid_specs("door", ["paper", "ppo"], [0, 32], [0, 1])
    assert [(s.seed, s.preset, s.lag) for s in specs] == list(
        itertools.product((0, 1), ("paper", "ppo"), (0, 32))
    )
    assert {s.lag: s.num_steps for s in specs} == {0: WORLDS["door"].min_steps, 32: 320}
    config = config_of(spec_of(8, preset="m2po", changes=("loss.ess_lr_power=0.5",), lr=2e-3, seed=5))
    assert (config.loss.clip, config.loss.ess_lr_power, config.learner.lr) == ("m2po", 0.5, 2e-3)
    assert (config.run.seed, config.staleness.max_lag, config.lifecycle.group_size) == (5, 8, 8)
    assert len(RECIPES) == 14 and all(config_of(spec_of(4, preset=name)) for name in RECIPES)
    with pytest.raises(ConfigError, match="eps_low"):
        config_of(spec_of(0, changes=("loss.eps_low=-1.0",)))
    assert spec_of(0).key != spec_of(0, seed=1).key and spec_of(0).recipe.startswith("paper bootstrap")


# --------------------------------------------------------------------------------------------------- analysis


def result_of(
    late: Sequence[float],
    *,
    lag: int = 0,
    seed: int = 0,
    end: float | None = None,
    error: str = "",
    **of: Any,
) -> RunResult:
    """Return a run whose training had these late rewards, and that ended at ``end``."""
    end = late[-1] if end is None else end
    steps = Steps()
    for number, value in enumerate(late):
        batch = Played([], [0.25, value, value], 0.0, max(number - lag, 0))
        steps.add(batch, {"ess_frac": 1.0 / (1 + number)} | ({"staleness_k3_nats": 0.1 * lag} if lag else {}))
    spec = make_spec("door", "paper", lag, seed, num_steps=len(late), **of)
    before = Evaluation(num_packs=2, rewards=[0.25] * 3, late=0.25, late_sem=0.0, update_reward=0.0)
    after = msgspec.structs.replace(before, rewards=[0.25, end, end], late=end)
    return RunResult(spec=spec, before=before, after=after, steps=steps, error=error, wall_s=1.0, cpu_s=1.0)


def test_curves_bars_and_falls_by_hand() -> None:
    risen = result_of([0.2] * 10 + [1.0] * 10)
    assert analysis.curve(risen.steps.rewards) == pytest.approx([0.2 + 0.08 * k for k in range(11)])
    # .6 is reached by the window with five of the ten steps at 1: after fifteen steps.
    assert WORLDS["door"].bar == 0.6 and analysis.steps_to_bar(risen) == 15
    assert analysis.deepest_fall(risen) == 0.0
    fallen = result_of([1.0] * 10 + [0.0] * 5)
    assert analysis.deepest_fall(fallen) == pytest.approx(0.5) and analysis.steps_to_bar(fallen) == 10
    flat = result_of([0.25] * 12)
    assert analysis.steps_to_bar(flat) is None and analysis.curve(flat.steps.rewards[:9]) == []
    assert [analysis.outcome(r) for r in (risen, fallen, flat)] == ["learned", "unlearned", "slow"]
    assert analysis.outcome(result_of([1.0] * 10, error="NumericsError: nan")) == "stopped"


def test_evaluations_by_hand() -> None:
    found = evaluation([[0.0, 1.0, 0.5], [1.0, 0.5, 0.0], [0.5, 0.0, 0.0]], -0.5)
    assert found.rewards == [0.5, 0.5, pytest.approx(0.5 / 3, rel=1e-4)]
    late = [0.75, 0.25, 0.0]  # mean 1/3, variance 7/48
    assert found.late == pytest.approx(sum(late) / 3, rel=1e-4)
    assert found.late_sem == pytest.approx(math.sqrt(7 / 48 / 3), rel=1e-4)


def test_medians_leave_out_the_steps_before_the_lag_was_full() -> None:
    stale = result_of([0.5] * 5, lag=2)
    assert analysis.metric_median(stale, "ess_frac") == pytest.approx(1 / 4)  # of 1/3, 1/4, 1/5
    assert analysis.metric_lowest(stale, "ess_frac") == pytest.approx(1 / 5)
    assert analysis.metric_median(stale, "grad_norm") is None


def student_t_below(x: float, df: int) -> float:
    """Integrate the density of Student's t from 0 to x with Simpson's rule, and add one half."""
    n = 20_000
    scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))

    def density(at: float) -> float:
        return scale * (1 + at * at / df) ** (-(df + 1) / 2)

    inner = sum((4 if k % 2 else 2) * density(k * x / n) for k in range(1, n))
    return 0.5 + (density(0) + inner + density(x)) * x / n / 3


@pytest.mark.parametrize(("level", "quantiles"), [(0.95, analysis.T_95), (0.975, analysis.T_975)])
def test_quantiles_against_the_integral_of_the_density(level: float, quantiles: Sequence[float]) -> None:
    assert len(quantiles) == 15
    for df, quantile in enumerate(quantiles, 1):
        assert student_t_below(quantile, df) == pytest.approx(level, abs=5e-5)


def test_bounds_by_hand() -> None:
    # Mean 2, standard deviation 1, three values: 2 + 2.920 / sqrt(3).
    assert analysis.bound_of([1.0, 2.0, 3.0]) == pytest.approx(3.6859, abs=1e-4)
    assert analysis.bound_of([1.0]) == math.inf
    assert analysis.bound_of([1.0] * 40) == 1.0


def test_pairs_are_runs_that_differ_in_lag_alone() -> None:
    rise = [0.2] * 10 + [1.0] * 30
    late_rise = [0.2] * 14 + [1.0] * 26
    fresh = [result_of(rise, seed=seed, end=0.9, num_eval_packs=512) for seed in (0, 1, 2)]
    stale = [
        result_of(late_rise, lag=4, seed=seed, end=end, num_eval_packs=512)
        for seed, end in ((0, 0.9), (1, 0.88), (2, 0.89), (3, 0.1))
    ]
    other = result_of(rise, lag=4, seed=0, end=0.0, num_eval_packs=512, lr=1e-3)
    (found,) = analysis.pair([*stale, *fresh, other])
    assert (found.lag, found.seeds) == (4, [0, 1, 2])
    assert found.loss == pytest.approx(0.01) and found.bound == pytest.approx(0.01 + 0.01 * 2.92 / 3**0.5)
    assert found.steps == [19] * 3 and found.steps_0 == [15] * 3
    assert found.more_steps == (19.0, 1.25 * 15 + 4) and found.is_met
    never = result_of([0.2] * 40, lag=4, seed=0, end=0.9, num_eval_packs=512)
    (found,) = analysis.pair([never, *stale[1:], *fresh])
    assert found.more_steps is None and not found.is_met


# ------------------------------------------------------------------------------------------- files and report


def test_a_line_that_a_crash_cut_off_counts_as_not_done(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "grid.jsonl"
    assert read_results(path) == []
    lines = [msgspec.json.encode(result_of([0.5] * 3, seed=seed)) for seed in (0, 1)]
    append_result(path, lines[0])
    with path.open("ab") as file:
        file.write(lines[1][:100])
    assert [result.spec.seed for result in read_results(path)] == [0]
    append_result(path, lines[1])
    assert [result.spec.seed for result in read_results(path)] == [0, 1]


def test_reports_of_runs_that_learn_collapse_and_stop(tmp_path: Path) -> None:
    rise = [0.2] * 10 + [1.0] * 30
    results = [
        result_of(rise, seed=0, num_eval_packs=8),
        result_of(rise, lag=4, seed=0, num_eval_packs=8),
        result_of([*rise, *[0.1] * 20], lag=16, seed=0, num_eval_packs=8),
        result_of([0.2] * 12, lag=32, seed=0, error="NumericsError: step 12: loss nan", num_eval_packs=8),
        *(result_of(rise, lag=lag, seed=seed, num_eval_packs=512) for lag in (0, 16) for seed in range(9)),
    ]
    found = blocks(results)
    assert (
        "| `paper` | 1 | 1.00 | 1.00 | **.100** (worst .100, 0 of 1) | **.200** (worst .200, 0 of 1) |"
        in (found["LATE_DOOR"])
    )
    assert "| `paper` | 1 | 15 | 15 | 15 | never |" in found["STEPS_DOOR"]
    failures = failures_table(results)
    assert failures.count("\n") == 3  # titles, rule, and the two that failed
    assert "collapsed" in failures and "stopped" in failures and "loss nan" in failures
    planned, all_seeds = found["PAIRED"].splitlines()[2:]
    assert "| 16 | 8 |" in planned and "| 16 | 9 |" in all_seeds and planned.endswith("| yes |")
    page, missing = fill("a\n<!-- PAIRED -->\nold\n<!-- /PAIRED -->\nb\n", found)
    assert page == f"a\n<!-- PAIRED -->\n{found['PAIRED']}\n<!-- /PAIRED -->\nb\n"
    assert missing == [name for name in found if name != "PAIRED"]
    kept = msgspec.json.decode(msgspec.json.encode(baseline(results)))
    assert len(kept["runs"]) == 22 and kept["runs"][2]["outcome"] == "unlearned"
    paths = draw(results, tmp_path)
    assert [path.name for path in paths] == ["lag_door_curves.png", "lag_door_summary.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
