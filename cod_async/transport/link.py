"""The two ends of the link between processes; see the package text for an example of each."""

from __future__ import annotations

from cod_async.transport.client_link import ACKED, ClientLink
from cod_async.transport.server_link import ServerLink
from cod_async.wire.session import Closed, Event, KnownSession, Opened, Received, Session

__all__ = [
    "ACKED",
    "ClientLink",
    "Closed",
    "Event",
    "KnownSession",
    "Opened",
    "Received",
    "ServerLink",
    "Session",
]
