"""PDE Discovery: the four actions as a policy meets them, what is told and what never is."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import numpy as np
import pytest

from cod_async.envs.base import StepResult, TaskSpec
from cod_async.envs.pde_discovery import SPEC
from cod_async.envs.pde_discovery.basis import TERMS, Equation, Reaction, evaluate
from cod_async.envs.pde_discovery.env import PdeDiscovery
from cod_async.envs.pde_discovery.equation import parse, read_support, render
from cod_async.envs.pde_discovery.families import FAMILIES, load
from cod_async.envs.pde_discovery.oracle import commit, run_regression, sample
from cod_async.envs.pde_discovery.report import MAX_TABLE_ROWS
from cod_async.envs.pde_discovery.solver import interpolate
from cod_async.envs.pde_discovery.state import decode
from cod_async.envs.pde_discovery.world import WorldKey, field

TRUTH = {"u**5": -1.07, "u**2/(1+u**2)": 1.88}
POINTS = [(x, 0.0) for x in (0.1, 0.2, 0.3, 0.45, 0.6, 0.8)]


def task(position: int = 0, seed: int = 11, pack_seed: int = 1234, pack_size: int = 4) -> TaskSpec:
    return TaskSpec("pde_discovery", "train", {}, {"seed": seed}, pack_seed, position, pack_size)


def started(**options: Any) -> PdeDiscovery:
    environment = PdeDiscovery(SPEC.options("train", options))
    environment.reset(task())
    return environment


def step(environment: PdeDiscovery, response: str) -> StepResult:
    return asyncio.run(environment.step(response))


def do(environment: PdeDiscovery, action: str, inside: str = "") -> StepResult:
    return step(environment, f"I think. <answer><{action}>{inside}</{action}></answer> Done.")


def result_of(result: StepResult) -> str:
    return result.observation.split("## Result of the last action\n")[1].split("\n\n## Next")[0]


def first_task(environment: PdeDiscovery) -> StepResult:
    step(environment, sample(POINTS))
    step(environment, run_regression(["u**5 + u**2/(1+u**2)"]))
    return step(environment, commit(render(environment.fitted_equations[0])))


def test_first_observation_and_rules() -> None:
    environment = PdeDiscovery(SPEC.options("train"))
    assert environment.reset(task(2)) == (
        "Task 3 of 4, step 1 of 6.\n"
        "A new trajectory of the pack's equation is before you. Measure it, and commit the reaction f(u) "
        "that explains the data of the pack.\n\n"
        "## State\n"
        "Points left in this task: 6\n"
        "Data sets of the pack: none\n"
        "Max error of the latest regression in this task: none\n"
        "Earlier commits in this pack: none\n\n"
        "## Next\n"
        "Nothing has been measured in this task yet: sample_pde_data."
    )
    prompt = environment.system_prompt()
    assert all(term in prompt for term in TERMS)
    assert "1 to 2 terms" in prompt and "6 steps" in prompt and "up to 6 points" in prompt
    assert "alpha" not in prompt and "{" not in prompt and "\n## " not in prompt
    assert "1 to 3 terms" in PdeDiscovery(SPEC.options("eval")).system_prompt()
    assert "exactly 2 terms" in started(min_terms=2).system_prompt()
    assert "- alpha:" in started(parity=True).system_prompt()
    assert environment.max_steps == 6 and not environment.is_step_penalized


def test_sampling_is_offered_as_long_as_points_are_left() -> None:
    def offer(result: StepResult) -> str:
        return result.observation.split("## Next\n")[1]

    environment = started()
    assert "sample further" in offer(step(environment, sample(POINTS[:5])))
    assert "sample further" in offer(step(environment, run_regression(["u"])))
    for response in (sample(POINTS[:1]), run_regression(["u"])):
        following = offer(step(environment, response))
        assert "no points are left" in following and "sample" not in following
    environment.reset(task(1))
    following = offer(step(environment, sample(POINTS)))
    assert "no points are left: run_sparse_regression." in following


def test_no_template_is_given_away_in_the_texts() -> None:
    """Examples in prompts and messages are equations that no family has."""
    families = [frozenset(template) for name in FAMILIES for template in load(name).templates]
    prompt = started().system_prompt()
    shown = re.findall(r"<(?:preferred_)?equation>(.*?)</", prompt) + re.findall(r"such as (f.*?) or", prompt)
    environment = started()
    step(environment, sample(POINTS[:1]))
    mistake = result_of(step(environment, run_regression(["cos(u)"])))
    shown += re.findall(r"such as (.*?)\. This", mistake)
    assert len(shown) == 5
    for text in shown:
        support = read_support(text)
        assert support is not None and frozenset(support) not in families


def test_measurements_are_the_solution_with_seeded_noise() -> None:
    environment = started()
    spots = [(0.3, 0.0), (0.5, 0.05), (0.7, 1.0)]
    first = step(environment, sample(spots))
    assert "Measured 3 points as data set ds_t1_1; 3 points are left" in result_of(first)
    assert "x from 0.3 to 0.7 (span 0.4); t from 0 to 1 (span 1, mean 0.35)" in result_of(first)
    step(environment, sample([(0.5, 0.05)]))
    state = decode(environment.snapshot())
    assert state is not None and [one.name for one in state.data_sets] == ["ds_t1_1", "ds_t1_2"]
    key = WorldKey(1234, None, 4, "train", 1, 2, 3.0, 1, 2)
    for counter, (one, chosen) in enumerate(zip(state.data_sets, (spots, spots[1:2]), strict=True), start=1):
        x, t = np.array(chosen).T
        u, y = interpolate(field(key, 0), Reaction([TRUTH]), x, t)
        noise = np.random.default_rng(np.random.SeedSequence([11, 1, counter]))
        assert one.u == tuple(u + noise.normal(0, 0.002, len(u)))
        assert one.y == tuple(y + noise.normal(0, 0.0005, len(y)))
    # Frozen: numpy's bit streams are a part of the environment.
    assert state.data_sets[0].u == pytest.approx(GOLDEN_U, abs=1e-9)
    assert state.data_sets[0].y == pytest.approx(GOLDEN_Y, abs=1e-9)


GOLDEN_U = (1.7605574589, 1.1027582436, 0.0008570861)
GOLDEN_Y = (-16.7391461168, -0.7175976073, 0.0007354042)


def test_points_as_child_elements() -> None:
    environment = started()
    do(
        environment,
        "sample_pde_data",
        "<point_grid><p><x>0.25</x><t>.5</t></p><p x='1e-1'><t>+0</t></p></point_grid>",
    )
    state = decode(environment.snapshot())
    assert state is not None and (state.data_sets[0].x, state.data_sets[0].t) == ((0.25, 0.1), (0.5, 0.0))


@pytest.mark.parametrize(
    ("inside", "words"),
    [
        ("", "one or more point elements"),
        ("<point_grid/>", "one or more point elements"),
        ("<point_grid>0.5 0.5</point_grid>", "one or more point elements"),
        ("<point_grid x='0.5' t='0'/>", "one or more point elements"),
        ("<point_grid><p x='0.5'/></point_grid>", "point 1 must have exactly x and t"),
        ("<point_grid><p x='0.5' t='0' u='1'/></point_grid>", "point 1 must have exactly x and t"),
        ("<point_grid><p>0.5</p></point_grid>", "point 1 must have exactly x and t"),
        ("<point_grid><p x='0' t='0'/></point_grid>", "x of point 1 is 0; it must lie inside 0 < x < 1"),
        ("<point_grid><p x='.5' t='0'/><p x='1' t='0'/></point_grid>", "x of point 2 is 1"),
        ("<point_grid><p x='.5' t='1.01'/></point_grid>", "t of point 1 is 1.01"),
        ("<point_grid><p x='.5' t='nan'/></point_grid>", "t of point 1 is 'nan'"),
        ("<point_grid><p x='half' t='0'/></point_grid>", "x of point 1 is 'half'"),
        ("<point_grid><p x='1e999' t='0'/></point_grid>", "x of point 1 is '1e999'"),
        ("<point_grid><p x='0_5' t='0'/></point_grid>", "finite decimal number"),
        (
            "<point_grid>" + "<p x='.5' t='0'/>" * 7 + "</point_grid>",
            "7 points were asked for, but 6 are left",
        ),
        ("<grid><p x='.5' t='0'/></grid>", "unknown argument 'grid'; arguments are point_grid"),
    ],
)
def test_wrong_points_cost_a_step(inside: str, words: str) -> None:
    environment = started()
    result = do(environment, "sample_pde_data", inside)
    assert not result.is_done and words in result_of(result) and "cost one step" in result_of(result)
    assert "step 2 of 6" in result.observation and "Points left in this task: 6" in result.observation
    state = decode(environment.snapshot())
    assert state is not None and state.num_samplings == 0


def test_the_sample_budget_is_per_task() -> None:
    environment = started()
    step(environment, sample(POINTS[:4]))
    assert "but 2 are left" in result_of(step(environment, sample(POINTS[:3])))
    assert environment.num_points_left == 2
    environment.reset(task(1))
    assert environment.num_points_left == 6


def test_regression_of_the_whole_dictionary() -> None:
    environment = started()
    step(environment, sample(POINTS))
    text = result_of(step(environment, run_regression()))
    assert text.startswith("Fitted 120 sets of terms to 6 points of merged_all; ")
    best = parse(text.split("Best: ")[1].split("\n")[0])
    assert best == environment.fitted_equations[0]
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("ds_t")]
    assert len(rows) == 6 and all(row[0] == "ds_t1_1" for row in rows)
    worst = 0.0
    for name, x, t, u, y, fitted, error in rows:
        assert (name, float(t)) == ("ds_t1_1", 0.0) and float(x) in [spot[0] for spot in POINTS]
        assert float(fitted) == pytest.approx(evaluate(best, np.array([float(u)]))[0], rel=3e-3, abs=1e-3)
        assert float(error) == pytest.approx(float(y) - float(fitted), abs=1e-3 * max(1, abs(float(y))))
        worst = max(worst, abs(float(error)))
    assert worst == pytest.approx(float(text.split("Max error: ")[1].split("\n")[0]), rel=1e-3)


def test_the_hidden_equation_never_shows_when_nothing_is_fitted() -> None:
    """An empty fit predicts 0; in both modes, never the hidden f."""
    for parity in (False, True):
        environment = started(parity=parity)
        step(environment, sample(POINTS))
        text = result_of(do(environment, "run_sparse_regression", "<threshold>1e9</threshold>"))
        assert "Best: f(u) = 0\n" in text
        rows = [line.split(" | ") for line in text.splitlines() if line.startswith("ds_t")]
        assert len(rows) == 6 and all(row[5] == "0" and row[6] == row[4] for row in rows)
        refused = step(environment, commit("f(u) = 0"))
        assert "is not an equation" in result_of(refused)


def test_candidates_and_dictionaries() -> None:
    environment = started()
    step(environment, sample(POINTS))
    step(environment, run_regression(["u - c1*u**3", "tanh(u)", "sin(u)+sin(2*u)+u+u**2"]))
    assert [set(e) for e in environment.fitted_equations if len(e) == 1] == [{"tanh(u)"}]
    assert {frozenset(e) for e in environment.fitted_equations} >= {frozenset({"u", "u**3"})}
    do(environment, "run_sparse_regression", "<dictionary><t>u</t><t>U **3</t></dictionary>")
    assert {frozenset(e) for e in environment.fitted_equations} <= {
        frozenset(s) for s in ({"u"}, {"u**3"}, {"u", "u**3"})
    }
    candidates = "<candidate_equations><e>u - u**3</e><e>u**3</e></candidate_equations>"
    do(environment, "run_sparse_regression", f"<dictionary><t>u</t></dictionary>{candidates}")
    assert [set(e) for e in environment.fitted_equations] == [{"u"}]


def test_data_sets_by_name() -> None:
    environment = started()
    step(environment, sample(POINTS[:2]))
    environment.reset(task(1))
    step(environment, sample(POINTS[:3]))
    for name, num in (
        ("merged_all", 5),
        ("merged", 5),
        ("ds_t1_1", 2),
        ("ds_t2_2", 3),
        ("merged_t1_t1", 2),
        ("merged_t2_t1", 5),
    ):
        environment.reset(task(2))
        text = result_of(do(environment, "run_sparse_regression", f"<dataset_id>{name}</dataset_id>"))
        assert f"to {num} points of {name};" in text


@pytest.mark.parametrize(
    ("inside", "words"),
    [
        ("<dataset_id>ds_t1_2</dataset_id>", "no data set 'ds_t1_2'; there are merged_all, ds_t1_1"),
        ("<dataset_id>merged_t3_t4</dataset_id>", "no data set"),
        ("<dataset_id><a/></dataset_id>", "no data set"),
        ("<threshold>-1</threshold>", "must not be negative"),
        ("<threshold>inf</threshold>", "finite decimal number"),
        ("<alpha>0.1</alpha>", "unknown argument 'alpha'"),
        ("<dictionary>u</dictionary>", "dictionary must hold one or more elements"),
        ("<dictionary><t>u**6</t></dictionary>", "'u**6' is not a term"),
        ("<dictionary><t x='u'/></dictionary>", "dictionary must hold"),
        ("<candidate_equations/>", "candidate_equations must hold"),
        ("<candidate_equations>" + "<e>u</e>" * 9 + "</candidate_equations>", "9 entries; at most 8"),
        ("<candidate_equations><e>u + sinh(u)</e></candidate_equations>", "candidate 'u + sinh(u)'"),
        (
            "<dictionary><t>u</t></dictionary><candidate_equations><e>u**2</e></candidate_equations>",
            "no candidate has a term of the given dictionary",
        ),
    ],
)
def test_wrong_regressions_cost_a_step(inside: str, words: str) -> None:
    environment = started()
    step(environment, sample(POINTS))
    result = do(environment, "run_sparse_regression", inside)
    assert not result.is_done and words in result_of(result) and not environment.has_regression


def test_a_regression_needs_data() -> None:
    assert "there are no data yet" in result_of(step(started(), run_regression()))


def test_alpha_is_inert_and_only_there_in_parity_mode() -> None:
    fitted: list[list[Equation]] = []
    for alpha in ("", "<alpha>0</alpha>", "<alpha>1e6</alpha>"):
        environment = started(parity=True)
        step(environment, sample(POINTS))
        do(environment, "run_sparse_regression", alpha)
        fitted.append(environment.fitted_equations)
    assert fitted[0] and fitted[0] == fitted[1] == fitted[2]
    refused = do(environment, "run_sparse_regression", "<alpha>-1</alpha>")
    assert "alpha is '-1'; it must not be negative" in result_of(refused)


def test_rank_deficiency_shows_unless_in_parity_mode() -> None:
    for parity, condition in ((False, "1e+12; penalty: 10"), (True, "1; penalty: 0")):
        environment = started(parity=parity)
        step(environment, sample(POINTS[:1]))
        text = result_of(
            do(
                environment,
                "run_sparse_regression",
                "<threshold>0</threshold><candidate_equations><e>u+u**3</e></candidate_equations>",
            )
        )
        assert f"Condition number of the best terms: {condition}" in text


def test_commit_of_the_right_structure() -> None:
    environment = started()
    result = first_task(environment)
    fitted = environment.fitted_equations[0]
    assert set(fitted) == set(TRUTH)
    error = sum(abs(fitted[term] - TRUTH[term]) for term in TRUTH) / 2.95
    assert result.is_done and result.finish == "success"
    assert result.raw_reward == pytest.approx(1 / (1 + error), rel=1e-12) and result.raw_reward > 0.9
    assert result.metrics["structure_recovered"] == 1.0 and result.metrics["num_points"] == 6.0
    assert result.metrics["l1_error"] == result.metrics["loss"] == pytest.approx(error, rel=1e-12)
    assert result.metrics["num_terms"] == 2.0 and result.metrics["template_index"] == 39.0
    assert result.metrics["reward_2_terms"] == result.raw_reward
    shown = result.observation + environment.feedback()
    assert "reward" not in shown.lower() and str(TRUTH["u**5"]) + "*" not in shown.replace(render(fitted), "")


def test_commit_of_a_wrong_structure_is_a_failure_with_a_reward() -> None:
    environment = started()
    step(environment, sample(POINTS))
    step(environment, run_regression(["u + tanh(u)"]))
    result = step(environment, commit(render(environment.fitted_equations[0])))
    assert result.is_done and result.finish == "failure" and 0.0 < result.raw_reward < 0.5
    assert "coefficient_error" not in result.metrics and result.metrics["structure_recovered"] == 0.0


def test_any_scored_candidate_may_be_committed() -> None:
    environment = started()
    step(environment, sample(POINTS))
    step(environment, run_regression())
    last = environment.fitted_equations[-1]
    assert len(environment.fitted_equations) > 50 and step(environment, commit(render(last))).is_done


def test_commits_need_data_a_regression_and_a_fitted_equation() -> None:
    environment = started()
    assert "needs data measured in this task" in result_of(step(environment, commit("0.5*u")))
    step(environment, sample(POINTS))
    assert "needs a regression run in this task" in result_of(step(environment, commit("0.5*u")))
    step(environment, run_regression(["u"]))
    refused = result_of(step(environment, commit("0.5*u")))
    assert "f(u) = 0.5*u is not an equation that the latest regression of this task has fitted" in refused
    assert step(environment, commit(render(environment.fitted_equations[0]))).is_done
    environment.reset(task(1))  # data and regressions of earlier tasks do not count
    assert "needs data measured in this task" in result_of(step(environment, commit("0.5*u")))
    step(environment, run_regression(["u"]))  # a regression before the data does
    step(environment, sample(POINTS))
    assert step(environment, commit(render(environment.fitted_equations[0]))).is_done


@pytest.mark.parametrize(
    ("inside", "words"),
    [
        ("", "preferred_equation is missing"),
        ("<preferred_equation/>", "preferred_equation is missing"),
        ("<preferred_equation><e>1*u</e></preferred_equation>", "preferred_equation is missing"),
        ("<preferred_equation>c1*u - c2*u**3</preferred_equation>", "symbols for coefficients"),
        ("<preferred_equation>u - u**3</preferred_equation>", "is not an equation; write it as"),
        ("<preferred_equation>1*u</preferred_equation><note a='1'/>", "note must be a single text"),
        (
            "<preferred_equation>1*u</preferred_equation><uncertain_terms>"
            + "<t>u</t>" * 5
            + "</uncertain_terms>",
            "5 entries; at most 4",
        ),
        (
            "<preferred_equation>1*u</preferred_equation><uncertain_terms><t>v</t></uncertain_terms>",
            "'v' is not a term",
        ),
        ("<preferred_equation>1*u</preferred_equation><why>x</why>", "unknown argument 'why'"),
    ],
)
def test_wrong_commits_cost_a_step(inside: str, words: str) -> None:
    environment = started()
    step(environment, sample(POINTS))
    step(environment, run_regression(["u"]))
    result = do(environment, "update_scientific_context", inside)
    assert not result.is_done and words in result_of(result)


def test_commit_with_note_and_uncertain_terms() -> None:
    environment = started()
    step(environment, sample(POINTS))
    step(environment, run_regression(["u"]))
    equation = render(environment.fitted_equations[0]).upper()
    inside = (
        f"<preferred_equation>{equation}</preferred_equation><note>{'n' * 5000}</note>"
        "<uncertain_terms><t>u</t><t>sin(u)</t></uncertain_terms>"
    )
    assert do(environment, "update_scientific_context", inside).is_done
    assert len(environment.snapshot()) < 1000  # notes are not kept


def test_evidence_of_earlier_tasks() -> None:
    environment = started()
    assert "No equation has been committed" in result_of(do(environment, "summarize_pack_evidence"))
    first_task(environment)
    equation = render(environment.fitted_equations[0])
    observation = environment.reset(task(1))
    assert "Earlier commits in this pack: 1; the last one, in task 1: 6 points, u from " in observation
    assert "Data sets of the pack: ds_t1_1 (6 points)" in observation and "u**5" not in observation
    step(environment, sample(POINTS))
    step(environment, run_regression(["u**3"]))
    step(environment, commit(render(environment.fitted_equations[0])))
    environment.reset(task(2))
    hidden = result_of(do(environment, "summarize_pack_evidence"))
    assert hidden == (
        "2 earlier commits with 2 different equations:\n"
        "equation 1: committed in task 1\nequation 2: committed in task 2"
    )
    shown = result_of(
        do(environment, "summarize_pack_evidence", "<reveal_equations> True</reveal_equations>")
    )
    assert f"equation 1, {equation}: committed in task 1" in shown
    wrong = do(environment, "summarize_pack_evidence", "<reveal_equations>1</reveal_equations>")
    assert "reveal_equations is '1'; it must be true or false" in result_of(wrong)


def test_equal_commits_share_a_slot() -> None:
    environment = started()
    first_task(environment)
    text = render(environment.fitted_equations[0])
    environment.reset(task(0))  # the same task again, as in packs that repeat one task
    step(environment, sample(POINTS))
    inside = (
        "<dataset_id>ds_t1_1</dataset_id><candidate_equations><e>u**5+u**2/(1+u**2)</e></candidate_equations>"
    )
    do(environment, "run_sparse_regression", inside)
    assert step(environment, commit(text)).is_done
    environment.reset(task(1))
    assert "equation 1: committed in task 1, 1" in result_of(do(environment, "summarize_pack_evidence"))


def test_margin_of_a_commit_and_its_evidence() -> None:
    """A commit is compared with other sets of terms, by the data of its own task; the reference is not."""
    for parity in (False, True):
        environment = started(parity=parity)
        first_task(environment)
        environment.reset(task(1))
        step(environment, sample(POINTS[:3]))
        text = result_of(step(environment, run_regression()))
        margin = float(text.split("Margin: ")[1].split("\n")[0])
        best = environment.fitted_equations[0]
        assert len(best) == 2 and margin > 0
        shown = step(environment, commit(render(best))).observation
        state = decode(environment.snapshot())
        assert state is not None
        last = state.commits[-1]
        by_length = sorted(best, key=lambda term: (-len(term), TERMS.index(term)))
        is_confused = parity and by_length != list(best)
        assert f"{last.margin:.4g}" == ("0" if is_confused else f"{margin:.4g}")
        assert (f"Closest with other terms: {render(best)}" in shown) == is_confused
        assert last.num_points == (9 if parity else 3)
        assert max(state.data_sets[0].u) > 2 and (last.u_high > 2) == parity


def test_unreadable_answers_end_the_task() -> None:
    for response, words in (
        ("no tags", "exactly one <answer>"),
        (f"I write <answer> here. {sample(POINTS)}", "exactly one <answer>"),
        ("<answer>sample_pde_data</answer>", "invalid XML"),
        ("<answer><sample_pde_data/><sample_pde_data/></answer>", "invalid XML"),
        ("<answer><!DOCTYPE a [<!ENTITY b 'c'>]><sample_pde_data>&b;</sample_pde_data></answer>", "<!"),
        ("<answer><peek/></answer>", "unknown action 'peek'; actions are sample_pde_data, run_sparse"),
        ("<answer><run_sparse_regression>all</run_sparse_regression></answer>", "must hold its arguments"),
        ("<answer><" + "x" * 9000 + "/></answer>", "unknown action 'xxx"),
        ("<answer>" + "<a>" * 5000 + "</answer>", "invalid XML"),
        ("\ud800\x00" * 100, "exactly one <answer>"),
        ("<answer>" + "y" * 1_000_000 + "</answer>", "invalid XML"),
    ):
        environment = started()
        result = step(environment, response)
        assert result.is_done and result.finish == "format_error" and result.raw_reward == 0.0
        assert words in result.observation and len(result.observation) < 600
        assert environment.feedback() == result.observation
        assert result.metrics["structure_recovered"] == 0.0 and "l1_error" not in result.metrics


def test_out_of_steps() -> None:
    environment = started(max_steps=3)
    step(environment, sample(POINTS))
    result = step(environment, run_regression())
    assert result.observation.endswith("This is the last step; only a commit still counts.")
    result = step(environment, run_regression())
    assert result.is_done and result.finish == "out_of_steps" and result.raw_reward == 0.0
    assert result.metrics["max_error"] > 0
    late = started(max_steps=3)
    assert first_task(late).finish == "success"  # a commit at the last step counts


def test_step_outside_a_task_is_the_callers_mistake() -> None:
    environment = PdeDiscovery(SPEC.options("train"))
    with pytest.raises(RuntimeError, match="reset"):
        step(environment, "x")
    environment = started()
    step(environment, "x")
    with pytest.raises(RuntimeError, match="reset"):
        step(environment, "x")


def test_long_tables_are_cut_to_the_newest_points() -> None:
    environment = PdeDiscovery(SPEC.options("train", {"max_points": 50}))
    for position in range(3):
        environment.reset(task(position))
        step(environment, sample([(0.01 + 0.018 * k, 0.0) for k in range(50)]))
    text = result_of(step(environment, run_regression(["u"])))
    assert f"({150 - MAX_TABLE_ROWS} earlier points are not listed)" in text
    assert text.count("\nds_t") == MAX_TABLE_ROWS and "\nds_t3_3 | 0.892 | " in text
