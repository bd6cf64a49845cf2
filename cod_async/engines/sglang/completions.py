"""Completions of one SGLang server: requests, streams, stop tokens, deadlines.

Every sampling parameter is sent, because a server fills in what is missing from the model's generation
config. What comes back is checked before it is believed (see :mod:`.answers`).

Stop tokens. A server ends a completion on its own end-of-text tokens as well as on the requested ones, and
``ignore_eos`` turns off both. So ``ignore_eos`` is sent only when no stop token is wanted; when a completion
ends on a token that is not one of ``stop_ids``, the rest is requested as a continuation of the row, which
the server's prefix cache makes cheap, and the parts are returned as one completion.

Streams hold everything so far in every event, so they grow with the square of the length; an event is asked
for only every ``max_tokens / 32`` tokens (50 at least). ``sampling_seed`` is sent to servers that sample
reproducibly (``--enable-deterministic-inference``) and to no others.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import aiohttp
import msgspec

from cod_async.config.schema import ServerConfig
from cod_async.engines.base import SamplingParams
from cod_async.engines.sglang import answers
from cod_async.engines.sglang.http import ServerHttp
from cod_async.engines.sglang.protocol import Generated, joined_spans
from cod_async.engines.sglang.stream import EventStream, StreamOverflowError
from cod_async.errors import EngineDownError, EngineError

# A log-prob triple, an id and the longest text of a token, with room; and all fields around them.
_TOKEN_BYTES = 1024
_ANSWER_BYTES = 1 << 18
_NUM_EVENTS = 32
# Servers report so often between their own processes anyway.
_MIN_EVENT_TOKENS = 50
# With one event per so many tokens, a sequence slower than this looks stalled.
_SLOWEST_TOKENS_PER_S = 4.0
# The server takes lower temperatures for greedy sampling, and its log-probs are then of another policy.
_MIN_TEMPERATURE = 1e-5
# A cancelled caller waits this long for its abort to be posted, which goes on behind it if need be.
_ABORT_WAIT_S = 2.0
# After the end mark of a stream its connection is usable again once the body has ended, too.
_DRAIN_S = 1.0


@dataclass
class ServerFacts:
    """What is known of a server, shared between its completions and its control requests.

    Attributes:
        has_version_spans: it tells the weights of every token.
        is_seeded: it samples reproducibly.
        running: set unless this client holds it paused.
        resumed_at_s: when this client last resumed it (monotonic clock, seconds).
        num_changes: counts beginnings and ends of changes of weights or label through this client.
    """

    has_version_spans: bool = False
    is_seeded: bool = False
    running: asyncio.Event = field(default_factory=asyncio.Event)
    resumed_at_s: float = float("-inf")
    num_changes: int = 0

    def __post_init__(self) -> None:
        self.running.set()


class Completions:
    """Completions of one server; see :class:`cod_async.engines.sglang.client.ServerClient` for arguments."""

    def __init__(
        self,
        http: ServerHttp,
        facts: ServerFacts,
        settings: ServerConfig,
        vocab_size: int,
        max_connections: int,
    ) -> None:
        self.url = http.url
        self.num_cancelled_tokens = 0
        self._http = http
        self._facts = facts
        self._settings = settings
        self._vocab_size = vocab_size
        self._slots = asyncio.Semaphore(max_connections)
        self._attempts = itertools.count(1)
        # Other clients of this server, and earlier ones of this actor, may use the same names.
        self._nonce = secrets.token_hex(4)
        self._wire_ids: dict[str, str] = {}
        self._aborts: set[asyncio.Task[None]] = set()

    async def aclose(self) -> None:
        """Give up aborts that are still being posted."""
        for task in tuple(self._aborts):
            task.cancel()
        await asyncio.gather(*self._aborts, return_exceptions=True)

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, rid: str, namespace: str = ""
    ) -> Generated:
        """See :meth:`cod_async.engines.sglang.client.ServerClient.generate`."""
        row = self._checked_request(token_ids, params, rid)
        self._wire_ids[rid] = ""
        try:
            async with self._slots:
                return await self._generate(row, params, rid, namespace)
        finally:
            del self._wire_ids[rid]

    async def _generate(self, row: list[int], params: SamplingParams, rid: str, namespace: str) -> Generated:
        """Generate part after part until the completion ends as it was asked to."""
        made: Generated | None = None
        while True:
            num_made = len(made.token_ids) if made is not None else 0
            try:
                part = await self._generate_part(
                    row + made.token_ids if made is not None else row, params, num_made, rid, namespace
                )
            except EngineDownError as error:
                error.num_tokens += num_made
                raise
            except asyncio.CancelledError:
                self.num_cancelled_tokens += num_made
                raise
            made = part if made is None else _joined(made, part)
            if made.finish == "length" and made.token_ids[-1] in params.stop_ids:
                return msgspec.structs.replace(made, finish="stop")  # some servers look at the length first
            if made.finish != "stop" or made.token_ids[-1] in params.stop_ids:
                return made
            if not params.stop_ids:
                raise EngineDownError(
                    f"{self.url}/generate stopped on token {made.token_ids[-1]} although asked not to",
                    num_tokens=len(made.token_ids),
                )
            if len(made.token_ids) == params.max_tokens:
                return msgspec.structs.replace(made, finish="length")

    async def abort(self, rid: str) -> None:
        """See :meth:`cod_async.engines.sglang.client.ServerClient.abort`."""
        wire_id = self._wire_ids.get(rid)
        if wire_id:
            await self._post_abort(wire_id)

    def _checked_request(self, token_ids: Sequence[int], params: SamplingParams, rid: str) -> list[int]:
        row = list(token_ids)
        if not row:
            raise EngineError("the prompt is empty")
        if set(map(type, row)) != {int} or min(row) < 0 or max(row) >= self._vocab_size:
            wrong = next(i for i in row if type(i) is not int or not 0 <= i < self._vocab_size)
            raise EngineError(f"token id {wrong!r} is outside 0..{self._vocab_size - 1}; it was not sent")
        if params.max_tokens < 1:
            raise EngineError(f"max_tokens is {params.max_tokens}, at least 1 is needed")
        if not _MIN_TEMPERATURE <= params.temperature < float("inf"):
            raise EngineError(f"temperature is {params.temperature}, at least {_MIN_TEMPERATURE:g} is needed")
        if not 0 < params.top_p <= 1:
            raise EngineError(f"top_p is {params.top_p}, not in (0, 1]")
        if any(not 0 <= token < self._vocab_size for token in params.stop_ids):
            raise EngineError(f"a stop id is outside 0..{self._vocab_size - 1}")
        if not rid or "~" in rid:
            raise EngineError(f"{rid!r} cannot name a request: it is empty or has a ~")
        if rid in self._wire_ids:
            raise EngineError(f"a request named {rid!r} is running")
        return row

    async def _generate_part(
        self, row: list[int], params: SamplingParams, num_made: int, rid: str, namespace: str
    ) -> Generated:
        """Request one part of a completion, with deadline, abort and bookkeeping."""
        max_tokens = params.max_tokens - num_made
        events = EventStream(_ANSWER_BYTES + _TOKEN_BYTES * max_tokens)
        num_changes = self._facts.num_changes
        timeout_s = self._settings.request_timeout_s

        def body() -> bytes:
            return self._body(row, params, max_tokens, self._new_wire_id(rid), namespace)

        try:
            async with asyncio.timeout(timeout_s), self._http.completing("/generate", body) as response:
                await self._receive(response, events)
            return self._completed(events, row, max_tokens, num_changes)
        except aiohttp.ServerTimeoutError as error:
            raise self._http.broken("/generate", error) from None
        except TimeoutError:
            self._spawn_abort(self._wire_ids[rid])
            raise EngineDownError(
                f"{self.url}/generate did not finish within {timeout_s:g} s", num_tokens=_num_seen(events)
            ) from None
        except _StalledError as error:
            self._spawn_abort(self._wire_ids[rid])
            raise EngineDownError(str(error), num_tokens=_num_seen(events)) from None
        except EngineDownError as error:
            error.num_tokens = _num_seen(events)
            raise
        except (aiohttp.ClientError, OSError) as error:
            broken = self._http.broken("/generate", error)
            broken.num_tokens = _num_seen(events)
            raise broken from None
        except asyncio.CancelledError:
            self.num_cancelled_tokens += _num_seen(events)
            posting = self._spawn_abort(self._wire_ids[rid])
            if self._facts.running.is_set():
                await asyncio.wait({posting}, timeout=_ABORT_WAIT_S)
            raise

    def _new_wire_id(self, rid: str) -> str:
        # Servers abort every request whose id begins with the one given, hence the closing ~. And two seconds
        # after a stream has ended they abort whatever has its id by then, so that none is used twice.
        wire_id = self._wire_ids[rid] = f"{rid}~{self._nonce}{next(self._attempts)}~"
        return wire_id

    def _body(
        self, row: list[int], params: SamplingParams, max_tokens: int, wire_id: str, namespace: str
    ) -> bytes:
        slowest = int(self._settings.stall_timeout_s * _SLOWEST_TOKENS_PER_S)
        sampling: dict[str, object] = {
            "max_new_tokens": max_tokens,
            "min_new_tokens": 0,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": -1,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "n": 1,
            "stop_token_ids": sorted(params.stop_ids),
            "ignore_eos": not params.stop_ids,
        }
        if self._facts.is_seeded:
            sampling["sampling_seed"] = params.seed
        if self._settings.has_streaming:
            sampling["stream_interval"] = max(
                1, min(max(_MIN_EVENT_TOKENS, max_tokens // _NUM_EVENTS), slowest)
            )
        body: dict[str, object] = {
            "rid": wire_id,
            "input_ids": row,
            "sampling_params": sampling,
            "return_logprob": True,
            "logprob_start_len": -1,
            "top_logprobs_num": 0,
            "return_text_in_logprobs": False,
            "stream": self._settings.has_streaming,
        }
        if namespace:
            body["extra_key"] = namespace
        return msgspec.json.encode(body)

    async def _receive(self, response: aiohttp.ClientResponse, events: EventStream) -> None:
        """Read an answer to its end; what does not come as a stream is taken for its only event."""
        is_stream = response.content_type == "text/event-stream"
        try:
            while True:
                piece = await self._next_piece(response)
                if not piece:
                    break
                if not is_stream:
                    events.feed_plain(piece)
                    continue
                events.feed(piece)
                if events.is_done:
                    await _drain(response)
                    break
        except StreamOverflowError as error:
            raise EngineDownError(f"{self.url}/generate sent {error}") from None
        if is_stream and not events.is_done:
            raise EngineDownError(f"{self.url}/generate ended its stream without the end mark")
        if not is_stream:
            events.finish_plain()

    async def _next_piece(self, response: aiohttp.ClientResponse) -> bytes:
        stall_s = self._settings.stall_timeout_s
        while True:
            try:
                async with asyncio.timeout(stall_s):
                    return await response.content.readany()
            except TimeoutError:
                # Silence is right while this client holds the server paused, and a while after.
                if self._facts.running.is_set() and time.monotonic() - self._facts.resumed_at_s > stall_s:
                    raise _StalledError(f"{self.url}/generate was silent for {stall_s:g} s") from None

    def _completed(self, events: EventStream, row: list[int], max_tokens: int, num_changes: int) -> Generated:
        try:
            answer = msgspec.json.decode(events.newest, type=answers.GenerateAnswer)
            failure = answer.failure
            if failure is not None:
                raise self._http.failure("/generate", failure[0], failure[1], is_admin=False)
            made = answers.generated_of(
                answer, num_prompt_tokens=len(row), max_tokens=max_tokens, vocab_size=self._vocab_size
            )
        except (msgspec.MsgspecError, answers.AnswerError) as error:
            said = self._http.cleaned(str(error))
            raise EngineDownError(f"{self.url}/generate answered nonsense: {said}") from None
        if made.token_ids:
            self._facts.has_version_spans = answer.has_version_spans
            if not answer.has_version_spans and self._facts.num_changes != num_changes:
                raise EngineDownError(
                    f"{self.url}/generate does not tell which tokens came before the weights changed; this "
                    "release of SGLang cannot take new weights while requests run"
                )
        return made

    def _spawn_abort(self, wire_id: str) -> asyncio.Task[None]:
        task = asyncio.create_task(self._abort_quietly(wire_id))
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)
        return task

    async def _abort_quietly(self, wire_id: str) -> None:
        # A paused server ignores the abort of a request that it still holds at its door, and then also all
        # later ones; running requests end with their next token anyway.
        await self._facts.running.wait()
        try:
            await self._post_abort(wire_id)
        except EngineError:
            return  # the connection was closed too, which ends the request on a server that lives

    async def _post_abort(self, wire_id: str) -> None:
        body, timeout_s = msgspec.json.encode({"rid": wire_id}), self._settings.control_timeout_s
        status, blob = await self._http.call("/abort_request", body, is_admin=True, timeout_s=timeout_s)
        if status != 200:
            raise self._http.failure("/abort_request", status, answers.error_message(blob), is_admin=True)


async def _drain(response: aiohttp.ClientResponse) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_S):
            while await response.content.readany():
                pass


class _StalledError(Exception):
    """A stream fell silent."""


def _num_seen(events: EventStream) -> int:
    """Tokens in the newest complete event of an answer that was broken off."""
    try:
        return len(msgspec.json.decode(events.newest, type=answers.GenerateAnswer).output_ids or ())
    except msgspec.MsgspecError:
        return 0


def _joined(first: Generated, rest: Generated) -> Generated:
    """Return two parts of one completion as one."""
    return Generated(
        token_ids=first.token_ids + rest.token_ids,
        logprobs=first.logprobs + rest.logprobs,
        spans=joined_spans(first.spans + rest.spans),
        finish=rest.finish,
        num_prompt_tokens=first.num_prompt_tokens,
        num_cached_tokens=first.num_cached_tokens,
        num_retractions=first.num_retractions + rest.num_retractions,
    )
