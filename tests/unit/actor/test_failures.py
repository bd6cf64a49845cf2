"""Waits and log lines while something goes on failing."""

from __future__ import annotations

from cod_async.actor.failures import MAX_CAUSES, REPEAT_S, Failures


def test_waits_grow_and_start_anew_when_it_worked() -> None:
    failures = Failures(lambda: 0.0)
    assert [failures.failed("x")[0] for _ in range(7)] == [0.2, 0.5, 1.0, 2.0, 5.0, 5.0, 5.0]
    failures.cut()
    assert not failures.is_wait_cuttable
    failures.worked()
    assert failures.is_wait_cuttable and failures.num_in_row == 0
    assert failures.failed("x")[0] == 0.2


def test_a_cause_is_told_once_and_then_now_and_then() -> None:
    now = 100.0
    failures = Failures(lambda: now)
    told = []
    for second in range(95):
        now = 100.0 + second
        if failures.failed(f"engine-0 is down, version 0.{second}")[1]:
            told.append(second)
    assert told == [0, 30, 60, 90] and REPEAT_S == 30.0
    assert failures.failed("no such file")[1]  # another cause is news at once
    assert not failures.failed("no such file")[1]
    failures.worked()
    assert not failures.failed("no such file")[1]  # in and out of working is no reason to flood the log


def test_what_was_told_is_bounded() -> None:
    failures = Failures(lambda: 0.0)
    names = ["x" * n for n in range(1, MAX_CAUSES + 2)]
    assert all(failures.failed(name)[1] for name in names)
    assert not failures.failed(names[-1])[1]
    assert failures.failed(names[0])[1]  # forgotten for the last one
