"""Requests that are sent until they are answered, and the rules that tell which answer belongs to which
request.

Every request of the protocol is idempotent: the coordinator gives a repeated one the same answer. So a
request is simply sent again, more and more rarely, until its reply is complete, whatever happens to
connections and processes in between. A reply that comes in parts (a large batch) is collected here; parts of
an older plan are thrown away when a newer plan's first part arrives.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec import UNSET

from cod_async.wire.messages import (
    Checkpointed,
    LeaseRequest,
    Leases,
    LineageOpened,
    OpenLineage,
    Published,
    PublishRecorded,
    StepBatch,
    StepDone,
    StepRecorded,
    StepRequest,
    ToClient,
)

Request = LeaseRequest | OpenLineage | StepRequest | StepDone | Published | Checkpointed
Reply = Leases | LineageOpened | StepRecorded | PublishRecorded | list[StepBatch]

MAX_BACKOFF = 4  # a request is repeated after 1, 2, 4, 8, 16, 16, … times ``resend_s``


@dataclass(slots=True)
class _Asked:
    message: Request
    body: bytes
    send_at: float
    num_sends: int = 0
    parts: dict[int, StepBatch] = field(default_factory=dict)


def answers(request: Request, reply: ToClient) -> bool:
    """Whether ``reply`` (or this part of it) belongs to ``request``."""
    match request, reply:
        case LeaseRequest(), Leases():
            return reply.request == request.request
        case OpenLineage(), LineageOpened():
            return reply.nonce == request.nonce
        case StepRequest(), StepBatch():
            return reply.version == request.version
        case StepDone(), StepRecorded():
            # a version may have several plans that are dropped, and one that is trained
            dropped = UNSET if request.dropped_as is UNSET else request.plan_digest
            return reply.version == request.version and reply.dropped_plan == dropped
        case Published(), PublishRecorded():
            return reply.version == request.manifest.version
        case Checkpointed(), PublishRecorded():
            return reply.version == request.version
        case _:
            return False


class Requests:
    """The open requests of one client. Pure: time is passed in.

    Args:
        resend_s: seconds until an unanswered request is first repeated.
    """

    def __init__(self, resend_s: float) -> None:
        self._resend_s = resend_s
        self._asked: dict[int, _Asked] = {}

    def __len__(self) -> int:
        return len(self._asked)

    def ask(self, request_id: int, message: Request, body: bytes, now: float) -> None:
        """Open a request under the caller's ``request_id``; it is due at once."""
        self._asked[request_id] = _Asked(message, body, now)

    def forget(self, request_id: int) -> None:
        """Give a request up (its caller timed out)."""
        self._asked.pop(request_id, None)

    def repeat_all(self, now: float) -> None:
        """Make every request due: the connection is new."""
        for asked in self._asked.values():
            asked.send_at, asked.num_sends = now, 0

    def next_due(self, now: float) -> bytes | None:
        """Return the body of a request that is due and note that it is sent, or None."""
        for asked in self._asked.values():
            if asked.send_at <= now:
                asked.send_at = now + self._resend_s * (1 << min(asked.num_sends, MAX_BACKOFF))
                asked.num_sends += 1
                return asked.body
        return None

    def deadline(self) -> float | None:
        """Return the earliest time at which a request is due."""
        return min((asked.send_at for asked in self._asked.values()), default=None)

    def receive(self, message: ToClient, now: float) -> tuple[list[tuple[int, Reply]], bool]:
        """Match an incoming message.

        Published and Checkpointed of one version have the same answer, so one message may answer several
        requests.

        Returns:
            The requests that are now completely answered, as (request id, reply); and whether the message
            belonged to any request at all.
        """
        done: list[tuple[int, Reply]] = []
        is_matched = False
        for request_id, asked in list(self._asked.items()):
            if not answers(asked.message, message):
                continue
            is_matched = True
            reply = self._complete(asked, message, now)
            if reply is not None:
                del self._asked[request_id]
                done.append((request_id, reply))
        return done, is_matched

    def _complete(self, asked: _Asked, message: ToClient, now: float) -> Reply | None:
        if isinstance(message, Leases | LineageOpened | StepRecorded | PublishRecorded):
            return message
        assert isinstance(message, StepBatch)  # noqa: S101  (answers() admits nothing else)
        if any(part.plan_digest != message.plan_digest for part in asked.parts.values()):
            asked.parts.clear()
        asked.parts[message.part] = message
        # Parts are on their way: ask again only if the next one fails to come.
        asked.send_at = max(asked.send_at, now + 2 * self._resend_s)
        if set(asked.parts) < set(range(message.num_parts)):
            return None
        return [asked.parts[part] for part in range(message.num_parts)]
