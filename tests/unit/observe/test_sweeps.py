"""Pictures of sweeps, and what was evaluated beside training, as people get to see them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import msgspec

from cod_async.config import Config
from cod_async.observe.metrics import read_history
from cod_async.observe.plots import draw_all
from cod_async.observe.summary import build_summary, labels_for, read_in_training
from cod_async.observe.sweeps import draw_answer, draw_checkpoints, draw_positions, draw_steps, panels


def report(checkpoint: str, step: int | None, control: str = "normal", **changes: Any) -> dict[str, Any]:
    base = 0.1 if step is None else step / 100
    values = {
        "entry": "door", "mode": "cod", "carry": "hint", "split": "held_out", "control": control,
        "checkpoint": checkpoint, "step": step, "mean": base, "mean_sem": 0.02,
        "reward_by_position": [{"mean": base + k / 10, "sem": 0.03} for k in range(3)],
    }  # fmt: skip
    return values | changes


SWEEP = [
    report(name, step, control)
    for name, step in (("start", 0), ("0.20", 20), ("0.40", 40))
    for control in ("normal", "blanked")
]


def lines_of(draw: Any, reports: list[dict[str, Any]]) -> list[tuple[list[float], list[float], str]]:
    figure, axes = plt.subplots()
    draw(axes, reports)
    found = [
        (list(map(float, line.get_xdata())), list(map(float, line.get_ydata())), str(line.get_linestyle()))
        for container in axes.containers
        for line in container.lines[:1]
    ]
    plt.close(figure)
    return found


def test_one_line_per_checkpoint_and_dashed_controls() -> None:
    lines = lines_of(draw_positions, SWEEP)
    assert [style for _, _, style in lines] == [
        "-",
        "-",
        "-",
        "--",
    ]  # three checkpoints, the last one's control
    assert [ys[0] for _, ys, _ in lines] == [0.0, 0.2, 0.4, 0.4]
    assert lines[0][0] == [0.0, 1.0, 2.0]


def test_mean_reward_against_steps() -> None:
    lines = lines_of(draw_checkpoints, SWEEP)
    assert [(xs, ys) for xs, ys, _ in lines] == [([0.0, 20.0, 40.0], [0.0, 0.2, 0.4])] * 2
    bare = lines_of(draw_checkpoints, [report("a", None), report("b", None)])
    assert bare[0][0] == [0.0, 1.0]


def test_one_line_per_position_over_training() -> None:
    lines = lines_of(draw_steps, [r for r in SWEEP if r["control"] == "normal"])
    assert [[round(y, 9) for y in ys] for _, ys, _ in lines] == [
        [0.0, 0.2, 0.4], [0.1, 0.3, 0.5], [0.2, 0.4, 0.6]
    ]  # fmt: skip


def test_panels_are_environments_modes_and_splits() -> None:
    mixed = [
        report("m", 0), report("m", 0, mode="ralph_full"), report("m", 0, split="train"),
        report("m", 0, "blanked"), report("m", 0, mode="none", carry="none"),
        report("m", 0, carry="transcript"),
    ]  # fmt: skip
    assert {title: len(found) for title, found in panels(mixed).items()} == {
        "door, cod, held_out": 2, "door, ralph_full, held_out": 1, "door, cod, train": 1,
        "door, none, held_out": 1, "door, cod, carry transcript, held_out": 1,
    }  # fmt: skip


def test_pictures_are_files(tmp_path: Path) -> None:
    paths = draw_answer({"reports": SWEEP}, tmp_path / "plots")
    assert [path.name for path in paths] == ["reward_by_position.png", "reward_by_checkpoint.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    many = [report(f"0.{step}", step) for step in range(30)]
    assert len(draw_answer({"reports": many}, tmp_path / "many")) == 2
    assert len(draw_answer({"reports": SWEEP[:2]}, tmp_path / "one")) == 1


def test_plain_seeds_leave_no_world_that_was_never_trained_on(config: Config) -> None:
    assert labels_for(config)["held_out"] == "after, worlds never trained on"
    lifecycle = msgspec.structs.replace(config.lifecycle, has_plain_pack_seeds=True)
    plain = msgspec.structs.replace(config, lifecycle=lifecycle)
    assert labels_for(plain)["held_out"] == "after, held-out packs"


def test_evaluations_beside_training_are_summarised_and_drawn(run_dir: Path, config: Config) -> None:
    nothing = {"suite": "", "num_skipped": 0, "num_failed": 0, "points": []}
    assert read_in_training(run_dir) == nothing
    assert "evaluation_in_training.png" not in {path.name for path in draw_all(run_dir)}
    points = [
        {"version": f"0.{step}", "lineage": 0, "step": step, "wall_s": 2.0, "rows": [{"mean": step}],
         "reports": [report(f"0.{step}", step)]}
        for step in (20, 0)
    ]  # fmt: skip
    kept = {"suite": "s", "every_steps": 20, "num_skipped": 4, "num_failed": 1, "points": points}
    (run_dir / "evaluation" / "in_training.json").write_text(json.dumps(kept))
    found = read_in_training(run_dir)
    assert [point["step"] for point in found["points"]] == [0, 20] and found["num_skipped"] == 4
    summary = build_summary(
        status="finished", config=config, history=read_history(run_dir), evaluations={}, ledger=None,
        processes=[], seconds={}, versions={}, num_policy_versions=1, in_training=found,
    )  # fmt: skip
    told = summary["evaluation_in_training"]
    assert [(point["step"], point["rows"]) for point in told["points"]] == [
        (0, [{"mean": 0}]),
        (20, [{"mean": 20}]),
    ]
    assert "reports" not in told["points"][0]
    assert "evaluation_in_training.png" in {path.name for path in draw_all(run_dir)}
    (run_dir / "evaluation" / "in_training.json").write_text("{")
    assert read_in_training(run_dir) == nothing
