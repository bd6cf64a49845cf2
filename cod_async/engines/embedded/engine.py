"""The embedded engine: an asyncio task that turns requests into completions, one token per running row and
step.

A step admits waiting requests, computes the new prompt tokens of those that have several (batched, in
rectangles of similar length), and decodes one token for every row. Between two steps the loop belongs to the
other coroutines, so weights change only between two tokens. With nothing to do the task ends; the next
request starts it again.

Weight switches (``on_publish``): ``in_place`` (and ``auto``) goes on with the old keys and values, also in
sessions that are idle; every other mode computes them again under the new weights, so that a plain forward
under them reproduces the log-probs of all tokens sampled after the switch. ``retract`` switches at once;
``wait`` holds new requests back until the running ones are done, and ``at_segment_boundary`` new sessions
until all open ones are closed, each at most ``hold_timeout_s``. A hold that ends by that limit is a
``retract``.

Batch invariance: with ``is_batch_invariant`` every token, given or sampled, goes through the decode step
alone, in one fixed shape ([max_running rounded up to 32] rows, the whole context attended and masked).
Nothing a row computes depends
on other rows, on its slot, on arrival order, or on whether its prefix was generated here or prefilled after a
takeover: tokens and log-probs are bitwise a function of (weights, row ids, seed), for one ``max_running``,
context length, number of threads and kind of machine. It is checked once at start-up. A switch ``in_place``
makes the old weights part of that function; the other modes do not. Without the flag, results agree to
float32 rounding, so a sampled token differs only where the random number falls within rounding of a boundary.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cod_async.config.schema import EngineConfig
from cod_async.engines.base import Completion, CompletionFinish, EngineCounters, SamplingParams
from cod_async.engines.embedded.forward import FusedWeights
from cod_async.engines.embedded.scheduler import Request, Scheduler
from cod_async.engines.embedded.slots import IntArray
from cod_async.engines.embedded.stepper import Stepper
from cod_async.errors import EngineClosedError, EngineError, WeightsError
from cod_async.lifecycle.segment import Version, VersionSpan
from cod_async.models.directory import check_weights, load_model
from cod_async.models.qwen3 import Qwen3
from cod_async.weights.manifest import Manifest

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Held:
    """A loaded version that waits for what ``on_publish`` lets go first; ``done`` wakes its caller."""

    weights: FusedWeights
    version: Version
    digest: str
    done: asyncio.Future[None]


class EmbeddedEngine:
    """Implements :class:`cod_async.engines.base.Engine` in this process, on the CPU.

    Args:
        model: starting weights, copied; float32 (float64 works, for references).
        config: the run's engine section.
        max_context_tokens: longest row, prompt and completion.
        version: policy version of the starting weights.
        run_dir: run folder that manifests refer to.

    Raises:
        EngineError: the model is not on the CPU, or this machine's arithmetic is not batch invariant although
            asked to.
    """

    def __init__(
        self,
        model: Qwen3,
        config: EngineConfig,
        *,
        max_context_tokens: int,
        version: Version,
        run_dir: Path,
    ) -> None:
        if model.device.type != "cpu":
            raise EngineError(f"the embedded engine runs on the CPU, the model is on {model.device}")
        self.counters = EngineCounters()
        self.returned_tokens = 0
        self._config = config
        self._version = version
        self._digest: str | None = None  # of weights that came with a manifest
        self._run_dir = run_dir
        self._stepper = Stepper(model, config, max_context_tokens)
        self._table = self._stepper.table
        self._scheduler = Scheduler(config.max_running, self._table)
        self._task: asyncio.Task[None] | None = None
        self._step_number = 0
        self._request_number = 0
        self._unclaimed: set[Request] = set()
        self._loading = asyncio.Lock()
        self._held: _Held | None = None
        self._is_closed = False

    @property
    def extra_counters(self) -> dict[str, float]:
        """Nothing beyond the counters."""
        return {}

    @property
    def version(self) -> Version:
        """The policy version that the next token will be sampled from."""
        return self._version

    @property
    def max_context_tokens(self) -> int:
        """Longest row (prompt and completion) the engine can hold."""
        return self._table.max_context_tokens

    @property
    def in_flight_tokens(self) -> int:
        """Sampled tokens of running requests and of completions whose callers have not taken them yet.

        At any moment ``counters.sampled_tokens == returned_tokens + counters.aborted_tokens +
        in_flight_tokens``.
        """
        running = np.flatnonzero(self._table.is_running)
        sampled = int((self._table.known[running] - self._table.prompt[running]).sum())
        return sampled + sum(request.num_tokens for request in self._unclaimed)

    @property
    def num_evictions(self) -> int:
        """How often an idle session lost its slot to a waiting request."""
        return self._scheduler.num_evictions

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        """Generate one completion; see :meth:`cod_async.engines.base.Engine.generate`.

        Cancelling the awaiting task aborts the request and closes its session.

        Raises:
            EngineError: parameters out of range, a prompt that leaves no room, a session that already has a
                request, or logits that are not finite.
            EngineClosedError: the engine was closed.
        """
        if self._is_closed:
            raise EngineClosedError("the engine is closed")
        prompt = self._check_request(token_ids, params)
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._request_number += 1
        request = Request(self._request_number, prompt, params, future, self._scheduler.session_for(session))
        self._scheduler.submit(request)
        self._wake()
        try:
            completion = await future
        except asyncio.CancelledError:
            self._abort(request)
            raise
        self._unclaimed.discard(request)
        self.returned_tokens += len(completion.token_ids)
        return completion

    async def close_session(self, session: str) -> None:
        """Release a conversation's cache; unknown ones are ignored, a running one closes when it is done."""
        self._scheduler.close(session)
        self._switch_if_possible()

    async def update_weights(self, manifest: Manifest) -> None:
        """Load a published version beside the loop and switch to it between two tokens.

        Returns when the switch is done; in the modes ``wait`` and ``at_segment_boundary`` also when a newer
        version replaced this one while it was held back.

        Raises:
            WeightsError: missing, wrong digest, or not this model's tensors; the engine keeps its old
                weights.
            EngineClosedError: the engine was closed before the switch.
        """
        from cod_async.weights.load import load_weights

        async with self._loading:
            if self._is_closed:
                raise EngineClosedError("the engine is closed")
            if manifest.version == self._version and manifest.digest == self._digest:
                return
            weights = await asyncio.to_thread(
                lambda: self._fuse(load_weights(self._run_dir, manifest), manifest.version)
            )
        await self._take_up(weights, manifest.version, manifest.digest)

    def announce(self, manifest: Manifest) -> None:
        """Nothing to do: a version is taken up when :meth:`update_weights` is called for it."""

    def swap_weights(self, tensors: Mapping[str, Tensor], version: Version) -> None:
        """Switch at once to tensors that are already in this process, in the mode of ``on_publish``.

        ``wait`` and ``at_segment_boundary`` do not hold here: the caller decides when to call.

        Raises:
            WeightsError: not this model's tensors; the engine keeps its old weights.
        """
        self._switch(self._fuse(tensors, version), version, digest=None)

    async def aclose(self) -> None:
        """Stop; running and waiting requests, and held weight updates, raise EngineClosedError."""
        self._is_closed = True
        self._fail_all(EngineClosedError("the engine was closed"))
        if self._held is not None and not self._held.done.done():
            self._held.done.set_exception(EngineClosedError("engine closed before the switch"))
        self._held = None
        task, self._task = self._task, None
        if task is not None and not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    # Requests

    def _check_request(self, token_ids: Sequence[int], params: SamplingParams) -> IntArray:
        prompt: IntArray = np.array(token_ids, dtype=np.int64).reshape(-1)
        vocab_size = self._stepper.weights.config.vocab_size
        if prompt.size == 0:
            raise EngineError("the prompt is empty")
        if prompt.size >= self.max_context_tokens:
            raise EngineError(
                f"a prompt of {prompt.size} tokens leaves no room in a context of {self.max_context_tokens}"
            )
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            raise EngineError(f"the prompt has token ids outside 0 .. {vocab_size - 1}")
        if params.max_tokens < 1:
            raise EngineError(f"max_tokens must be at least 1, is {params.max_tokens}")
        if not (params.temperature > 0 and math.isfinite(params.temperature)):
            raise EngineError(f"temperature must be positive and finite, is {params.temperature}")
        if not 0 < params.top_p <= 1:
            raise EngineError(f"top_p must be in (0, 1], is {params.top_p}")
        return prompt

    def _complete(self, slots: IntArray, finish: CompletionFinish) -> None:
        """Hand finished rows to their callers."""
        table = self._table
        for slot in slots.tolist():
            request = self._scheduler.request_at(slot)
            first, last = int(table.prompt[slot]), int(table.known[slot])
            completion = Completion(
                token_ids=table.tokens[slot, first:last].tolist(),
                logprobs=table.logprobs[slot, first:last].tolist(),
                versions=_spans(request.marks, self._version, last - first),
                finish=finish,
            )
            self._scheduler.finish(request, self._step_number)
            request.num_tokens = last - first
            self._unclaimed.add(request)
            if not request.future.done():
                request.future.set_result(completion)

    def _abort(self, request: Request) -> None:
        """Account for a request whose caller was cancelled, and free what it holds."""
        if request in self._unclaimed:
            self._unclaimed.discard(request)
            self.counters.aborted_tokens += request.num_tokens
            if request.session.request is None and request.session.key is not None:
                self._scheduler.close(request.session.key)
        elif request.session.request is request:
            self._drop_running(request)
        self._switch_if_possible()

    def _drop_running(self, request: Request) -> None:
        slot = request.session.slot
        if slot is not None and self._table.is_running[slot]:  # a held turn waits beside its idle slot
            self.counters.aborted_tokens += int(self._table.known[slot] - self._table.prompt[slot])
        self._scheduler.abort(request, self._step_number)

    def _fail(self, requests: Iterable[Request], error: EngineError) -> None:
        for request in list(requests):
            self._drop_running(request)
            if not request.future.done():
                request.future.set_exception(error)

    def _fail_all(self, error: EngineError) -> None:
        self._fail([*self._scheduler.running(), *self._scheduler.waiting], error)

    # Weights

    def _fuse(self, tensors: Mapping[str, Tensor], version: Version) -> FusedWeights:
        """Check and convert tensors; the engine's state is not touched, so any thread may do it."""
        config, dtype = self._stepper.weights.config, self._stepper.weights.norm.dtype
        problems = check_weights(config, tensors)
        if problems:
            raise WeightsError(f"version {version}: " + "; ".join(problems[:20]))
        return FusedWeights.of(config, {name: tensor.to(dtype) for name, tensor in tensors.items()})

    async def _take_up(self, weights: FusedWeights, version: Version, digest: str) -> None:
        """Switch now, or hold the switch back until what ``on_publish`` lets go first is done."""
        if self._is_closed:
            raise EngineClosedError("the engine was closed before the switch")
        if not self._must_hold:
            self._switch(weights, version, digest)
            return
        if self._held is not None and not self._held.done.done():
            self._held.done.set_result(None)  # replaced by this newer version
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        held = self._held = _Held(weights, version, digest, done)
        self._scheduler.hold = "turns" if self._config.on_publish == "wait" else "sessions"
        timer = loop.call_later(self._config.hold_timeout_s, self._switch_late, done)
        try:
            await done
        except asyncio.CancelledError:
            if self._held is held:
                self._held = None
                self._scheduler.hold = None
                self._wake()
            raise
        finally:
            timer.cancel()

    @property
    def _must_hold(self) -> bool:
        """Whether something is under way that a switch has to wait for."""
        mode = self._config.on_publish
        if mode == "wait":
            return self._scheduler.has_running
        return mode == "at_segment_boundary" and self._scheduler.has_open_episode

    def _switch_late(self, done: asyncio.Future[None]) -> None:
        """End a hold that took too long, so that no forgotten session keeps an engine on old weights."""
        if self._held is not None and self._held.done is done:
            _log.warning(
                "%s held version %s back for %.0f s; switching now",
                "running completions" if self._scheduler.hold == "turns" else "open episodes",
                self._held.version,
                self._config.hold_timeout_s,
            )
            self._switch_if_possible(is_forced=True)

    def _switch_if_possible(self, *, is_forced: bool = False) -> None:
        """Do a held switch once nothing stands in its way."""
        if self._held is None or (self._must_hold and not is_forced):
            return
        held, self._held = self._held, None
        self._switch(held.weights, held.version, held.digest)
        if not held.done.done():
            held.done.set_result(None)
        self._scheduler.hold = None
        self._wake()

    def _switch(self, weights: FusedWeights, version: Version, digest: str | None) -> None:
        table = self._table
        for request in self._scheduler.running():
            slot = request.session.placed_slot
            request.marks.append((self._version, int(table.known[slot] - table.prompt[slot])))
        self._stepper.weights, self._version, self._digest = weights, version, digest
        self.counters.num_weight_updates += 1
        if self._config.on_publish not in ("auto", "in_place"):
            table.length[:] = 0  # no row, running or idle, may read keys and values of the old weights

    # The loop

    def _wake(self) -> None:
        if not self._is_closed and (self._task is None or self._task.done()) and self._scheduler.has_work:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="embedded-engine")

    async def _run(self) -> None:
        """Step while there is work. A step that fails takes its requests with it, never the engine."""
        try:
            while self._scheduler.has_work:
                started = time.perf_counter()
                try:
                    with torch.inference_mode():
                        self._step()
                except Exception as error:
                    _log.exception("an engine step failed")
                    self._fail_all(EngineError(f"an engine step failed: {error!r}"))
                self.counters.busy_s += time.perf_counter() - started
                self._switch_if_possible()
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            # Somebody cancels every task of the loop: nobody may be left waiting for tokens that never come.
            self._fail_all(EngineClosedError("the engine's task was cancelled"))
            raise

    def _step(self) -> None:
        stepper, counters = self._stepper, self.counters
        self._step_number += 1
        self._scheduler.admit(self._step_number)
        rows = stepper.rows_to_prefill()
        if rows.size:
            arrival = [self._scheduler.request_at(slot).number for slot in rows.tolist()]
            counters.prefilled_tokens += stepper.prefill(rows[np.argsort(arrival)])
        result = stepper.decode()
        counters.prefilled_tokens += result.num_prompt
        counters.sampled_tokens += result.num_sampled
        self._complete(result.stopped, "stop")
        self._complete(result.exhausted, "length")
        if result.not_finite.size:
            self._fail_not_finite(result.not_finite.tolist())

    def _fail_not_finite(self, slots: list[int]) -> None:
        error = EngineError(f"logits under version {self._version} are not finite; the weights have diverged")
        self._fail([self._scheduler.request_at(slot) for slot in slots], error)
        for slot in slots:
            self._stepper.cache.clear(slot)


def _spans(
    marks: Iterable[tuple[Version, int]], version: Version, num_tokens: int
) -> tuple[VersionSpan, ...]:
    """Run-length code the versions of ``num_tokens`` tokens from the switches that happened meanwhile."""
    spans: list[VersionSpan] = []
    before = 0
    for span_version, end in (*marks, (version, num_tokens)):
        if end > before:
            if spans and spans[-1].version == span_version:
                spans[-1] = VersionSpan(span_version, spans[-1].num_tokens + end - before)
            else:
                spans.append(VersionSpan(span_version, end - before))
            before = end
    return tuple(spans)


def load_engine(
    model_dir: Path,
    config: EngineConfig,
    *,
    max_context_tokens: int,
    version: Version | None = None,
    run_dir: Path | None = None,
) -> EmbeddedEngine:
    """Make an engine from a Hugging Face model directory.

    Args:
        model_dir: directory with ``config.json`` and safetensors weights.
        config: engine section; the number of threads is the caller's to set.
        max_context_tokens: longest row.
        version: policy version of these weights; (0, 0) if None.
        run_dir: run folder for later manifests; the model directory's parent if None.

    Raises:
        InputError: the model directory is missing or not what this project loads.
    """
    return EmbeddedEngine(
        load_model(model_dir),
        config,
        max_context_tokens=max_context_tokens,
        version=version or Version(0, 0),
        run_dir=run_dir or model_dir.parent,
    )
