"""The bootstrap documents of hidden buttons: format, note-taking, and reading a fact outside the game.

A tiny model that starts from nothing must first speak the language of the rollout. These documents teach

* the format: restate the goal, a colon, a button; the button is *uniformly random*, whatever the hint or the
  feedback says;
* the world's answers: feedback words carry loss, so the model learns which facts can follow a press;
* faithful note-taking: the new hint is the old one followed by the facts just seen, each once, never empty;
* reading (a quarter of the documents): ``map 3=Left 1=Up ; at Up : 1``, a plain text and not an episode.

They teach **no use of a hint, and no use of earlier feedback, when acting**: reward by position is flat after
them, and reinforcement learning has to connect reading to acting. What they leak is said plainly: *what* to
write is taught, not discovered, and the colon before the answer is the same cue in reading and in acting.
Door worlds have one fact to know, so their documents go without the reading part. Only training worlds occur.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

from cod_async.envs.base import TaskSpec
from cod_async.envs.hidden_buttons.env import SPEC, HiddenButtons, press_text
from cod_async.envs.hidden_buttons.worlds import (
    DIRECTIONS,
    Options,
    mapping_of,
    pack_seed_for,
    world_of,
)
from cod_async.envs.note_documents import (
    frame_words,
    lifecycle_documents,
    mixed_documents,
    reading_document,
    solve_document,
)
from cod_async.lifecycle.documents import Document

QA_FRAC = 0.25
"""Share of fact-reading documents in permutation worlds."""


def vocabulary(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return every word that texts of these options can contain, in a fixed order.

    Raises:
        EnvironmentInputError: wrong options.
    """
    made = Options.of(options)
    buttons = [str(button) for button in range(1, made.num_buttons + 1)]
    facts = [f"{button}={direction}" for button in buttons for direction in made.directions]
    return tuple(dict.fromkeys([*frame_words(), *buttons, *made.directions, *facts]))


def bootstrap_documents(
    options: Mapping[str, Any], seed: int, num: int, *, pack_size: int = 4, qa_frac: float | None = None
) -> list[Document]:
    """Make ``num`` documents; equal arguments give equal documents.

    Args:
        options: merged options of a preset.
        seed: what is drawn depends on it alone.
        num: how many; they are shuffled, and whole lifecycles stand behind the episodes among them.
        pack_size: tasks per lifecycle, so that hints of all lengths occur as in a rollout.
        qa_frac: share of fact-reading documents in [0, 1]; None: :data:`QA_FRAC`, none in door worlds.

    Raises:
        EnvironmentInputError: wrong options.
    """
    made = Options.of(options)
    if qa_frac is None:
        qa_frac = 0.0 if made.world == "door" else QA_FRAC
    rng = random.Random(f"hidden_buttons documents {seed}")
    environment = HiddenButtons(options)
    return mixed_documents(
        num,
        qa_frac,
        rng,
        lambda: _reading(options, made, rng),
        lambda: _lifecycle(environment, options, pack_size, rng),
    )


def _lifecycle(
    environment: HiddenButtons, options: Mapping[str, Any], pack_size: int, rng: random.Random
) -> list[Document]:
    """Play one training lifecycle with random presses and faithful notes, as documents."""
    pack_seed = pack_seed_for(options, "train", rng.getrandbits(63))

    def tasks() -> Iterator[TaskSpec]:
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

    return lifecycle_documents(environment, tasks(), lambda: _press(environment, rng), rng)


def _solve(
    environment: HiddenButtons, task: TaskSpec, hint: str, rng: random.Random
) -> tuple[Document, list[str], float]:
    """Play one solve episode with random presses; return it, the facts it revealed, and its reward."""
    return solve_document(environment, task, hint, lambda: _press(environment, rng))


def _press(environment: HiddenButtons, rng: random.Random) -> str:
    """Press any button, whatever is known."""
    return press_text(environment.task_view()["goal"], rng.randint(1, environment.num_buttons))


def _reading(options: Mapping[str, Any], made: Options, rng: random.Random) -> Document:
    """Ask for one of some facts of a training world, in plain text."""
    mapping = mapping_of(made, world_of(made, pack_seed_for(options, "train", rng.getrandbits(63))))
    facts = {str(index + 1): name for index, name in enumerate(mapping) if name in DIRECTIONS}
    return reading_document(facts, rng)


def skills(options: Mapping[str, Any]) -> tuple[tuple[str, bool, str], ...]:
    """Return what the documents teach and what they do not: (skill, whether it is taught, how)."""
    made = Options.of(options)
    is_door = made.world == "door"
    reading = (
        "no such documents in door worlds"
        if is_door
        else "in plain text that is not an episode, after a colon"
    )
    return (
        ("output format", True, "restate the goal, a colon, a button"),
        ("faithful note-taking", True, "new hint = old hint plus the facts just seen, never empty"),
        (
            "world model",
            made.num_tries > 1,
            "the words of the environment's answers between presses carry loss",
        ),
        ("looking up a fact", not is_door, reading),
        ("using a hint when acting", False, "every button in the documents is uniformly random"),
        ("using earlier feedback when acting", False, "every button in the documents is uniformly random"),
        ("held-out worlds", False, "documents come from training worlds only"),
    )
