"""Transcripts come from the run database: the tokens that were trained on, with the policy's part marked."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from cod_async.errors import StoreError
from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.rendering import TextTokenizer
from cod_async.lifecycle.segment import (
    LifecycleState,
    Row,
    Segment,
    SegmentKey,
    Version,
    VersionSpan,
    kind_and_position,
)
from cod_async.models.tokenizers import write_word_tokenizer
from cod_async.observe.transcripts import render_row, write_transcripts
from cod_async.store.schema import connect_writer
from cod_async.store.segments import SegmentTable

WORDS = ["Task", "goal", "Up", ":", "3", "Hints", "3=Up", "1=In"]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    write_word_tokenizer(tmp_path / "model", WORDS, 64)
    return tmp_path


def segment_of(tokenizer: TextTokenizer, group: int, member: int, ordinal: int, is_last: bool) -> Segment:
    kind, position = kind_and_position(ordinal)
    prompt, action = tokenizer.encode("Task goal Up"), tokenizer.encode("Up : 3")
    row = Row(
        token_ids=Array.of(prompt + action, "<i4"),
        action_spans=((len(prompt), len(prompt) + len(action)),),
        behavior_logprobs=Array.of([-0.5] * len(action), "<f4"),
        versions=(VersionSpan(Version(0, group), 2), VersionSpan(Version(0, group + 1), len(action) - 2)),
    )
    return Segment(
        run="r", key=SegmentKey(group, member, ordinal), lease_epoch=0,
        actor="actor-0",
        environment="hidden_buttons", preset="cross", pack_seed=7, kind=kind, position=position, rows=(row,),
        reward=0.5, raw_reward=0.5,
        finish="success", is_last=is_last,
        state_after=LifecycleState(next_ordinal=ordinal + 1, hint=f"Hints : {ordinal}=Up"),
    )  # fmt: skip


def fill(run_dir: Path, lifecycles: dict[tuple[int, int], int]) -> sqlite3.Connection:
    """Write lifecycles of three episodes, of which the first ``n`` have arrived."""
    connection = connect_writer(run_dir / "run.sqlite")
    connection.execute("PRAGMA foreign_keys = OFF")
    tokenizer, table = TextTokenizer(run_dir / "model"), SegmentTable(connection)
    for (group, member), arrived in lifecycles.items():
        for ordinal in range(arrived):
            table.insert(segment_of(tokenizer, group, member, ordinal, ordinal == 2), 1, Version(0, 0))
    return connection


def test_actions_are_marked(run_dir: Path) -> None:
    tokenizer = TextTokenizer(run_dir / "model")
    (row,) = segment_of(tokenizer, 0, 0, 0, False).rows
    assert render_row(row, tokenizer) == "Task goal Up «Up : 3»"


def test_complete_lifecycles_from_both_ends_of_the_run(run_dir: Path) -> None:
    fill(run_dir, {(0, 0): 2, (0, 1): 3, (1, 0): 3, (2, 0): 3, (3, 0): 3, (4, 0): 1}).close()
    paths = write_transcripts(run_dir, 3)
    assert [path.name for path in paths] == ["g000000.m01.md", "g000001.m00.md", "g000003.m00.md"]
    text = paths[-1].read_text()
    assert text.startswith("# Lifecycle 3.0: hidden_buttons cross")
    assert "Reward by position: 0.50 0.50" in text  # solve 0 and solve 1
    assert "## Update context after task 0" in text and "Hint from now on: `Hints : 1=Up`" in text
    assert "policy version 0.3 to 0.4" in text
    assert text.count("Task goal Up «Up : 3»") == 3


def test_what_was_not_retained_is_not_shown(run_dir: Path) -> None:
    connection = fill(run_dir, {(0, 0): 3, (1, 0): 3})
    connection.execute("UPDATE segments SET payload = NULL WHERE grp = 0 AND ordinal = 1")
    connection.close()
    assert [path.name for path in write_transcripts(run_dir, 4)] == ["g000001.m00.md"]


def test_a_run_without_database_is_named(run_dir: Path) -> None:
    with pytest.raises(StoreError, match="no run database"):
        write_transcripts(run_dir, 1)
