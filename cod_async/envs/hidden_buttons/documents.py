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
from collections.abc import Mapping
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
from cod_async.lifecycle.documents import Document, Piece
from cod_async.lifecycle.hint import prompts_for, terse_number

MAX_FACTS = 7
"""Most facts in a hint: the newest are kept."""

QA_FRAC = 0.25
"""Share of fact-reading documents in permutation worlds."""

# Share of updates after which the hint is lost, so that the placeholder of a failed update is no stranger.
_LOST_FRAC = 0.05


def vocabulary(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return every word that texts of these options can contain, in a fixed order.

    Raises:
        EnvironmentInputError: wrong options.
    """
    made, prompts = Options.of(options), prompts_for("terse")
    buttons = [str(button) for button in range(1, made.num_buttons + 1)]
    facts = [f"{button}={direction}" for button in buttons for direction in made.directions]
    texts = (
        prompts.initial,
        prompts.failed,
        prompts.start,
        prompts.end,
        prompts.cut_marker,
        prompts.overflow_feedback,
    )
    words = [word for text in texts for word in text.split()]
    rewards = [terse_number(tenths / 10) for tenths in range(11)]
    rest = ["Write", "Log", "Task", "goal", ";", ".", ":", "reward", "bad", "map", "at"]
    return tuple(dict.fromkeys([*words, *rest, *rewards, *buttons, *made.directions, *facts]))


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
    num_qa = round(num * qa_frac)
    documents = [_reading(options, made, rng) for _ in range(num_qa)]
    episodes: list[Document] = []
    environment = HiddenButtons(options)
    while len(episodes) < num - num_qa:
        episodes += _lifecycle(environment, options, pack_size, rng)
    rng.shuffle(episodes)
    documents += episodes[: num - num_qa]
    rng.shuffle(documents)
    return documents


def _lifecycle(
    environment: HiddenButtons, options: Mapping[str, Any], pack_size: int, rng: random.Random
) -> list[Document]:
    """Play one training lifecycle with random presses and faithful notes, as documents."""
    prompts = prompts_for(environment.prompt_style)
    pack_seed = pack_seed_for(options, "train", rng.getrandbits(63))
    hint, notes = prompts.initial, list[str]()
    documents: list[Document] = []
    for position in range(pack_size):
        task = TaskSpec(
            environment=SPEC.name,
            preset="",
            options={},
            record={"seed": rng.getrandbits(53)},
            pack_seed=pack_seed,
            position=position,
            pack_size=pack_size,
        )
        solve, facts, reward = _solve(environment, task, hint, rng)
        documents.append(solve)
        if position == pack_size - 1:
            break
        notes = [*notes, *(fact for fact in dict.fromkeys(facts) if fact not in notes)][-MAX_FACTS:]
        trajectory = environment.trajectory([]) or ""
        system, user = prompts.update_messages(hint, trajectory, reward, environment.feedback())
        written = f"{prompts.start} {' '.join(notes)} {prompts.end}"
        pieces = (
            Piece(kind="open", system=system, text=user),
            Piece(kind="response", text=written, has_loss=True),
        )
        documents.append(Document(category="hint", pieces=pieces))
        hint = prompts.parse(written) or prompts.failed
        if rng.random() < _LOST_FRAC:
            hint, notes = prompts.failed, []
    return documents


def _solve(
    environment: HiddenButtons, task: TaskSpec, hint: str, rng: random.Random
) -> tuple[Document, list[str], float]:
    """Play one solve episode with random presses; return it, the facts it revealed, and its reward."""
    prompts = prompts_for(environment.prompt_style)
    user = environment.reset(task)
    goal = environment.task_view()["goal"]
    pieces = [Piece(kind="open", system=prompts.solve_system(environment.system_prompt(), hint), text=user)]
    facts: list[str] = []
    while True:
        response = press_text(goal, rng.randint(1, environment.num_buttons))
        pieces.append(Piece(kind="response", text=response, has_loss=True))
        result = environment.press(response)
        facts.append(result.observation)
        if result.is_done:
            return Document(category="solve", pieces=tuple(pieces)), facts, result.raw_reward
        pieces.append(Piece(kind="turn", text=result.observation, has_loss=True))


def _reading(options: Mapping[str, Any], made: Options, rng: random.Random) -> Document:
    """Ask for one of some facts of a training world, in plain text."""
    mapping = mapping_of(made, world_of(made, pack_seed_for(options, "train", rng.getrandbits(63))))
    known = [index for index, direction in enumerate(mapping) if direction in DIRECTIONS]
    shown = rng.sample(known, rng.randint(1, min(len(known), MAX_FACTS)))
    asked = rng.choice(shown)
    facts = " ".join(f"{index + 1}={mapping[index]}" for index in shown)
    question = f"map {facts} ; at {mapping[asked]} :"
    pieces = (Piece(kind="start", text=question), Piece(kind="text", text=str(asked + 1), has_loss=True))
    return Document(category="qa", pieces=pieces)


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
