"""The shapes of SGLang's answers that this project uses, and the checks that make them trustworthy.

Answers are decoded with msgspec into structs that name what is needed and ignore the rest; a missing or
wrong field is an error, never a guess. A completion is handed on only when its ids, log-probs, counts and
version spans agree with each other.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from cod_async.engines.sglang.protocol import Generated, LabelSpan, ServerLoad, joined_spans

# Probabilities may come out as 1 + rounding; anything above is not a log-prob.
MAX_LOGPROB = 1e-6


class AnswerError(ValueError):
    """An answer of a server does not hold together; the message says how, without the server's url."""


class ModelInfoAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """``/model_info``."""

    model_path: str
    weight_version: str | None = None
    architectures: list[str] | None = None


class ServerInfoAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """``/server_info``."""

    version: str = ""
    max_req_input_len: int | None = None
    max_total_num_tokens: int | None = None
    context_length: int | None = None
    tp_size: int = 1
    disable_radix_cache: bool = False
    incremental_streaming_output: bool = False
    enable_deterministic_inference: bool = False


class _RankLoad(msgspec.Struct, frozen=True, kw_only=True):
    num_running_reqs: int
    num_waiting_reqs: int
    timestamp: float | None = None


class _LoadsAnswer(msgspec.Struct, frozen=True, kw_only=True):
    timestamp: datetime.datetime
    loads: list[_RankLoad]


class OutcomeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What control requests answer."""

    success: bool = True
    message: str = ""


class _RankChecksums(msgspec.Struct, frozen=True, kw_only=True):
    checksums: dict[str, str]


class _ChecksumsAnswer(msgspec.Struct, frozen=True, kw_only=True):
    ranks: list[_RankChecksums]


class _Finish(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["stop", "length", "abort"]
    message: str = ""
    status_code: int | None = None
    matched: Any = None


class _Span(msgspec.Struct, frozen=True, kw_only=True):
    version: str
    start: int
    end: int


class _Meta(msgspec.Struct, frozen=True, kw_only=True):
    finish_reason: _Finish | None
    output_token_logprobs: list[tuple[float | None, int, Any]] | None = None
    input_token_logprobs: list[tuple[float | None, int, Any]] | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int = 0
    num_retractions: int = 0
    weight_version: str | None = None
    weight_versions: list[_Span] | None = None


class GenerateAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """``/generate``: a finished or unfinished completion, or an error inside a stream."""

    output_ids: list[int] | None = None
    meta_info: _Meta | None = None
    error: Any = None

    @property
    def failure(self) -> tuple[int, str] | None:
        """Status and message of an error, also of one that came as an abort with a status; None if none."""
        if self.error is not None:
            details = self.error if isinstance(self.error, dict) else {"message": self.error}
            code = details.get("code")
            return (code if isinstance(code, int) else 400), str(details.get("message", ""))
        finish = self.meta_info.finish_reason if self.meta_info is not None else None
        if finish is not None and finish.type == "abort" and finish.status_code is not None:
            return finish.status_code, finish.message
        return None

    @property
    def has_version_spans(self) -> bool:
        """Whether the server tells the weights of every token."""
        return self.meta_info is not None and self.meta_info.weight_versions is not None


class _ErrorAnswer(msgspec.Struct, frozen=True, kw_only=True):
    error: Any = None
    message: Any = None
    detail: Any = None


def error_message(blob: bytes) -> str:
    """Return what the server said in the body of an error, in any of its shapes."""
    try:
        answer = msgspec.json.decode(blob, type=_ErrorAnswer)
    except msgspec.MsgspecError:
        return blob.decode(errors="replace").strip()
    said = answer.error or answer.message or answer.detail
    if isinstance(said, dict):
        said = said.get("message", said)
    return str(said) if said else blob.decode(errors="replace").strip()


def load_of(blob: bytes) -> ServerLoad:
    """Decode ``/v1/loads``, summed over replicas; ages are by the server's own clock."""
    answer = msgspec.json.decode(blob, type=_LoadsAnswer)
    loads, now_s = answer.loads, answer.timestamp.timestamp()
    if not loads:
        raise AnswerError("it names no scheduler")
    ages = [now_s - (load.timestamp or 0.0) for load in loads]
    return ServerLoad(
        num_running=sum(load.num_running_reqs for load in loads),
        num_waiting=sum(load.num_waiting_reqs for load in loads),
        age_s=max(0.0, *ages),
    )


def checksums_of(blob: bytes) -> dict[str, str]:
    """Decode ``/weights_checker``: checksum by parameter; with several ranks by ``RANK:PARAMETER``."""
    ranks = msgspec.json.decode(blob, type=_ChecksumsAnswer).ranks
    if len(ranks) == 1:
        return ranks[0].checksums
    return {
        f"{rank}:{name}": sum_ for rank, item in enumerate(ranks) for name, sum_ in item.checksums.items()
    }


def generated_of(
    answer: GenerateAnswer, *, num_prompt_tokens: int, max_tokens: int, vocab_size: int
) -> Generated:
    """Return a finished answer as a checked completion.

    Without version spans, all tokens get the one label that the server named: the caller must know that its
    weights did not change meanwhile.

    Raises:
        AnswerError: counts, ids, log-probs or spans contradict each other or are no such things.
    """
    meta, ids = answer.meta_info, answer.output_ids
    if meta is None or ids is None:
        raise AnswerError("output_ids or meta_info is missing")
    if meta.finish_reason is None:
        raise AnswerError("it ended without finish_reason")
    finish = meta.finish_reason.type
    if finish == "stop" and (not ids or meta.finish_reason.matched != ids[-1]):
        # The one such case in practice: a NaN or an id beyond the vocabulary was sampled and painted over.
        raise AnswerError(f"generation ended on {meta.finish_reason.matched!r}, which is not the last token")
    if (not ids and finish != "abort") or len(ids) > max_tokens:
        raise AnswerError(f"it has {len(ids)} tokens, 1 to {max_tokens} were asked for")
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        raise AnswerError(f"a token id is outside 0..{vocab_size - 1}")
    if meta.prompt_tokens not in (None, num_prompt_tokens):
        raise AnswerError(f"it counts {meta.prompt_tokens} prompt tokens, {num_prompt_tokens} were sent")
    if meta.completion_tokens not in (None, len(ids)):
        raise AnswerError(f"it counts {meta.completion_tokens} tokens and has {len(ids)}")
    return Generated(
        token_ids=ids,
        logprobs=_checked_logprobs(meta.output_token_logprobs or [], ids),
        spans=_checked_spans(meta, len(ids)),
        finish=finish,
        num_prompt_tokens=num_prompt_tokens,
        num_cached_tokens=meta.cached_tokens,
        num_retractions=meta.num_retractions,
    )


def prompt_logprobs_of(
    answer: GenerateAnswer, row: Sequence[int], start: int, vocab_size: int
) -> tuple[list[float], str]:
    """Return the log-probs of ``row[start + 1:]``, and the label of the weights that they are of.

    Args:
        answer: to a request with ``logprob_start_len`` = ``start``.
        row: its prompt.
        start: >= 0; the token there has nothing that it could follow from, and no log-prob.
        vocab_size: of the model.

    Raises:
        AnswerError: too few, or of other tokens, or no such things.
    """
    meta = answer.meta_info
    if meta is None or meta.finish_reason is None:
        raise AnswerError("it ended without meta_info or finish_reason")
    if meta.finish_reason.type == "abort":
        raise AnswerError(f"it was aborted: {meta.finish_reason.message}")
    if meta.prompt_tokens not in (None, len(row)):
        raise AnswerError(f"it counts {meta.prompt_tokens} prompt tokens, {len(row)} were sent")
    triples, ids = (meta.input_token_logprobs or [])[1:], list(row[start + 1 :])
    if len(triples) == len(ids):  # the server calls the last id of a vocabulary 0, as it does padding
        shown = [
            0 if (token, asked) == (0, vocab_size - 1) else asked
            for (_, token, _), asked in zip(triples, ids, strict=True)
        ]
        return _checked_logprobs(triples, shown), meta.weight_version or ""
    raise AnswerError(f"it has {len(triples)} log-probs of the prompt for {len(ids)} tokens")


def _checked_logprobs(triples: Sequence[tuple[float | None, int, Any]], ids: list[int]) -> list[float]:
    if len(triples) != len(ids):
        raise AnswerError(f"it has {len(triples)} log-probs for {len(ids)} tokens")
    logprobs = []
    for place, ((logprob, token, _), sampled) in enumerate(zip(triples, ids, strict=True)):
        if token != sampled:
            raise AnswerError(f"the log-prob of token {place} is of id {token}, the token is {sampled}")
        if logprob is None or not math.isfinite(logprob):
            raise AnswerError(f"the log-prob of token {place} is not a finite number")
        if logprob > MAX_LOGPROB:
            raise AnswerError(f"the log-prob of token {place} is {logprob:g}, above 0")
        logprobs.append(min(logprob, 0.0))
    return logprobs


def _checked_spans(meta: _Meta, num_tokens: int) -> tuple[LabelSpan, ...]:
    if num_tokens == 0:
        return ()
    if meta.weight_versions is None:
        if meta.weight_version is None:
            raise AnswerError("it does not say which weights made its tokens")
        return (LabelSpan(meta.weight_version, num_tokens),)
    end = 0
    for span in meta.weight_versions:
        if span.start != end or span.end <= span.start:
            raise AnswerError(f"the version spans do not join at token {end}")
        end = span.end
    if end != num_tokens:
        raise AnswerError(f"the version spans cover {end} of {num_tokens} tokens")
    return joined_spans([LabelSpan(span.version, span.end - span.start) for span in meta.weight_versions])
