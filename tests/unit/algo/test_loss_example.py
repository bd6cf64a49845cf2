"""The example of docs/losses/README.md, from credit to loss: its numbers are read and computed again."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from cod_async.algo.credit import MemberRewards, credit_group
from cod_async.config.presets import PRESETS
from cod_async.config.schema import CreditAssignmentConfig, LossConfig
from cod_async.learner.objective import make_objective, needs_survey
from cod_async.learner.packing import FlatRows
from cod_kernels import segment_loss

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "losses" / "README.md").read_text()


def table(first_column: str) -> list[list[str]]:
    """Return the cells under the header that begins with ``first_column``, in the last section."""
    example = TEXT.split("## An example by hand")[1]
    lines = example.split(f"| {first_column} |")[1].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return rows


def test_credit_of_the_example() -> None:
    rows = table("lifecycle")
    members = [
        MemberRewards(
            member,
            *(
                tuple(float(r[3]) for r in rows if r[0] == str(member) and r[1] == k)
                for k in ("solve", "update")
            ),
        )
        for member in (0, 1)
    ]
    credit = credit_group(members, 2, CreditAssignmentConfig())
    found = {(e.member, e.kind, e.position): (e.return_, e.baseline, e.advantage) for e in credit.episodes}
    assert len(found) == len(rows) == 6
    for member, kind, position, _, *numbers in rows:
        expected = tuple(float(number) for number in numbers)
        assert found[int(member), kind, int(position)] == pytest.approx(expected, abs=1e-9)  # type: ignore[index]


def tokens() -> tuple[FlatRows, torch.Tensor, list[list[str]]]:
    rows = table("token")
    ids = np.array([int(row[1]) for row in rows])
    nothing = np.zeros(len(rows), dtype=np.int64)
    flat = FlatRows(
        tokens=nothing,
        starts=nothing[:1],
        lengths=nothing[:1] + len(rows),
        action_items=ids,
        action_rows=nothing,
        action_offsets=nothing + 1,
        action_lags=np.array([int(row[2]) for row in rows]),
        behavior_logprobs=np.array([float(row[3]) for row in rows]),
        advantages=np.array([float(row[6]) for row in table("lifecycle")]),
        row_lifecycles=nothing[:1],
        teacher_logprobs=np.array([float(row[8]) for row in rows]),
    )
    return flat, torch.tensor([float(row[4]) for row in rows], dtype=torch.float64), rows


def test_tokens_of_the_example_add_up() -> None:
    flat, current, rows = tokens()
    ratios = torch.exp(current - torch.from_numpy(flat.behavior_logprobs)).tolist()
    total = 0.0
    for row, ratio, ell, item in zip(rows, ratios, current.tolist(), flat.action_items, strict=True):
        advantage = flat.advantages[item]
        keep = ratio <= 1.2 if advantage > 0 else ratio >= 0.8
        assert float(row[5]) == pytest.approx(ratio, abs=1e-6)
        assert int(row[6]) == keep
        assert float(row[7]) == pytest.approx(keep * advantage * ell, abs=1e-12)
        total += float(row[7])
    (said, sum_said, loss_said) = re.search(
        r"Their sum is .([0-9.]+), the loss ([0-9.]+)/8 = ([0-9.]+)\.", TEXT
    ).groups()  # type: ignore[union-attr]
    assert float(said) == float(sum_said) == pytest.approx(-total, abs=1e-12)
    assert float(loss_said) == pytest.approx(-total / 8, abs=1e-12)


@pytest.mark.parametrize("name", PRESETS)
def test_losses_of_the_example(name: str) -> None:
    flat, current, _ = tokens()
    said = {row[0]: float(row[1]) for row in table("preset")}
    assert set(said) == set(PRESETS)
    loss = LossConfig(preset=name)  # type: ignore[arg-type]
    survey = current if needs_survey(loss) else None
    objective = make_objective(loss, flat, torch.device("cpu"), survey=survey)
    found, _ = segment_loss(
        current,
        objective.behavior,
        objective.segment_ids,
        objective.advantages,
        objective.weights,
        proximal_mix=objective.proximal_mix,
        segment_log_ratios=objective.segment_log_ratios,
        m2po_bound=objective.m2po_bound,
        reference_logprobs=objective.teacher,
        **vars(objective.options),
    )
    assert found.item() == pytest.approx(said[name], abs=1e-6)
