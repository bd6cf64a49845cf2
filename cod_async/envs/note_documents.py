"""Bootstrap documents for games of one-word facts: format, note-taking, and reading a fact outside the game.

A *fact* is one word that is observation, feedback, record and note at once (``3=Left``). The functions here
play a lifecycle of such a game with responses that know nothing, keep faithful notes, and write both down as
documents encoded by the calls of a rollout. An environment that uses them decides what its responses, worlds
and words are; what the documents teach and leave to learn is then the same for all of them:

* solve: the responses are given by the caller (uniformly random ones, so that no use of a hint is taught);
  the answers between two responses carry loss;
* hint: the new hint is the old one followed by the facts just seen, each once, never empty;
* reading: ``map 3=Left 1=Up ; at Up : 1``, a plain text and not an episode.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar, Protocol

from cod_async.envs.base import PromptStyle, StepResult, TaskSpec
from cod_async.lifecycle.documents import Document, Piece
from cod_async.lifecycle.hint import prompts_for, terse_number

MAX_FACTS = 7
"""Most facts in a hint: the newest are kept."""

LOST_FRAC = 0.05
"""Share of updates after which the hint is lost, so that the model has met its placeholder."""


class FactGame(Protocol):
    """What the documents need of an environment: one that is answered without waiting."""

    prompt_style: ClassVar[PromptStyle]

    def reset(self, task: TaskSpec) -> str:
        """Start a task and return the first user message."""

    def system_prompt(self) -> str:
        """Return the rules."""

    def press(self, response: str) -> StepResult:
        """Apply a response; the observation is the fact it revealed."""

    def feedback(self) -> str:
        """Return the last answer."""

    def trajectory(self, messages: list[tuple[str, str]]) -> str | None:
        """Return the record of the finished episode, without the last answer."""


def frame_words() -> tuple[str, ...]:
    """Return the words of terse rollouts and of reading that are no game's own, in a fixed order."""
    prompts = prompts_for("terse")
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
    return tuple(dict.fromkeys([*words, *rest, *rewards]))


def mixed_documents(
    num: int,
    qa_frac: float,
    rng: random.Random,
    reading: Callable[[], Document],
    lifecycle: Callable[[], Sequence[Document]],
) -> list[Document]:
    """Return ``num`` shuffled documents: a share of readings, the rest episodes of whole lifecycles.

    Args:
        num: how many.
        qa_frac: share of readings in [0, 1].
        rng: draws the order; ``reading`` and ``lifecycle`` may draw from it too.
        reading: makes one fact-reading document.
        lifecycle: makes the documents of one lifecycle.
    """
    num_qa = round(num * qa_frac)
    documents = [reading() for _ in range(num_qa)]
    episodes: list[Document] = []
    while len(episodes) < num - num_qa:
        episodes += lifecycle()
    rng.shuffle(episodes)
    documents += episodes[: num - num_qa]
    rng.shuffle(documents)
    return documents


def lifecycle_documents(
    environment: FactGame, tasks: Iterable[TaskSpec], respond: Callable[[], str], rng: random.Random
) -> list[Document]:
    """Play one lifecycle with faithful notes, as documents.

    Args:
        environment: the game; it is reset with every task.
        tasks: the tasks of a pack in order; they may be drawn one by one from ``rng``.
        respond: makes the next response in the current task.
        rng: decides which hints get lost.
    """
    prompts = prompts_for(environment.prompt_style)
    hint, notes = prompts.initial, list[str]()
    documents: list[Document] = []
    for task in tasks:
        solve, facts, reward = solve_document(environment, task, hint, respond)
        documents.append(solve)
        if task.position == task.pack_size - 1:
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
        if rng.random() < LOST_FRAC:
            hint, notes = prompts.failed, []
    return documents


def solve_document(
    environment: FactGame, task: TaskSpec, hint: str, respond: Callable[[], str]
) -> tuple[Document, list[str], float]:
    """Play one solve episode; return it, the facts it revealed, and its raw reward."""
    prompts = prompts_for(environment.prompt_style)
    user = environment.reset(task)
    pieces = [Piece(kind="open", system=prompts.solve_system(environment.system_prompt(), hint), text=user)]
    facts: list[str] = []
    while True:
        response = respond()
        pieces.append(Piece(kind="response", text=response, has_loss=True))
        result = environment.press(response)
        facts.append(result.observation)
        if result.is_done:
            return Document(category="solve", pieces=tuple(pieces)), facts, result.raw_reward
        pieces.append(Piece(kind="turn", text=result.observation, has_loss=True))


def reading_document(facts: Mapping[str, str], rng: random.Random) -> Document:
    """Ask for one of some facts, in plain text.

    Args:
        facts: what is to be answered -> what is asked by; at least one, values all different.
        rng: draws how many facts are shown (at most :data:`MAX_FACTS`), which, in what order, and the one
            asked for.
    """
    known = list(facts)
    shown = rng.sample(known, rng.randint(1, min(len(known), MAX_FACTS)))
    asked = rng.choice(shown)
    text = " ".join(f"{item}={facts[item]}" for item in shown)
    question = f"map {text} ; at {facts[asked]} :"
    pieces = (Piece(kind="start", text=question), Piece(kind="text", text=asked, has_loss=True))
    return Document(category="qa", pieces=pieces)
