"""One line takes another recipe, the resolved configuration shows its numbers, contradictions are refused."""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_type_hints

import msgspec
import pytest

from cod_async.config import load_config
from cod_async.config.check_loss import loss_problems
from cod_async.config.load import apply_overrides, save_resolved, to_tree
from cod_async.config.loss import LossConfig
from cod_async.config.presets import NEUTRAL, PRESETS, preset_values
from cod_async.config.schema import Config

BASE = '[[environments]]\nname = "hidden_buttons"\npreset = "door"\n'


def made(tmp_path: Path, *overrides: str, text: str = "") -> Config:
    path = tmp_path / "c.toml"
    path.write_text(BASE + text)
    return load_config([path], overrides)


def test_presets_and_schema_name_the_same_things() -> None:
    assert get_args(get_type_hints(LossConfig)["preset"]) == tuple(PRESETS)
    assert set(NEUTRAL) | {"preset"} == {field.name for field in msgspec.structs.fields(LossConfig)}
    for name, says in PRESETS.items():
        assert set(says) <= set(NEUTRAL), name


@pytest.mark.parametrize("name", PRESETS)
def test_one_line_is_a_recipe_without_contradictions(tmp_path: Path, name: str) -> None:
    config = made(tmp_path, f"loss.preset={name}")
    assert to_tree(config)["loss"] == {"preset": name} | preset_values(name)
    assert config.loss == LossConfig(preset=name)  # type: ignore[arg-type]
    assert list(loss_problems(config)) == []
    # What was resolved is the same configuration again.
    again = load_config([save_resolved(config, tmp_path)])
    assert again == config


def test_overrides_stay_and_old_presets_go(tmp_path: Path) -> None:
    config = made(tmp_path, text='[loss]\npreset = "gspo"\nkl_coef = 0.1\n')
    assert (config.loss.eps_high, config.loss.kl_coef, config.loss.ratio) == (4e-4, 0.1, "segment")
    # --set on a resolved tree, where every number of gspo is written down: only kl_coef was said beside it.
    other = apply_overrides(config, ["loss.preset=cispo"])
    assert to_tree(other)["loss"] == {"preset": "cispo"} | preset_values("cispo") | {"kl_coef": 0.1}
    # A later file does the same, and an override may stand in front of the preset that it belongs to.
    resolved = save_resolved(config, tmp_path)
    later = tmp_path / "later.toml"
    later.write_text('[loss]\npreset = "ppo"\n')
    config = load_config([resolved, later], ["loss.eps_low=0.3", "loss.preset=m2po"])
    assert to_tree(config)["loss"] == {"preset": "m2po"} | preset_values("m2po") | {
        "kl_coef": 0.1,
        "eps_low": 0.3,
    }


@pytest.mark.parametrize(
    ("overrides", "path", "part"),
    [
        (["loss.preset=gspo", "loss.behavior_weight=truncated", "loss.proximal=start"],
         "loss.behavior_weight", 'weighs tokens, which contradicts loss.ratio = "segment"'),
        (["loss.preset=gspo", "loss.clip=none"], "loss.ratio", 'no meaning with clip "none"'),
        (["loss.preset=dppo_tv", "loss.ratio=segment"], "loss.ratio", 'no meaning with clip "dppo_tv"'),
        (["loss.preset=ppo", "loss.behavior_weight=masked"], "loss.behavior_weight", "the ratio twice"),
        (["loss.preset=topr", "loss.behavior_weight=truncated", "loss.weight_level=segment"],
         "loss.behavior_weight", "counts the ratio twice"),
        (["loss.preset=tis_segment", "loss.segment_weight=lifecycle_product"],
         "loss.segment_weight", "is refused: the logarithm of a product over a whole lifecycle varies"),
        (["loss.dual_clip=3"], "loss.dual_clip", 'no meaning with clip "one_side"'),
        (["loss.preset=ppo", "loss.dual_clip=1"], "loss.dual_clip", "above 1"),
        (["loss.preset=m2po", "loss.proximal=interpolated"], "loss.proximal", "contradicts"),
        (["loss.clip=none", "loss.proximal=interpolated"], "loss.proximal", "no use"),
        (["loss.preset=ppo", "loss.proximal=start"], "loss.proximal", "makes every ratio 1"),
        (["loss.weight_level=segment"], "loss.weight_level", "no effect"),
        (["loss.weight_cap=3"], "loss.weight_cap", "no effect"),
        (["loss.preset=tis_token", "loss.weight_floor=0.5"], "loss.weight_floor", "masked"),
        (["loss.preset=icepop", "loss.weight_cap=0.5"], "loss.weight_cap", "not above"),
        (["loss.preset=geo_mask", "loss.mask_cap=0.8"], "loss.mask_cap", "not above"),
        (["loss.mask_drift=0.1"], "loss.mask_drift", "no effect"),
        (["loss.tv_bound=0.1"], "loss.tv_bound", "no effect"),
        (["loss.second_moment=0.1"], "loss.second_moment", "no effect"),
        (["loss.preset=tis_token", "loss.segment_weight=product"], "loss.segment_weight", "no effect"),
        (["loss.preset=ppo", "loss.eps_low=1.5"], "loss.eps_low", "under 1"),
        (["loss.aggregation=fixed_length"], "loss.fixed_length_tokens", "missing"),
        (["loss.preset=topr", "loss.eps_high=0.3"], "loss.eps_high", "no effect"),
        (["loss.preset=dppo_tv", "loss.eps_low=0.3"], "loss.eps_low", "no effect"),
        (["loss.kl=k1"], "loss.kl", "no effect"),
        (["loss.fixed_length_tokens=9"], "loss.fixed_length_tokens", "no effect"),
        (["learner.minibatches_per_step=500"], "learner.minibatches_per_step", "128 lifecycles"),
    ],
)  # fmt: skip
def test_contradictions(tmp_path: Path, overrides: list[str], path: str, part: str) -> None:
    problems = list(loss_problems(made(tmp_path, *overrides)))
    assert len(problems) == 1, problems
    assert problems[0].startswith(f"{path}: ") and part in problems[0]


def test_all_contradictions_at_once(tmp_path: Path) -> None:
    config = made(tmp_path, "loss.dual_clip=2", "loss.tv_bound=0.3", "loss.fixed_length_tokens=4")
    assert len(list(loss_problems(config))) == 3


def test_what_only_the_preset_says_may_go_unread(tmp_path: Path) -> None:
    config = made(tmp_path, "loss.preset=opsm", "loss.segment_mask=none", "loss.kl_coef=0.1", "loss.kl=k1")
    assert list(loss_problems(config)) == []
    config = made(tmp_path, "loss.preset=icepop", "loss.behavior_weight=none", "loss.proximal=none")
    assert config.loss.weight_cap == 5
    assert list(loss_problems(config)) == []


def test_what_more_mini_batches_make_meaningful(tmp_path: Path) -> None:
    config = made(tmp_path, "loss.preset=ppo", "loss.proximal=start", "learner.minibatches_per_step=2")
    assert list(loss_problems(config)) == []
