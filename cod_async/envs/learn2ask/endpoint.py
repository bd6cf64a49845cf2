"""One question to a chat model behind an OpenAI-compatible HTTP endpoint, with tries, limits and few words.

Only the standard library, in a daemon thread per request: a judge may think for a minute, so the pool that
asyncio shares would hold up everything else, and its threads would hold up the end of the process. The key is
read from its environment variable when a request is sent, stored nowhere, and no text of the server or of the
HTTP library enters an error message, because either may repeat it. Redirects are not followed: they would
carry the key to another host.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from cod_async.envs.learn2ask.options import LOOPBACK_HOSTS, Learn2AskOptions, url_problem
from cod_async.errors import EnvironmentInputError, InfrastructureError

Answer = TypeVar("Answer")

MAX_REPLY_BYTES = 4 << 20
"""Longest reply that is read."""
MAX_BACKOFF_S = 30.0
"""Longest sleep between two tries."""
RETRIED_STATUSES = (408, 409, 425, 429)
"""Client errors that another try may cure; so may every server error (500 and above)."""


class RequestFailedError(Exception):
    """One try failed. The message is ours and holds nothing that a server sent."""

    def __init__(self, reason: str, *, can_retry: bool = True) -> None:
        super().__init__(reason)
        self.can_retry = can_retry


def backoff_s(num_failed: int, first_s: float) -> float:
    """Return the sleep after the ``num_failed``-th failed try (1, 2, ...): doubling, at most 30 s."""
    return min(MAX_BACKOFF_S, first_s * 2.0 ** min(num_failed - 1, 30))


class ChatEndpoint(msgspec.Struct, frozen=True):
    """Where and how to ask; see the options of the same names. Holds the name of the key's variable only.

    Raises:
        EnvironmentInputError: the address is not one that may be spoken to.
    """

    url: str
    model: str
    key_env: str = ""
    temperature: float = 1.0
    top_p: float = 0.95
    extra_body: dict[str, Any] = {}
    num_tries: int = 6
    timeout_s: float = 120.0
    first_backoff_s: float = 1.0
    allow_plain_http: bool = False

    def __post_init__(self) -> None:
        problem = url_problem(self.url, self.allow_plain_http)
        if problem:
            raise EnvironmentInputError(f"learn2ask: the address of the judge {problem}")

    @classmethod
    def of(cls, options: Learn2AskOptions) -> ChatEndpoint:
        """Return the endpoint that checked options describe."""
        return cls(
            url=options.judge_url,
            model=options.judge_model,
            key_env=options.judge_key_env,
            temperature=float(options.judge_temperature),
            top_p=float(options.judge_top_p),
            extra_body=options.judge_extra_body,
            num_tries=options.judge_tries,
            timeout_s=float(options.judge_timeout_s),
            first_backoff_s=float(options.judge_backoff_s),
            allow_plain_http=options.allow_plain_http,
        )

    @property
    def full_url(self) -> str:
        """The address that is posted to: ``.../chat/completions``."""
        base = self.url.rstrip("/")
        return base if base.endswith("/chat/completions") else base + "/chat/completions"

    async def ask(self, system: str, user: str, parse: Callable[[str], Answer | None]) -> tuple[Answer, int]:
        """Ask until an answer parses; return it and the number of tries.

        Args:
            system: what the model is told to be.
            user: what it is asked.
            parse: reads the reply; None means that it is malformed, and asks again.

        Raises:
            InfrastructureError: no try gave a usable answer, or the endpoint refused the request for good.
        """
        body = json.dumps(self._body(system, user)).encode("ascii")
        reason = ""
        for attempt in range(1, self.num_tries + 1):
            try:
                answer = parse(await self._try(body))
            except RequestFailedError as error:
                reason = str(error)
                if not error.can_retry:
                    raise self._failed(reason, attempt) from None
            else:
                if answer is not None:
                    return answer, attempt
                reason = "its reply does not have the form that was asked for"
            if attempt < self.num_tries:
                await asyncio.sleep(backoff_s(attempt, self.first_backoff_s))
        raise self._failed(reason, self.num_tries)

    def _failed(self, reason: str, num_tries: int) -> InfrastructureError:
        return InfrastructureError(
            f"learn2ask: the judge at {urlsplit(self.url).netloc} gave no usable answer in {num_tries} "
            f"tries; the last time: {reason}"
        )

    def _body(self, system: str, user: str) -> dict[str, Any]:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        return {
            "model": self.model,
            "messages": messages,
            "temperature": self.temperature,
            "top_p": self.top_p,
            **self.extra_body,
        }

    async def _try(self, body: bytes) -> str:
        """Send one request and return the reply's text; a thread that is late is left behind."""
        try:
            async with asyncio.timeout(self.timeout_s):
                return await _in_thread(lambda: _content(self._post(body)))
        except TimeoutError:
            raise RequestFailedError(f"no answer within {self.timeout_s:g} s") from None

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key_env:
            key = os.environ.get(self.key_env, "").strip()
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise RequestFailedError(
                    "the variable named by judge_key_env is empty or holds no key", can_retry=False
                )
            headers["Authorization"] = f"Bearer {key}"
        return headers

    def _post(self, body: bytes) -> bytes:
        """Post and return the reply's bytes (blocking).

        Raises:
            RequestFailedError: no connection, an error status, too slow, or too long a reply.
        """
        deadline_s = time.monotonic() + self.timeout_s
        # The scheme was checked by url_problem: http or https.
        request = urllib.request.Request(self.full_url, body, self._headers(), method="POST")  # noqa: S310
        try:
            with _opener(self.url).open(request, timeout=self.timeout_s) as response:
                return _read(response, deadline_s)
        except urllib.error.HTTPError as error:
            error.close()
            raise _status_error(error.code) from None
        except TimeoutError:
            raise RequestFailedError(f"no answer within {self.timeout_s:g} s") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            inner = getattr(error, "reason", error)
            said = inner.strerror if isinstance(inner, OSError) and inner.strerror else type(inner).__name__
            raise RequestFailedError(f"no connection ({said})") from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Turns a redirect into an error status."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _opener(url: str) -> urllib.request.OpenerDirector:
    """Return an opener that follows no redirects, and goes through no proxy to this machine."""
    is_loopback = urlsplit(url).hostname in LOOPBACK_HOSTS
    proxies = urllib.request.ProxyHandler({} if is_loopback else None)
    return urllib.request.build_opener(proxies, _NoRedirects())


def _status_error(status: int) -> RequestFailedError:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "unknown status"
    can_retry = status >= 500 or status in RETRIED_STATUSES
    return RequestFailedError(f"HTTP status {status} ({phrase})", can_retry=can_retry)


def _read(response: http.client.HTTPResponse, deadline_s: float) -> bytes:
    """Read a reply piece by piece, bounded in bytes and in time."""
    parts: list[bytes] = []
    num_bytes = 0
    while part := response.read1(1 << 16):
        parts.append(part)
        num_bytes += len(part)
        if num_bytes > MAX_REPLY_BYTES:
            raise RequestFailedError(f"its reply is longer than {MAX_REPLY_BYTES} bytes")
        if time.monotonic() > deadline_s:
            raise TimeoutError
    return b"".join(parts)


def _content(raw: bytes) -> str:
    """Return the text of a chat completion, without what a thinking model thought."""
    try:
        content = json.loads(raw)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        content = None
    if not isinstance(content, str):
        raise RequestFailedError("its reply is no chat completion")
    return content.rpartition("</think>")[2]


async def _in_thread(function: Callable[[], Answer]) -> Answer:
    """Run a blocking function in a daemon thread of its own and await its result."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Answer] = loop.create_future()

    def settle(result: Answer | None, error: BaseException | None) -> None:
        if future.done():  # cancelled, or too late
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def work() -> None:
        result: Answer | None = None
        failure: BaseException | None = None
        try:
            result = function()
        except BaseException as error:  # handed to whoever waits
            failure = error
        with suppress(RuntimeError):  # the loop was closed in the meantime
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=work, name="learn2ask-judge", daemon=True).start()
    return await future
