"""Plots, TensorBoard files and live progress, from the files of a run."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from cod_async.config import Config, save_resolved
from cod_async.observe.metrics import History, read_history
from cod_async.observe.plots import _smooth, draw_all
from cod_async.observe.progress import (
    Progress,
    describe_training,
    format_curve,
    format_duration,
    training_line,
)
from cod_async.observe.tensorboard import EventWriter, scalars


def test_every_plot_is_a_picture(run_dir: Path) -> None:
    paths = draw_all(run_dir)
    assert [path.name for path in paths] == [
        "reward_by_position.png",
        "evaluation.png",
        "lag.png",
        "quickstart.png",
    ]
    for path in paths:
        with Image.open(path) as picture:
            assert picture.width > 500
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 10  # something was drawn


def test_a_run_without_data_yet_can_be_drawn(tmp_path: Path, config: Config) -> None:
    save_resolved(config, tmp_path)
    assert len(draw_all(tmp_path)) == 4


def test_smoothing_is_a_trailing_mean_that_skips_gaps() -> None:
    assert _smooth([1.0, None, 3.0, 5.0], 2) == [1.0, 1.0, 3.0, 4.0]
    assert _smooth([None], 3) == [None]


def test_scalars_are_flattened_and_the_gap_is_added() -> None:
    record = {
        "kind": "step", "step": 3, "time_s": 1.0, "lineage": 0, "reward_by_position": [0.25, 0.5, None],
        "learner": {"loss": 1, "is_ok": True}, "lag_histogram": {"1": 5},
    }  # fmt: skip
    assert scalars(record) == {
        "lineage": 0.0, "reward_by_position/0": 0.25, "reward_by_position/1": 0.5, "learner/loss": 1.0,
        "reward_gap": 0.25,
    }  # fmt: skip


def test_event_files_hold_the_steps(run_dir: Path) -> None:
    writer = EventWriter(run_dir / "tensorboard")
    writer.write(read_history(run_dir).steps)
    writer.close()
    (path,) = (run_dir / "tensorboard").glob("events.out.tfevents.*")
    assert b"reward_by_position/1" in path.read_bytes()


def test_progress_numbers(run_dir: Path, config: Config) -> None:
    values = describe_training(read_history(run_dir), config)
    assert values["step"] == 60
    assert values["segments_per_s"] == pytest.approx(896 / 2)
    assert values["tokens_per_s"] == pytest.approx(17000 / 2)
    assert values["left_s"] == pytest.approx(140 * 2)
    assert values["lag_mean"] == 1.5 and values["lag_max"] == 3
    assert values["reward_by_position"][0] == pytest.approx(0.25)
    line = training_line(values, config)
    assert "step 60/200" in line and "4:40 left" in line and "lag 1.5 (max 3)" in line


def test_progress_before_the_first_step(config: Config) -> None:
    values = describe_training(History(), config)
    assert values["step"] == 0 and values["left_s"] is None and values["lag_max"] is None
    assert "step 0/200" in training_line(values, config)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_on_a_terminal_and_in_a_pipe(run_dir: Path, config: Config, is_terminal: bool) -> None:
    out = io.StringIO()
    with Progress(config, Console(file=out, force_terminal=is_terminal, width=160)) as progress:
        progress.phase("training")
        progress.event("actor-0 died [signal SIGKILL]")
        progress.detail("halfway")
        progress.phase("training")
        progress.training(read_history(run_dir))
    text = out.getvalue()
    assert "actor-0 died [signal SIGKILL]" in text  # brackets are text, not markup
    assert "60" in text and "training" in text


def test_formats() -> None:
    assert [format_duration(s) for s in (None, 0, 61, 3661)] == ["-", "0:00", "1:01", "1:01:01"]
    assert format_curve([0.25, None, 1.0, -0.5]) == ".25 - 1.00 -.50"
    assert format_curve([k / 100 for k in range(13)]) == ".00 .01 .02 … .06 … .12"
