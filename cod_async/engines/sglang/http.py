"""Bounded HTTP requests to one server: deadlines, size limits, and one error class per kind of trouble.

Two sets of connections. Completions use kept-alive ones, as many as there are requests. Control requests
open a connection each: they never wait behind completions, and never meet one that the server has just
closed, so that a change is never sent twice. Reads, which do no harm, are repeated once by aiohttp.
"""

from __future__ import annotations

import asyncio
import urllib.parse
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import aiohttp

from cod_async.engines.sglang.answers import error_message
from cod_async.errors import EngineDownError, EngineMismatchError, EngineRefusedError

# Under the five seconds after which SGLang closes an idle connection.
KEEP_ALIVE_S = 4.0
MAX_MESSAGE_CHARS = 500
MAX_ERROR_BYTES = 1 << 16
# Refusals that another try or another server may not meet: timeout, too many requests.
_PASSING_STATUSES = frozenset((408, 425, 429))


class ServerHttp:
    """HTTP to one SGLang server.

    Args:
        url: ``http://HOST:PORT`` or ``https://…``, without a path.
        api_key, admin_key: bearer keys; empty: none. Control requests use the admin key if there is one.
        connect_timeout_s: longest time to open a connection.
        section: of the configuration, that names the keys.

    Raises:
        EngineMismatchError: not such a url, or a key that cannot be sent.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str,
        admin_key: str,
        connect_timeout_s: float,
        section: str = "engine.server",
    ) -> None:
        self.url = _checked_url(url)
        self._section = section
        self._keys = [_checked_key(key) for key in (api_key, admin_key) if key]
        self._headers = {False: _bearer(api_key), True: _bearer(admin_key or api_key)}
        self._connect_timeout_s = connect_timeout_s
        self._kept: aiohttp.ClientSession | None = None
        self._fresh: aiohttp.ClientSession | None = None
        self._is_closed = False

    async def aclose(self) -> None:
        """Close all connections."""
        self._is_closed = True
        for session in (self._kept, self._fresh):
            if session is not None:
                await session.close()
        self._kept = self._fresh = None

    async def call(
        self,
        path: str,
        body: bytes | None = None,
        *,
        is_admin: bool,
        timeout_s: float,
        max_bytes: int = 1 << 22,
    ) -> tuple[int, bytes]:
        """Send one control request (POST with a body, else GET) on a connection of its own.

        Returns:
            The status, 200 or a refusal other than of the key, and the body.

        Raises:
            EngineDownError: no answer in time, a broken one, status 5xx, or over ``max_bytes`` (bytes).
            EngineMismatchError: status 401 or 403.
        """
        try:
            async with asyncio.timeout(timeout_s):
                async with self._sent(
                    self._session(is_fresh=True), path, body, is_admin=is_admin
                ) as response:
                    blob = await self._read(response, path, max_bytes)
        except aiohttp.ServerTimeoutError as error:
            raise self.broken(path, error) from None
        except TimeoutError:
            raise EngineDownError(f"{self.url}{path} did not answer within {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise self.broken(path, error) from None
        if response.status in (401, 403) or response.status >= 500 or response.status in _PASSING_STATUSES:
            raise self.failure(path, response.status, error_message(blob), is_admin=is_admin)
        return response.status, blob

    @asynccontextmanager
    async def completing(self, path: str, body: Callable[[], bytes]) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a completion request on a kept-alive connection; the answer has status 200.

        A connection that turns out to have been closed by the server before a byte came back is replaced by
        a new one, once, with a new ``body``: the server may have taken the first one in.

        Raises:
            EngineDownError, EngineRefusedError, EngineMismatchError: by status.
            aiohttp.ClientError, OSError: the connection failed; see :meth:`broken`.
        """
        reuse = SimpleNamespace(is_reused=False)
        kept = self._sent(self._session(is_fresh=False), path, body(), is_admin=False, trace=reuse)
        try:
            response = await kept.__aenter__()
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            if not reuse.is_reused:
                raise
            kept = self._sent(self._session(is_fresh=True), path, body(), is_admin=False)
            response = await kept.__aenter__()
        try:
            if response.status != 200:
                said = error_message(await self._read(response, path, MAX_ERROR_BYTES))
                raise self.failure(path, response.status, said, is_admin=False)
            yield response
        finally:
            # Closes the connection unless the answer was read to its end, which tells the server to stop.
            if response.content.at_eof():
                response.release()
            else:
                response.close()

    def failure(self, path: str, status: int, said: str, *, is_admin: bool) -> Exception:
        """Return the error that a status means, with the server's words."""
        text = f"{self.url}{path} answered {status}: {self.cleaned(said)}"
        if status in (401, 403):
            which = "admin_key_env" if is_admin else "api_key_env"
            return EngineMismatchError(f"{text}; it wants another key: see {self._section}.{which}")
        if 300 <= status < 500 and status not in _PASSING_STATUSES:
            return EngineRefusedError(text)
        return EngineDownError(text)

    def broken(self, path: str, error: Exception) -> EngineDownError:
        """Return the error for a connection that failed or an answer that broke off."""
        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            return EngineDownError(f"{self.url}{path}: cannot connect ({self.cleaned(str(error))})")
        said = self.cleaned(str(error)) or type(error).__name__
        return EngineDownError(f"{self.url}{path} broke off ({said})")

    def cleaned(self, text: str) -> str:
        """Return the beginning of a text from outside, on one line and without keys."""
        for key in self._keys:
            text = text.replace(key, "***")
        return " ".join(text.split())[:MAX_MESSAGE_CHARS]

    def _session(self, *, is_fresh: bool) -> aiohttp.ClientSession:
        """Return a session; made late because it belongs to the running loop."""
        session = self._fresh if is_fresh else self._kept
        if session is not None:
            return session
        if self._is_closed:
            raise EngineDownError(f"the client of {self.url} is closed")
        tracing = aiohttp.TraceConfig()
        tracing.on_connection_reuseconn.append(_note_reuse)
        connector = (
            aiohttp.TCPConnector(limit=0, force_close=True)
            if is_fresh
            else aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        )
        session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout_s),
            headers={"Accept-Encoding": "identity", "Content-Type": "application/json"},
            trace_configs=[] if is_fresh else [tracing],
        )
        if is_fresh:
            self._fresh = session
        else:
            self._kept = session
        return session

    def _sent(
        self,
        session: aiohttp.ClientSession,
        path: str,
        body: bytes | None,
        *,
        is_admin: bool,
        trace: SimpleNamespace | None = None,
    ) -> Any:
        return session.request(
            "GET" if body is None else "POST",
            self.url + path,
            data=body,
            headers=self._headers[is_admin],
            allow_redirects=False,
            trace_request_ctx=trace,
        )

    async def _read(self, response: aiohttp.ClientResponse, path: str, max_bytes: int) -> bytes:
        pieces, num_bytes = [], 0
        async for piece in response.content.iter_any():
            pieces.append(piece)
            num_bytes += len(piece)
            if num_bytes > max_bytes:
                raise EngineDownError(f"{self.url}{path} answered with more than {max_bytes} bytes")
        return b"".join(pieces)


async def _note_reuse(session: aiohttp.ClientSession, context: SimpleNamespace, _: object) -> None:
    context.trace_request_ctx.is_reused = True


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _checked_url(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    try:
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_good = False
    if (
        not is_good
        or parts.username is not None
        or parts.query
        or parts.fragment
        or parts.path not in ("", "/")
    ):
        shown = url.rpartition("@")[2]  # whatever stands before it may be a password
        raise EngineMismatchError(f"{shown!r} is not http://HOST:PORT; correct engine.urls")
    return url.rstrip("/")


def _checked_key(key: str) -> str:
    if not key.isascii() or not key.isprintable() or " " in key:
        raise EngineMismatchError("a key has characters that a header cannot carry; check its variable")
    return key
