"""A recorded step is computed again to the bit, or refused by name."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from replay_world import RecordedRun
from safetensors.torch import save_file

from cod_async.cli import main
from cod_async.config.load import save_resolved
from cod_async.config.schema import Config
from cod_async.errors import InputError, NumericsError, WorkError
from cod_async.learner import opening
from cod_async.learner.failing import FailedStep, keep_failed
from cod_async.learner.replaying import Replay, replay_failed, replay_step
from cod_async.lifecycle.segment import Version
from cod_async.models.loading import load_policy
from cod_async.store.recorded import RecordedRun as RecordedSteps
from cod_async.store.token_records import FIELDS, read_file
from cod_async.wire.messages import TrainItem


@pytest.fixture(autouse=True)
def _restore_torch() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(num_threads)


@dataclass
class Kept:
    """What is left of a run that is over."""

    run_dir: Path
    config: Config
    batches: dict[Version, list[TrainItem]]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """Steps 0 to 3 with a checkpoint at 2; then back to it, steps 2 to 4 on lineage 1."""
    run = RecordedRun(tmp_path_factory.mktemp("recorded") / "run")
    for _ in range(2):
        run.take_step()
    run.checkpoint()
    for _ in range(2):
        run.take_step()
    run.kill()
    run.open(2)
    for _ in range(3):
        run.take_step()
    run.close()
    return Kept(run.run_dir, run.config, run.batches)


@pytest.fixture
def run(recorded: Kept, tmp_path: Path) -> Kept:
    """A copy of it, to do with what one likes."""
    shutil.copytree(recorded.run_dir, tmp_path / "run")
    return Kept(tmp_path / "run", recorded.config, recorded.batches)


def edit(run: Kept, statement: str, *values: Any) -> int:
    """Change the run database behind everybody's back; return the number of rows."""
    with sqlite3.connect(run.run_dir / "run.sqlite") as connection:
        return connection.execute(statement, values).rowcount


def report(run: Kept, version: Version) -> dict[str, Any]:
    return RecordedSteps(run.run_dir, is_transcript=False).step(version).report


def set_witness(run: Kept, version: Version, **witness: str | None) -> None:
    """Change entries of a step's witness; None removes one."""
    whole = report(run, version)
    whole["witness"] = {k: v for k, v in {**whole["witness"], **witness}.items() if v is not None}
    edit(
        run,
        "UPDATE steps SET report = ? WHERE lineage = ? AND step = ?",
        msgspec.json.encode(whole).decode(),
        version.lineage,
        version.step,
    )


def start_of(replay: Replay) -> tuple[str, Version, int]:
    return replay.start.kind, replay.start.version, len(replay.start.steps)


def test_every_step_replays_to_the_bit(run: Kept) -> None:
    for step, lineage, start in (
        (0, 0, ("model", 0, 0)),
        (1, 0, ("model", 0, 1)),
        (2, 1, ("checkpoint", 2, 0)),
        (3, 1, ("checkpoint", 2, 1)),
        (4, 1, ("checkpoint", 2, 2)),
    ):
        replay = replay_step(run.run_dir, step)
        assert replay.version == Version(lineage, step)
        assert replay.is_equal, [one for one in replay.compared if not one.is_equal]
        kind, version, num_steps = start_of(replay)
        assert (kind, version.step, num_steps) == start and replay.notes == []
        names = [one.name for one in replay.compared]
        assert names[:4] == ["weights", "gradients", "loss", "grad_norm"] and len(names) > 30
        assert not any(name.endswith("_s") for name in names)


def test_a_published_version_is_enough(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "run")
    run.take_step()
    run.publish()
    version = run.take_step()
    replay = replay_step(run.run_dir, version.step)
    assert replay.is_equal and start_of(replay) == ("published", version, 0)
    run.kill()
    run.open(None)  # back to the start: both steps are rolled back
    with pytest.raises(InputError, match=r"rolled back and is no part .* add --lineage 0"):
        replay_step(run.run_dir, version.step)
    assert replay_step(run.run_dir, version.step, lineage=0).is_equal
    run.close()


def test_several_optimizer_steps_need_the_optimizer(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "run", learner={"minibatches_per_step": 2})
    for _ in range(2):
        run.take_step()
    run.publish()
    run.take_step()
    replay = replay_step(run.run_dir, 2)
    assert replay.is_equal and start_of(replay) == ("model", Version(0, 0), 2)
    assert {one.name: one.replayed for one in replay.compared}["num_updates"] == 2
    run.close()


def test_a_step_of_an_abandoned_lineage_replays(run: Kept) -> None:
    for step in (2, 3):
        replay = replay_step(run.run_dir, step, lineage=0)
        assert replay.is_equal and replay.version == Version(0, step)


def test_settings_that_a_resumed_run_may_change_are_those_of_the_step(run: Kept) -> None:
    learner = msgspec.structs.replace(run.config.learner, tokens_per_micro_batch=16384, num_threads=2)
    save_resolved(msgspec.structs.replace(run.config, learner=learner), run.run_dir)
    replay = replay_step(run.run_dir, 3)
    assert replay.is_equal and torch.get_num_threads() == 1
    assert {one.name for one in replay.compared} >= {"num_micro_batches"}


@pytest.mark.parametrize("name", ["advantage", "loss"])
def test_what_differs_is_named(run: Kept, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "advantage":  # by one bit, of one segment
        (old,) = (
            sqlite3.connect(run.run_dir / "run.sqlite")
            .execute("SELECT max(advantage) FROM step_items WHERE lineage = 1 AND step = 4")
            .fetchone()
        )
        edit(
            run, "UPDATE step_items SET advantage = ? WHERE lineage = 1 AND step = 4 AND advantage = ?",
            float(np.nextafter(np.float32(old), np.float32(9))), old,
        )  # fmt: skip
    else:
        whole = report(run, Version(1, 4))
        whole["learner"]["loss"] = float(np.nextafter(whole["learner"]["loss"], 9))
        text = msgspec.json.encode(whole).decode()
        edit(run, "UPDATE steps SET report = ? WHERE lineage = 1 AND step = 4", text)
    replay = replay_step(run.run_dir, 4)
    differing = {one.name for one in replay.compared if not one.is_equal}
    assert (
        differing == {"loss"} if name == "loss" else "gradients" in differing and "weights" not in differing
    )
    assert main(["replay", str(run.run_dir), "--step", "4", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert (
        not answer["is_equal"] and {n["name"] for n in answer["compared"] if not n["is_equal"]} == differing
    )
    assert main(["replay", str(run.run_dir), "--step", "4"]) == 1
    assert f"{len(differing)} of {len(replay.compared)} differ" in capsys.readouterr().out


def test_other_weights_on_the_way_are_noticed(run: Kept) -> None:
    set_witness(run, Version(1, 3), weights="0" * 64)
    with pytest.raises(
        WorkError, match=r"step 1\.3, on the way from checkpoint .*: the weights are not the recorded"
    ):
        replay_step(run.run_dir, 4)


def test_another_machine_is_named_when_bits_differ(run: Kept) -> None:
    set_witness(run, Version(1, 4), machine="abacus")
    assert replay_step(run.run_dir, 4).notes == []
    set_witness(run, Version(1, 4), gradients="0" * 64)
    (note,) = replay_step(run.run_dir, 4).notes
    assert "recorded with machine abacus" in note


def test_without_digests_the_numbers_are_compared(run: Kept) -> None:
    set_witness(run, Version(1, 4), gradients=None, weights=None)
    replay = replay_step(run.run_dir, 4)
    assert replay.is_equal and replay.compared[0].name == "loss"
    assert [note.split(",")[0] for note in replay.notes] == [
        "the weights of this step were not digested",
        "the gradients of this step were not digested; their norm is compared",
    ]


def test_several_ranks_are_compared_within_a_millionth(run: Kept) -> None:
    set_witness(run, Version(1, 2), data_parallel="2")
    replay = replay_step(run.run_dir, 2)
    assert replay.is_equal and [one.name for one in replay.compared] == ["weights", "loss", "grad_norm"]
    assert not replay.is_exact
    assert "computed on 2 ranks" in replay.notes[0]
    with pytest.raises(InputError, match=r"step 1\.2 on the way was computed on several ranks"):
        replay_step(run.run_dir, 3)


def test_a_way_with_another_optimizer_is_refused(run: Kept) -> None:
    set_witness(run, Version(1, 3), optimizer="adamw_8bit")
    assert replay_step(run.run_dir, 3).is_equal  # its gradients do not depend on what applies them
    with pytest.raises(
        InputError, match=r"step 1\.3 on the way was computed with other settings .*adamw_8bit"
    ):
        replay_step(run.run_dir, 4)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--step", "9"], "--step 9: not taken; the run has steps 0 to 4"),
        (["--step", "-1"], "--step -1: steps count from 0"),
        (["--step", "3", "--lineage", "7"], "--lineage 7: the run has lineages 0 to 1"),
        (
            ["--step", "4", "--lineage", "0"],
            "--step 4 --lineage 0: that lineage has no such step; it has 0 to 3",
        ),
        (["--step", "1", "--failed", "x"], "give either --step N or --failed FILE"),
        ([], "give either --step N or --failed FILE"),
        (["--failed", "nowhere"], "--failed nowhere: cannot be read"),
        (["--step", "1", "--out", "/nowhere/x"], "--out /nowhere/x: its folder does not exist"),
        (["--step", "1", "--out", "/"], "--out /: is a folder; choose a file"),
        (["--step", "1", "--device", "abacus"], "--device abacus: unknown"),
    ],
)
def test_wrong_input_is_exit_code_2(
    run: Kept, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    assert main(["replay", str(run.run_dir), *arguments]) == 2
    assert problem in capsys.readouterr().err


def test_pruned_payloads_are_named(run: Kept) -> None:
    segments = "(SELECT grp, member, ordinal FROM step_items WHERE lineage = 1 AND step = 3)"
    num = edit(run, f"UPDATE segments SET payload = NULL WHERE (grp, member, ordinal) IN {segments}")  # noqa: S608
    with pytest.raises(
        InputError, match=rf"step 1\.3: the payloads of {num} segments are gone, g\d+\.m\d+\.o\d+"
    ):
        replay_step(run.run_dir, 3)
    assert replay_step(run.run_dir, 2).is_equal
    with pytest.raises(
        InputError, match=r"step 1\.4: its starting weights are gone, .* step 1\.3 on the way has lost"
    ):
        replay_step(run.run_dir, 4)


def test_without_weights_there_is_no_start(run: Kept) -> None:
    shutil.rmtree(run.run_dir / "checkpoints")
    assert start_of(replay_step(run.run_dir, 4))[0] == "model"
    shutil.rmtree(run.run_dir / "model")
    with pytest.raises(InputError, match="and so is the run's starting model; checkpoints: none"):
        replay_step(run.run_dir, 4)


def test_a_damaged_checkpoint_is_passed_over(run: Kept) -> None:
    for path in (run.run_dir / "checkpoints").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    replay = replay_step(run.run_dir, 3)
    assert replay.is_equal and start_of(replay)[0] == "model" and len(replay.start.steps) == 3
    assert replay.notes[0].startswith("passed over checkpoint 0.2: ")


def test_a_step_whose_report_was_lost_is_refused(run: Kept) -> None:
    edit(run, "UPDATE steps SET report = '{}' WHERE lineage = 1 AND step = 4")
    with pytest.raises(InputError, match="the learner died before it could report its numbers"):
        replay_step(run.run_dir, 4)


def test_records_are_written_where_asked(run: Kept, tmp_path: Path) -> None:
    out = tmp_path / "step.safetensors"
    assert main(["replay", str(run.run_dir), "--step", "3", "--out", str(out)]) == 0
    for item in run.batches[Version(1, 3)]:
        found = read_file(out, item.key)
        assert found is not None and found.version == Version(1, 3) and set(found.tokens) == set(FIELDS)
        expected = [float(value) for row in item.rows for value in row.behavior_logprobs.numpy()]
        assert found.tokens["behavior_logprob"].tolist() == expected


def poisoned(run: Kept) -> FailedStep:
    """The batch of step 4 with an advantage that overflows, as the learner would have kept it."""
    version, items = Version(1, 4), list(run.batches[Version(1, 4)])
    items[2] = msgspec.structs.replace(items[2], advantage=3e38)
    config = run.config
    trainer, _, _ = _trainer_at(run, version)
    with pytest.raises(NumericsError) as caught:
        trainer.take_step(opening.rows_of(items, config, trainer, version), version.step)
    witness = report(run, version)["witness"]
    return FailedStep(
        version=version,
        plan_digest="ab" * 32,
        items=items,
        error=str(caught.value),
        witness={name: value for name, value in witness.items() if name != "gradients"},
    )


def _trainer_at(run: Kept, version: Version) -> Any:
    from cod_async.learner.replaying import _Scene

    scene = _Scene(run.run_dir, RecordedSteps(run.run_dir, is_transcript=False), run.config)
    return scene.at(version, report(run, version)["witness"])


def test_a_failed_step_with_poisoned_weights_names_every_segment(run: Kept, tmp_path: Path) -> None:
    """The weights on disk are poisoned, so that every token of the batch is not finite."""
    version = Version(0, 0)
    model = load_policy(run.run_dir / "model")
    items = list(run.batches[version])
    tensors = {name: value.detach().clone() for name, value in model.named_parameters()}
    tensors["model.norm.weight"][0] = 3e38
    tensors["model.norm.weight"][1] = 3e38
    tensors["lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"].mul_(1e3)
    save_file(tensors, run.run_dir / "model" / "model.safetensors", {"format": "pt"})
    failed = FailedStep(version=version, plan_digest="cd" * 32, items=items, error="something", witness={})
    path = keep_failed(run.run_dir, failed)
    replay = replay_failed(run.run_dir, path, out=tmp_path / "out.safetensors")
    assert not replay.is_equal and "not finite" in str(replay.compared[0].replayed)
    assert set(replay.nonfinite_segments) == {str(item.key) for item in items}
    assert replay.answer()["nonfinite_segments"] == replay.nonfinite_segments


def test_a_failed_step_fails_again_and_names_its_segments(
    run: Kept, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = poisoned(run)
    path = keep_failed(run.run_dir, failed)
    out = tmp_path / "failed.safetensors"
    replay = replay_failed(run.run_dir, path, out=out)
    assert replay.is_equal and replay.version == Version(1, 4)
    assert replay.compared[0].recorded == failed.error
    found = read_file(out, failed.items[2].key)
    assert found is not None and abs(found.tokens["gradient"]).max() > 1e30
    assert main(["replay", str(run.run_dir), "--failed", str(path)]) == 0
    assert "all 1 are equal to the bit" in capsys.readouterr().out
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="not a failed step"):
        replay_failed(run.run_dir, path)
