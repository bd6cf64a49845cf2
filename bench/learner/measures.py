"""What is measured of the learner; every function returns plain numbers for the table and the JSON file."""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from bench.kernels.measure import compare, ratio
from bench.learner.peer import PlainLearner, padded_rows
from bench.learner.recording import NUM_TURNS, Recording
from cod_async.config.schema import LearnerConfig, LossConfig
from cod_async.learner.packing import (
    FlatRows,
    assign,
    balance_of,
    flatten,
    layout_metrics,
    merging_metrics,
    plan_micro_batches,
)
from cod_async.learner.selftest import random_items
from cod_async.learner.step import Trainer
from cod_async.lifecycle.arrays import Array
from cod_async.models.qwen3 import Qwen3, Qwen3Config
from cod_async.wire.messages import TrainItem

Row = dict[str, Any]
TEMPERATURE = 1.0
MICRO_BATCH_TOKENS = 2048
"""Budget of a batch, for both sides: what fits the cache of a CPU."""
LOSS = LossConfig()


def small_model(vocab_size: int) -> Qwen3:
    """Return the model that everything is measured with; its head is a third of it, as in Qwen3-0.6B."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    return Qwen3(config, torch.Generator().manual_seed(0))


def trainer_of(model: Qwen3, **options: Any) -> Trainer:
    """Return a trainer of a copy of ``model``."""
    settings = {"tokens_per_micro_batch": MICRO_BATCH_TOKENS} | options
    return Trainer.create(copy.deepcopy(model), LearnerConfig(**settings), LOSS, TEMPERATURE)


def flat_of(items: Sequence[TrainItem], vocab_size: int, *, is_merged: bool = False) -> FlatRows:
    """Return the rows of items."""
    return flatten(items, vocab_size=vocab_size, has_prefix_merging=is_merged)


def with_policy(items: Sequence[TrainItem], model: Qwen3, seed: int = 0) -> list[TrainItem]:
    """Give items behaviour log-probs: the model's own and a little noise, as after a few steps of lag."""
    flat = flat_of(items, model.config.vocab_size)
    own = trainer_of(model).logprobs(flat).numpy().astype(np.float64)
    behavior = np.minimum(own + np.random.default_rng(seed).normal(0.0, 0.1, own.size), 0.0)
    result, done = [], 0
    for item in items:
        rows = []
        for row in item.rows:
            part = behavior[done : done + row.num_action_tokens]
            done += part.size
            rows.append(msgspec.structs.replace(row, behavior_logprobs=Array.of(part, "<f4")))
        result.append(msgspec.structs.replace(item, rows=tuple(rows)))
    return result


def gradient_gap(
    model: Qwen3, flat: FlatRows, other: FlatRows, options: dict[str, Any], other_options: dict[str, Any]
) -> float:
    """Return the norm of the difference of two steps' gradients over the norm of the first."""
    gradients = []
    for rows, settings in ((flat, options), (other, other_options)):
        trainer = trainer_of(model, **settings)
        trainer.accumulate(rows)
        gradients.append([p.grad for p in trainer.model.parameters() if p.grad is not None])
    gap = torch.stack([(a - b).double().norm() for a, b in zip(*gradients, strict=True)]).norm()
    return float(gap / torch.stack([a.double().norm() for a in gradients[0]]).norm())


def closed_form(recording: Recording) -> tuple[float, float]:
    """Return forward tokens (one row per turn, merged) from each episode's prompt P, its mean response r and
    its mean observation d: ``K P + r K (K + 1) / 2 + d K (K - 1) / 2`` and ``P + K r + (K - 1) d`` for K
    turns.
    """
    per_turn = merged = 0.0
    for item in recording.whole:
        spans = item.rows[0].action_spans
        prompt, turns = spans[0][0], len(spans)
        response = statistics.fmean(stop - start for start, stop in spans)
        observation = statistics.fmean(after[0] - before[1] for before, after in itertools.pairwise(spans))
        later = turns - 1
        per_turn += turns * (prompt + response * (turns + 1) / 2 + observation * later / 2)
        merged += prompt + turns * response + later * observation
    return per_turn, merged


def merging(recording: Recording, model: Qwen3) -> Row:
    """Measure prefix merging on the solve episodes of the pack."""
    size = recording.vocab_size
    per_turn = flat_of(recording.per_turn, size)
    merged = flat_of(recording.per_turn, size, is_merged=True)
    whole = flat_of(recording.whole, size)
    expected = closed_form(recording)
    measured = per_turn.num_tokens / merged.num_tokens
    return {
        "num_episodes": len(recording.whole),
        "num_turns": NUM_TURNS,
        "rows": {"per_turn": per_turn.num_rows, "merged": merged.num_rows, "recorded_whole": whole.num_rows},
        "forward_tokens": {"per_turn": per_turn.num_tokens, "merged": merged.num_tokens},
        "times_fewer_tokens": measured,
        "closed_form_times_fewer": expected[0] / expected[1],
        "closed_form_gap_frac": abs(measured / (expected[0] / expected[1]) - 1),
        "is_same_as_recorded_whole": merged.lengths.tolist() == whole.lengths.tolist(),
        "gradient_gap_relative": gradient_gap(model, per_turn, merged, {}, {}),
        **merging_metrics(merged),
    }


def sharing(recording: Recording, model: Qwen3) -> Row:
    """Measure prefix trees on the same rows: lifecycles of one group open every task alike."""
    flat = flat_of(recording.per_turn, recording.vocab_size, is_merged=True)
    plans = plan_micro_batches(flat, 1 << 20, kind="tree")
    budgets = {
        str(budget): layout_metrics(plan_micro_batches(flat, budget, kind="tree"))["tree_share_rate"]
        for budget in (8192, 16384, 65536)
    }
    computed = sum(plan.num_tokens for plan in plans)
    return {
        "group_size": len({item.key.member for item in recording.whole}),
        "row_tokens": flat.num_tokens,
        "computed_tokens": computed,
        "times_fewer_tokens": flat.num_tokens / computed,
        "tree_share_rate": 1 - computed / flat.num_tokens,
        "tree_share_rate_by_budget": budgets,
        "gradient_gap_relative": gradient_gap(
            model, flat, flat, {}, {"has_prefix_tree": True, "tokens_per_micro_batch": 16384}
        ),
    }


def _race(
    items: Sequence[TrainItem], rows: FlatRows, model: Qwen3, num_useful: int, seconds: float, **options: Any
) -> Row:
    """Let the trainer and the plain loop take steps on the same rows, in turns.

    Args:
        items: what the trainer gets; laying their rows out is part of its time.
        rows: the same for the plain loop, whose batches are made beforehand.
        model: the starting weights of both.
        num_useful: tokens that anybody has to compute at least once.
        seconds: for everything.
        options: of the learner.
    """
    size, learner = model.config.vocab_size, LearnerConfig(tokens_per_micro_batch=MICRO_BATCH_TOKENS)
    trainer, plain = trainer_of(model, **options), PlainLearner(model, learner, LOSS)
    batches = padded_rows(rows, MICRO_BATCH_TOKENS)
    gap = _plain_gap(trainer_of(model, **options), PlainLearner(model, learner, LOSS), items, batches, size)
    contestants: dict[str, Callable[[], Any]] = {
        "trainer": lambda: trainer.take_step(flat_of(items, size, is_merged=True), 0),
        "transformers": lambda: plain.take_step(batches),
    }
    times, failed = compare(contestants, torch.device("cpu"), seconds=seconds, max_rounds=15)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "num_rounds": len(next(iter(times.values()), [])),
        "ms": medians,
        "useful_tokens_per_s": {name: num_useful / value * 1e3 for name, value in medians.items()},
        "times_faster": ratio(times, "transformers", "trainer"),
        "gradient_gap_relative": gap,
        "failed": failed,
    }


def _plain_gap(
    trainer: Trainer, plain: PlainLearner, items: Sequence[TrainItem], batches: Sequence[Any], size: int
) -> float:
    """Return how far the gradients of the two sides are apart before the race, relative to their norm."""
    trainer.accumulate(flat_of(items, size, is_merged=True))
    plain.accumulate(batches)
    theirs = dict(plain.model.named_parameters())
    ours = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    gap = torch.stack([(value - theirs[name].grad).double().norm() for name, value in ours.items()]).norm()
    return float(gap / torch.stack([value.double().norm() for value in ours.values()]).norm())


def speed(recording: Recording, model: Qwen3, seconds: float) -> Row:
    """Race on the recorded pack, and on rows of one length that nothing can merge or pad."""
    size = model.config.vocab_size
    items = with_policy(recording.per_turn, model)
    per_turn = flat_of(items, size)
    merged = flat_of(items, size, is_merged=True)
    pack = _race(items, per_turn, model, merged.num_tokens, seconds * 0.7)
    uniform = with_policy(random_items(48, vocab_size=size, min_tokens=256, max_tokens=256, seed=3), model)
    rows = flat_of(uniform, size)
    return {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "recorded_pack": pack,
        "uniform_lengths": _race(uniform, rows, model, rows.num_tokens, seconds * 0.3),
    }


def packing(budget: int = 16384, num_rows: int = 2000, num_ranks: int = 8) -> Row:
    """Measure the layout of CUDA on a batch of mixed lengths (log-normal, 32 tokens to the budget)."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6.8, 1.0, num_rows), 32, budget).astype(np.int64)
    ends = np.cumsum(lengths)
    flat = FlatRows(
        tokens=np.zeros(int(ends[-1]), dtype=np.int64),
        starts=ends - lengths,
        lengths=lengths,
        action_items=np.arange(num_rows),
        action_rows=np.arange(num_rows),
        action_offsets=lengths - 1,
        action_lags=np.zeros(num_rows, dtype=np.int64),
        behavior_logprobs=np.full(num_rows, -1.0, dtype=np.float32),
        advantages=np.ones(num_rows),
        row_lifecycles=np.arange(num_rows),
    )
    packed = plan_micro_batches(flat, budget, kind="packed")
    padded = plan_micro_batches(flat, budget, kind="packed", multiple=16)
    parts = assign(flat, num_ranks, kind="packed")
    # Ranks wait for the one with the most: what counts is real tokens over turns of the whole budget's width.
    return {
        "num_rows": num_rows,
        "lengths": {"min": int(lengths.min()), "median": int(np.median(lengths)), "max": int(lengths.max())},
        "budget_tokens": budget,
        "num_micro_batches": len(packed),
        "fewest_possible": -(-flat.num_tokens // budget),
        "packing_efficiency": layout_metrics(packed)["packing_efficiency"],
        "packing_efficiency_shared_by_8": layout_metrics(padded)["packing_efficiency"],
        "micro_batch_balance": layout_metrics(packed)["micro_batch_balance"],
        "fill_frac": flat.num_tokens / (len(packed) * budget),
        "rectangles_efficiency": layout_metrics(plan_micro_batches(flat, budget))["packing_efficiency"],
        "num_ranks": num_ranks,
        "rank_balance": balance_of(flat, parts),
    }
