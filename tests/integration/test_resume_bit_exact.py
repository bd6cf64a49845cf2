"""A run that was killed and resumed is the same run, to the bit (max_lag = 0, one actor, one thread).

The long form, 20 and 20 steps with several kills, is ``python -m tests.integration.resume_report``.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from resume_report import RunDigests, Scene, differences, digest_samples

from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.segment import LifecycleState, Row, Segment, SegmentKey, Version, VersionSpan


def _check_run(digests: RunDigests, half: int) -> None:
    """The digests are of a run that learned something in every step."""
    assert sorted(digests.parameters) == sorted(digests.optimizer) == [half, 2 * half]
    assert len(digests.weights) == len(set(digests.weights)) == 2 * half + 1
    assert len(digests.batches) == len(set(digests.batches)) == 2 * half
    assert len(digests.samples) == len(set(digests.samples)) == 2 * half


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.timeout(300)
def test_six_steps_kill_six_steps_are_twelve_steps(tmp_path: Path) -> None:
    half = 6
    scene = Scene(tmp_path, half)
    straight = scene.straight("straight")
    _check_run(straight, half)
    resumed, kill = scene.interrupted("killed", "mid_generation")
    assert kill.num_half_played > 0, "nothing was being played when it was killed"
    assert kill.num_continued > 0, "no lifecycle was continued by the resumed run"
    assert kill.max_lag == 0 and kill.is_balanced
    assert differences(straight, resumed) == []


def _segment(logprob: float, token: int = 7) -> Segment:
    row = Row(
        token_ids=Array.of([1, 2, token], "<i4"),
        action_spans=((1, 3),),
        behavior_logprobs=Array.of([-0.5, logprob], "<f4"),
        versions=(VersionSpan(Version(0, 0), 2),),
    )
    return Segment(
        run="r", key=SegmentKey(0, 0, 0), lease_epoch=0, actor="a", environment="e", preset="p", pack_seed=1,
        kind="solve", position=0, rows=(row,), reward=1.0, raw_reward=1.0, finish="success", is_last=True,
        state_after=LifecycleState(next_ordinal=1, hint=""),
    )  # fmt: skip


def test_digests_notice_a_single_bit() -> None:
    one = digest_samples([_segment(-1.0)])
    assert one == digest_samples([_segment(-1.0)])
    assert one != digest_samples([_segment(math.nextafter(-1.0, 0) * (1 - 2**-23))])
    assert one != digest_samples([_segment(-1.0, token=8)])


def test_differences_are_named() -> None:
    ours = RunDigests({2: "a", 4: "b"}, {2: "c", 4: "d"}, ["0", "1"], ["e"], ["f"])
    assert (
        differences(ours, RunDigests(dict(ours.parameters), dict(ours.optimizer), ["0", "1"], ["e"], ["f"]))
        == []
    )
    theirs = RunDigests({2: "a"}, {2: "c", 4: "x"}, ["0", "2"], ["e"], [])
    assert differences(ours, theirs) == [
        "parameters: 2 and 1 digests",
        "parameters[4]",
        "optimizer[4]",
        "weights[1]",
        "samples: 1 and 0 digests",
    ]
