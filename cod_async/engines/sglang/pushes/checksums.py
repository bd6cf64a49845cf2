"""What a server's checksums must be after an update, worked out from the published tensors.

SGLang's ``/weights_checker`` hashes every parameter as it lies in memory: query, key and value projections
stacked into one, gate and up projections too, embedding and head padded with zero rows to a multiple of 64, a
tied head left out, all in the server's dtype. On a CPU the hash is the first 8 bytes of SHA-256; on a GPU it
is a sum of mixed 32-bit words. A server says neither its dtype nor its device here, so every combination is
a candidate until one of them has matched the smallest parameter.

Known for the dense Qwen2, Qwen3 and Llama models on one rank. Any other server is named in the log as not
checked, once. Quantized weights, and weights that SGLang repacks for AMX on a CPU, have other bytes: switch
``weights.is_checked`` off there.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from cod_async.errors import WeightsError
from cod_async.weights.digest import tensor_bytes
from cod_async.weights.source import PublishedWeights

if TYPE_CHECKING:
    from cod_async.engines.sglang.client import ServerClient

log = logging.getLogger(__name__)

ARCHITECTURES = frozenset({"Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM"})
VOCAB_ROWS = 64
"""Embedding and head are padded to a multiple of this many rows."""

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_STACKED = re.compile(r"^(?P<where>.+\.)(?P<part>q_proj|k_proj|v_proj|gate_proj|up_proj)\.(?P<kind>\w+)$")
_STACKS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_PART_OF = {part: stack for stack, parts in _STACKS.items() for part in parts}
_OF_RANK = re.compile(r"^\d+:")
_DRAFT = "draft"
"""Parameters of a draft model; it proposes tokens and has no say in them."""
_MAX_NOTED = 1000

# Constants of the GPU hash.
_TILE_WORDS = 8192
_CHUNK_WORDS = 32 * _TILE_WORDS
_MIX_1, _MIX_2 = 0x85EBCA6B, 0xC2B2AE35
_PLACE_1, _PLACE_2 = 0x27D4EB2D, 0x165667B1
_SEED_1 = 0x243F6A88
_SEED_2 = ((_SEED_1 * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF
_MASK_32, _MASK_64 = (1 << 32) - 1, (1 << 64) - 1


@dataclass(frozen=True)
class Form:
    """How a server holds and hashes its parameters."""

    dtype: torch.dtype
    hashing: Literal["sha256", "words"]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a server: published tensors stacked along their rows, then zero rows."""

    parts: tuple[torch.Tensor, ...]
    num_padding_rows: int = 0

    @property
    def numel(self) -> int:
        """Number of elements, padding included."""
        row = self.parts[0].shape[1:].numel()
        return sum(part.numel() for part in self.parts) + self.num_padding_rows * row

    def blocks(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Yield the parameter piece by piece, converted."""
        for part in self.parts:
            yield part.to(dtype)
        if self.num_padding_rows:
            yield torch.zeros(self.num_padding_rows, *self.parts[0].shape[1:], dtype=dtype)


def stacked_parameters(
    tensors: Mapping[str, torch.Tensor], *, architecture: str, is_tied: bool
) -> dict[str, Parameter] | None:
    """Return a server's parameters by its names, or None if the architecture is not known here.

    Args:
        tensors: published tensors by Hugging Face name.
        architecture: as ``config.json`` names it.
        is_tied: whether the head is the embedding.
    """
    if architecture not in ARCHITECTURES:
        return None
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name == _HEAD and is_tied:
            continue
        if match := _STACKED.match(name):
            part = match["part"]
            groups.setdefault(f"{match['where']}{_PART_OF[part]}.{match['kind']}", {})[part] = tensor
        else:
            groups[name] = {"": tensor}
    parameters = {}
    for name, parts in groups.items():
        order = _STACKS.get(name.split(".")[-2], ("",)) if "" not in parts else ("",)
        if set(order) != set(parts):
            return None
        num_rows = parts[order[0]].shape[0]
        padding = -num_rows % VOCAB_ROWS if name in (_HEAD, _EMBEDDING) else 0
        parameters[name] = Parameter(tuple(parts[part] for part in order), padding)
    return parameters


def checksum(parameter: Parameter, form: Form) -> str:
    """Return what a server of that form reports for a parameter: 16 hex digits."""
    if form.hashing == "words":
        return f"{_hash_words(parameter, form.dtype):016x}"
    digest = hashlib.sha256()
    for block in parameter.blocks(form.dtype):
        digest.update(tensor_bytes(block))
    return digest.hexdigest()[:16]


def expected_checksums(
    tensors: Mapping[str, torch.Tensor], tp: int, *, architecture: str, is_tied: bool, form: Form
) -> dict[str, str] | None:
    """Return the checksums of a server that holds these tensors, by its parameter names.

    Returns:
        None for more than one rank (``tp``) and for unknown architectures: nothing can be said.
    """
    if tp != 1:
        return None
    parameters = stacked_parameters(tensors, architecture=architecture, is_tied=is_tied)
    if parameters is None:
        return None
    return {name: checksum(parameter, form) for name, parameter in parameters.items()}


class Checker:
    """Compares one server with one version; made before the server is paused, so that it is quick then.

    Raises (from :meth:`prepare`):
        EngineError: the server does not answer.
    """

    def __init__(self, client: ServerClient, source: PublishedWeights) -> None:
        self._client, self._source = client, source
        self._parameters: dict[str, Parameter] | None = None
        self._known: dict[tuple[str, Form], str] = {}

    @classmethod
    async def prepare(cls, client: ServerClient, source: PublishedWeights) -> Checker:
        """Ask the server how it is split, and work out ahead what its checksums must be."""
        checker = cls(client, source)
        info = await client.info()
        if info.tensor_parallel_size != 1:
            _note_once(client.url, f"it has {info.tensor_parallel_size} ranks, only one can be checked")
            return checker
        parameters = stacked_parameters(
            source.tensors(), architecture=source.architecture, is_tied=source.is_tied
        )
        if parameters is None:
            _note_once(client.url, f"the layout of {source.architecture or 'this model'} is not known")
            return checker
        # Smallest first: they tell the form at the least cost.
        checker._parameters = dict(sorted(parameters.items(), key=lambda item: item[1].numel))
        if (form := _FORMS.get(client.url)) is not None:
            await asyncio.to_thread(checker._work_out, form)
        return checker

    async def check(self) -> bool:
        """Compare.

        Returns:
            Whether anything was compared; False was explained in the log.

        Raises:
            WeightsError: a parameter differs (the smallest such one is named), or only one side has it.
            EngineError: the server does not answer.
        """
        if self._parameters is None:
            return False
        found = await self._client.checksums()
        if any(_OF_RANK.match(name) for name in found):
            _note_once(self._client.url, "it has several ranks, only one can be checked")
            return False
        found = {name: sum_ for name, sum_ in found.items() if not name.startswith(_DRAFT)}
        if other := sorted(found.keys() ^ self._parameters.keys()):
            whose = "the server" if other[0] in found else self._source.label
            raise WeightsError(
                f"{self._client.url}: only {whose} has a parameter {other[0]}; the published tensors are not "
                "those of the served model (or it is quantized, then switch weights.is_checked off)"
            )
        await asyncio.to_thread(self._compare, self._parameters, found)
        return True

    def _work_out(self, form: Form) -> None:
        for name, parameter in (self._parameters or {}).items():
            self._known[name, form] = checksum(parameter, form)

    def _expected(self, name: str, parameter: Parameter, form: Form) -> str:
        if (name, form) not in self._known:
            self._known[name, form] = checksum(parameter, form)
        return self._known[name, form]

    def _compare(self, parameters: dict[str, Parameter], found: Mapping[str, str]) -> None:
        url = self._client.url
        forms = _candidates(next(iter(parameters.values())).parts[0].dtype, _FORMS.get(url))
        for name, parameter in parameters.items():
            matching = [form for form in forms if self._expected(name, parameter, form) == found[name]]
            if not matching:
                raise WeightsError(
                    f"{url}: parameter {name} has checksum {found[name]}, in {self._source.label} it has "
                    f"{self._expected(name, parameter, forms[0])}; the server has other weights than it "
                    "should, or quantizes or repacks them (weights.is_checked is for servers that do not)"
                )
            forms = matching
        if len(_FORMS) >= _MAX_NOTED:
            _FORMS.clear()
        _FORMS[url] = forms[0]


async def verify(client: ServerClient, source: PublishedWeights) -> None:
    """Compare a server's checksums with a published version.

    Servers that cannot be checked are named in the log, once.

    Raises:
        WeightsError: a parameter differs; it is named.
        EngineError: the server does not answer.
    """
    checker = await Checker.prepare(client, source)
    await checker.check()


# Forms that matched, by url: only a hint of what to work out ahead and to try first.
_FORMS: dict[str, Form] = {}
_NOTED: set[str] = set()


def _candidates(published: torch.dtype, hint: Form | None) -> list[Form]:
    dtypes = dict.fromkeys((published, torch.bfloat16, torch.float32, torch.float16))
    forms = [Form(dtype, "sha256") for dtype in dtypes] + [Form(dtype, "words") for dtype in dtypes]
    return forms if hint is None else [hint, *(form for form in forms if form != hint)]


def _note_once(url: str, why: str) -> None:
    text = f"{url}: weights are not checked after updates: {why}"
    if text not in _NOTED:
        if len(_NOTED) >= _MAX_NOTED:
            _NOTED.clear()
        _NOTED.add(text)
        log.warning(text)


def _hash_words(parameter: Parameter, dtype: torch.dtype) -> int:
    """The hash that SGLang computes on a GPU, modulo 2^64 and 2^32 as there.

    Every 32-bit word is mixed twice with its place; the words of a tile of 8192 are added up and mixed
    again into two halves of a 64-bit number; the tiles' numbers are added up and mixed once more.
    """
    total, start = 0, 0
    for words in _words(parameter, dtype):
        place = torch.arange(start, start + words.numel(), dtype=torch.int64)
        start += words.numel()
        halves = []
        for factor, seed, turn in ((_PLACE_1, _SEED_1, 15), (_PLACE_2, _SEED_2, 13)):
            turned = ((place << turn) | (place >> (32 - turn))) & _MASK_32
            mixed = _mix(words ^ ((place * factor + seed) & _MASK_32) ^ turned)
            num_tiles = -(-mixed.numel() // _TILE_WORDS)
            tiles = torch.nn.functional.pad(mixed, (0, num_tiles * _TILE_WORDS - mixed.numel()))
            halves.append(tiles.view(num_tiles, _TILE_WORDS).sum(dim=1) & _MASK_32)
        parameter_bytes = (_num_words(parameter, dtype) * 4) & _MASK_32
        first, second = (_mix(half ^ parameter_bytes).tolist() for half in halves)
        total += sum((high << 32) | low for high, low in zip(first, second, strict=True))
    total &= _MASK_64
    total ^= total >> 30
    total = (total * 0xBF58476D1CE4E5B9) & _MASK_64
    total ^= total >> 27
    total = (total * 0x94D049BB133111EB) & _MASK_64
    return total ^ (total >> 31)


def _num_words(parameter: Parameter, dtype: torch.dtype) -> int:
    return -(-parameter.numel * dtype.itemsize // 4)


def _mix(words: torch.Tensor) -> torch.Tensor:
    """Mix 32-bit words, held as int64 in 0 .. 2^32-1."""
    words = words ^ (words >> 16)
    words = _times(words, _MIX_1)
    words = words ^ (words >> 13)
    words = _times(words, _MIX_2)
    return words ^ (words >> 16)


def _times(words: torch.Tensor, factor: int) -> torch.Tensor:
    """Multiply modulo 2^32: int64 wraps modulo 2^64, whose low half is right."""
    return (words * factor) & _MASK_32


def _words(parameter: Parameter, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yield the parameter's bytes as 32-bit words (int64), whole tiles at a time, the end padded by zeros."""
    held = torch.empty(0, dtype=torch.uint8)
    for block in parameter.blocks(dtype):
        flat = block.contiguous().reshape(-1).view(torch.uint8)
        offset = 0
        while offset < flat.numel():
            taken = flat[offset : offset + _CHUNK_WORDS * 4 - held.numel()]
            offset += taken.numel()
            held = torch.cat([held, taken])
            if held.numel() == _CHUNK_WORDS * 4:
                yield held.view(torch.int32).to(torch.int64) & _MASK_32
                held = held[:0]
    if held.numel():
        held = torch.nn.functional.pad(held, (0, -held.numel() % 4))
        yield held.view(torch.int32).to(torch.int64) & _MASK_32
