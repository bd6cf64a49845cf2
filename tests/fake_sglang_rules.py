"""What the fake SGLang server samples, what can go wrong with it, and what it knows of a request."""

from __future__ import annotations

import asyncio
import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EOS = 256
SAMPLING_FIELDS = frozenset(
    (
        "max_new_tokens", "stop", "stop_token_ids", "temperature", "top_p", "top_k", "min_p",
        "frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens", "n", "ignore_eos",
        "skip_special_tokens", "stream_interval", "logit_bias", "sampling_seed",
    )
)  # fmt: skip
ADMIN_PATHS = frozenset(
    (
        "/flush_cache", "/update_weights_from_disk", "/init_weights_update_group",
        "/destroy_weights_update_group", "/update_weights_from_tensor", "/begin_weight_update",
        "/end_weight_update", "/update_weights_from_distributed", "/update_weight_version",
        "/weights_checker", "/abort_request", "/pause_generation", "/continue_generation",
    )
)  # fmt: skip
# Pausing and going on are told to the scheduler without waiting for it.
SCHEDULER_PATHS = (ADMIN_PATHS - {"/abort_request", "/pause_generation", "/continue_generation"}) | {
    "/generate",
    "/server_info",
}

NextToken = Callable[[Sequence[int], str, int], int]


def next_token(context: Sequence[int], weights: str, vocab_size: int) -> int:
    """The rule: a hash of the last eight ids, the length and the weights; never :data:`EOS`."""
    text = f"{weights}|{len(context)}|{list(context[-8:])}"
    token = zlib.crc32(text.encode()) % vocab_size
    return token if token != EOS else 0


def logprob_of(token: int, weights: str) -> float:
    """The log-prob that belongs to a token: between -5 and -0.01."""
    return -0.01 - (zlib.crc32(f"{token}|{weights}".encode()) % 4990) / 1000


PromptScores = Callable[[Sequence[int]], Sequence[float]]
"""Log-prob of each token of a row but the first, given those before it."""


def expected_tokens(
    prompt: Sequence[int], num_tokens: int, weights: str = "default", *, vocab_size: int = 320
) -> list[int]:
    """What a server with one set of weights answers."""
    context = list(prompt)
    for _ in range(num_tokens):
        context.append(next_token(context, weights, vocab_size))
    return context[len(prompt) :]


def digest_of_folder(folder: Path) -> str:
    """Identity of the weights in a directory: a digest of its safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"Cannot find any model weights with `{folder}`")
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def checksums_of_folder(folder: Path) -> dict[str, str]:
    """One checksum per tensor of a directory, over its bytes (the real server fuses some tensors first)."""
    sums = {}
    for path in sorted(folder.glob("*.safetensors")):
        blob = path.read_bytes()
        start = 8 + int.from_bytes(blob[:8], "little")
        for name, entry in json.loads(blob[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                sums[name] = hashlib.sha256(blob[start + begin : start + end]).hexdigest()[:16]
    return sums


@dataclass
class Faults:
    """What goes wrong; every field may be changed while the server runs.

    Attributes:
        statuses: path -> statuses of its next answers.
        drops: path -> so many of its next requests are closed on without a byte.
        hung_paths: paths that never answer.
        is_hung: nothing answers, connections open.
        is_wedged: the scheduler is stuck: ``/model_info`` and ``/v1/loads`` answer (stale), the rest hangs.
        reset_after_tokens, stall_after_tokens: the answer to ``/generate`` breaks off or falls silent.
        is_half_answer: the connection ends in the middle of the last JSON.
        is_not_json: ``/generate`` answers with HTML and status 200.
        abort_status: requests end as aborted with this status.
        change: edits the body of a final answer to ``/generate``.
        is_flush_refused: updates that flush are applied and answered with 400.
        update_message: updates fail with this message and change nothing.
    """

    statuses: dict[str, list[int]] = field(default_factory=dict)
    drops: dict[str, int] = field(default_factory=dict)
    hung_paths: set[str] = field(default_factory=set)
    is_hung: bool = False
    is_wedged: bool = False
    reset_after_tokens: int | None = None
    stall_after_tokens: int | None = None
    is_half_answer: bool = False
    is_not_json: bool = False
    abort_status: int | None = None
    change: Callable[[dict[str, Any]], object] | None = None
    is_flush_refused: bool = False
    update_message: str = ""


@dataclass(eq=False)
class Request:
    """One completion in the making."""

    rid: str
    prompt: list[int]
    params: dict[str, Any]
    extra_key: str
    logprob_start: int = -1
    cached_tokens: int = 0
    output: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    switches: list[tuple[str, int]] = field(default_factory=list)
    num_retractions: int = 0
    is_running: bool = True
    is_aborting: bool = False
    finish: dict[str, Any] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def prompt_triples(self, scores: PromptScores, vocab_size: int) -> list[list[Any]]:
        """The log-probs of the prompt from ``logprob_start`` on, in the real server's shape: the first one is
        none, and the last id of the vocabulary is called 0, as padding is. Nothing without a start.
        """
        if self.logprob_start < 0:
            return []
        found = [None, *list(scores(self.prompt))[self.logprob_start :]]
        ids = self.prompt[self.logprob_start :]
        return [[lp, i if i < vocab_size - 1 else 0, None] for lp, i in zip(found, ids, strict=True)]
