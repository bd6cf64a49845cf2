"""The agenda: everything is handed out once, in an order that any number of workers may finish in."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from evaluation_world import config_for, entry
from hypothesis import given, settings
from hypothesis import strategies as st

from cod_async.evaluate.agenda import Agenda, Cell
from cod_async.evaluate.playing import Unit
from cod_async.evaluate.report import build_reports
from cod_async.evaluate.results import LifecycleResult, ResultFile
from cod_async.evaluate.suite import Suite, SuiteEntry, resolve


def cells_of(*entries: SuiteEntry, seeds: tuple[int, ...] = (0,)) -> list[Cell]:
    found, problems = resolve(Suite(name="t", entries=entries, seeds=seeds), config_for())
    assert problems == []
    return [Cell(setting, index, seed, seed) for index, setting in enumerate(found) for seed in seeds]


def outcome(unit: Unit, num_worlds: int) -> LifecycleResult:
    """What a player would come to whose rewards, hints and worlds are known."""
    pack, member = int(unit.what["pack"]), int(unit.what["member"])
    size = unit.plan.pack_size
    is_normal = unit.control == "normal"
    return LifecycleResult(
        key=unit.key,
        what=unit.what,
        rewards=tuple(float(pack + member + position) for position in range(size)),
        raw_rewards=(1.0,) * size,
        finishes=("success",) * size,
        num_responses=(1,) * size,
        updates=("success",) * (size - 1) + (None,),
        num_hint_tokens=1,
        num_tokens=10,
        hints=tuple(f"{pack}/{member}/{position}" for position in range(size)) if is_normal else (),
        world=str(pack % num_worlds),
    )


def run(
    cells: list[Cell],
    folder: Path,
    *,
    seed: int = 0,
    num_worlds: int = 2,
    num_steps: int = 10_000,
    fails: frozenset[tuple[str, int]] = frozenset(),
) -> tuple[Agenda, list[Unit]]:
    """Play by taking and finishing in a random order, for at most so many steps."""
    generator, running, played = random.Random(seed), [], []
    with ResultFile(folder / "r.jsonl") as results:
        agenda = Agenda(cells, results)
        for _ in range(num_steps):
            unit = agenda.take() if generator.random() < 0.5 or not running else None
            if unit is not None:
                running.append(unit)
                played.append(unit)
            elif running:
                done = running.pop(generator.randrange(len(running)))
                if (done.control, int(done.what["pack"])) in fails:
                    agenda.fail(done, "it broke")
                else:
                    agenda.finish(done.number, outcome(done, num_worlds))
            if agenda.is_over:
                break
    return agenda, played


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    num_packs=st.integers(2, 5),
    members=st.integers(1, 3),
    num_steps=st.integers(0, 60),
    controls=st.sets(st.sampled_from(["normal", "blanked", "swapped", "truth"]), min_size=1),
)
def test_everything_is_played_once_however_it_is_stopped(
    seed: int, num_packs: int, members: int, num_steps: int, controls: set[str]
) -> None:
    asked = entry(num_packs=num_packs, lifecycles_per_pack=members, controls=tuple(sorted(controls)))
    with tempfile.TemporaryDirectory() as name:
        # Stopped anywhere (what was running is lost), then continued with fresh objects.
        first, _ = run(cells_of(asked, seeds=(0, 1)), Path(name), seed=seed, num_steps=num_steps)
        agenda, played = run(cells_of(asked, seeds=(0, 1)), Path(name), seed=seed + 1)
        assert agenda.is_over and agenda.is_handed_out and agenda.take() is None
        num_controls = len(controls | ({"normal"} if "swapped" in controls else set()))
        assert agenda.total == agenda.num_done == 2 * num_packs * members * num_controls
        assert agenda.num_kept == first.num_played and len({unit.key for unit in played}) == len(played)
        for unit in played:
            if unit.control == "swapped":
                pack, size = int(unit.what["pack"]), unit.plan.pack_size
                donor = next(
                    p % num_packs
                    for p in range(pack + 1, pack + num_packs)
                    if (p - pack) % num_packs and p % num_packs % 2 != pack % 2
                )
                assert unit.hints == tuple(f"{donor}/{unit.member}/{k}" for k in range(size))
            else:
                assert unit.hints is None
        again, played = run(cells_of(asked, seeds=(0, 1)), Path(name))
        assert played == [] and again.num_kept == agenda.total


def test_an_order_of_work_that_keeps_workers_busy(tmp_path: Path) -> None:
    cells = cells_of(
        entry(controls=("swapped",), lifecycles_per_pack=1, num_packs=3),
        entry(name="b", carry="none", num_packs=1, lifecycles_per_pack=1),
    )
    with ResultFile(tmp_path / "r.jsonl") as results:
        agenda = Agenda(cells, results)
        units = [agenda.take() for _ in range(4)]
        names = [(unit.what["entry"], unit.control) for unit in units if unit is not None]
        # While the hints of the first entry are not known, the second goes on.
        assert names == [("hidden_buttons door", "normal")] * 3 + [("b", "normal")]
        assert agenda.take() is None and not agenda.is_handed_out
        for unit in units:
            assert unit is not None
            agenda.finish(unit.number, outcome(unit, 2))
        swapped = agenda.take()
        assert swapped is not None and swapped.control == "swapped"


def test_what_fails_is_named_and_the_rest_is_reported(tmp_path: Path) -> None:
    cells = cells_of(entry(controls=("normal", "swapped"), num_packs=4, lifecycles_per_pack=1))
    agenda, _ = run(cells, tmp_path, fails=frozenset({("normal", 1)}))
    assert agenda.is_over and agenda.num_done == agenda.total
    # Pack 1 failed; packs 0 and 2 would have been shown its hints.
    assert len(agenda.failures) == 2 and "it broke" in agenda.failures[0]
    assert "whose hints it is shown failed" in agenda.failures[1]
    with ResultFile(tmp_path / "r.jsonl") as results:
        (normal, swapped), missing = build_reports("m", 7, cells, results)
    assert missing == []
    assert (normal.num_packs, normal.num_missing, swapped.num_packs, swapped.num_missing) == (3, 1, 3, 1)
    assert [row.mean for row in normal.rows][:2] == [(0 + 2 + 3) / 3, (1 + 3 + 4) / 3]
    assert {row.step for row in normal.rows} == {7}


def test_one_world_for_all_packs_leaves_nothing_to_swap(tmp_path: Path) -> None:
    cells = cells_of(entry(controls=("normal", "swapped"), num_packs=3, lifecycles_per_pack=1))
    agenda, played = run(cells, tmp_path, num_worlds=1)
    assert agenda.is_over and agenda.total == 3 and {unit.control for unit in played} == {"normal"}
    with ResultFile(tmp_path / "r.jsonl") as results:
        reports, missing = build_reports("m", None, cells, results)
    assert [report.control for report in reports] == ["normal"]
    assert [(m["control"], m["reason"]) for m in missing] == [
        ("swapped", "all 3 packs have the same hidden world, so there is no other to take hints from")
    ]


def test_equal_lifecycles_of_two_entries_share_a_result(tmp_path: Path) -> None:
    twice = cells_of(entry(num_packs=2), entry(name="the same", num_packs=2))
    agenda, played = run(twice, tmp_path)
    assert agenda.is_over and agenda.num_done == 8 and len({unit.key for unit in played}) == 4
