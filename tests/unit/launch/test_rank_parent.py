"""The parent of a learner's ranks, with small programs in the place of the ranks."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import msgspec
import psutil
import pytest

from cod_async.config.learner import LearnerConfig
from cod_async.launch import ranks
from cod_async.launch.supervisor import ENDED_RUN_CODE, INPUT_ERROR_CODE, LOST_CODE


class _Run(msgspec.Struct, frozen=True):
    grace_s: float = 20.0


class _Config(msgspec.Struct, frozen=True):
    learner: LearnerConfig
    run: _Run = _Run()


def start(run_dir: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run ``script`` as two ranks, its arguments ``learner RUN --rank I``; return the parent's code."""

    def command(*args: str) -> list[str]:
        return [sys.executable, "-I", "-S", "-c", script, *args]

    monkeypatch.setattr(ranks, "cod_command", command)
    monkeypatch.setattr(ranks, "load_resolved", lambda path: _Config(LearnerConfig(data_parallel=2)))
    monkeypatch.setattr(ranks, "AFTER_FAILURE_S", 0.2)
    code = ranks.run_ranks(run_dir)
    assert not list(run_dir.glob(".ranks-*"))
    assert not [child for child in psutil.Process().children() if str(run_dir) in child.cmdline()]
    return code


SAY = """
import json, os, sys
run, rank = sys.argv[2], sys.argv[4]
folder = os.path.dirname(os.environ["COD_RENDEZVOUS"].removeprefix("file:"))
said = {"local": os.environ["LOCAL_RANK"], "mode": os.stat(folder).st_mode, "folder": folder}
open(os.path.join(run, rank), "w").write(json.dumps(said))
"""


def test_every_rank_has_a_number_of_its_own_and_all_meet_in_a_new_private_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "7")  # of whatever started the run
    old = tmp_path / ".ranks-old"
    old.mkdir()
    assert start(tmp_path, SAY, monkeypatch) == 0
    said = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert [one["local"] for one in said] == ["0", "1"]
    assert len({one["folder"] for one in said}) == 1 and Path(said[0]["folder"]) != old
    assert all(stat.S_IMODE(one["mode"]) == 0o700 for one in said)
    assert os.environ["LOCAL_RANK"] == "7"


@pytest.mark.parametrize(
    ("script", "code"),
    [
        # Rank 1 is killed, rank 0 would wait for ever.
        ("import os, signal, sys\nif sys.argv[4] == '1': os.kill(os.getpid(), 9)\nsignal.pause()", LOST_CODE),
        # What was wrong with the input explains more than that somebody was left alone.
        (f"import sys\nsys.exit({INPUT_ERROR_CODE} if sys.argv[4] == '1' else 1)", INPUT_ERROR_CODE),
        # Rank 0 says that the run must not go on; the library of rank 1 aborts as it is left alone.
        (
            f"import os, sys\nsys.exit({ENDED_RUN_CODE}) if sys.argv[4] == '0' else os.kill(os.getpid(), 9)",
            ENDED_RUN_CODE,
        ),
        ("import sys\nsys.exit(1 if sys.argv[4] == '1' else 0)", 1),
    ],
)
def test_one_rank_that_fails_ends_all(
    script: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start(tmp_path, script, monkeypatch) == code


LEAVE = """
import os, signal, sys
if sys.argv[4] == "0":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    os.kill(os.getppid(), signal.SIGTERM)
    while True:
        signal.pause()
"""


def test_a_signal_goes_to_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start(tmp_path, LEAVE, monkeypatch) == 0
