"""Results on disk: what was written is read again, whatever happened to the end of the file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cod_async.errors import InputError
from cod_async.evaluate.results import FolderLock, LifecycleResult, ResultFile


def result(number: int, **changes: Any) -> LifecycleResult:
    values: dict[str, Any] = {
        "key": f"{number:032x}", "what": {"entry": "door", "pack": number}, "rewards": (0.1, 1 / 3),
        "raw_rewards": (0.5, 1.0), "finishes": ("failure", "success"), "num_responses": (1, 2),
        "updates": ("success", None), "num_hint_tokens": 7, "num_tokens": 90,
        "hints": ("Hints : ü\n", "b"),
    }  # fmt: skip
    return LifecycleResult(**(values | changes))


def test_results_come_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.jsonl"
    with ResultFile(path) as file:
        for number in range(5):
            file.add(result(number))
        assert len(file) == 5 and result(3).key in file and result(9).key not in file
        assert file.get(result(2).key) == result(2) and file.get(result(9).key) is None
    with ResultFile(path) as file:
        assert [file.get(result(number).key) for number in range(5)] == [
            result(number) for number in range(5)
        ]
        file.add(result(1, hints=(), num_tokens=4))  # the later one counts
        found = file.get(result(1).key)
        assert found is not None and found.num_tokens == 4
    with ResultFile(path) as file:
        found = file.get(result(1).key)
        assert found is not None and found.num_tokens == 4 and len(file) == 5


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 4000))
def test_a_torn_end_is_cut_off_and_written_over(cut: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.jsonl"
        with ResultFile(path) as file:
            for number in range(4):
                file.add(result(number))
        whole = path.read_bytes()
        cut = min(cut, len(whole))
        path.write_bytes(whole[:cut])
        num_whole = whole[:cut].count(b"\n")
        with ResultFile(path) as file:
            assert len(file) == num_whole and file.num_bad_lines == 0
            for number in range(num_whole, 4):
                file.add(result(number))
        assert path.read_bytes() == whole


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_damaged_line_counts_as_missing(place: float, flip: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.jsonl"
        with ResultFile(path) as file:
            for number in range(3):
                file.add(result(number))
        raw = bytearray(path.read_bytes())
        at = int(place * len(raw))
        raw[at] ^= flip
        path.write_bytes(raw)
        with ResultFile(path) as file:
            intact = [number for number in range(3) if file.get(result(number).key) == result(number)]
            assert len(intact) >= 1 and len(file) == len(intact) < 3  # a flipped line end tears two lines
            for number in range(3):
                if result(number).key not in file:
                    file.add(result(number))
        with ResultFile(path) as file:
            assert all(file.get(result(number).key) == result(number) for number in range(3))


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="choose another --out"):
        ResultFile(tmp_path / "file" / "a.jsonl")
    with pytest.raises(InputError, match="choose another --out"):
        FolderLock(tmp_path / "file")
    first = FolderLock(tmp_path / "out")
    with pytest.raises(InputError, match="another evaluation is at work"):
        FolderLock(tmp_path / "out")
    first.release()
    FolderLock(tmp_path / "out").release()
