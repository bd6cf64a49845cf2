"""Bootstrap documents: supervised text in the very token format of the rollout, with a loss flag per piece.

A document is a list of pieces that mirror what a rollout does (open an episode, sample a response, append the
next turn), and it is encoded by the same renderer with the same calls. The formats of bootstrap and rollout
can therefore not drift apart. Documents carry a category, so that a loss can be watched, and gated on, by
what it teaches.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from cod_async.lifecycle.rendering import Renderer

Category = Literal["solve", "hint", "qa"]


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a document.

    Attributes:
        kind: ``open``: an episode's first prompt, from ``system`` and ``text``; ``response``: what the policy
            would sample, closed by the end-of-turn token; ``turn``: the next user message, after a stopped
            response; ``start``: the beginning of a plain document; ``text``: more plain text, without any
            control token.
        text: the text; user message for ``open`` and ``turn``.
        system: system message, for ``open``.
        has_loss: whether the piece is learned. Of ``open``, ``turn`` and ``start`` only the words are, not
            the control tokens of the template; of ``response`` the end-of-turn token too.
    """

    kind: Literal["open", "response", "turn", "start", "text"]
    text: str
    system: str = ""
    has_loss: bool = False


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """One training text of a category (``solve``, ``hint`` or ``qa``: fact reading)."""

    category: Category
    pieces: tuple[Piece, ...]

    def encode(self, renderer: Renderer) -> tuple[list[int], list[bool]]:
        """Return token ids [T] and the loss mask [T].

        ``mask[t]`` says that token t is a target, predicted from the tokens before it; token 0 never is.
        """
        ids: list[int] = []
        mask: list[bool] = []
        for piece in self.pieces:
            new = _encode(piece, renderer)
            is_response = piece.kind == "response"
            special = renderer.tokenizer.special_ids
            mask += [piece.has_loss and (is_response or i not in special) for i in new]
            ids += new
        if mask:
            mask[0] = False
        return ids, mask


def _encode(piece: Piece, renderer: Renderer) -> list[int]:
    """Encode one piece by the renderer call that the rollout would make."""
    if piece.kind == "open":
        return renderer.open(piece.system, piece.text)
    if piece.kind == "turn":
        return renderer.next_turn(piece.text, is_stopped=True)
    ids = renderer.tokenizer.encode(piece.text)
    if piece.kind == "response":
        return [*ids, renderer.end_of_turn_id]
    return [*renderer.begin_ids, *ids] if piece.kind == "start" else ids
