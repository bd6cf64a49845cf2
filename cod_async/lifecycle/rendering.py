"""Messages to token ids, appended and never rendered anew.

A chat template applied to the whole history again may re-tokenise what the policy generated, or drop parts of
it, and then the ids that are trained on are not the ids that were sampled. A :class:`Renderer` therefore only
ever renders the opening of an episode (:meth:`Renderer.open`) and the delta between a sampled response and
the next one (:meth:`Renderer.next_turn`); the rollout concatenates. One renderer per template family; a
template that no family knows is refused by name. Text inside messages can never become a control token:
model-written hints that spell one are encoded as ordinary characters (byte-level vocabularies) or as the
unknown word (word vocabularies).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken, Tokenizer

from cod_async.errors import InputError


class TextTokenizer:
    """A Hugging Face ``tokenizer.json`` for message texts; only :meth:`token_id` reaches control tokens.

    Args:
        path: a model directory, or the ``tokenizer.json`` itself.

    Raises:
        InputError: the file is missing or is not a tokenizer; give a model directory with a
            ``tokenizer.json``.
    """

    def __init__(self, path: Path) -> None:
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise InputError(f"{file}: no such file; a model directory needs a tokenizer.json")
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for anything it cannot read
            raise InputError(f"{file}: not a readable tokenizer ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Control tokens spelled out in a text are split like any other text. Some vocabularies mark only some
        # of them as special (Qwen3's leaves out think and tool tags); here all of them are.
        added = self._tokenizer.get_added_tokens_decoder()
        self._tokenizer.add_special_tokens(
            [AddedToken(token.content, special=True, normalized=False) for token in added.values()]
        )
        self._tokenizer.encode_special_tokens = True
        self.special_ids: frozenset[int] = frozenset(added)
        # Where whole words are looked up in a vocabulary that contains them, they become unknown instead.
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        self._unknown_id: int | None = self._tokenizer.token_to_id(unknown) if unknown else None

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included (the embedding of a model may be larger)."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def tokens(self) -> dict[int, str]:
        """What each id stands for, added tokens included; equal in tokenizers whose ids mean the same."""
        return {number: token for token, number in self._tokenizer.get_vocab(with_added_tokens=True).items()}

    def encode(self, text: str) -> list[int]:
        """Encode a message text; the result contains no control token, whatever the text says."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._unknown_id is None or self.special_ids.isdisjoint(ids):
            return ids
        return [self._unknown_id if i in self.special_ids else i for i in ids]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode ids; control tokens stay visible as their names."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def token_id(self, token: str) -> int:
        """Return the id of one token by its exact name.

        Raises:
            InputError: the vocabulary has no such token.
        """
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise InputError(f"the tokenizer has no token {token!r}, which its template family needs")
        return int(found)

    def find_id(self, token: str) -> int | None:
        """Return the id of one token by its exact name, or None."""
        found = self._tokenizer.token_to_id(token)
        return None if found is None else int(found)


class Renderer(Protocol):
    """One template family.

    Attributes:
        family: its name.
        tokenizer: the text tokenizer underneath.
        stop_ids: generation ends after any of these.
        end_of_turn_id: the one stop id that closes a turn inside a conversation.
        begin_ids: ids before the first text of a plain document (no conversation).
    """

    family: str
    tokenizer: TextTokenizer
    stop_ids: frozenset[int]
    end_of_turn_id: int
    begin_ids: tuple[int, ...]

    def open(self, system: str, user: str) -> list[int]:
        """Render an episode's first prompt, up to where the policy's response begins."""
        ...

    def next_turn(self, user: str, is_stopped: bool) -> list[int]:
        """Render what follows a sampled response, up to where the next response begins.

        Args:
            user: the next user message.
            is_stopped: whether the response ended with ``end_of_turn_id``; if not (it was cut by length),
                that token is supplied here, as context.
        """
        ...

    def decode_response(self, token_ids: Sequence[int]) -> str:
        """Return the text of a sampled response, without its stop token."""
        ...


class _Family:
    """What the families share."""

    family: str

    def __init__(self, tokenizer: TextTokenizer, end_of_turn: str, other_stops: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.end_of_turn_id = tokenizer.token_id(end_of_turn)
        others = [tokenizer.find_id(token) for token in other_stops]
        self.stop_ids: frozenset[int] = frozenset(
            [self.end_of_turn_id, *(i for i in others if i is not None)]
        )
        self.begin_ids: tuple[int, ...] = ()

    def decode_response(self, token_ids: Sequence[int]) -> str:
        """Return the text of a sampled response, without its stop token."""
        ids = list(token_ids)
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        return self.tokenizer.decode(ids)


class TerseRenderer(_Family):
    """The tiny model's family: ``<bos> SYSTEM USER <asst> RESPONSE <eot> <user> USER <asst> ...``."""

    family = "terse"

    def __init__(self, tokenizer: TextTokenizer) -> None:
        super().__init__(tokenizer, "<eot>")
        self._bos = tokenizer.token_id("<bos>")
        self._user = tokenizer.token_id("<user>")
        self._assistant = tokenizer.token_id("<asst>")
        self.begin_ids = (self._bos,)

    def open(self, system: str, user: str) -> list[int]:
        """Render an episode's first prompt; the system text runs straight into the user's."""
        encode = self.tokenizer.encode
        return [self._bos, *encode(system), *encode(user), self._assistant]

    def next_turn(self, user: str, is_stopped: bool) -> list[int]:
        """Render what follows a sampled response."""
        closing = [] if is_stopped else [self.end_of_turn_id]
        return [*closing, self._user, *self.tokenizer.encode(user), self._assistant]


class ChatMLRenderer(_Family):
    """ChatML as Qwen3 uses it, thinking off: every generation prompt ends with an empty think block.

    Args:
        tokenizer: must know ``<|im_start|>`` and ``<|im_end|>``.
        has_empty_think: put the empty think block (templates with a thinking switch need it; plain ChatML
            does not).
    """

    family = "chatml"

    def __init__(self, tokenizer: TextTokenizer, has_empty_think: bool = True) -> None:
        super().__init__(tokenizer, "<|im_end|>", ("<|endoftext|>",))
        self._start = tokenizer.token_id("<|im_start|>")
        self._newline = tokenizer.encode("\n")
        think: list[int] = []
        if has_empty_think:
            gap = tokenizer.encode("\n\n")
            think = [tokenizer.token_id("<think>"), *gap, tokenizer.token_id("</think>"), *gap]
        self._generation = [self._start, *tokenizer.encode("assistant\n"), *think]

    def _message(self, role: str, text: str) -> list[int]:
        # Role and text are encoded together: the newline between them may merge with the text's own. Texts
        # are stripped because newer templates of the family trim them and older ones do not: stripped, both
        # agree.
        ids = self.tokenizer.encode(f"{role}\n{text.strip()}")
        return [self._start, *ids, self.end_of_turn_id, *self._newline]

    def open(self, system: str, user: str) -> list[int]:
        """Render an episode's first prompt."""
        return [*self._message("system", system), *self._message("user", user), *self._generation]

    def next_turn(self, user: str, is_stopped: bool) -> list[int]:
        """Render what follows a sampled response."""
        closing = [] if is_stopped else [self.end_of_turn_id]
        return [*closing, *self._newline, *self._message("user", user), *self._generation]


def _chat_template(model_dir: Path) -> str:
    """Read the chat template of a model directory as text, empty if there is none; it is not evaluated."""
    jinja = model_dir / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    file = model_dir / "tokenizer_config.json"
    if not file.is_file():
        return ""
    try:
        template = json.loads(file.read_text(encoding="utf-8")).get("chat_template", "")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{file}: not a JSON object ({error})") from error
    if isinstance(template, list):  # named templates; the one called default is used for chat
        named = {
            entry.get("name"): entry.get("template", "") for entry in template if isinstance(entry, dict)
        }
        template = named.get("default", "")
    return str(template)


def _family_of(template: str, model_dir: Path) -> str:
    """Tell the family from a chat template, or refuse."""
    if "<|im_start|>" in template:
        return "chatml"
    if "<asst>" in template and "<eot>" in template:
        return "terse"
    raise InputError(
        f"{model_dir}: no template family knows its chat template; families are terse and chatml "
        "(set model.renderer to one of them only if its format really is the same)"
    )


def load_renderer(model_dir: Path, family: str = "auto") -> Renderer:
    """Choose and build the renderer of a model directory.

    Args:
        model_dir: Hugging Face model directory with ``tokenizer.json``.
        family: ``terse``, ``chatml``, or ``auto`` to tell from the chat template.

    Raises:
        InputError: unknown family, a template no family knows, or a tokenizer without the family's control
            tokens.
    """
    tokenizer = TextTokenizer(model_dir)
    template = _chat_template(model_dir)
    if family == "auto":
        family = _family_of(template, model_dir)
    if family == "terse":
        return TerseRenderer(tokenizer)
    if family != "chatml":
        raise InputError(f"no renderer {family!r}; renderers are auto, terse, chatml")
    # Only what the template does when it opens the policy's turn matters: history is never rendered through
    # it.
    opening = template.rpartition("add_generation_prompt")[2]
    has_switch = "enable_thinking" in opening
    if "<think>" in opening and not has_switch:
        raise InputError(
            f"{model_dir}: its chat template opens every turn with thinking and has no switch to turn that "
            "off; use a model whose template has enable_thinking, or one that does not think"
        )
    return ChatMLRenderer(tokenizer, has_empty_think=has_switch)
