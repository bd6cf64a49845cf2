"""Model check of the session protocol: nothing acknowledged is lost, nothing counts twice, everything arrives
in the end.

Two actors with five segments each and one coordinator, under losses, repetitions, reorderings, broken
connections and crashes of either side. Once exhaustively over every place of one fault (and of two crashes)
in a clean run, once by random search over interleavings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from session_world import World

Fault = Callable[[World], None]


def drop_up(world: World) -> None:
    if world.up:
        world.up.pop(0)


def drop_down(world: World) -> None:
    if world.down:
        world.down.pop(0)


def repeat_up(world: World) -> None:
    world.up.extend(world.up[:1] * 3)


def repeat_down(world: World) -> None:
    world.down.extend(world.down[:1] * 3)


def reverse_all(world: World) -> None:
    world.up.reverse()
    world.down.reverse()


def lose_all(world: World) -> None:
    world.up.clear()
    world.down.clear()


def silence(world: World) -> None:
    world.tick(6.0)


def server_away(world: World) -> None:
    world.tick(60.0, is_server_away=True)


FAULTS: dict[str, Fault] = {
    "drop_up": drop_up,
    "drop_down": drop_down,
    "repeat_up": repeat_up,
    "repeat_down": repeat_down,
    "reverse_all": reverse_all,
    "lose_all": lose_all,
    "silence": silence,
    "server_away": server_away,
    "crash_server": World.crash_server,
    "crash_actor": lambda world: world.crash_actor(0),
    "reconnect": lambda world: world.reconnect(0),
}
CRASHES = ("crash_server", "crash_actor", "silence", "reconnect")


def clean_run(world: World, num_events: int = 140) -> Iterator[None]:
    """Run without faults, one event at a time; the order of kinds changes so that queues fill and empty."""
    for turn in range(num_events):
        kind = turn % 7
        if kind in (0, 1, 2):
            world.send(turn % 2)
            world.send((turn + 1) % 2)
        elif kind in (3, 4) and world.up:
            world.deliver_up(len(world.up) // 2 if kind == 4 else 0)
        elif kind == 5:
            world.commit()
        elif world.down:
            world.deliver_down(0)
        world.tick(0.05)
        yield


def run_with(faults: dict[int, str]) -> None:
    world = World()
    for turn, _ in enumerate(clean_run(world)):
        if turn in faults:
            FAULTS[faults[turn]](world)
        world.check()
    world.settle_down()
    assert world.num_refused == 0


def test_without_faults() -> None:
    run_with({})


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_at_every_place(fault: str) -> None:
    for turn in range(110):
        run_with({turn: fault})


@pytest.mark.parametrize("first", CRASHES)
@pytest.mark.parametrize("second", CRASHES)
def test_two_crashes_at_many_places(first: str, second: str) -> None:
    for turn in range(0, 100, 5):
        for gap in (1, 3, 8, 20):
            run_with({turn: first, turn + gap: second})


@pytest.mark.parametrize("keep_every", [2, 3, 10])
def test_a_network_that_loses_much(keep_every: int) -> None:
    world = World()
    num_sent = 0
    for _ in range(4000):
        for index in range(2):
            while world.send(index):
                num_sent += 1
                if num_sent % keep_every:
                    world.up.pop()
        while world.up:
            world.deliver_up(0)
        world.commit()
        while world.down:
            world.deliver_down(0)
        world.check()
        if not any(actor.session.num_unacked for actor in world.actors):
            break
        world.tick(0.5)
    world.settle_down()


class Interleavings(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.num_crashes = 0

    @rule(index=st.integers(0, 1))
    def send(self, index: int) -> None:
        self.world.send(index)

    @rule(index=st.integers(0, 1))
    def send_all(self, index: int) -> None:
        while self.world.send(index):
            pass

    @precondition(lambda self: self.world.up)
    @rule(data=st.data())
    def deliver_up(self, data: st.DataObject) -> None:
        self.world.deliver_up(data.draw(st.integers(0, len(self.world.up) - 1)))

    @precondition(lambda self: self.world.down)
    @rule(data=st.data())
    def deliver_down(self, data: st.DataObject) -> None:
        self.world.deliver_down(data.draw(st.integers(0, len(self.world.down) - 1)))

    @rule()
    def deliver_all(self) -> None:
        while self.world.up:
            self.world.deliver_up(0)
        while self.world.down:
            self.world.deliver_down(0)

    @precondition(lambda self: self.world.up or self.world.down)
    @rule(data=st.data(), is_lost=st.booleans())
    def lose_or_repeat(self, data: st.DataObject, is_lost: bool) -> None:
        queue = self.world.up if self.world.up and data.draw(st.booleans()) else self.world.down
        if queue:
            at = data.draw(st.integers(0, len(queue) - 1))
            if is_lost:
                queue.pop(at)
            else:
                queue.append(queue[at])

    @rule()
    def commit(self) -> None:
        self.world.commit()

    @rule(seconds=st.sampled_from([0.1, 1.0, 2.0, 6.0]), is_server_away=st.booleans())
    def tick(self, seconds: float, is_server_away: bool) -> None:
        self.world.tick(seconds, is_server_away=is_server_away)

    @rule(index=st.integers(0, 1))
    def reconnect(self, index: int) -> None:
        self.world.reconnect(index)

    @precondition(lambda self: self.num_crashes < 3)
    @rule(victim=st.sampled_from([0, 1, None]))
    def crash(self, victim: int | None) -> None:
        self.num_crashes += 1
        if victim is None:
            self.world.crash_server()
        else:
            self.world.crash_actor(victim)

    @invariant()
    def holds(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.world.settle_down()


Interleavings.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestInterleavings = Interleavings.TestCase
