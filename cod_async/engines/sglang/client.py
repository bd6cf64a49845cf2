"""One SGLang server over HTTP: completions, weights, health; each call with its own deadline.

What is asked of servers about completions, and why, is in :mod:`.completions`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from cod_async.config.schema import ServerConfig
from cod_async.engines.base import SamplingParams
from cod_async.engines.sglang import answers
from cod_async.engines.sglang.completions import Completions, ServerFacts
from cod_async.engines.sglang.http import ServerHttp
from cod_async.engines.sglang.protocol import (
    OLDEST_RELEASE,
    VERSION_SPANS_RELEASE,
    Generated,
    PauseMode,
    ServerInfo,
    ServerLoad,
    TensorSpec,
    parse_release,
)
from cod_async.errors import EngineDownError, EngineMismatchError, EngineRefusedError

_Struct = TypeVar("_Struct", bound=msgspec.Struct)

# Counts renew many times a second; older ones mean a paused, busy or stuck scheduler.
_FRESH_LOAD_S = 3.0
_INFO_BYTES = 1 << 24
_CHECKSUM_BYTES = 1 << 26
_APPLIED_MESSAGE = "Weights were updated"

_PROMPT_MARGIN_TOKENS = 6
"""``max_req_input_len`` is so much less than the context, or than the KV cache if that is smaller."""


class ServerClient:
    """One SGLang server.

    Args:
        url: ``http://HOST:PORT``.
        settings: deadlines and whether to stream.
        vocab_size: token ids are 0 .. vocab_size-1; others never reach the server, which would die of them.
        api_key, admin_key: bearer keys; empty: none.
        max_connections: completions requested at once; more wait their turn.

    Attributes:
        url: of the server.

    Raises:
        EngineMismatchError: not a url, or a key that cannot be sent.
    """

    def __init__(
        self,
        url: str,
        *,
        settings: ServerConfig,
        vocab_size: int,
        api_key: str = "",
        admin_key: str = "",
        max_connections: int = 1024,
    ) -> None:
        self._http = ServerHttp(
            url, api_key=api_key, admin_key=admin_key, connect_timeout_s=settings.connect_timeout_s
        )
        self.url = self._http.url
        self._settings = settings
        self._facts = ServerFacts()
        self._completions = Completions(self._http, self._facts, settings, vocab_size, max_connections)

    @property
    def has_version_spans(self) -> bool:
        """Whether the server tells the weights of every token.

        Without (before 0.5.19) a completion is refused when this client changed the weights meanwhile, so
        that only modes that let running requests end first are possible. Known after :meth:`info` or the
        first completion.
        """
        return self._facts.has_version_spans

    @property
    def num_cancelled_tokens(self) -> int:
        """Generated tokens that had been seen of requests whose caller was cancelled."""
        return self._completions.num_cancelled_tokens

    async def aclose(self) -> None:
        """Close all connections; running calls fail as if the server was gone."""
        await self._completions.aclose()
        await self._http.aclose()

    # Information

    async def info(self) -> ServerInfo:
        """Return what the server says of itself.

        Raises:
            EngineMismatchError: wrong key, an unsupported release, or streams that are not cumulative.
        """
        model = self._decoded(
            "/model_info", await self._get("/model_info", "/get_model_info"), answers.ModelInfoAnswer
        )
        server = self._decoded(
            "/server_info", await self._get("/server_info", "/get_server_info"), answers.ServerInfoAnswer
        )
        release = parse_release(server.version)
        if release is None or release < OLDEST_RELEASE:
            oldest = ".".join(map(str, OLDEST_RELEASE))
            raise EngineMismatchError(
                f"{self.url} runs SGLang {self._http.cleaned(server.version)!r}; {oldest} or newer is needed"
            )
        if server.incremental_streaming_output and self._settings.has_streaming:
            raise EngineMismatchError(
                f"{self.url} was started with --incremental-streaming-output; start it without, or set "
                "engine.server.has_streaming = false"
            )
        # Prompts must be shorter than max_req_input_len, six less than the context. Rows may be four longer,
        # but one row limit has to do for both: the longest prompt leaves room for a single token.
        max_request = server.max_req_input_len
        if max_request is None:
            limit = server.context_length or server.max_total_num_tokens
            if limit is None:
                text = "names neither max_req_input_len nor a context"
                raise EngineMismatchError(f"{self.url}/server_info {text}")
            max_request = limit - _PROMPT_MARGIN_TOKENS
        self._facts.has_version_spans = release >= VERSION_SPANS_RELEASE
        self._facts.is_seeded = server.enable_deterministic_inference
        return ServerInfo(
            release=server.version,
            model_path=model.model_path,
            architecture=(model.architectures or [""])[0],
            label=model.weight_version or "",
            max_request_tokens=max_request,
            max_cached_tokens=server.max_total_num_tokens or max_request,
            tensor_parallel_size=server.tp_size,
            has_prefix_cache=not server.disable_radix_cache,
        )

    async def label(self) -> str:
        """Return what the server's weights are called; empty if the server does not say."""
        blob = await self._get("/model_info", "/get_model_info")
        return self._decoded("/model_info", blob, answers.ModelInfoAnswer).weight_version or ""

    async def load(self) -> ServerLoad:
        """Return what the server is doing: the health probe, right also while it is paused.

        The counts come from shared memory, which a stuck scheduler leaves behind and a paused one does not
        renew. When they are stale the scheduler itself is asked something.

        Raises:
            EngineDownError: no answer from the scheduler within ``probe_timeout_s``.
        """
        timeout_s = self._settings.probe_timeout_s
        status, blob = await self._http.call("/v1/loads", is_admin=False, timeout_s=timeout_s)
        load = ServerLoad(num_running=0, num_waiting=0, age_s=float("inf"))
        if status == 200:
            try:
                load = answers.load_of(blob)
            except (msgspec.MsgspecError, ValueError) as error:
                raise EngineDownError(f"{self.url}/v1/loads answered nonsense: {error}") from None
        elif status != 404:
            raise self._http.failure("/v1/loads", status, answers.error_message(blob), is_admin=False)
        if load.age_s > _FRESH_LOAD_S:
            await self._get("/server_info", "/get_server_info", timeout_s=timeout_s)
        return load

    async def checksums(self) -> dict[str, str]:
        """Return the server's checksum of each of its parameters, by the server's names.

        Raises:
            EngineRefusedError: this release has no such call.
        """
        path = "/weights_checker"
        blob = await self._post(
            path, {"action": "checksum"}, self._settings.update_timeout_s, max_bytes=_CHECKSUM_BYTES
        )
        try:
            return answers.checksums_of(blob)
        except msgspec.MsgspecError as error:
            raise EngineDownError(f"{self.url}{path} answered nonsense: {error}") from None

    # Completions

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, rid: str, namespace: str = ""
    ) -> Generated:
        """Generate one completion.

        Args:
            token_ids: the prompt, ids in 0 .. vocab_size-1.
            params: sampling parameters.
            rid: name of the request, unique among the running ones.
            namespace: cached prefixes are shared only between requests of one namespace.

        Raises:
            EngineDownError: no connection, silence, a broken answer, or one that contradicts itself.
            EngineRefusedError: status 4xx.
            EngineMismatchError: wrong key.
            EngineError: bad arguments; nothing was sent. Cancelling aborts the request on the server.
        """
        return await self._completions.generate(token_ids, params, rid=rid, namespace=namespace)

    async def abort(self, rid: str) -> None:
        """End a running request; what came so far is returned to its caller. Unknown ones are ignored.

        A request that waits for a paused server to go on cannot be ended so; cancelling its caller can.
        """
        await self._completions.abort(rid)

    # Control

    async def flush_cache(self) -> None:
        """Drop all cached prefixes.

        Raises:
            EngineRefusedError: requests are running.
        """
        await self._post("/flush_cache", {}, self._settings.control_timeout_s)

    async def pause(self, mode: PauseMode) -> None:
        """Stop sampling; new requests wait at the server.

        ``abort`` ends running requests, ``retract`` frees their cache, ``in_place`` does neither. That the
        server answers does not mean that its scheduler is alive.
        """
        self._facts.running.clear()
        await self._post("/pause_generation", {"mode": mode}, self._settings.control_timeout_s)

    async def resume(self) -> None:
        """Go on sampling."""
        await self._post("/continue_generation", {}, self._settings.control_timeout_s)
        self._facts.resumed_at_s = time.monotonic()
        self._facts.running.set()

    async def begin_update(self) -> None:
        """Open a weight update; fine when one is open or the server (before 0.5.21) knows no such thing."""
        await self._bracket("/begin_weight_update", "already open")

    async def end_update(self) -> None:
        """Close a weight update; fine when none is open or the server knows no such thing."""
        await self._bracket("/end_weight_update", "no weight-update session is open")

    async def update_from_disk(self, folder: Path, label: str, *, is_flushing: bool) -> None:
        """Load weights from a directory that the server sees under the same path.

        A server that is not paused first lets running requests end.
        """
        body = {"model_path": str(folder), "load_format": "auto"}
        await self._update("/update_weights_from_disk", body, label, is_flushing=is_flushing)

    async def open_group(
        self, *, address: str, port: int, rank_offset: int, world_size: int, group: str, backend: str
    ) -> None:
        """Let the server join a process group; answers when all members have."""
        body = {
            "master_address": address,
            "master_port": port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group,
            "backend": backend,
        }
        await self._post("/init_weights_update_group", body, self._settings.update_timeout_s)

    async def update_from_group(
        self, tensors: Sequence[TensorSpec], group: str, label: str, *, is_flushing: bool
    ) -> None:
        """Receive tensors that rank 0 of the group broadcasts in this order."""
        body = {
            "names": [tensor.name for tensor in tensors],
            "dtypes": [tensor.dtype for tensor in tensors],
            "shapes": [list(tensor.shape) for tensor in tensors],
            "group_name": group,
        }
        await self._update("/update_weights_from_distributed", body, label, is_flushing=is_flushing)

    async def close_group(self, group: str) -> None:
        """Let the server leave a process group."""
        await self._post(
            "/destroy_weights_update_group", {"group_name": group}, self._settings.control_timeout_s
        )

    async def update_from_handles(self, serialized: Sequence[str], label: str, *, is_flushing: bool) -> None:
        """Take tensors from shared memory: one base64 text per tensor-parallel rank."""
        body = {"serialized_named_tensors": list(serialized)}
        await self._update("/update_weights_from_tensor", body, label, is_flushing=is_flushing)

    async def set_label(self, label: str) -> None:
        """Name the server's weights; running requests go on and their next tokens get the new label."""
        self._facts.num_changes += 1
        try:
            body = {"new_version": label, "abort_all_requests": False}
            await self._post("/update_weight_version", body, self._settings.control_timeout_s)
        finally:
            self._facts.num_changes += 1

    async def _update(self, path: str, body: Mapping[str, object], label: str, *, is_flushing: bool) -> None:
        named = {"weight_version": label, "flush_cache": is_flushing, "abort_all_requests": False}
        self._facts.num_changes += 1
        try:
            await self._post(path, {**body, **named}, self._settings.update_timeout_s)
        except EngineRefusedError as error:
            if _APPLIED_MESSAGE in str(error):
                # The weights are in and the tokens are labelled so, but /model_info was left behind.
                await self.set_label(label)
            raise
        finally:
            self._facts.num_changes += 1

    async def _bracket(self, path: str, harmless: str) -> None:
        status, blob = await self._http.call(
            path, b"{}", is_admin=True, timeout_s=self._settings.update_timeout_s
        )
        said = answers.error_message(blob)
        if status != 404 and not (status == 400 and harmless in said):
            self._check_outcome(path, status, blob)

    async def _get(self, path: str, older_path: str, *, timeout_s: float | None = None) -> bytes:
        """Return the answer of a path, or of its name in older releases."""
        timeout_s = timeout_s or self._settings.control_timeout_s
        status, blob = await self._http.call(path, is_admin=False, timeout_s=timeout_s, max_bytes=_INFO_BYTES)
        if status == 404:
            path = older_path
            status, blob = await self._http.call(
                path, is_admin=False, timeout_s=timeout_s, max_bytes=_INFO_BYTES
            )
        if status != 200:
            raise self._http.failure(path, status, answers.error_message(blob), is_admin=False)
        return blob

    async def _post(
        self, path: str, body: Mapping[str, object], timeout_s: float, *, max_bytes: int = 1 << 22
    ) -> bytes:
        status, blob = await self._http.call(
            path, msgspec.json.encode(body), is_admin=True, timeout_s=timeout_s, max_bytes=max_bytes
        )
        self._check_outcome(path, status, blob)
        return blob

    def _check_outcome(self, path: str, status: int, blob: bytes) -> None:
        """Raise for a refusal, also for one that came with status 200."""
        if status != 200:
            raise self._http.failure(path, status, answers.error_message(blob), is_admin=True)
        if blob.startswith(b"{"):
            outcome = self._decoded(path, blob, answers.OutcomeAnswer)
            if not outcome.success:
                raise EngineRefusedError(f"{self.url}{path} failed: {self._http.cleaned(outcome.message)}")

    def _decoded(self, path: str, blob: bytes, type_: type[_Struct]) -> _Struct:
        try:
            return msgspec.json.decode(blob, type=type_)
        except msgspec.MsgspecError as error:
            raise EngineDownError(f"{self.url}{path} answered nonsense: {error}") from None
