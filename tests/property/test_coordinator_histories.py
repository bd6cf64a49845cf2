"""Random histories of actors, a learner and crashes; the books of all three must agree, and nothing may get
stuck.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest
from coordinator_world import (
    MEMORY_FOLDER,
    RUN,
    Actor,
    Learner,
    LearnerCheckpoint,
    World,
    make_config,
    true_lag,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cod_async.envs import registry
from cod_async.envs.hidden_buttons import SPEC
from cod_async.envs.hidden_buttons.env import HiddenButtons
from cod_async.lifecycle.segment import SegmentKey
from cod_async.store.ledger import ledger_with_problems
from cod_async.store.segments import SegmentRow
from cod_async.wire.messages import SegmentData, StepRequest

OPERATIONS = {
    "ask": 10,
    "play": 30,
    "play_crash_before": 1,
    "play_crash_after": 1,
    "play_crash_inside": 2,
    "play_out_of_order": 2,
    "play_bad": 1,
    "heartbeat": 4,
    "give_back": 1,
    "die": 1,
    "leave": 1,
    "start_over": 1,
    "train": 12,
    "train_crash": 2,
    "train_crash_inside": 1,
    "checkpoint": 3,
    "learner_dies": 1,
    "wait": 1,
}


class History:
    """One random history."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        *,
        max_lag: int,
        on_bound: str,
        is_deterministic: bool,
        is_resumable: bool = True,
        has_late: bool = False,
        max_uses: int = 1,
    ) -> None:
        self.rng = random.Random(seed)
        quorum = {"close": "quorum", "quorum_members": 2, "after_s": 1.0} if has_late else {}
        self.config = make_config(
            staleness={"max_lag": max_lag, "on_bound": on_bound},
            lifecycle={"group_size": 3 if has_late else 2},
            replay={"max_uses": max_uses, "groups_per_step": 2 if max_uses > 1 else 0},
            groups={"deadline_s": 50.0, **quorum},
            learner={"groups_per_step": self.rng.choice([1, 2])},
            store={"retention": self.rng.choice(["all", "until_checkpoint"])},
            credit_assignment={"red": self.rng.choice(["off", "bisection"])},
        )
        self.is_deterministic = is_deterministic
        self.is_resumable = is_resumable
        self.num_restarted = 0
        self.world = World(folder, self.config)
        self.learner = Learner(self.world)
        self.saved: LearnerCheckpoint | None = None
        self.num_actors = 0
        self.gone: list[Actor] = []
        self.actors = [self.new_actor(), self.new_actor()]
        self.num_rollbacks = 0
        self.num_replayed = self.num_late = 0

    def new_actor(self) -> Actor:
        self.num_actors += 1
        actor = Actor(self.world, f"actor-{self.num_actors}", rng=self.rng)
        actor.open_frac = 0.5
        return actor

    def run(self, num_operations: int) -> None:
        names, weights = list(OPERATIONS), list(OPERATIONS.values())
        for name in self.rng.choices(names, weights, k=num_operations):
            index = self.rng.randrange(len(self.actors))
            actor = self.actors[index]
            if name in ("die", "leave"):
                getattr(actor, name)()
                self.gone.append(actor)
                self.actors[index] = self.new_actor()
            elif name in ("ask", "heartbeat", "start_over"):
                getattr(actor, name)()
            elif name.startswith("play") or name == "give_back":
                if actor.lives:
                    self.play(actor, name)
            elif name == "wait":
                self.world.tick(self.rng.choice([0.5, 2.0, 2.0, 60.0]))
            else:
                self.train(name)

    def play(self, actor: Actor, name: str) -> None:
        ref = self.rng.choice(list(actor.lives))
        if name == "give_back":
            actor.give_back(ref, self.rng.choice(["infrastructure", "draining"]))
        elif name == "play_bad":
            seq = actor.seal(ref)
            segment = actor.outbox[seq]
            actor.outbox[seq] = type(segment)(**{**_fields(segment), "pack_seed": segment.pack_seed ^ 1})
            actor.send(seq)
        elif name == "play_out_of_order":
            first = actor.seal(ref)
            second = actor.seal(ref) if ref in actor.lives else first
            actor.send(second)
            if first in actor.outbox:
                actor.send(first)
        elif name == "play_crash_inside":
            seq = actor.seal(ref)
            data = SegmentData(seq=seq, segment=actor.outbox[seq])
            self.world.fail_inside(actor.session, data, self.rng.randrange(1, 400))
        else:
            actor.play(
                ref, is_lost_before=name == "play_crash_before", is_lost_after=name == "play_crash_after"
            )

    def train(self, name: str) -> None:
        learner = self.learner
        if name == "checkpoint":
            self.saved = learner.checkpoint()
        elif name == "learner_dies":
            learner.die()
            self.num_rollbacks += 1
            self.learner = Learner(self.world, self.saved)
            assert self.learner.opened is not None
        elif name == "train_crash_inside":
            request = StepRequest(version=learner.version)
            self.world.fail_inside(learner.session, request, self.rng.randrange(1, 4000))
        else:
            learner.request_step()
            if learner.batch is not None:
                self.check_batch()
                noise = "" if self.is_deterministic else str(self.rng.random())
                crash = (
                    {self.rng.choice(["is_lost_before", "is_lost_after"]): True} if "crash" in name else {}
                )
                learner.take_step(noise, **crash)

    def check_batch(self) -> None:
        learner = self.learner
        assert learner.batch is not None
        items = learner.batch[1]
        assert items and [item.key for item in items] == sorted(item.key for item in items)
        for item in items:
            versions = [span.version for row in item.rows for span in row.versions]
            lags = [true_lag(self.world, learner, version, learner.version.step) for version in versions]
            assert max(lags) <= self.config.staleness.max_lag
            assert item.lag_steps == max(lags)

    def check_books(self) -> None:
        """Compare the database with what everybody else counted."""
        answer, problems = ledger_with_problems(self.world.folder)
        assert answer["balanced"], problems
        uses = Counter(item.key for items in self.learner.history for item in items)
        assert max(uses.values(), default=0) <= self.config.replay.max_uses, "trained too often"
        trained = list(uses)
        rows = self.world.store._connection.execute(
            "SELECT grp, member, ordinal, lease_epoch, state FROM segments"
        ).fetchall()
        stored = {SegmentKey(g, m, o): (epoch, state) for g, m, o, epoch, state in rows}
        assert {key for key, (_, state) in stored.items() if state == "trained"} == set(trained)
        everyone = [*self.actors, *self.gone]
        acked = [(key, epoch) for actor in everyone for key, epoch in actor.acked.items()]
        restarted = {
            (SegmentKey(g, m, o), epoch)
            for g, m, o, epoch in self.world.store._connection.execute(
                "SELECT grp, member, ordinal, lease_epoch FROM refused_segments WHERE reason = 'restarted'"
            )
        }
        for key, epoch in acked:
            is_winner = key in stored and stored[key][0] == epoch
            assert is_winner != ((key, epoch) in restarted), "acknowledged and lost, or two winners"
        assert not (self.is_resumable and restarted)
        self.num_restarted = len(restarted)
        sealed = sum(actor.counters["sealed_segments"] for actor in everyone)
        assert answer["segments"]["generated"] <= sealed
        assert answer["segments"]["trained"] == len(trained)
        tokens: Counter[SegmentKey] = Counter()
        for item in (item for items in self.learner.history for item in items):
            tokens[item.key] += sum(row.num_action_tokens for row in item.rows)
        assert answer["tokens"]["trained"] == sum(tokens[key] // uses[key] for key in uses)
        replayed = {"segments": uses.total() - len(uses)}
        replayed["tokens"] = tokens.total() - answer["tokens"]["trained"]
        assert answer.get("replayed", {"segments": 0, "tokens": 0}) == replayed
        self.num_replayed = replayed["segments"]
        self.num_late = sum(row.is_late for row in self.late_rows())
        dropped: Counter[str] = sum((actor.dropped for actor in everyone), Counter())
        for reason in ("wrong_world", "fenced"):
            assert answer["segments"]["dropped"].get(reason, 0) >= (dropped[reason] > 0)
        if not self.num_rollbacks and self.config.staleness.on_bound == "wait":
            assert "stale" not in answer["segments"]["dropped"]

    def late_rows(self) -> list[SegmentRow]:
        """Every segment that was credited late, whatever became of it."""
        groups = self.world.store._connection.execute("SELECT grp FROM groups").fetchall()
        segments = self.world.store.segments
        return [row for (group,) in groups for row in segments.of_group(group) if row.is_late]

    def check_progress(self) -> None:
        """With one healthy actor and the learner alone, steps must follow each other."""
        for actor in self.actors:
            actor.die()
            self.gone.append(actor)
        actor = self.new_actor()
        self.actors = [actor]
        goal = self.learner.version.step + 3
        for _ in range(200):
            self.world.tick(1.0)
            actor.ask(8)
            actor.play_all()
            self.train("train")
            if self.learner.version.step >= goal:
                return
        raise AssertionError(f"stuck at {self.learner.version}: {self.world.brain.status()}")

    def check_everything_counted(self) -> None:
        """Once everybody has left, generated is exactly what the survivors sealed plus what is known of the
        dead.
        """
        for actor in self.actors:
            actor.leave()
        answer, problems = ledger_with_problems(self.world.folder)
        assert answer["balanced"], problems
        self.world.brain.close_run()
        answer, problems = ledger_with_problems(self.world.folder)
        assert answer["balanced"], problems


def _fields(segment: object) -> dict[str, object]:
    return {name: getattr(segment, name) for name in segment.__struct_fields__}  # type: ignore[attr-defined]


def live(history: History) -> None:
    """Let a history happen and check the books on the way and at its end."""
    assert history.config.run.name == RUN
    for _ in range(3):
        history.run(50)
        history.check_books()
    history.check_progress()
    history.check_books()
    history.check_everything_counted()
    history.world.store.close()


@pytest.mark.parametrize(
    ("max_lag", "on_bound", "is_deterministic"),
    [
        (0, "wait", False),
        (0, "wait", True),
        (1, "wait", False),
        (3, "wait", False),
        (3, "wait", True),
        (2, "expire", False),
    ],
)
@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_histories_keep_their_books(
    max_lag: int, on_bound: str, is_deterministic: bool, seed: int
) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY_FOLDER) as folder:
        live(
            History(Path(folder), seed, max_lag=max_lag, on_bound=on_bound, is_deterministic=is_deterministic)
        )


@pytest.mark.parametrize(
    ("max_lag", "on_bound", "max_uses", "has_late"),
    [(3, "wait", 1, True), (2, "expire", 1, True), (4, "wait", 3, False), (3, "expire", 2, True)],
)
def test_late_members_and_replay_keep_the_books_as_well(
    max_lag: int, on_bound: str, max_uses: int, has_late: bool
) -> None:
    num_late = num_replayed = 0
    for seed in range(10):
        with tempfile.TemporaryDirectory(dir=MEMORY_FOLDER) as folder:
            history = History(
                Path(folder),
                seed,
                max_lag=max_lag,
                on_bound=on_bound,
                is_deterministic=False,
                max_uses=max_uses,
                has_late=has_late,
            )
            live(history)
            num_late += history.num_late
            num_replayed += history.num_replayed
    assert (num_late > 0, num_replayed > 0) == (has_late, max_uses > 1)  # it did happen


class Forgetful(HiddenButtons):
    """Says that its state cannot be carried to another actor."""

    is_resumable: ClassVar[bool] = False


@pytest.mark.parametrize(("max_lag", "on_bound"), [(0, "wait"), (3, "wait"), (2, "expire")])
def test_lifecycles_that_start_anew_keep_the_books_as_well(
    max_lag: int, on_bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = msgspec.structs.replace(SPEC, make=Forgetful)
    monkeypatch.setattr(registry, "get", lambda name: spec)
    num_restarted = 0
    for seed in range(12):
        with tempfile.TemporaryDirectory(dir=MEMORY_FOLDER) as folder:
            history = History(
                Path(folder),
                seed,
                max_lag=max_lag,
                on_bound=on_bound,
                is_deterministic=False,
                is_resumable=False,
            )
            live(history)
            num_restarted += history.num_restarted
    assert num_restarted > 12  # it did happen
