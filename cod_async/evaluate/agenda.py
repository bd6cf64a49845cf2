"""What is left to play with one set of weights, handed out one lifecycle at a time.

A *cell* is a setting under one seed. Its packs are planned as they are handed out, and what is on disk
already is passed over, so starting, continuing and extending an evaluation are the same thing. The control
``swapped`` needs to know every hidden world of its cell and the hints of the normal lifecycles, so it is
handed out when those are done; until then other cells go on.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence

from cod_async.evaluate.plan import Packs, donors, lifecycle_key, pack_digest, sampling_seed, setting_digest
from cod_async.evaluate.playing import Unit
from cod_async.evaluate.results import LifecycleResult, ResultFile
from cod_async.evaluate.suite import Control, Setting
from cod_async.lifecycle.packs import PackPlan

SAME_WORLD = "all {num} packs have the same hidden world, so there is no other to take hints from"
MAX_FAILURES = 20
"""More lifecycles than this that cannot be played mean that something is broken."""


class Cell:
    """A setting under one seed.

    Args:
        setting: what is played.
        index: number of the setting.
        seed: of the sampling, and of the data unless the suite has a seed of its own for them.
        data_seed: of data sets and hidden worlds.

    Attributes:
        num_packs: packs of this cell.
        pack_digests: what identifies each pack, once it was planned.
        donors: for each pack the one whose hints its ``swapped`` lifecycles are shown; None until the worlds
            are known, or if there is only one.
        unavailable: control -> why it cannot be played in this cell.
    """

    def __init__(self, setting: Setting, index: int, seed: int, data_seed: int) -> None:
        self.setting = setting
        self.index = index
        self.seed = seed
        self._digest = setting_digest(setting)
        self._packs = Packs(setting, data_seed)
        self.num_packs = self._packs.num_packs
        self.pack_digests: list[str] = []
        self.donors: list[int] | None = None
        self.unavailable: dict[Control, str] = {}

    @property
    def num_lifecycles(self) -> int:
        """Lifecycles of all controls that can be played."""
        num_controls = len([control for control in self.setting.controls if control not in self.unavailable])
        return self.num_packs * self.setting.lifecycles_per_pack * num_controls

    def plan(self, pack: int) -> PackPlan:
        """Plan a pack; the first time in the order of their numbers."""
        plan = self._packs.plan(pack)
        if pack == len(self.pack_digests):
            self.pack_digests.append(pack_digest(plan))
        return plan

    def key(self, control: Control, pack: int, member: int, hints: Sequence[str] | None = None) -> str:
        """Return the key of a lifecycle; the hints are those of the donor with control ``swapped``."""
        seed = sampling_seed(self.seed, pack, member)
        return lifecycle_key(self._digest, self.pack_digests[pack], seed, member, control, hints)

    def result(self, results: ResultFile, control: Control, pack: int, member: int) -> LifecycleResult | None:
        """Return what a lifecycle came to, or None if it was not played."""
        if control in self.unavailable:
            return None
        if control != "swapped":
            return results.get(self.key(control, pack, member))
        hints = self.donated(results, pack, member)
        return None if hints is None else results.get(self.key(control, pack, member, hints))

    def donated(self, results: ResultFile, pack: int, member: int) -> tuple[str, ...] | None:
        """Return the hints that a ``swapped`` lifecycle is shown, or None if their lifecycle failed."""
        if self.donors is None:
            return None
        donor = results.get(self.key("normal", self.donors[pack], member))
        return None if donor is None else donor.hints

    def find_donors(self, results: ResultFile) -> None:
        """Choose the donors, now that all normal lifecycles are played (or failed)."""
        worlds = []
        for pack in range(self.num_packs):
            found = results.get(self.key("normal", pack, 0))
            # A pack that failed has no hints to give; it takes part as its own world would.
            worlds.append(f"failed {pack}" if found is None else found.world)
        self.donors = donors(worlds)
        if self.donors is None:
            self.unavailable["swapped"] = SAME_WORLD.format(num=self.num_packs)

    def unit(
        self,
        number: int,
        control: Control,
        plan: PackPlan,
        pack: int,
        member: int,
        hints: tuple[str, ...] | None = None,
    ) -> Unit:
        """Return one lifecycle as something to play."""
        setting = self.setting
        return Unit(
            number=number,
            key=self.key(control, pack, member, hints),
            what={
                "entry": setting.label,
                "mode": setting.mode,
                "split": setting.split,
                "control": control,
                "seed": self.seed,
                "pack": pack,
                "member": member,
            },
            setting=self.index,
            plan=plan,
            member=member,
            sampling_seed=sampling_seed(self.seed, pack, member),
            control=control,
            hints=hints,
        )


class Agenda:
    """Hands out what is left of some cells and takes in what came of it.

    Args:
        cells: what to play.
        results: the lifecycles played so far with these weights; finished ones are added to it.

    Attributes:
        num_kept: lifecycles that were on disk already, as far as looked.
        num_played: lifecycles finished since.
        failures: what could not be played, and why.
    """

    def __init__(self, cells: Sequence[Cell], results: ResultFile) -> None:
        self.cells = list(cells)
        self.num_kept = 0
        self.num_played = 0
        self.failures: list[str] = []
        self._results = results
        self._sources: deque[tuple[Cell, Iterator[Unit]]] = deque(
            (cell, self._first_units(cell)) for cell in self.cells
        )
        self._running: dict[int, Cell] = {}
        self._counter = itertools.count()
        self._outstanding = dict.fromkeys(range(len(self.cells)), 0)
        self._numbers = {id(cell): number for number, cell in enumerate(self.cells)}
        self._listed: set[int] = set()

    @property
    def total(self) -> int:
        """Lifecycles in all, those on disk included."""
        return sum(cell.num_lifecycles for cell in self.cells)

    @property
    def num_done(self) -> int:
        """Lifecycles that need no more work, failed ones included."""
        return self.num_kept + self.num_played + len(self.failures)

    @property
    def is_handed_out(self) -> bool:
        """Whether :meth:`take` will never have anything again."""
        return not self._sources and not any(
            "swapped" in cell.setting.controls and number not in self._listed
            for number, cell in enumerate(self.cells)
        )

    @property
    def is_over(self) -> bool:
        """Whether everything was handed out and has come back."""
        return self.is_handed_out and not self._running

    def take(self) -> Unit | None:
        """Return a lifecycle to play; None if there is none now (see :attr:`is_handed_out`)."""
        while self._sources:
            cell, units = self._sources[0]
            unit = next(units, None)
            if unit is not None:
                self._running[unit.number] = cell
                self._outstanding[self._numbers[id(cell)]] += 1
                return unit
            self._sources.popleft()
            self._list_swapped(cell)
        return None

    def finish(self, number: int, result: LifecycleResult) -> None:
        """Take in the lifecycle that was handed out under this number, durably."""
        self._results.add(result)
        self.num_played += 1
        self._settle(number)

    def fail(self, unit: Unit, reason: str) -> None:
        """Take in that a lifecycle cannot be played."""
        words = " ".join(str(value) for value in unit.what.values())
        self.failures.append(f"{words}: {reason}")
        self._settle(unit.number)

    def _settle(self, number: int) -> None:
        cell = self._running.pop(number)
        self._outstanding[self._numbers[id(cell)]] -= 1
        self._list_swapped(cell)

    def _first_units(self, cell: Cell) -> Iterator[Unit]:
        """Go through everything but ``swapped``."""
        controls = [control for control in cell.setting.controls if control != "swapped"]
        for pack in range(cell.num_packs):
            plan = cell.plan(pack)
            for member in range(cell.setting.lifecycles_per_pack):
                for control in controls:
                    if cell.key(control, pack, member) in self._results:
                        self.num_kept += 1
                    else:
                        yield cell.unit(next(self._counter), control, plan, pack, member)

    def _list_swapped(self, cell: Cell) -> None:
        """Put the ``swapped`` lifecycles of a cell first in line, once everything they need is there."""
        number = self._numbers[id(cell)]
        is_waiting = "swapped" in cell.setting.controls and number not in self._listed
        is_listing = any(other is cell for other, _ in self._sources)
        if not is_waiting or is_listing or self._outstanding[number]:
            return
        self._listed.add(number)
        cell.find_donors(self._results)
        if cell.donors is not None:
            self._sources.appendleft((cell, self._swapped_units(cell)))

    def _swapped_units(self, cell: Cell) -> Iterator[Unit]:
        for pack in range(cell.num_packs):
            plan = cell.plan(pack)
            for member in range(cell.setting.lifecycles_per_pack):
                hints = cell.donated(self._results, pack, member)
                if hints is None:
                    self.failures.append(
                        f"{cell.setting.label} {cell.setting.mode} {cell.setting.split} swapped {cell.seed} "
                        f"{pack} {member}: the lifecycle whose hints it is shown failed"
                    )
                elif cell.key("swapped", pack, member, hints) in self._results:
                    self.num_kept += 1
                else:
                    yield cell.unit(next(self._counter), "swapped", plan, pack, member, hints)
