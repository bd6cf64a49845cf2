"""Where lifecycles live: each on one server, lifecycles of a group together while there is room.

A server answers a turn faster when it still has the row's earlier turns in its prefix cache, and a group's
lifecycles share their first prompt. So a lifecycle stays where it is, a new one goes where its group went
last if that server has room, else to the least loaded one. Memory is bounded: what was not heard of for
longest is forgotten and simply placed anew.
"""

from __future__ import annotations

import re
import zlib
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

_SESSION = re.compile(r"^(?P<group>.*/g\d+)(?P<member>\.m\d+)\.e\d+\.o\d+$", re.DOTALL)


@dataclass(frozen=True)
class Load:
    """How busy a server is: open sessions and running requests."""

    num_sessions: int
    num_running: int


def lifecycle_of(session: str) -> tuple[str, str | None]:
    """Return (lifecycle, group) of a session ``RUN/g<group>.m<member>.e<epoch>.o<ordinal>``.

    Any other text is a lifecycle of its own, without a group.
    """
    match = _SESSION.match(session)
    return (match["group"] + match["member"], match["group"]) if match else (session, None)


class Affinity:
    """Remembers and chooses places.

    Args:
        max_lifecycles: lifecycles, and groups, that are remembered.
    """

    def __init__(self, max_lifecycles: int) -> None:
        self._max = max_lifecycles
        self._lifecycles: OrderedDict[str, str] = OrderedDict()
        self._groups: OrderedDict[str, str] = OrderedDict()

    def place(
        self, session: str | None, loads: Mapping[str, Load], *, serving: Collection[str], room: int
    ) -> str | None:
        """Choose a server for a session that is not open anywhere.

        Args:
            session: its key; None for a single request, which goes to the server that runs least.
            loads: servers that take new sessions now.
            serving: servers that are well, though some may be holding new sessions back for a moment.
            room: a server with so many open sessions takes no more of them for the sake of its cache.

        Returns:
            A key of ``loads``; None to wait: nobody takes sessions, or the lifecycle's server will soon, and
            the others are full.
        """
        if not loads:
            return None
        if session is None:
            return min(loads, key=lambda name: (loads[name].num_running, name))
        lifecycle, group = lifecycle_of(session)
        home = self._lifecycles.get(lifecycle)
        free = {name: load for name, load in loads.items() if load.num_sessions < room}
        chosen: str
        if home is not None and home in loads:
            chosen = home
        elif home in serving and not free:
            return None
        elif group is not None and self._groups.get(group, "") in free:
            chosen = self._groups[group]
        else:
            key = group or lifecycle
            chosen = min(loads, key=lambda name: (loads[name].num_sessions, *_rank(key, name)))
        _remember(self._lifecycles, lifecycle, chosen, self._max)
        if group is not None:
            _remember(self._groups, group, chosen, self._max)
        return chosen


def _rank(key: str, name: str) -> tuple[int, str]:
    """Break ties the same way in every process, and differently for every key."""
    return zlib.crc32(f"{key}|{name}".encode()), name


def _remember(places: OrderedDict[str, str], key: str, name: str, limit: int) -> None:
    places[key] = name
    places.move_to_end(key)
    while len(places) > limit:
        places.popitem(last=False)
