"""CoD-Deploy against engines whose answers are known: curves, controls and their pairing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cod_async.bootstrap.run import run_bootstrap
from cod_async.config.schema import (
    BootstrapConfig,
    Config,
    EngineConfig,
    EnvironmentConfig,
    LifecycleConfig,
    ModelConfig,
)
from cod_async.engines.base import Completion, EngineCounters, SamplingParams
from cod_async.errors import EnvironmentInputError, InputError
from cod_async.evaluate.deploy import SPLITS, EvaluationRequest, evaluate, evaluate_request
from cod_async.evaluate.jobs import EvaluationJob, run_jobs
from cod_async.evaluate.request import plan
from cod_async.lifecycle.rendering import load_renderer
from cod_async.lifecycle.segment import Version, VersionSpan


def config_for(preset: str, **lifecycle: Any) -> Config:
    settings = {"max_response_tokens": 6, "max_hint_tokens": 12, "solve_penalty": 0.0} | lifecycle
    return Config(
        environments=(EnvironmentConfig(name="hidden_buttons", preset=preset),),
        lifecycle=LifecycleConfig(**settings),
        model=ModelConfig(max_context_tokens=96),
        engine=EngineConfig(max_running=8),
        bootstrap=BootstrapConfig(num_steps=1, documents_per_step=4, qa_loss_gate=100.0),
    )


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untrained models: the tokenizer is what matters where a scripted engine answers."""
    root = tmp_path_factory.mktemp("models")
    for preset in ("door", "cross"):
        run_bootstrap(config_for(preset), root / preset)
    return {preset: root / preset for preset in ("door", "cross")}


def ask(preset: str, **changes: Any) -> EvaluationRequest:
    settings: dict[str, Any] = {"num_packs": 6, "lifecycles_per_pack": 2, "seed": 1}
    return EvaluationRequest(environment="hidden_buttons", preset=preset, **(settings | changes))


class ScriptedEngine:
    """Presses the button that the shown hint names else button 1; notes every fact it has seen."""

    def __init__(
        self, model: Any, config: EngineConfig, *, max_context_tokens: int, version: Version, run_dir: Path
    ):
        self.counters = EngineCounters()
        self.version = version
        self.max_context_tokens = max_context_tokens
        self.is_closed = False
        self.prompts: list[str] = []
        self.renderer = load_renderer(run_dir)

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        prompt = self.renderer.tokenizer.decode(token_ids)
        self.prompts.append(prompt)
        answer = self.write(prompt) if "Write" in prompt else self.press(prompt)
        ids = [*self.renderer.tokenizer.encode(answer), self.renderer.end_of_turn_id]
        return Completion(
            token_ids=ids,
            logprobs=[-0.5] * len(ids),
            versions=(VersionSpan(self.version, len(ids)),),
            finish="stop",
        )

    @staticmethod
    def press(prompt: str) -> str:
        goal = prompt.split("goal ")[1].split()[0]
        facts = dict(word.split("=")[::-1] for word in prompt.split("goal")[0].split() if "=" in word)
        return f"{goal} : {facts.get(goal, '1')}"

    @staticmethod
    def write(prompt: str) -> str:
        facts = dict.fromkeys(word for word in prompt.split() if "=" in word)
        return f"[ {' '.join(facts) or 'null'} ]"

    async def close_session(self, session: str) -> None:
        return None

    async def aclose(self) -> None:
        self.is_closed = True


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[ScriptedEngine]:
    made: list[ScriptedEngine] = []

    def make(*args: Any, **kwargs: Any) -> ScriptedEngine:
        made.append(ScriptedEngine(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr("cod_async.engines.embedded.EmbeddedEngine", make, raising=False)
    return made


def curve(report: Any) -> list[float]:
    return [row.mean for row in report.rows]


def test_a_player_that_reads_hints_shows_the_effect_and_its_controls(
    model_dirs: dict[str, Path], scripted: list[ScriptedEngine]
) -> None:
    request = ask(
        "door", controls=("normal", "blanked", "swapped", "truth"), num_packs=24, lifecycles_per_pack=1
    )
    normal, blanked, swapped, truth = evaluate_request(model_dirs["door"], config_for("door"), request)
    first = curve(normal)[0]
    # Button 1 is right in some worlds; after one press the note names the right one.
    assert 0 < first < 0.6
    assert curve(normal)[1:] == [1.0, 1.0, 1.0]
    assert normal.gap == pytest.approx(1 - first)
    assert curve(blanked) == [first] * 4 and blanked.gap == 0.0
    # Another pack's note names another button, always a wrong one.
    assert curve(swapped) == [first, 0.0, 0.0, 0.0]
    assert curve(truth) == [1.0] * 4
    for report in (normal, blanked, swapped, truth):
        assert report.well_formed_frac == 1.0
        assert report.steps_mean == 1.0
        assert {row.n for row in report.rows} == {24}
    assert scripted[0].is_closed


def test_the_writer_keeps_its_own_history(
    model_dirs: dict[str, Path], scripted: list[ScriptedEngine]
) -> None:
    evaluate_request(model_dirs["door"], config_for("door"), ask("door", controls=("blanked",)))
    solves = [prompt for prompt in scripted[0].prompts if "Write" not in prompt]
    updates = [prompt for prompt in scripted[0].prompts if "Write" in prompt]
    assert all("null" in prompt.split("goal")[0] for prompt in solves)
    # updates 1 and 2 of every lifecycle still see the fact noted before
    assert sum("=" in prompt.split("Log")[0] for prompt in updates) == len(updates) * 2 // 3


def test_swapped_alone_adds_the_normal_pass_but_reports_itself_only(
    model_dirs: dict[str, Path], scripted: list[ScriptedEngine]
) -> None:
    reports = evaluate_request(model_dirs["cross"], config_for("cross"), ask("cross", controls=("swapped",)))
    assert [report.control for report in reports] == ["swapped"]
    assert reports[0].num_lifecycles == 12


def test_splits_have_different_worlds_and_equal_seeds_equal_packs(model_dirs: dict[str, Path]) -> None:
    config = config_for("cross")
    worlds = {
        split: [pack[0].pack_seed for pack in plan(ask("cross", split=split, num_packs=20), config)]
        for split in SPLITS
    }
    again = [pack[0].pack_seed for pack in plan(ask("cross", num_packs=20), config)]
    assert worlds["train"] == again
    assert not set(worlds["train"]) & set(worlds["held_out"])
    other = [pack[0].pack_seed for pack in plan(ask("cross", num_packs=20, seed=2), config)]
    assert other != again


def test_without_carry_there_are_no_updates(
    model_dirs: dict[str, Path], scripted: list[ScriptedEngine]
) -> None:
    (report,) = evaluate_request(model_dirs["door"], config_for("door", carry="none"), ask("door"))
    assert {row.mode for row in report.rows} == {"none"}
    assert len(set(curve(report))) == 1
    assert not any("Write" in prompt for prompt in scripted[0].prompts)


def test_progress_ends_at_the_total(model_dirs: dict[str, Path], scripted: list[ScriptedEngine]) -> None:
    told: list[dict[str, Any]] = []
    evaluate_request(model_dirs["door"], config_for("door"), ask("door"), told.append)
    assert told[-1] == {"split": "train", "control": "normal", "done": 12, "total": 12}


def test_wrong_requests_are_named(model_dirs: dict[str, Path]) -> None:
    config = config_for("door")
    with pytest.raises(InputError, match="num_packs 0"):
        evaluate_request(model_dirs["door"], config, ask("door", num_packs=0))
    with pytest.raises(InputError, match="each once"):
        evaluate_request(model_dirs["door"], config, ask("door", controls=("blanked", "blanked")))
    with pytest.raises(EnvironmentInputError, match="no preset"):
        evaluate_request(model_dirs["door"], config, ask("maze"))
    with pytest.raises(InputError, match="other hidden worlds"):
        evaluate_request(model_dirs["door"], config, ask("door", num_packs=1, controls=("swapped",)))


def test_the_real_engine_and_separate_processes_agree(model_dirs: dict[str, Path]) -> None:
    config = config_for("door")
    told: list[dict[str, Any]] = []
    jobs = [
        EvaluationJob(
            model_dir=str(model_dirs["door"]),
            config=config,
            request=ask("door", split=split, controls=("normal", "blanked"), num_packs=4),
        )
        for split in SPLITS
    ]
    here = run_jobs(jobs)
    there = run_jobs(jobs, num_processes=2, on_progress=told.append)

    def timeless(reports: list[list[Any]]) -> list[Any]:
        return [[{**fields_of(report), "wall_s": 0.0} for report in job] for job in reports]

    assert timeless(here) == timeless(there)
    assert {values["job"] for values in told} == {0, 1}
    single = evaluate(
        model_dirs["door"],
        config,
        environment="hidden_buttons",
        preset="door",
        num_packs=4,
        seed=1,
    )
    assert single["reward_by_position"] == [{"mean": row.mean, "sem": row.sem} for row in here[0][0].rows]
    assert (single["mode"], single["control"]) == ("cod", "normal")


def fields_of(report: Any) -> dict[str, Any]:
    return {name: getattr(report, name) for name in report.__struct_fields__}


def test_wrong_jobs_are_listed_before_anything_starts(model_dirs: dict[str, Path]) -> None:
    requests = (ask("maze"), ask("door"), ask("door", num_packs=0))
    jobs = [
        EvaluationJob(model_dir=str(model_dirs["door"]), config=config_for("door"), request=request)
        for request in requests
    ]
    with pytest.raises(InputError) as caught:
        run_jobs(jobs, num_processes=2)
    assert len(caught.value.problems) == 2


def test_a_worker_passes_on_what_is_wrong(tmp_path: Path) -> None:
    job = EvaluationJob(model_dir=str(tmp_path / "nowhere"), config=config_for("door"), request=ask("door"))
    with pytest.raises(InputError, match="nowhere"):
        run_jobs([job, job], num_processes=2)
