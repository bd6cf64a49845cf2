"""SGLang servers as one engine: whole completions under known versions, whatever happens to a server.

A request that a server breaks off is asked again elsewhere; what had come of it is counted as aborted, and
nothing of it is ever handed on. A completion is handed on only if every token of it was sampled under weights
that this engine brought into that server, and verified there, while the request ran.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from msgspec.structs import replace

from cod_async.config.schema import Config
from cod_async.engines.base import Completion, EngineCounters, SamplingParams
from cod_async.engines.sglang.attempts import Attempt
from cod_async.engines.sglang.complaints import complain
from cod_async.engines.sglang.opening import Needs, look_at_servers, starting_weights
from cod_async.engines.sglang.pool import ServerPool
from cod_async.engines.sglang.protocol import Generated, parse_version_label
from cod_async.engines.sglang.pushes import push_for
from cod_async.engines.sglang.records import ServerRecord
from cod_async.engines.sglang.slot import ServerSlot, Shared
from cod_async.engines.sglang.tally import Tally
from cod_async.errors import EngineClosedError, EngineDownError, EngineError, EngineMismatchError
from cod_async.lifecycle.segment import Version, VersionSpan
from cod_async.weights.manifest import Manifest
from cod_async.weights.source import PublishedWeights

_log = logging.getLogger(__name__)

MAX_ATTEMPTS = 4
"""A request that so many servers broke off is an error: it may be what breaks them."""

_WEIGHTS_KEPT = 2


class SGLangEngine:
    """Implements :class:`cod_async.engines.base.Engine` over SGLang servers. Made by :meth:`open`.

    Args:
        pool: the servers.
        tally: what counts them.
        needs: model and configuration.
    """

    def __init__(self, pool: ServerPool, tally: Tally, needs: Needs) -> None:
        self.pool = pool
        self._tally = tally
        self._vocab_size = needs.vocab_size
        self._max_context_tokens = needs.config.model.max_context_tokens
        self._busy_sessions: set[str] = set()
        self._is_closed = False

    @classmethod
    async def open(
        cls,
        records: Callable[[], list[ServerRecord]],
        config: Config,
        *,
        run_dir: Path,
        model_dir: Path,
        root: Path | None = None,
    ) -> SGLangEngine:
        """Look at the servers and connect.

        Args:
            records: returns the servers of this actor as they are now; asked again and again.
            config: the run's configuration.
            run_dir: run folder.
            model_dir: the model that the run starts from.
            root: folder that manifests refer to; None: ``run_dir``.

        Raises:
            InputError: attached servers do not answer, or servers do not fit the run; all problems listed.
            EngineError: no started server answered within ``engine.server.start_timeout_s``.
        """
        needs = Needs.of(model_dir, config)
        await look_at_servers(records, needs)
        tally = Tally()
        library = WeightsLibrary(root or run_dir, model_dir, config.run.name)

        def shared(pool: ServerPool) -> Shared:
            return Shared(
                config=config,
                tally=tally,
                connect=needs.client,
                make_push=lambda: push_for(config.weights, config.engine.server),
                load=library.load,
                check=needs.problems,
                reread=pool.reread,
                notify=pool.notify,
                fail=pool.fail,
                complain=partial(complain, run_dir),
            )

        pool = ServerPool(records, config, shared)
        pool.start()
        try:
            async with asyncio.timeout(config.engine.server.start_timeout_s):
                await pool.wait_connected()
        except TimeoutError:
            await pool.aclose()
            raise EngineError("the servers answered once and not again; see their logs") from None
        except BaseException:
            await pool.aclose()
            raise
        return cls(pool, tally, needs)

    @property
    def counters(self) -> EngineCounters:
        """The engine's counters, live."""
        return self._tally.counters

    @property
    def extra_counters(self) -> dict[str, float]:
        """More counters for heartbeats, see :data:`cod_async.engines.sglang.tally.EXTRA_NAMES`, and the
        number of servers that take requests.
        """
        num_serving = sum(slot.is_serving for slot in self.pool.slots.values())
        return self._tally.extra | {"num_servers": float(num_serving)}

    @property
    def version(self) -> Version:
        """Oldest version among servers that take requests; if there are none, what it was last."""
        return self.pool.version

    @property
    def max_context_tokens(self) -> int:
        """Longest row (prompt and completion)."""
        return self._max_context_tokens

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        """Generate one completion; see :meth:`cod_async.engines.base.Engine.generate`.

        Raises:
            EngineError: parameters out of range, a prompt that leaves no room, a session that already has a
                request, no usable server for too long, a request that every server broke off, or tokens
                whose version is not known.
            EngineMismatchError: a server is not what this run needs; the engine is of no use any more.
            EngineClosedError: the engine was closed.
        """
        self.pool.raise_if_over()
        row, params = self._checked(token_ids, params)
        if session is None:
            return await self._generate(row, params, None)
        if session in self._busy_sessions:
            raise EngineError(f"session {session!r} already has a request; wait for it before the next turn")
        self._busy_sessions.add(session)
        try:
            return await self._generate(row, params, session)
        except asyncio.CancelledError:
            self.pool.close_session(session)
            raise
        finally:
            self._busy_sessions.discard(session)

    async def close_session(self, session: str) -> None:
        """Tell that a conversation is over; unknown ones are ignored."""
        self.pool.close_session(session)

    def announce(self, manifest: Manifest) -> None:
        """A version was published; :meth:`update_weights` need not have been called for it yet.

        Servers take it up by themselves. Whoever is waiting in :meth:`update_weights` for an older version
        is served by this one.
        """
        self.pool.announce(manifest)

    async def update_weights(self, manifest: Manifest) -> None:
        """Let all servers take a published version up, in the mode of ``engine.on_publish``.

        Returns when those that take requests have it, or a newer one. Servers that are down, hang in an
        update or failed to take it hold nobody up; they go on trying.

        Raises:
            WeightsError: no server could take it.
            EngineClosedError: the engine was closed.
        """
        await self.pool.settle(self.pool.announce(manifest))

    async def aclose(self) -> None:
        """Abort running requests at their servers, let updates end, close all connections. Running and
        waiting requests raise EngineClosedError.
        """
        self._is_closed = True
        await self.pool.aclose()

    async def _generate(self, row: Sequence[int], params: SamplingParams, session: str | None) -> Completion:
        trouble: EngineError | None = None
        for number in range(MAX_ATTEMPTS):
            if number:
                self._tally.count("num_request_retries")
            slot, attempt = await self.pool.begin(row, params, session)
            try:
                made = await attempt.outcome()
            except EngineDownError as error:
                if self._is_closed:
                    raise EngineClosedError("the engine was closed") from None
                slot.broke_off(attempt)
                trouble = error
                continue
            except EngineMismatchError as error:
                slot.refused_key(attempt, error)
                trouble = error
                continue
            # From here to the return nothing is awaited: the tokens are counted exactly once.
            try:
                completion = self._accepted(slot, attempt, made)
            except _GivenUpError as error:
                trouble = EngineError(str(error))
                continue
            if session is not None:
                self.pool.answered(session, completion.versions[0].version)
            return completion
        raise EngineError(f"{MAX_ATTEMPTS} attempts were broken off, the last: {trouble}") from trouble

    def _accepted(self, slot: ServerSlot, attempt: Attempt, made: Generated) -> Completion:
        """Check a completion's versions and count its tokens, as returned or as aborted.

        Raises:
            EngineError: tokens without a version of ours.
            _GivenUpError: it is to be asked again.
        """
        num_tokens = len(made.token_ids)
        if made.finish == "abort":
            self._tally.aborted(num_tokens)
            raise _GivenUpError(f"{slot.name} aborted a request")
        spans = []
        for span in made.spans:
            version = parse_version_label(span.label)
            if version is None or span.label not in attempt.labels:
                self._tally.aborted(num_tokens)
                why = (
                    f"{slot.name} sampled tokens under weights called {span.label!r}, which were not brought "
                    "there by this actor; does somebody else update this server?"
                )
                slot.updater.doubt(why)
                raise EngineError(f"no token without a version: {why}")
            spans.append(VersionSpan(version, span.num_tokens))
        if not attempt.connection.client.has_version_spans and len(attempt.labels) > 1:
            self._tally.aborted(num_tokens)
            raise _GivenUpError(f"{slot.name} changed weights meanwhile, and does not tell when")
        slot.succeeded()
        self._tally.returned(num_tokens)
        return Completion(made.token_ids, made.logprobs, tuple(spans), made.finish)

    def _checked(self, token_ids: Sequence[int], params: SamplingParams) -> tuple[list[int], SamplingParams]:
        """Return a request that a server can take.

        Raises:
            EngineError: it cannot be made into one.
        """
        row = [int(token) for token in token_ids]
        limit = self._max_context_tokens
        if not row:
            raise EngineError("the prompt is empty")
        if len(row) >= limit:
            raise EngineError(f"a prompt of {len(row)} tokens leaves no room in a context of {limit}")
        if min(row) < 0 or max(row) >= self._vocab_size:
            raise EngineError(f"the prompt has token ids outside 0 .. {self._vocab_size - 1}")
        if params.max_tokens < 1:
            raise EngineError(f"max_tokens must be at least 1, is {params.max_tokens}")
        if not (params.temperature > 0 and math.isfinite(params.temperature)):
            raise EngineError(f"temperature must be positive and finite, is {params.temperature}")
        if not 0 < params.top_p <= 1:
            raise EngineError(f"top_p must be in (0, 1], is {params.top_p}")
        return row, replace(params, max_tokens=min(params.max_tokens, limit - len(row)))


class _GivenUpError(Exception):
    """A server ended a request although nothing is wrong with it or the server."""


class WeightsLibrary:
    """Published versions on this host, each read and checked once however many servers take it up.

    Args:
        root: folder that manifests refer to.
        model_dir: the weights that the run starts from.
        run: run id.
    """

    def __init__(self, root: Path, model_dir: Path, run: str) -> None:
        self._root, self._model_dir, self._run = root, model_dir, run
        self._kept: OrderedDict[str, PublishedWeights] = OrderedDict()
        self._loading = asyncio.Lock()

    async def load(self, manifest: Manifest | None) -> PublishedWeights:
        """Return a version; None: what the run starts from.

        Raises:
            WeightsError: it is missing, damaged, or not what its manifest says.
        """
        key = "" if manifest is None else f"{manifest.version} {manifest.digest}"
        async with self._loading:
            if key not in self._kept:
                if manifest is None:
                    weights = await asyncio.to_thread(starting_weights, self._model_dir, self._run)
                else:
                    weights = await asyncio.to_thread(PublishedWeights.open, self._root, manifest)
                self._kept[key] = weights
                while len(self._kept) > _WEIGHTS_KEPT:
                    self._kept.popitem(last=False)
            return self._kept[key]
