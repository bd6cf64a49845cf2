"""What is exchanged with an SGLang server, in this project's own terms: completions, information, labels.

Policy versions travel as labels, ``L<lineage>-S<step>``. How the server's answers become these structs, and
what is checked on the way, is in :mod:`.answers`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import msgspec

from cod_async.lifecycle.segment import Version

_LABEL = re.compile(r"^L(\d{1,9})-S(\d{1,12})$")
_RELEASE = re.compile(r"^v?(\d{1,4})\.(\d{1,4})\.(\d{1,4})")

OLDEST_RELEASE = (0, 5, 17)
VERSION_SPANS_RELEASE = (0, 5, 19)

PauseMode = Literal["abort", "retract", "in_place"]


def version_label(version: Version) -> str:
    """Return what a server is told its weights are called."""
    return f"L{version.lineage}-S{version.step}"


def parse_version_label(label: str) -> Version | None:
    """Return the version that a label names; None for any other text, such as ``default``."""
    match = _LABEL.match(label)
    return Version(int(match[1]), int(match[2])) if match else None


def parse_release(text: str) -> tuple[int, int, int] | None:
    """Return the first three numbers of a release such as ``0.5.23`` or ``0.5.24.dev1``; None without."""
    match = _RELEASE.match(text)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


class LabelSpan(msgspec.Struct, frozen=True):
    """``num_tokens`` consecutive generated tokens under the weights called ``label``."""

    label: str
    num_tokens: int


def joined_spans(spans: Sequence[LabelSpan]) -> tuple[LabelSpan, ...]:
    """Return spans with equal neighbors made one."""
    joined: list[LabelSpan] = []
    for span in spans:
        if joined and joined[-1].label == span.label:
            joined[-1] = LabelSpan(span.label, joined[-1].num_tokens + span.num_tokens)
        else:
            joined.append(span)
    return tuple(joined)


class Generated(msgspec.Struct, frozen=True, kw_only=True):
    """One checked completion as a server reported it.

    Attributes:
        token_ids: N >= 1 sampled ids, the stop token included; N = 0 only with ``abort``.
        logprobs: N floats <= 0, after temperature, before top-p.
        spans: labels of the N tokens, run-length coded.
        finish: why it ended; ``abort``: the server gave the request up, what came so far is here.
        num_prompt_tokens: tokens of the prompt.
        num_cached_tokens: of these, how many the server did not compute again.
        num_retractions: times the request lost its KV cache and was computed again.
    """

    token_ids: list[int]
    logprobs: list[float]
    spans: tuple[LabelSpan, ...]
    finish: Literal["stop", "length", "abort"]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_retractions: int


class ServerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a server says of itself.

    Attributes:
        release: SGLang's version, for example ``0.5.23``.
        model_path, architecture: what it serves.
        label: what its weights are called now.
        max_request_tokens: longest prompt and completion together, if all but one token may be prompt.
        max_cached_tokens: tokens its KV cache holds.
        tensor_parallel_size: ranks of the model.
        has_prefix_cache: whether finished prefixes are kept.
    """

    release: str
    model_path: str
    architecture: str
    label: str
    max_request_tokens: int
    max_cached_tokens: int
    tensor_parallel_size: int
    has_prefix_cache: bool


class ServerLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What a server is doing.

    Attributes:
        num_running: requests being decoded.
        num_waiting: requests queued or retracted.
        age_s: age of these counts; a paused server does not renew them.
    """

    num_running: int
    num_waiting: int
    age_s: float = 0.0


class TensorSpec(msgspec.Struct, frozen=True):
    """One tensor of a group update: Hugging Face name, dtype such as ``bfloat16``, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
