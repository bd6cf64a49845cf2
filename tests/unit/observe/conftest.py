"""A run folder as a finished quickstart leaves it, small and made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cod_async.config import Config, load_config, save_resolved
from cod_async.observe.summary import write_evaluation

CURVES = {
    ("train", "normal"): [0.25, 0.5, 0.6, 0.65],
    ("train", "blanked"): [0.25, 0.26, 0.24, 0.25],
    ("train", "swapped"): [0.24, 0.22, 0.25, 0.24],
    ("held_out", "normal"): [0.26, 0.45, 0.5, 0.55],
    ("held_out", "blanked"): [0.25, 0.25, 0.25, 0.25],
    ("held_out", "swapped"): [0.25, 0.25, 0.25, 0.25],
}
FLAT = [0.27, 0.29, 0.28, 0.3]


def report(
    split: str, control: str, means: list[float], environment: str = "hidden_buttons"
) -> dict[str, Any]:
    rows = [
        {"environment": environment, "preset": "cross", "position": k, "mean": m} for k, m in enumerate(means)
    ]
    return {
        "split": split,
        "control": control,
        "rows": rows,
        "reward_by_position": [{"mean": mean, "sem": 0.02} for mean in means],
        "well_formed_frac": 0.99,
    }


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(
        [],
        [
            'environments=[{name="hidden_buttons", preset="cross"}]',
            f'run.output_dir="{tmp_path}"',
            "run.num_steps=200",
        ],
    )


@pytest.fixture
def run_dir(tmp_path: Path, config: Config) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    save_resolved(config, folder)
    before = [report("train", "normal", FLAT), report("held_out", "normal", FLAT)]
    after = [report(split, control, means) for (split, control), means in CURVES.items()]
    write_evaluation(folder, "before", {"checkpoint": "start", "reports": before})
    write_evaluation(folder, "after", {"checkpoint": "0.60", "reports": after})
    with (folder / "metrics.jsonl").open("w") as file:
        for number in range(60):
            record = {
                "kind": "step", "time_s": 1000.0 + 2 * number, "lineage": 0, "step": number,
                "reward_by_position": [0.25, 0.25 + number / 200, 0.25 + number / 150, None],
                "lag_mean": 1.5, "lag_max": 3, "lag_histogram": {"1": 50, "2": 50},
                "num_segments": 896, "num_tokens": 17000, "learner": {"loss": 0.5, "grad_norm": 1.0},
            }  # fmt: skip
            file.write(json.dumps(record) + "\n")
    return folder
