"""Asking an engine, and comparing what it says with the reference.

Every answer is looked over when it comes: as many log-probs and versions as ids, ids of the vocabulary,
log-probs that can be some, an end that fits the request. What an answer claims is then compared with the
reference, token by token.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from cod_async.engines.base import Completion, Engine, SamplingParams
from cod_async.engines.conformance.findings import CheckFailedError
from cod_async.engines.conformance.reference import Reference
from cod_async.engines.conformance.updating import Updater

MAX_LOGPROB = 1e-5
"""A log-prob may exceed 0 by this much of rounding."""


@dataclass(frozen=True)
class Tolerance:
    """Largest allowed difference of log-probs to the reference, in nats.

    Attributes:
        max: of any token.
        mean: of the mean over the tokens of a comparison.
    """

    max: float
    mean: float

    def __str__(self) -> str:
        return f"limits: max {self.max:g}, mean {self.mean:g}"


FLOAT32 = Tolerance(max=1e-4, mean=1e-4)
"""Engines that compute in float32."""
BFLOAT16 = Tolerance(max=1.0, mean=0.03)
"""Engines that compute in bfloat16: eight bits of mantissa in every layer leave differences of some
hundredths on average, and more for unlikely tokens."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is examined.

    Attributes:
        engine: the engine.
        vocab_size: ids 0 .. vocab_size - 1 may be sent.
        reference: its model, by transformers; None: checks that compare with it are skipped.
        tolerance: of log-probs.
        eos_ids: ids after which the model's own files would end a completion.
        updater: how its weights may be changed; None: checks that change them are skipped.
        counts_aborted: whether the engine counts the tokens of cancelled requests.
        max_full_context_tokens: rows as long as the context are tried if that is at most this long.
        seed: of prompts and sampling.
    """

    engine: Engine
    vocab_size: int
    reference: Reference | None
    tolerance: Tolerance = FLOAT32
    eos_ids: frozenset[int] = frozenset()
    updater: Updater | None = None
    counts_aborted: bool = True
    max_full_context_tokens: int = 4096
    seed: int = 0

    def prompt(self, number: int, num_tokens: int) -> list[int]:
        """Return a prompt of random ids, the same for the same number and length."""
        rng = random.Random(f"{self.seed}/{number}/{num_tokens}")
        return [rng.randrange(self.vocab_size) for _ in range(num_tokens)]

    def lengths(self, wanted: Sequence[int], max_tokens: int) -> list[int]:
        """Return prompt lengths cut so that ``max_tokens`` more fit into the context."""
        room = max(1, self.engine.max_context_tokens - max_tokens - 1)
        return [min(length, room) for length in wanted]


@dataclass(frozen=True)
class Answer:
    """A completion and what was asked for."""

    prompt: list[int]
    params: SamplingParams
    completion: Completion

    @property
    def row(self) -> list[int]:
        """Prompt and completion."""
        return [*self.prompt, *self.completion.token_ids]


@dataclass
class Differences:
    """Absolute differences of reported and expected log-probs, in nats."""

    values: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.values:
            return "no tokens"
        return f"max {self.max:.2g}, mean {self.mean:.2g} over {len(self.values)} tokens"

    @property
    def max(self) -> float:
        """The largest."""
        return max(self.values, default=0.0)

    @property
    def mean(self) -> float:
        """The mean."""
        return sum(self.values) / len(self.values) if self.values else 0.0

    def fit(self, tolerance: Tolerance) -> bool:
        """Whether they are small enough (a value that is not a number never is)."""
        return self.max <= tolerance.max and self.mean <= tolerance.mean


def params(
    max_tokens: int, *, seed: int, stop_ids: Iterable[int] = (), temperature: float = 1.0, top_p: float = 1.0
) -> SamplingParams:
    """Return sampling parameters."""
    return SamplingParams(
        max_tokens=max_tokens, stop_ids=frozenset(stop_ids), temperature=temperature, top_p=top_p, seed=seed
    )


async def ask(
    subject: Subject, prompt: Sequence[int], asked: SamplingParams, session: str | None = None
) -> Answer:
    """Ask for one completion and look it over.

    Raises:
        CheckFailedError: the answer contradicts itself or the request.
        EngineError: the engine did not answer.
    """
    completion = await subject.engine.generate(prompt, asked, session=session)
    problems = _problems(subject, asked, completion)
    if problems:
        raise CheckFailedError(f"an answer to {len(prompt)} ids: {'; '.join(problems)}")
    return Answer(list(prompt), asked, completion)


async def ask_all(subject: Subject, requests: Iterable[tuple[Sequence[int], SamplingParams]]) -> list[Answer]:
    """Ask for several completions at once.

    Raises:
        CheckFailedError, EngineError: as :func:`ask`, of the first that fails; the others are cancelled.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(subject, prompt, asked)) for prompt, asked in requests]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _problems(subject: Subject, asked: SamplingParams, completion: Completion) -> list[str]:
    ids, logprobs, spans = completion.token_ids, completion.logprobs, completion.versions
    problems = []
    if not 1 <= len(ids) <= asked.max_tokens:
        problems.append(f"{len(ids)} ids although 1 .. {asked.max_tokens} were asked for")
    if len(ids) != len(logprobs):
        problems.append(f"{len(ids)} ids and {len(logprobs)} log-probs")
    if any(not 0 <= token < subject.vocab_size for token in ids):
        problems.append(f"ids outside 0 .. {subject.vocab_size - 1}")
    if any(not (math.isfinite(value) and value <= MAX_LOGPROB) for value in logprobs):
        problems.append("log-probs above 0 or not finite")
    num_versioned = sum(span.num_tokens for span in spans)
    if num_versioned != len(ids) or any(span.num_tokens < 1 for span in spans):
        problems.append(f"{len(ids)} ids and versions for {num_versioned}")
    if any(one.version == other.version for one, other in itertools.pairwise(spans)):
        problems.append("neighbouring spans of one version")
    stops = [index for index, token in enumerate(ids) if token in asked.stop_ids]
    if completion.finish == "stop" and stops != [len(ids) - 1]:
        problems.append(f'finish "stop", and stop ids at {stops} of {len(ids)} ids')
    if completion.finish == "length" and stops:
        problems.append(f'finish "length" with stop ids at {stops}')
    return problems


def expected(reference: Reference, answer: Answer, temperature: float | None = None) -> list[float]:
    """Return the reference's log-probs of an answer's tokens, at its own temperature or another."""
    row, first = answer.row, len(answer.prompt)
    tempered = answer.params.temperature if temperature is None else temperature
    table = reference.logprobs(row, first, tempered)[:-1]
    values: list[float] = table.gather(1, torch.tensor(row[first:])[:, None])[:, 0].tolist()
    return values


def compare(reference: Reference, answers: Iterable[Answer], temperature: float | None = None) -> Differences:
    """Return the differences of all tokens of some answers."""
    found = Differences()
    for answer in answers:
        values = expected(reference, answer, temperature)
        found.values += [
            abs(one - other) for one, other in zip(answer.completion.logprobs, values, strict=True)
        ]
    return found
