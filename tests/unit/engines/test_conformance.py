"""The conformance suite on the embedded engine, and on engines that are broken in one way each."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cod_async.engines.base import Completion, EngineCounters, SamplingParams
from cod_async.engines.conformance import ENGINE_CHECKS, Check, Finding, engine_checks, find
from cod_async.engines.conformance.asking import Subject
from cod_async.engines.conformance.reference import Reference, TransformersReference, bytes_needed
from cod_async.engines.embedded import EmbeddedEngine
from cod_async.errors import EngineDownError, EngineError, EngineRefusedError, InputError
from cod_async.lifecycle.segment import Version, VersionSpan
from cod_async.models.directory import save_model, weights_of
from cod_async.models.qwen3 import Qwen3
from cod_async.weights.manifest import Manifest

from .helpers import VOCAB, make_engine, make_model, run

CONTEXT = 96
EOS = 36
OLD, NEW = make_model(0), make_model(2)
VERSION, NEXT = Version(0, 0), Version(0, 1)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> tuple[Reference, Reference]:
    """The two models, as transformers reads them."""
    found = []
    for name, model in (("old", OLD), ("new", NEW)):
        path = tmp_path_factory.mktemp(name)
        save_model(path, model)
        found.append(TransformersReference(path))
    return found[0], found[1]


class Wrapper:
    """Any engine around another one; broken ones override what they break."""

    def __init__(self, engine: EmbeddedEngine) -> None:
        self.inner = engine
        self.calls = 0

    @property
    def counters(self) -> EngineCounters:
        return self.inner.counters

    @property
    def extra_counters(self) -> dict[str, float]:
        return self.inner.extra_counters

    @property
    def version(self) -> Version:
        return self.inner.version

    @property
    def max_context_tokens(self) -> int:
        return self.inner.max_context_tokens

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        self.calls += 1
        return self.change(await self.inner.generate(token_ids, params, session=session), params)

    def change(self, completion: Completion, params: SamplingParams) -> Completion:
        return completion

    async def close_session(self, session: str) -> None:
        await self.inner.close_session(session)

    async def update_weights(self, manifest: Manifest) -> None:
        await self.inner.update_weights(manifest)

    def announce(self, manifest: Manifest) -> None:
        self.inner.announce(manifest)

    async def aclose(self) -> None:
        await self.inner.aclose()


class Swapping:
    """Switches an embedded engine between the two models."""

    has_other_weights = True
    goes_back = True

    def __init__(self, engine: EmbeddedEngine, new: Reference, mode: Any) -> None:
        self._engine, self._new, self.mode = engine, new, mode

    async def prepare(self) -> None:
        return None

    async def _to(self, model: Qwen3, version: Version) -> None:
        await self._engine._take_up(self._engine._fuse(weights_of(model), version), version, str(version))

    async def switch(self) -> tuple[Version, Reference]:
        await self._to(NEW, NEXT)
        return NEXT, self._new

    async def restore(self) -> Version:
        await self._to(OLD, VERSION)
        return self._engine.version


def examine(
    names: Sequence[str],
    references: tuple[Reference, Reference],
    wrap: Callable[[EmbeddedEngine], Any] = Wrapper,
    *,
    on_publish: str = "retract",
    deadline_s: float = 60.0,
    **engine_changes: Any,
) -> dict[str, Finding]:
    async def main() -> dict[str, Finding]:
        inner = make_engine(OLD, context=CONTEXT, on_publish=on_publish, max_running=16, **engine_changes)
        subject = Subject(
            engine=wrap(inner),
            vocab_size=VOCAB,
            reference=references[0],
            eos_ids=frozenset([EOS]),
            updater=Swapping(inner, references[1], on_publish),
        )
        checks = {check.name: check for check in engine_checks(subject, deadline_s)}
        found = {name: await find(checks[name]) for name in names}
        await inner.aclose()
        return found

    answer: dict[str, Finding] = run(main())
    return answer


@pytest.mark.parametrize("on_publish", ["retract", "in_place", "wait"])
def test_the_embedded_engine_conforms(references: tuple[Reference, Reference], on_publish: str) -> None:
    names = (
        ENGINE_CHECKS if on_publish == "retract" else ("versions_are_true", "live_update", "session_turns")
    )
    found = examine(names, references, on_publish=on_publish)
    assert {name: finding.status for name, finding in found.items()} == dict.fromkeys(names, "ok"), found
    assert all(any(letter.isdigit() for letter in finding.detail) for finding in found.values())


def test_the_batch_invariant_engine_conforms(references: tuple[Reference, Reference]) -> None:
    names = ("logprob_parity", "live_update")
    found = examine(names, references, is_batch_invariant=True)
    assert {finding.status for finding in found.values()} == {"ok"}, found


class ShiftedLogprobs(Wrapper):
    def change(self, completion: Completion, params: SamplingParams) -> Completion:
        return replaced(completion, logprobs=[value - 2e-3 for value in completion.logprobs])


class LogprobsOfTemperatureOne(Wrapper):
    """What servers report that score before they temper."""

    def change(self, completion: Completion, params: SamplingParams) -> Completion:
        return completion if params.temperature == 1 else replaced(completion, logprobs=self.untempered)

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        completion = await self.inner.generate(token_ids, params, session=session)
        reference = self.reference.logprobs([*token_ids, *completion.token_ids], len(token_ids), 1.0)
        self.untempered = [
            float(row[token]) for row, token in zip(reference, completion.token_ids, strict=False)
        ]
        return self.change(completion, params)

    reference: Reference


class TruncatedLogprobs(Wrapper):
    """Reports log-probs that are normalized over the nucleus."""

    def change(self, completion: Completion, params: SamplingParams) -> Completion:
        shift = -math.log(max(params.top_p, 0.5)) if params.top_p < 1 else 0.0
        return replaced(completion, logprobs=[min(0.0, value + shift) for value in completion.logprobs])


class CutTail(Wrapper):
    """Samples from a nucleus that nobody asked for, as a server with default sampling settings does."""

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        narrow = msgspec.structs.replace(params, top_p=0.8)
        return await self.inner.generate(token_ids, narrow, session=session)


class DroppedStop(Wrapper):
    def change(self, completion: Completion, params: SamplingParams) -> Completion:
        if completion.finish != "stop" or len(completion.token_ids) < 2:
            return completion
        return first_tokens(completion, len(completion.token_ids) - 1)


class StopsUnasked(Wrapper):
    """Ends at the model's own end token, whatever was asked for."""

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        more = msgspec.structs.replace(params, stop_ids=params.stop_ids | {EOS})
        completion = await self.inner.generate(token_ids, more, session=session)
        is_own = completion.token_ids[-1] == EOS and EOS not in params.stop_ids
        return replaced(completion, finish="length") if is_own else completion


class IgnoresStops(Wrapper):
    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        return await self.inner.generate(token_ids, msgspec.structs.replace(params, stop_ids=frozenset()))


class OneTooFew(Wrapper):
    def change(self, completion: Completion, params: SamplingParams) -> Completion:
        count = len(completion.token_ids)
        return (
            first_tokens(completion, count - 1) if completion.finish == "length" and count > 1 else completion
        )


class Retokenized(Wrapper):
    """Sends ids through text and back: ids without a text of their own become others."""

    def change(self, completion: Completion, params: SamplingParams) -> Completion:
        return replaced(completion, token_ids=[token if token < 30 else 29 for token in completion.token_ids])


class RetokenizedShorter(Wrapper):
    """Sends ids through text and back: ids that decode to nothing are lost."""

    def change(self, completion: Completion, params: SamplingParams) -> Completion:
        return replaced(completion, token_ids=[token for token in completion.token_ids if token < 30] or [0])


class WrongVersion(Wrapper):
    def change(self, completion: Completion, params: SamplingParams) -> Completion:
        return replaced(completion, versions=(VersionSpan(NEXT, len(completion.token_ids)),))


class LastVersionForAll(Wrapper):
    """One version per completion, as servers report that have no spans."""

    def change(self, completion: Completion, params: SamplingParams) -> Completion:
        span = VersionSpan(completion.versions[-1].version, len(completion.token_ids))
        return replaced(completion, versions=(span,))


class ShiftedBoundary(Wrapper):
    """Names the new version a few tokens too late."""

    def change(self, completion: Completion, params: SamplingParams) -> Completion:
        if len(completion.versions) != 2 or completion.versions[1].num_tokens < 8:
            return completion
        first, second = completion.versions
        spans = (
            VersionSpan(first.version, first.num_tokens + 3),
            VersionSpan(second.version, second.num_tokens - 3),
        )
        return replaced(completion, versions=spans)


class NoVersion(Wrapper):
    def change(self, completion: Completion, params: SamplingParams) -> Completion:
        return replaced(completion, versions=())


class Unforgetting(Wrapper):
    """Goes on with whatever a session's cache holds: an edited history is not noticed."""

    def __init__(self, engine: EmbeddedEngine) -> None:
        super().__init__(engine)
        self.histories: dict[str, list[int]] = {}

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        if session is None:
            return await self.inner.generate(token_ids, params)
        history = self.histories.setdefault(session, list(token_ids))
        if len(token_ids) >= len(history):
            history[:] = [*history, *token_ids[len(history) :]]
        return await self.inner.generate(history, params, session=session)


class CrossTalk(Wrapper):
    """Log-probs are right as long as nothing else is running."""

    running = 0

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        self.running += 1
        shift = 5e-3 if self.running > 12 else 0.0
        completion = await self.inner.generate(token_ids, params, session=session)
        self.running -= 1
        return replaced(completion, logprobs=[value - shift for value in completion.logprobs])


class FailsHard(Wrapper):
    """Impossible requests take it down."""

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        try:
            return await self.inner.generate(token_ids, params, session=session)
        except EngineError as error:
            raise EngineDownError("connection lost") from error


class SendsAnything(Wrapper):
    """Leaves it to the server to refuse what is wrong."""

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        try:
            return await self.inner.generate(token_ids, params, session=session)
        except EngineError as error:
            raise EngineRefusedError("status 400") from error


class Shortens(Wrapper):
    """Cuts prompts and ids until they fit."""

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        fitting = [min(max(token, 0), VOCAB - 1) for token in token_ids] or [0]
        return await self.inner.generate(fitting[-(CONTEXT - 8) :], params, session=session)


class Uncancellable(Wrapper):
    """Finishes what was cancelled, and tells nobody."""

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        return await asyncio.shield(self.inner.generate(token_ids, params, session=session))


class UncountedAborts(Wrapper):
    """Forgets the tokens of cancelled requests."""

    @property
    def counters(self) -> EngineCounters:
        return msgspec.structs.replace(self.inner.counters, aborted_tokens=0)


class Unswitchable(Wrapper):
    """Keeps calling its weights by the first name."""

    @property
    def version(self) -> Version:
        return VERSION

    def change(self, completion: Completion, params: SamplingParams) -> Completion:
        return replaced(completion, versions=(VersionSpan(VERSION, len(completion.token_ids)),))


def replaced(completion: Completion, **changes: Any) -> Completion:
    return msgspec.structs.replace(completion, **changes)


def first_tokens(completion: Completion, count: int) -> Completion:
    """The completion without its last tokens, versions (of one span) included."""
    (span,) = completion.versions
    return replaced(
        completion,
        token_ids=completion.token_ids[:count],
        logprobs=completion.logprobs[:count],
        versions=(VersionSpan(span.version, count),),
    )


BROKEN: list[tuple[str, type[Wrapper], str]] = [
    ("answers_are_whole", RetokenizedShorter, "log-probs"),
    ("answers_are_whole", NoVersion, "versions for 0"),
    ("answers_are_whole", OneTooFew, "nothing could end early"),
    ("logprob_parity", ShiftedLogprobs, "max 0.002"),
    ("logprob_parity", Retokenized, "T=1"),
    ("logprob_parity", LogprobsOfTemperatureOne, "those of temperature 1"),
    ("logprobs_before_top_p", TruncatedLogprobs, "after the cut"),
    ("samples_follow_logprobs", CutTail, "does not sample"),
    ("stop_ids", DroppedStop, 'finish "stop"'),
    ("stop_ids", IgnoresStops, 'finish "length" with stop ids'),
    ("stop_ids", StopsUnasked, 'finish "length" after'),
    ("own_eos_does_not_stop", StopsUnasked, "no stop id of the request"),
    ("length_limit", OneTooFew, "ids of"),
    ("context_limit", FailsHard, "took the engine down"),
    ("context_limit", Shortens, "was answered"),
    ("foreign_ids", FailsHard, "took the engine down"),
    ("foreign_ids", Shortens, "was answered"),
    ("foreign_ids", SendsAnything, "was sent to the server"),
    ("batch_equals_one_by_one", CrossTalk, "at once: max 0.005"),
    ("session_turns", Unforgetting, "max"),
    ("abort", UncountedAborts, "neither returned nor counted"),
    ("abort", Uncancellable, "neither returned nor counted"),
    ("versions_are_true", WrongVersion, "its tokens say 0.1"),
    ("live_update", LastVersionForAll, "old span"),
    ("live_update", ShiftedBoundary, "old span"),
    ("live_update", WrongVersion, "new span max"),
    ("live_update", Unswitchable, "names"),
]


@pytest.mark.parametrize(
    ("check", "wrap", "message"), BROKEN, ids=[f"{check}-{wrap.__name__}" for check, wrap, _ in BROKEN]
)
def test_a_broken_engine_is_found(
    references: tuple[Reference, Reference],
    check: str,
    wrap: type[Wrapper],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cod_async.engines.conformance.traffic.SETTLE_S", 0.02)
    monkeypatch.setattr(LogprobsOfTemperatureOne, "reference", references[0], raising=False)
    finding = examine([check], references, wrap)[check]
    assert finding.status == "failed", finding
    assert message in finding.detail, finding


def test_every_check_can_fail() -> None:
    assert {check for check, _, _ in BROKEN} == set(ENGINE_CHECKS)


def test_an_update_that_keeps_old_caches_is_found(references: tuple[Reference, Reference]) -> None:
    class Claims(Swapping):
        """Says that caches were computed again although they were kept."""

        def __init__(self, engine: EmbeddedEngine, new: Reference) -> None:
            super().__init__(engine, new, "retract")

    async def main() -> Finding:
        inner = make_engine(OLD, context=CONTEXT, on_publish="in_place", max_running=16)
        subject = Subject(
            engine=inner, vocab_size=VOCAB, reference=references[0], updater=Claims(inner, references[1])
        )
        return await find(engine_checks(subject)[-1])

    finding = run(main())
    assert finding.status == "failed" and "new span max" in finding.detail


def test_what_cannot_be_checked_is_skipped_with_the_reason() -> None:
    async def main() -> dict[str, Finding]:
        engine = make_engine(OLD, context=CONTEXT)
        subject = Subject(engine=engine, vocab_size=VOCAB, reference=None)
        return {check.name: await find(check) for check in engine_checks(subject)}

    found = run(main())
    assert found["logprob_parity"].status == "skipped" and "--model" in found["logprob_parity"].detail
    assert found["live_update"].status == "skipped" and "--allow-updates" in found["live_update"].detail
    assert found["length_limit"].status == "ok"


def test_checks_end_in_time_and_report_what_they_did_not_expect() -> None:
    async def never() -> str:
        await asyncio.Event().wait()
        return ""

    async def wrong() -> str:
        raise KeyError("unforeseen")

    assert run(find(Check("never", never, 0.01))) == Finding("never", "failed", "not done within 0.01 s")
    finding = run(find(Check("wrong", wrong)))
    assert finding.status == "failed" and "unforeseen" in finding.detail


def test_a_reference_is_a_whole_model_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="safetensors"):
        bytes_needed(tmp_path)
    with pytest.raises(InputError, match="cannot load"):
        TransformersReference(tmp_path)
    save_model(tmp_path / "model", OLD)
    tensors = weights_of(OLD).values()
    assert bytes_needed(tmp_path / "model") == 4 * sum(tensor.numel() for tensor in tensors)
