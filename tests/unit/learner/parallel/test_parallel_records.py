"""Per-token records and witnesses of several ranks are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_world import flat_of, trainer_of
from ranks import run_ranks

from cod_async.learner.token_records import TokenRecorder
from cod_async.learner.witness import Witness, num_ranks_of
from cod_async.store.token_records import FIELDS

CASES: list[dict[str, Any]] = [
    {"data": 2, "dtype": "float32", "learner": {"lr": 0.01}},
    {"sequence": 2, "mode": "ring", "dtype": "float32", "loss": {"kl_coef": 0.1, "ratio": "segment"}},
    {
        "data": 2,
        "dtype": "float32",
        "loss": {"proximal": "start", "clip": "ppo"},
        "learner": {"lr": 0.01, "minibatches_per_step": 2},
    },
]
EXACT = ("behavior_logprob", "advantage", "state", "lag", "update")


def job(rank: int, size: int, folder: Path, cases: list[dict[str, Any]]) -> dict[str, Any]:
    return {f"{number}/{k}": v for number, case in enumerate(cases) for k, v in found(case, False).items()}


def found(case: dict[str, Any], is_alone: bool) -> dict[str, Any]:
    trainer, flat = trainer_of(case, is_alone=is_alone), flat_of(case)
    witness, recorder = Witness(trainer, trainer.learner), TokenRecorder(trainer)
    witness.begin(0)
    recorder.begin(flat)
    trainer.take_step(flat, 0)
    of_step = witness.of_step()
    tokens = {name: torch.from_numpy(values.astype("float64")) for name, values in recorder.found().items()}
    return {**tokens, "weights": of_step["weights"], "num_ranks": num_ranks_of(of_step)}


@pytest.mark.timeout(200)
def test_two_ranks_record_what_one_does() -> None:
    results = run_ranks(2, job, CASES)
    for number, case in enumerate(CASES):
        alone = found(case, True)
        for result in results:  # both ranks have everything
            ours = {name: result[f"{number}/{name}"] for name in alone}
            assert ours["weights"] == alone["weights"]
            assert (ours["num_ranks"], alone["num_ranks"]) == (2, 1)
            for name in FIELDS:
                if name in EXACT:
                    assert torch.equal(ours[name], alone[name]), name
                elif name != "micro_batch":
                    torch.testing.assert_close(ours[name], alone[name], rtol=1e-4, atol=1e-5)
