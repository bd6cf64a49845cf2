"""Files of per-token records: what is written is read, one segment at a time, and old ones make room."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cod_async.errors import StoreError
from cod_async.lifecycle.segment import SegmentKey, Version
from cod_async.store.token_records import (
    FIELDS,
    STATES,
    prune_token_records,
    read_token_records,
    records_file,
    write_token_records,
)

KEYS = [SegmentKey(0, 1, 0), SegmentKey(0, 1, 1), SegmentKey(3, 0, 2)]
COUNTS = np.array([2, 0, 3])


def tokens(seed: int) -> dict[str, npt.NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(0, len(STATES), 5).astype(kind)
        if kind != "<f4"
        else rng.normal(size=5).astype(kind)
        for name, kind in FIELDS.items()
    }


def write(run_dir: Path, version: Version, seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    found = tokens(seed)
    path = records_file(run_dir, version)
    path.parent.mkdir(exist_ok=True)
    keys = np.array([(key.group, key.member, key.ordinal) for key in KEYS])
    write_token_records(path, version, keys, COUNTS, found)
    return found


def test_each_segment_gets_its_own_tokens(tmp_path: Path) -> None:
    written = write(tmp_path, Version(1, 12))
    for key, start, stop in zip(KEYS, (0, 2, 2), (2, 2, 5), strict=True):
        (found,) = read_token_records(tmp_path, key)
        assert found.version == Version(1, 12) and found.key == key
        assert set(found.tokens) == set(FIELDS)
        for name, values in found.tokens.items():
            assert values.dtype == np.dtype(FIELDS[name])
            np.testing.assert_array_equal(values, written[name][start:stop])
        assert found.state_names == [STATES[number] for number in written["state"][start:stop]]
    assert read_token_records(tmp_path, SegmentKey(3, 0, 1)) == []


def test_every_step_that_used_a_segment_is_returned(tmp_path: Path) -> None:
    assert read_token_records(tmp_path, KEYS[0]) == []
    for version in (Version(1, 4), Version(0, 11), Version(0, 3)):
        write(tmp_path, version, seed=version.step)
    found = read_token_records(tmp_path, KEYS[0])
    assert [one.version for one in found] == [Version(0, 3), Version(0, 11), Version(1, 4)]
    assert len({one.tokens["logprob"].tobytes() for one in found}) == 3


def test_equal_records_are_equal_files(tmp_path: Path) -> None:
    paths = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, Version(0, 1))
        paths.append(records_file(tmp_path / name, Version(0, 1)).read_bytes())
    assert paths[0] == paths[1]


def test_the_oldest_files_make_room_and_the_newest_stays(tmp_path: Path) -> None:
    versions = [Version(0, 9), Version(0, 10), Version(1, 2)]
    for version in versions:
        write(tmp_path, version)
    size = records_file(tmp_path, versions[0]).stat().st_size
    assert prune_token_records(tmp_path, 3 * size) == []
    assert prune_token_records(tmp_path, 2 * size + 1) == [records_file(tmp_path, versions[0])]
    assert prune_token_records(tmp_path, 0) == [records_file(tmp_path, versions[1])]
    assert [one.version for one in read_token_records(tmp_path, KEYS[2])] == [versions[2]]


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    write(tmp_path, Version(0, 1))
    path = records_file(tmp_path, Version(0, 1))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if damage == "cut" else data.replace(b"format", b"farmat"))
    with pytest.raises(StoreError, match=path.name):
        read_token_records(tmp_path, KEYS[0])


def test_reading_loads_no_torch() -> None:
    code = "import sys, cod_async.store.token_records; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
