"""The paper's runs: every shipped file says what the paper says, and can be planned without the weights."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from cod_async.cli import main
from cod_async.config import Config, load_config
from cod_async.config.check import check
from cod_kernels.segment_loss.reference import LossInputs, LossOptions, loss_gradient_and_metrics

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "configs" / "paper"
FILES = sorted(path for path in FOLDER.glob("*.toml") if not path.stem.endswith("_opd"))


class Row(NamedTuple):
    """One training row of the paper and of its released configurations."""

    environments: tuple[tuple[str, str], ...]
    model: str
    lengths: tuple[int, int, int]
    """Response, whole sequence, and what the prompt asks for."""
    experiences: int
    num_packs: int
    save_every: int
    warmup: int = 0
    solve_penalty: float = 0.1
    red: str = "bisection"
    is_weighted: bool = False
    tasks: int = 4


LAKE, ALCHEMY = ("frozen_lake_obscure", "easy"), ("alchemy_random", "easy")
SMALL, LARGE = "Qwen3-8B", "Qwen3.6-27B"
SHORT = (2000, 12000, 1000)
ROWS = {
    "frozen_lake_obscure": Row((LAKE,), SMALL, SHORT, 1440, 12_500, 100),
    "frozen_lake_obscure_task_by_task": Row((LAKE,), SMALL, SHORT, 1440, 50_000, 100, tasks=1),
    "mixed_flobs_alchran": Row((LAKE, ALCHEMY), SMALL, SHORT, 1440, 25_000, 100),
    "alchemy": Row((ALCHEMY,), SMALL, SHORT, 1440, 12_500, 100),
    "alchemy_abl_no_adaptive_red": Row((ALCHEMY,), SMALL, SHORT, 1440, 12_500, 100, red="off"),
    "alchemy_abl_no_adaptive_red_is": Row(
        (ALCHEMY,), SMALL, SHORT, 1440, 12_500, 100, red="off", is_weighted=True
    ),
    "grid_navigation": Row(
        (("grid_navigation", "train_8b"),), SMALL, SHORT, 1440, 12_500, 100, warmup=10, solve_penalty=0
    ),
    "grid_navigation_27b": Row(
        (("grid_navigation", "train_27b"),), LARGE, (3999, 26000, 4000), 1440, 12_500, 20, warmup=10,
        solve_penalty=0,
    ),
    "optimal_control": Row(
        (("optimal_control", "hard"),), LARGE, (4000, 40000, 4000), 480, 12_500, 100, solve_penalty=0
    ),
    "pde_discovery": Row(
        (("pde_discovery", "train"),), LARGE, (4000, 22001, 4000), 1440, 4_800, 25, solve_penalty=0
    ),
}  # fmt: skip


def load(path: Path, tmp_path: Path) -> Config:
    return load_config([path], [f'run.output_dir="{tmp_path}"'])


def test_every_row_has_a_file_and_a_line_in_the_readme() -> None:
    assert [path.stem for path in FILES] == sorted(ROWS)
    table = (FOLDER / "README.md").read_text()
    assert all(f"| `{name}.toml` |" in table for name in ROWS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_numbers_are_those_of_the_paper(path: Path, tmp_path: Path) -> None:
    config, row = load(path, tmp_path), ROWS[path.stem]
    assert tuple((e.name, e.preset) for e in config.environments) == row.environments
    assert {e.weight for e in config.environments} == {1.0} and not any(
        e.options for e in config.environments
    )
    assert Path(config.model.path).name == row.model
    assert Path(config.model.shape) == ROOT / "configs" / "models" / row.model.lower()
    lifecycle, learner, loss, credit = config.lifecycle, config.learner, config.loss, config.credit_assignment
    response, sequence, notice = row.lengths
    assert (lifecycle.pack_size, lifecycle.group_size) == (row.tasks, 8)
    assert lifecycle.carry == ("none" if row.tasks == 1 else "hint")
    assert (lifecycle.max_response_tokens, config.model.max_context_tokens) == (response, sequence)
    assert lifecycle.length_notice_tokens == notice
    if lifecycle.has_updates:
        assert (lifecycle.max_hint_tokens, lifecycle.hint_penalty) == (response, 0.1)
    assert lifecycle.solve_penalty == row.solve_penalty
    assert lifecycle.solve_length_full_tokens == lifecycle.hint_length_full_tokens == 0
    assert (learner.lr, learner.warmup_steps, learner.grad_clip) == (1e-6, row.warmup, 1.0)
    assert (learner.betas, learner.weight_decay) == ((0.9, 0.999), 0.01)
    assert learner.checkpoint_every_steps == row.save_every
    assert learner.keep_checkpoints * row.save_every >= config.run.num_steps + 2 * row.save_every
    assert (loss.clip, loss.eps_low, loss.eps_high, loss.kl_coef) == ("one_side", 0.2, 0.2, 0.0)
    assert loss.behavior_weight == ("truncated" if row.is_weighted else "none")
    assert (credit.style, credit.baseline, credit.std, credit.red) == ("mean", "group_mean", "none", row.red)
    assert (credit.red_level, credit.parity) == ("batch", row.red == "bisection")
    assert (config.staleness.max_lag, config.weights.publish_every_steps) == (20, 4)
    assert (config.engine.temperature, config.engine.top_p) == (1.0, 1.0)
    assert config.run.num_steps == row.num_packs // learner.groups_per_step


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_is_planned_without_the_weights(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no models/
    assert check(load(path, tmp_path), for_train=False) == []
    assert main(["train", str(path), "--dry-run", "--json"]) == 0
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)["plan"]
    row, per_step = ROWS[path.stem], plan["per_step"]
    segments = 8 * (2 * row.tasks - 1)
    assert per_step["lifecycles"] == 8 * per_step["packs"]
    assert per_step["segments"] == segments * per_step["packs"]
    assert 0 < per_step["tokens"] < per_step["tokens_at_most"]
    assert plan["model"]["is_there"] is False
    assert plan["model"]["num_parameters"] == {SMALL: 8_190_735_360, LARGE: 26_895_998_464}[row.model]
    # Whole groups come as near to the batch as half a group, give or take what 64 tasks leave to chance.
    group = per_step["responses"] / per_step["packs"]
    assert abs(per_step["responses"] - row.experiences) <= group / 2 + 0.07 * row.experiences
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_run_without_the_weights_is_refused_by_name(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    model = ROWS[path.stem].model
    assert lines[0].startswith(f'model.path: no such folder, found "models/{model}"; put the model ')
    assert len(lines) == 1
    assert list(tmp_path.iterdir()) == []


def test_ablations_differ_in_what_they_ablate() -> None:
    def leaves(name: str) -> set[tuple[str, str]]:
        tree = tomllib.loads((FOLDER / f"{name}.toml").read_text())
        del tree["run"]["name"]
        return {
            (f"{section}.{key}", str(value))
            for section, table in tree.items()
            for key, value in (table.items() if isinstance(table, dict) else enumerate(table))
        }

    whole, without, weighted = (
        leaves(f"alchemy{end}") for end in ("", "_abl_no_adaptive_red", "_abl_no_adaptive_red_is")
    )
    assert {key for key, _ in whole ^ without} == {
        f"credit_assignment.{key}" for key in ("red", "red_level", "parity")
    }
    assert {key for key, _ in without ^ weighted} == {"loss.behavior_weight", "loss.weight_cap"}


def test_the_importance_weighted_ablation_is_the_clip_times_the_ratio(tmp_path: Path) -> None:
    """Its gradient is keep * A * ratio, as the paper's ablation has it, which is also that of PPO's clip."""
    loss = load(FOLDER / "alchemy_abl_no_adaptive_red_is.toml", tmp_path).loss
    generator = torch.Generator().manual_seed(3)
    behavior = -3 * torch.rand(400, generator=generator)
    current = behavior + 0.6 * torch.randn(400, generator=generator)
    advantages = torch.randn(400, generator=generator)

    inputs = LossInputs(current, behavior, torch.arange(400), advantages, torch.full((400,), 1 / 400))

    def gradient(clip: str, **weight: Any) -> Tensor:
        options = LossOptions(clip=clip, eps_low=loss.eps_low, eps_high=loss.eps_high, **weight)
        return loss_gradient_and_metrics(inputs, options)[1]

    ratio = (current - behavior).exp()
    keep = ((advantages >= 0) & (ratio <= 1.2)) | ((advantages <= 0) & (ratio >= 0.8))
    expected = -(keep * advantages * ratio) / 400
    assert 0.1 < keep.float().mean() < 0.9
    weighted = gradient(loss.clip, behavior_weight=loss.behavior_weight, weight_cap=loss.weight_cap)
    torch.testing.assert_close(weighted, expected)
    torch.testing.assert_close(gradient("ppo"), expected)
