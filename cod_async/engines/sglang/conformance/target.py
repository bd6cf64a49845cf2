"""A server that is examined, as an engine, and how its weights may be loaded again."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from cod_async.config.schema import ServerConfig
from cod_async.engines.base import Completion, EngineCounters, SamplingParams
from cod_async.engines.conformance.asking import Subject, ask, compare, params
from cod_async.engines.conformance.findings import CheckSkippedError
from cod_async.engines.conformance.reference import Reference
from cod_async.engines.conformance.updating import SwitchMode
from cod_async.engines.sglang.client import ServerClient
from cod_async.engines.sglang.http import ServerHttp
from cod_async.engines.sglang.protocol import ServerInfo, parse_version_label, version_label
from cod_async.errors import EngineError, EngineRefusedError
from cod_async.lifecycle.segment import Version, VersionSpan
from cod_async.weights.manifest import Manifest

UNNAMED = Version(0, 0)
"""Version of weights whose label names none, such as ``default``."""
DOCTOR_LINEAGE = 999_999_999
"""Lineage of labels that only checks use."""


@dataclass(frozen=True, kw_only=True)
class ServerTarget:
    """A server to examine.

    Attributes:
        url: ``http://HOST:PORT``.
        api_key, admin_key: bearer keys; empty: none.
        settings: deadlines.
        model_dir: the model that it should serve; None: its own ``model_path``, if that can be read here.
        max_context_tokens: longest row that the run needs; None: whatever the server has.
        allow_updates: whether its weights may be loaded again, and generation be paused for that.
    """

    url: str
    api_key: str = ""
    admin_key: str = ""
    settings: ServerConfig = field(default_factory=ServerConfig)
    model_dir: Path | None = None
    max_context_tokens: int | None = None
    allow_updates: bool = False

    def client(self, vocab_size: int = 1) -> ServerClient:
        """Return a client for ids 0 .. vocab_size - 1."""
        return ServerClient(
            self.url,
            settings=self.settings,
            vocab_size=vocab_size,
            api_key=self.api_key,
            admin_key=self.admin_key,
        )

    async def call(self, path: str, body: Any, *, is_admin: bool, **keys: str) -> bytes:
        """Send one request that the client has no method for, and return the body of its answer.

        ``api_key`` and ``admin_key`` may be replaced.

        Raises:
            EngineMismatchError: wrong key.
            EngineRefusedError: any other status than 200.
        """
        given = {"api_key": self.api_key, "admin_key": self.admin_key} | keys
        http = ServerHttp(
            self.url,
            api_key=given["api_key"],
            admin_key=given["admin_key"],
            connect_timeout_s=self.settings.connect_timeout_s,
        )
        try:
            encoded = None if body is None else msgspec.json.encode(body)
            status, blob = await http.call(
                path, encoded, is_admin=is_admin, timeout_s=self.settings.control_timeout_s, max_bytes=1 << 24
            )
        finally:
            await http.aclose()
        if status != 200:
            raise EngineRefusedError(f"{self.url}{path} answered {status}")
        return blob


class ServerEngine:
    """One server as an engine, without sharing, retries or updates of its own.

    Args:
        client: to the server.
        info: what the server says of itself.
    """

    def __init__(self, client: ServerClient, info: ServerInfo) -> None:
        self.client, self.label = client, info.label
        self._first_label = info.label
        self._limit = info.max_request_tokens
        self._returned = 0

    @property
    def counters(self) -> EngineCounters:
        """Tokens that were returned, and those seen of cancelled requests."""
        aborted = self.client.num_cancelled_tokens
        return EngineCounters(sampled_tokens=self._returned + aborted, aborted_tokens=aborted)

    @property
    def extra_counters(self) -> dict[str, float]:
        """Nothing beyond the counters."""
        return {}

    @property
    def version(self) -> Version:
        """Version of the label that the server had last."""
        return self._version_of(self.label)

    @property
    def max_context_tokens(self) -> int:
        """Longest prompt and completion together."""
        return self._limit

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        """Generate one completion; the cache namespace is the label of the weights."""
        made = await self.client.generate(
            token_ids, params, rid=f"doctor-{secrets.token_hex(8)}", namespace=self.label
        )
        self._returned += len(made.token_ids)
        if made.finish == "abort":
            raise EngineError(f"{self.client.url} gave a request up after {len(made.token_ids)} tokens")
        spans = tuple(VersionSpan(self._version_of(span.label), span.num_tokens) for span in made.spans)
        return Completion(made.token_ids, made.logprobs, spans, made.finish)

    async def close_session(self, session: str) -> None:
        """Nothing to release: the server keeps its cache by itself."""

    async def update_weights(self, manifest: Manifest) -> None:
        """Refused: checks change weights through an updater.

        Raises:
            EngineError: always.
        """
        raise EngineError("a server that is being examined takes no new weights")

    def announce(self, manifest: Manifest) -> None:
        """Nothing is put off here."""

    async def aclose(self) -> None:
        """Close the client."""
        await self.client.aclose()

    def _version_of(self, label: str) -> Version:
        version = parse_version_label(label)
        if version is None and label != self._first_label:
            raise EngineError(f'weights called "{label}" turned up, expected "{self._first_label}"')
        return version or UNNAMED


class SameWeights:
    """Loads the weights that the server already has under another label, while requests run.

    Args:
        engine: the server.
        folder: model directory that the server sees under the same path.
        reference: of the folder.
        subject: for a look whether the folder really holds the server's weights.
    """

    mode: SwitchMode = "retract"
    has_other_weights = False
    goes_back = True

    def __init__(self, engine: ServerEngine, folder: Path, reference: Reference, subject: Subject) -> None:
        self._engine, self._folder = engine, folder.resolve()
        self._reference, self._subject = reference, subject
        self._first_label = engine.label
        self._is_other = False

    async def prepare(self) -> None:
        """See that loading the folder will not change the server.

        Raises:
            CheckSkippedError: it would.
        """
        answers = [
            await ask(self._subject, self._subject.prompt(2000 + i, 9), params(16, seed=i)) for i in range(2)
        ]
        found = compare(self._reference, answers)
        if not found.fit(self._subject.tolerance):
            raise CheckSkippedError(
                f"{self._folder} does not hold the server's weights ({found}); left alone"
            )

    async def switch(self) -> tuple[Version, Reference]:
        """Load the same weights under a new label: retract, flush, go on."""
        version = Version(DOCTOR_LINEAGE, secrets.randbelow(1_000_000))
        client, label = self._engine.client, version_label(version)
        self._is_other = True
        try:
            await client.pause("retract")
            await client.begin_update()
            try:
                await client.update_from_disk(self._folder, label, is_flushing=True)
            finally:
                await client.end_update()
        finally:
            await client.resume()
        self._engine.label = await client.label()
        return version, self._reference

    async def restore(self) -> Version:
        """Give the label back; the weights are the same."""
        if self._is_other:
            await self._engine.client.set_label(self._first_label)
            self._is_other = False
        self._engine.label = await self._engine.client.label()
        return self._engine.version
