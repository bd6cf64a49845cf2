"""A teacher in this process: a frozen model directory that scores rows, several in one forward pass.

Rows wait in a queue. Whenever the last pass is done, the next takes the oldest row and others of the queue
that fit into the token budget beside it, padded to the longest. It runs in a thread, so that the asyncio
loop, and with it the generation of other lifecycles, goes on. The model is loaded with the first row, and one
scorer serves all environments that have the same teacher.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cod_async.config.check_distillation import vocab_size_of
from cod_async.engines.base import scored_positions
from cod_async.errors import EngineClosedError, EngineError, InputError
from cod_async.models.loading import load_policy
from cod_kernels import KernelInputError, linear_logprob


@dataclass(frozen=True, eq=False)
class _Asked:
    """A row that waits: ``positions`` of ``token_ids`` are wanted at a temperature."""

    token_ids: list[int]
    positions: list[int]
    temperature: float
    future: asyncio.Future[list[float]]


class EmbeddedScorer:
    """Implements :class:`cod_async.engines.base.Scorer` in this process, on the CPU.

    Args:
        model_dir: Hugging Face model directory.
        tokens_per_batch: tokens of one forward pass, padding included; a longer row has one to itself.
        is_batch_invariant: one row per pass, so that a score is a function of the row alone, to the last bit.
        dtype: of the computation; float64 for references.

    Attributes:
        num_passes: forward passes so far.

    Raises:
        InputError: the directory has no model that is known here.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        tokens_per_batch: int = 8192,
        is_batch_invariant: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._model_dir = model_dir
        self._vocab_size = vocab_size_of(model_dir)
        self._tokens_per_batch = tokens_per_batch
        self._is_batch_invariant = is_batch_invariant
        self._dtype = dtype
        self._model: Any = None
        self._waiting: deque[_Asked] = deque()
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False
        self.num_passes = 0

    async def score(
        self, token_ids: Sequence[int], spans: Sequence[tuple[int, int]], temperature: float
    ) -> list[float]:
        """Score a row; see :meth:`cod_async.engines.base.Scorer.score`. A cancelled caller's row is left out.

        Raises:
            EngineError: arguments out of range, weights that cannot be read, or a log-prob that is none.
            EngineClosedError: the scorer was closed.
        """
        if self._is_closed:
            raise EngineClosedError("the scorer is closed")
        positions = scored_positions(token_ids, spans, temperature, self._vocab_size)
        future: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Asked(list(token_ids), positions, temperature, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work(), name="scorer")
        return await future

    async def aclose(self) -> None:
        """Stop after the pass that is running; callers get EngineClosedError."""
        self._is_closed = True
        while self._waiting:
            asked = self._waiting.popleft()
            if not asked.future.done():
                asked.future.set_exception(EngineClosedError("the scorer was closed"))
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        self._model = None

    async def _work(self) -> None:
        """Pass after pass until nobody waits."""
        while batch := self._next_batch():
            try:
                scores = await asyncio.to_thread(self._forward, batch)
            except Exception as error:  # a thread's failure is that of every row in it, and of no other
                for asked in batch:
                    if not asked.future.done():
                        asked.future.set_exception(EngineError(f"teacher {self._model_dir}: {error}"))
                continue
            for asked, found in zip(batch, scores, strict=True):
                if asked.future.done():
                    continue
                if all(math.isfinite(value) and value <= 1e-6 for value in found):
                    asked.future.set_result([min(value, 0.0) for value in found])
                else:
                    asked.future.set_exception(
                        EngineError(f"teacher {self._model_dir}: a log-prob is not a finite number <= 0")
                    )

    def _next_batch(self) -> list[_Asked]:
        """Take the oldest row, and others while the rectangle of all stays within the budget."""
        batch: list[_Asked] = []
        kept: list[_Asked] = []
        width = 0
        while self._waiting:
            asked = self._waiting.popleft()
            if asked.future.done():  # cancelled
                continue
            wider = max(width, len(asked.token_ids))
            fits = not self._is_batch_invariant and wider * (len(batch) + 1) <= self._tokens_per_batch
            if batch and not (fits and asked.temperature == batch[0].temperature):
                kept.append(asked)
                continue
            batch.append(asked)
            width = wider
        self._waiting.extend(kept)
        return batch

    @torch.no_grad()
    def _forward(self, batch: Sequence[_Asked]) -> list[list[float]]:
        """Return the log-probs of a batch; runs in a thread, one at a time."""
        if self._model is None:
            try:
                self._model = load_policy(self._model_dir, dtype=self._dtype).requires_grad_(False)
            except InputError as error:
                raise EngineError(str(error)) from None
        width = max(len(asked.token_ids) for asked in batch)
        grid = torch.zeros((len(batch), width), dtype=torch.int64)
        for row, asked in enumerate(batch):
            grid[row, : len(asked.token_ids)] = torch.tensor(asked.token_ids)
        wanted = [(row, position) for row, asked in enumerate(batch) for position in asked.positions]
        rows, positions = torch.tensor(wanted).unbind(1)
        hidden = self._model(grid)[rows, positions - 1]
        try:
            found = linear_logprob(
                hidden, self._model.head_weight, grid[rows, positions], temperature=batch[0].temperature
            )
        except KernelInputError as error:
            raise EngineError(str(error)) from None
        self.num_passes += 1
        values: list[float] = (found[0] if isinstance(found, tuple) else found).tolist()
        ends = itertools.accumulate((len(asked.positions) for asked in batch), initial=0)
        return [values[start:stop] for start, stop in itertools.pairwise(ends)]
