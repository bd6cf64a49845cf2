"""The benchmark's budget and its adaptors: what does not fit or is missing is named, never guessed."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch

from bench.kernels import linear_logprob, peers
from bench.kernels.measure import MIN_ROUNDS, compare, ratio, time_limit

CPU = torch.device("cpu")


def forever() -> None:
    while True:
        pass


def broken() -> None:
    raise RuntimeError("no such kernel\nand more")


def test_a_block_that_takes_too_long_is_stopped_and_an_older_alarm_stays() -> None:
    before = signal.getsignal(signal.SIGALRM)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    outer = signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        with pytest.raises(TimeoutError, match="s that were left"), time_limit(0.05):
            forever()
        assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
        assert signal.getsignal(signal.SIGALRM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *outer)


def test_contestants_that_fail_or_do_not_fit_are_named_and_the_others_timed() -> None:
    calls: list[str] = []
    times, failed = compare(
        {
            "ours": lambda: calls.append("ours"),
            "broken": broken,
            "endless": forever,
            "late": lambda: calls.append("late"),
        },
        CPU,
        seconds=0.2,
    )
    assert len(times["ours"]) >= MIN_ROUNDS
    assert failed["broken"] == "RuntimeError: no such kernel"
    assert failed["endless"].startswith("TimeoutError: took longer")
    assert times.keys() | failed.keys() == {"ours", "broken", "endless", "late"}
    assert "late" not in times or len(times["late"]) == len(times["ours"])
    assert ratio(times, "broken", "ours") is None


def test_every_peer_of_the_survey_has_an_adaptor_and_a_missing_one_is_said_to_be_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packages = {module for module, _ in peers.PEERS.values()}
    assert packages == {"cut_cross_entropy", "liger_kernel", "verl", "trl", "quack", "prime_rl"}
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    present, missing = peers.installed()
    assert set(peers.PEERS) <= set(missing)
    assert not set(present) & set(peers.PEERS)


class Changed(torch.autograd.Function):
    """Like a peer's function: the order of its arguments is not what it was."""

    @staticmethod
    def forward(ctx: Any, targets: Any, hidden: Any, new: int = 3) -> Any:
        raise NotImplementedError


class Unknown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Any, surprise: Any) -> Any:
        raise NotImplementedError


def test_arguments_are_filled_by_name() -> None:
    assert peers.by_name(Changed, {"hidden": "h", "targets": "t", "weight": "w"}) == ["t", "h", 3]
    with pytest.raises(TypeError, match="argument 'surprise' that this adaptor does not know"):
        peers.by_name(Unknown, {"hidden": "h"})


def test_contestants_compute_the_same_gradients() -> None:
    shape = (24, 50, 8)
    found = []
    for run in (linear_logprob.naive, linear_logprob.in_chunk, linear_logprob.by_autograd):
        data = linear_logprob.inputs(shape, CPU, torch.float32)
        run(data["hidden"], data["weight"], data["targets"], data["coefficients"])
        found.append((data["hidden"].grad, data["weight"].grad))
    for other in found[1:]:
        for ours, naive in zip(other, found[0], strict=True):
            assert ours is not None and naive is not None
            assert (ours - naive).norm() <= 1e-5 * naive.norm()
