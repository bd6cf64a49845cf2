"""The learner's benchmark: what it records, its closed form, and that its two sides train the same thing."""

from __future__ import annotations

import pytest
import torch
from rows_world import make_row

from bench.learner.__main__ import GPU_ROWS, show, verdicts
from bench.learner.measures import closed_form, flat_of, small_model, with_policy
from bench.learner.peer import PlainLearner, padded_rows
from bench.learner.recording import NUM_TURNS, PACK_SIZE, Recording, record, split_turns
from cod_async.config.schema import LearnerConfig, LossConfig
from cod_async.learner.packing import flatten
from cod_async.learner.selftest import random_items
from cod_async.learner.step import Trainer
from cod_async.lifecycle.segment import SegmentKey
from cod_async.wire.messages import TrainItem


def test_turns_of_a_row_by_hand() -> None:
    row = make_row([5, 6, 7, 8, 9, 1], [(1, 3), (5, 6)], [-1.0, -2.0, -3.0], [4, 7])
    first, second = split_turns(row)
    assert first.token_ids.numpy().tolist() == [5, 6, 7] and first.action_spans == ((1, 3),)
    assert second.token_ids.numpy().tolist() == [5, 6, 7, 8, 9, 1] and second.action_spans == ((5, 6),)
    assert first.behavior_logprobs.numpy().tolist() == [-1.0, -2.0]
    assert second.behavior_logprobs.numpy().tolist() == [-3.0]
    assert [span.version.step for span in (*first.versions, *second.versions)] == [4, 4, 7]


def test_the_recording_is_of_five_turns_and_merges_back() -> None:
    recording = record(2)
    again = record(2)
    assert recording.per_turn == again.per_turn
    assert len(recording.whole) == 2 * PACK_SIZE
    assert {len(item.rows) for item in recording.per_turn} == {NUM_TURNS}
    merged = flat_of(recording.per_turn, recording.vocab_size, is_merged=True)
    whole = flat_of(recording.whole, recording.vocab_size)
    assert merged.lengths.tolist() == whole.lengths.tolist()
    per_turn, folded = closed_form(recording)
    assert folded == pytest.approx(whole.num_tokens)
    measured = flat_of(recording.per_turn, recording.vocab_size).num_tokens
    assert measured == pytest.approx(per_turn, rel=0.02)
    assert measured / whole.num_tokens > 3


def test_the_closed_form_by_hand() -> None:
    """Prompt 10, responses 2, observations 3, three turns: 12 + 17 + 22 tokens one by one, 22 together."""
    row = make_row(list(range(22)), [(10, 12), (15, 17), (20, 22)], [-1.0] * 6, [0, 0, 0])
    item = TrainItem(
        key=SegmentKey(0, 0, 0), kind="solve", position=0, rows=(row,), advantage=1.0, lag_steps=0.0
    )
    assert closed_form(Recording([item], [], 30)) == (51, 22)


def test_both_sides_find_the_same_loss_and_gradients() -> None:
    model = small_model(97)
    items = with_policy(random_items(7, vocab_size=97, min_tokens=4, max_tokens=40), model)
    flat = flatten(items, vocab_size=97)
    plain = PlainLearner(model, LearnerConfig(), LossConfig())
    batches = padded_rows(flat, 80)
    assert len(batches) > 2 and all(b.ids.numel() <= 80 or b.ids.shape[0] == 1 for b in batches)
    theirs = plain.accumulate(batches)
    trainer = Trainer.create(model, LearnerConfig(), LossConfig(), 1.0)
    done = trainer.accumulate(flat)
    assert float(torch.stack(done.losses).sum()) == pytest.approx(theirs, rel=1e-5)
    gradients = {name: p.grad for name, p in plain.model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad - gradients[name]).norm() <= 1e-5 * gradients[name].norm() + 1e-8, name


def test_unequal_gradients_are_wrong_and_missed_goals_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    race = {"times_faster": 3.5, "gradient_gap_relative": 1e-7, "useful_tokens_per_s": {"trainer": 7.0}}
    results = {
        "merging": {"times_fewer_tokens": 2.5, "closed_form_gap_frac": 0.01, "gradient_gap_relative": 1e-3},
        "tree": {"times_fewer_tokens": 1.5, "gradient_gap_relative": 0.0},
        "packing": {"packing_efficiency": 0.99},
        "speed": {
            "num_parameters": 1,
            "recorded_pack": race,
            "uniform_lengths": race | {"times_faster": None},
        },
    }
    assert show(results) == ["merging: gradients: 1.0e-03, allowed 1e-5"]
    printed = capsys.readouterr().out
    assert all(what[:20] in printed for what in GPU_ROWS)
    reached = {
        what: value is not None and is_reached(value) for what, _, value, is_reached, _ in verdicts(results)
    }
    assert {what for what, is_fine in reached.items() if not is_fine} == {
        "merging: fewer forward tokens",
        "merging: gradients",
        "uniform lengths: speed over transformers",
    }
