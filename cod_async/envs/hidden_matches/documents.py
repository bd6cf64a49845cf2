"""The bootstrap documents of hidden matches: as those of hidden_buttons, in the words of a theme.

They teach the format of tries and hints, the world's answers, faithful note-taking, and reading a fact in
plain text (``map red=Hall ; at Hall : red``, the same frame as in hidden_buttons). They teach **no use of a
hint, and no use of earlier feedback, when acting**: every item tried is uniformly random. A model that is to
be evaluated on a theme without being trained on it must know the theme's words: these documents are all it
gets of it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

from cod_async.envs.base import TaskSpec
from cod_async.envs.hidden_matches.env import SPEC, HiddenMatches, try_text
from cod_async.envs.hidden_matches.worlds import Options, all_words, mapping_of, pack_seed_for
from cod_async.envs.note_documents import (
    frame_words,
    lifecycle_documents,
    mixed_documents,
    reading_document,
)
from cod_async.lifecycle.documents import Document

QA_FRAC = 0.25
"""Share of fact-reading documents."""


def vocabulary(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return every word that texts of these options can contain, in a fixed order.

    Raises:
        EnvironmentInputError: wrong options.
    """
    return tuple(dict.fromkeys([*frame_words(), *all_words(Options.of(options))]))


def bootstrap_documents(
    options: Mapping[str, Any], seed: int, num: int, *, pack_size: int = 4, qa_frac: float = QA_FRAC
) -> list[Document]:
    """Make ``num`` documents; equal arguments give equal documents.

    Args:
        options: merged options of a preset.
        seed: what is drawn depends on it (and the theme) alone.
        num: how many; they are shuffled, and whole lifecycles stand behind the episodes among them.
        pack_size: tasks per lifecycle, so that hints of all lengths occur as in a rollout.
        qa_frac: share of fact-reading documents in [0, 1].

    Raises:
        EnvironmentInputError: wrong options.
    """
    made = Options.of(options)
    rng = random.Random(f"hidden_matches {made.theme} documents {seed}")
    environment = HiddenMatches(options)

    def train_seed() -> int:
        return pack_seed_for(options, "train", rng.getrandbits(63))

    return mixed_documents(
        num,
        qa_frac,
        rng,
        lambda: reading_document(mapping_of(made, train_seed()), rng),
        lambda: lifecycle_documents(
            environment, _tasks(train_seed(), pack_size, rng), lambda: _try(environment, rng), rng
        ),
    )


def _tasks(pack_seed: int, pack_size: int, rng: random.Random) -> Iterator[TaskSpec]:
    """Draw the tasks of one pack."""
    for position in range(pack_size):
        yield TaskSpec(
            environment=SPEC.name,
            preset="",
            options={},
            record={"seed": rng.getrandbits(53)},
            pack_seed=pack_seed,
            position=position,
            pack_size=pack_size,
        )


def _try(environment: HiddenMatches, rng: random.Random) -> str:
    """Try any item, whatever is known."""
    return try_text(environment.task_view()["goal"], rng.choice(environment.items))


def skills(options: Mapping[str, Any]) -> tuple[tuple[str, bool, str], ...]:
    """Return what the documents teach and what they do not: (skill, whether it is taught, how)."""
    is_retried = Options.of(options).num_tries > 1
    world_model = "the words of the environment's answers between tries carry loss"
    random_note = "every item in the documents is uniformly random"
    return (
        ("output format", True, "restate the place, a colon, an item"),
        ("faithful note-taking", True, "new hint = old hint plus the facts just seen, never empty"),
        ("world model", is_retried, world_model),
        ("looking up a fact", True, "in plain text that is not an episode, after a colon"),
        ("using a hint when acting", False, random_note),
        ("using earlier feedback when acting", False, random_note),
        ("held-out worlds", False, "documents come from training worlds only"),
    )
