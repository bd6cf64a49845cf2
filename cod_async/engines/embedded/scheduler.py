"""Who gets a slot: sessions, the waiting queue, and eviction.

A session keeps its slot between turns, so a turn that extends the row computes only its new tokens. Requests
that need a slot wait in one queue, first come first served. When no slot is free, the session that has been
idle longest gives its slot up, provided it has been idle for a while or nothing at all is running; it is
computed again when it comes back. So a slow environment does not hold a slot, a quick one keeps it, and idle
sessions can never starve the queue.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from cod_async.engines.base import Completion, SamplingParams
from cod_async.engines.embedded.slots import IntArray, SlotTable
from cod_async.errors import EngineError
from cod_async.lifecycle.segment import Version

EVICT_AFTER_STEPS = 16
"""A session is evicted for a waiting request only after this many engine steps without a turn, unless nothing
runs."""

SESSIONS_PER_SLOT = 64
"""Evicted sessions remembered per slot; beyond that the oldest are forgotten (their next turn is simply a new
one)."""


@dataclass(eq=False)
class Session:
    """A conversation: the slot that holds its row, if any, and the request that it is waiting for, if any."""

    key: str | None
    slot: int | None = None
    request: Request | None = None
    is_started: bool = False
    is_closing: bool = False
    idle_since_step: int = 0

    @property
    def placed_slot(self) -> int:
        """The slot of a session that must have one."""
        if self.slot is None:
            raise RuntimeError(f"session {self.key!r} holds no slot")
        return self.slot


@dataclass(eq=False)
class Request:
    """One call of ``generate``.

    Attributes:
        number: order of arrival.
        marks: (version, tokens sampled before it was replaced), one per weight switch while running.
        num_tokens: tokens of a finished request whose completion its caller has not taken yet.
    """

    number: int
    prompt: IntArray
    params: SamplingParams
    future: asyncio.Future[Completion]
    session: Session
    marks: list[tuple[Version, int]] = field(default_factory=list)
    num_tokens: int = 0


class Scheduler:
    """Sessions, queue and slots. Knows nothing of tensors.

    Args:
        num_slots: sequences that can hold a cache at once.
        table: per-slot arrays (may have more rows than ``num_slots``; those are never given out).
    """

    def __init__(self, num_slots: int, table: SlotTable) -> None:
        self.table = table
        self.waiting: deque[Request] = deque()
        self.hold: Literal["turns", "sessions"] | None = None
        """What waits for a weight switch: every new request, or those of new sessions."""
        self.num_evictions = 0
        self._num_slots = num_slots
        self._free = list(range(num_slots))
        self._by_slot: dict[int, Request] = {}
        self._sessions: dict[str, Session] = {}
        self._idle: OrderedDict[Session, None] = OrderedDict()
        self._evicted: OrderedDict[Session, None] = OrderedDict()

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything: something runs, or something that may be admitted waits."""
        return bool(self._by_slot) or any(self._may_start(request) for request in self.waiting)

    @property
    def has_running(self) -> bool:
        """Whether any request holds a slot."""
        return bool(self._by_slot)

    @property
    def has_open_episode(self) -> bool:
        """Whether any session has started and is not closed, or any request is running."""
        return bool(self._by_slot) or any(session.is_started for session in self._sessions.values())

    def running(self) -> Iterator[Request]:
        """All requests that hold a slot."""
        return iter(self._by_slot.values())

    def request_at(self, slot: int) -> Request:
        """The request running in a slot."""
        return self._by_slot[slot]

    def session_for(self, key: str | None) -> Session:
        """Find or open the session of a new request.

        Raises:
            EngineError: the session already has a request, or is closing.
        """
        if key is None:
            return Session(None)
        session = self._sessions.get(key)
        if session is None:
            session = self._sessions[key] = Session(key)
        elif session.request is not None or session.is_closing:
            raise EngineError(f"session {key!r} already has a request; wait for it before the next turn")
        return session

    def submit(self, request: Request) -> None:
        """Place the request if its session holds a slot and may go on, else queue it."""
        session = request.session
        session.request = request
        self._evicted.pop(session, None)
        self._idle.pop(session, None)
        if session.slot is None or not self._may_start(request):
            self.waiting.append(request)
        else:
            self._place(request, session.slot)

    def admit(self, step: int) -> None:
        """Give slots to waiting requests, in order, as far as slots go."""
        if not self.waiting:
            return
        kept: deque[Request] = deque()
        is_full = False
        while self.waiting:
            request = self.waiting.popleft()
            if not self._may_start(request):
                kept.append(request)
                continue
            slot = request.session.slot
            if slot is None and not is_full:
                slot = self._take_slot(step)
                is_full = slot is None
            if slot is None:  # those behind it that a switch held back may still have their slots
                kept.append(request)
                continue
            self._place(request, slot)
        self.waiting.extendleft(reversed(kept))

    def finish(self, request: Request, step: int) -> None:
        """Take a request off its slot; its session, if it has one, goes idle and keeps its cache."""
        session = request.session
        slot = session.placed_slot
        del self._by_slot[slot]
        self.table.stop(slot)
        session.request = None
        session.idle_since_step = step
        if session.key is None or session.is_closing:
            self.drop(session)
        else:
            self._idle[session] = None

    def abort(self, request: Request, step: int) -> None:
        """Remove a request wherever it is, and forget its session with its slot."""
        session = request.session
        session.is_closing = True
        if session.slot is not None and self._by_slot.get(session.slot) is request:
            self.finish(request, step)
        else:
            self.waiting.remove(request)
            session.request = None
            self.drop(session)

    def close(self, key: str) -> None:
        """Close a session; one with a running request closes when that ends. Unknown keys are ignored."""
        session = self._sessions.get(key)
        if session is None:
            return
        if session.request is not None:
            session.is_closing = True
        else:
            self.drop(session)

    def drop(self, session: Session) -> None:
        """Forget a session without a request and free its slot."""
        self._idle.pop(session, None)
        self._evicted.pop(session, None)
        if session.slot is not None:
            self.table.forget(session.slot)
            heapq.heappush(self._free, session.slot)
            session.slot = None
        if session.key is not None and self._sessions.get(session.key) is session:
            del self._sessions[session.key]

    def _may_start(self, request: Request) -> bool:
        return self.hold is None or (self.hold == "sessions" and request.session.is_started)

    def _take_slot(self, step: int) -> int | None:
        if self._free:
            return heapq.heappop(self._free)
        if not self._idle:
            return None
        session = next(iter(self._idle))
        if self._by_slot and step - session.idle_since_step < EVICT_AFTER_STEPS:
            return None
        slot = session.placed_slot
        del self._idle[session]
        session.slot = None
        self.table.forget(slot)
        self.num_evictions += 1
        self._evicted[session] = None
        while len(self._evicted) > SESSIONS_PER_SLOT * self._num_slots:
            self.drop(next(iter(self._evicted)))
        return slot

    def _place(self, request: Request, slot: int) -> None:
        request.session.slot = slot
        request.session.is_started = True
        self._by_slot[slot] = request
        self.table.start(slot, request.prompt, request.params)
