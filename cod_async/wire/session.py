"""The session protocol: how a segment gets from an actor to the database exactly once, whatever breaks in
between.

::

    client                                         coordinator
      | -- Hello(session 0, instance) ---------------> |   allocates an epoch, durably
      | <------------------ Welcome(session, credit) - |
      | -- SegmentData(seq 1), (2), (3) … -----------> |   validates, writes, commits
      | <--------- Ack([1, 2, 3], cumulative credit) - |   only now the outbox forgets them
      | -- Heartbeat every heartbeat_s --------------> |   silence for session_timeout_s: leases are free
      | <------------------------------------- Pong -- |   silence: new connection, the address is read again
      |   … connection lost, coordinator restarted …   |
      | -- Hello(session, last_seq, unacked) --------> |   known: Welcome(is_continued), unacked come again
      | <------------------------ Welcome or Refused - |   expired: session_expired, then Hello(session 0)

*Nothing is lost*: a segment leaves the outbox only when it is settled, that is committed, or dropped with a
reason; until then it is sent again, after ``resend_s`` (growing) and after each reconnection. *Nothing counts
twice*: within a session a sequence number is handed to the coordinator once; across sessions and coordinator
restarts the database has one winner per (lifecycle, ordinal), and a lease epoch fences who may win.

*Credit* is cumulative over a session, in segments and in bytes: repeated or reordered acks do no harm. A
segment larger than the byte window may be sent when nothing else is unacknowledged.

*Identity*: one live session per client name; a newer process with the same name replaces an older one. Two
living processes of one name would replace each other in turn; after the third time the older is refused for
good (``session_replaced``). A process that was silent for too long, and lives, starts a new session and
offers its unacknowledged segments again there; whether they still count is decided by their lease epoch.

Both machines are pure: no socket, no clock, no thread. The model check in
``tests/property/test_session_model.py`` explores losses, repetitions, reorderings and crashes of either side
with these very objects.
"""

from __future__ import annotations

from cod_async.wire.client_session import FENCED_BEFORE_SEND, ClientSession, Incoming, Outgoing
from cod_async.wire.server_session import (
    Closed,
    Event,
    KnownSession,
    Opened,
    Outcome,
    Received,
    Reply,
    ServerSessions,
    Session,
)

__all__ = [
    "FENCED_BEFORE_SEND",
    "ClientSession",
    "Closed",
    "Event",
    "Incoming",
    "KnownSession",
    "Opened",
    "Outcome",
    "Outgoing",
    "Received",
    "Reply",
    "ServerSessions",
    "Session",
]
