"""One request at one server, on a task of its own, so that nobody has to wait for a server that is gone.

The caller awaits :meth:`Attempt.outcome`. When the caller is cancelled, or the server is given up, that ends
at once; the task goes on in the background until the server has been told, and what had been seen by then is
counted as aborted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from cod_async.engines.base import SamplingParams
from cod_async.engines.sglang.client import ServerClient
from cod_async.engines.sglang.protocol import Generated
from cod_async.engines.sglang.tally import Tally
from cod_async.errors import EngineError


class Connection:
    """A client, and how much of what it saw of cancelled requests was counted."""

    def __init__(self, client: ServerClient, tally: Tally) -> None:
        self.client = client
        self.tally = tally
        self._counted_tokens = client.num_cancelled_tokens

    def count_cancelled(self) -> None:
        """Count tokens of cancelled requests that were not counted yet."""
        now = self.client.num_cancelled_tokens
        self.tally.aborted(now - self._counted_tokens)
        self._counted_tokens = now


class Attempt:
    """A request under way.

    Args:
        connection: to the server.
        token_ids, params, rid: the request.
        label: what the server's weights are called now; also the request's cache namespace.
        on_end: called when the server is done with it, or was told that nobody wants it.

    Attributes:
        labels: what the server's weights were called from the beginning on, each once.
        num_prompt, max_tokens: tokens of the prompt, most tokens to generate.
        num_made: tokens that were generated, as far as known when it ended.
    """

    def __init__(
        self,
        connection: Connection,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        rid: str,
        label: str,
        on_end: Callable[[Attempt], None],
    ) -> None:
        self.labels = [label]
        self.num_prompt = len(token_ids)
        self.max_tokens = params.max_tokens
        self.num_made = 0
        self.connection = connection
        self._outcome: asyncio.Future[Generated] = asyncio.get_running_loop().create_future()
        self._is_abandoned = False
        self._on_end = on_end
        self._start_s = time.monotonic()
        connection.tally.started()
        self._task = asyncio.create_task(
            connection.client.generate(token_ids, params, rid=rid, namespace=label), name=f"attempt {rid}"
        )
        self._task.add_done_callback(self._ended)

    @property
    def elapsed_s(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._start_s

    async def outcome(self) -> Generated:
        """Wait for the completion. Counting its tokens is up to the caller from here on.

        Raises:
            EngineError: of the server.
            asyncio.CancelledError: the awaiting task was cancelled, and the request with it.
        """
        try:
            return await self._outcome
        except asyncio.CancelledError:
            self.abandon()
            raise

    def abandon(self, error: EngineError | None = None) -> None:
        """Stop it because nobody wants it any more, or with ``error`` because the server is given up."""
        if self._is_abandoned:
            return
        self._is_abandoned = True
        outcome = self._outcome
        if not outcome.done():
            if error is not None:
                outcome.set_exception(error)
                outcome.exception()  # its caller may be gone
            else:
                outcome.cancel()
        elif error is None and not outcome.cancelled() and outcome.exception() is None:
            # It ended, and its caller was cancelled before taking the completion.
            self.connection.tally.aborted(len(outcome.result().token_ids))
        self._task.cancel()

    async def wait_ended(self) -> None:
        """Return when the server is done with it, or was told."""
        await asyncio.wait([self._task])

    def _ended(self, task: asyncio.Task[Generated]) -> None:
        tally, outcome = self.connection.tally, self._outcome
        tally.ended()
        if task.cancelled():
            self.connection.count_cancelled()
            outcome.cancel()
        elif (error := task.exception()) is not None:
            self.num_made = int(getattr(error, "num_tokens", 0))
            tally.aborted(self.num_made)
            if not outcome.done():
                outcome.set_exception(error)
                outcome.exception()
        else:
            generated = task.result()
            self.num_made = len(generated.token_ids)
            self._count_prompt(generated)
            if outcome.done():
                tally.aborted(self.num_made)
            else:
                outcome.set_result(generated)
        self._on_end(self)

    def _count_prompt(self, generated: Generated) -> None:
        """Count what the prompt cost, and what had to be computed again after switches that retracted it."""
        num_again = 0
        if generated.num_retractions:
            before = 0
            for span in generated.spans[:-1]:
                before += span.num_tokens
                num_again += generated.num_prompt_tokens + before
        self.connection.tally.computed(
            num_prompt=generated.num_prompt_tokens,
            num_cached=generated.num_cached_tokens,
            num_again=num_again,
            num_retractions=generated.num_retractions,
        )
