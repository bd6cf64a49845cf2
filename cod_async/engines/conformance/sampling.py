"""Checks of single completions: log-probs, the distribution that is sampled from, stops and limits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from cod_async.engines.conformance.asking import Answer, Subject, ask, ask_all, compare, params
from cod_async.engines.conformance.findings import CheckFailedError, CheckSkippedError
from cod_async.engines.conformance.reference import Reference
from cod_async.errors import EngineClosedError, EngineDownError, EngineError, EngineRefusedError

TEMPERATURES = (0.5, 1.0, 1.3)
ODD_LENGTHS = (1, 2, 3, 5, 7, 13, 17, 31, 33, 63, 65, 127)
"""Prompt lengths beside and on the edges of blocks and pages."""
NUCLEI = (0.5, 0.8, 0.95)
"""Samples outside these shares of the distribution are counted."""
MAX_Z = 5.0
"""Standard deviations; chance exceeds them once in two million."""
MIN_EXPECTED = 10.0
"""Fewer expected samples tell nothing."""
MAX_STOP_IDS = 24
EOS_TRIES = 6
LAST_TOKENS = 16
"""Tokens generated at the end of a full context."""
EOS_REQUESTS = 32


def needed_reference(subject: Subject) -> Reference:
    """Return the reference.

    Raises:
        CheckSkippedError: there is none.
    """
    if subject.reference is None:
        raise CheckSkippedError("nothing to compare with; give the model directory with --model")
    return subject.reference


async def answers_are_whole(subject: Subject) -> str:
    """Every sampled id has its log-prob and its version, and is an id of the vocabulary."""
    lengths = subject.lengths((1, 4, 9, 16, 25, 36, 49, 64), 48)
    answers = await ask_all(
        subject,
        (
            (subject.prompt(number, length), params(48, seed=number, temperature=2.0))
            for number, length in enumerate(lengths)
        ),
    )
    ids = [token for answer in answers for token in answer.completion.token_ids]
    wanted = 48 * len(answers)
    if len(ids) != wanted:
        raise CheckFailedError(f"{len(ids)} ids came of {wanted} that nothing could end early")
    return f"{len(ids)} ids, {len(set(ids))} of them different, each with log-prob and version"


async def logprob_parity(subject: Subject) -> str:
    """Reported log-probs are those of the reference, at several temperatures and prompt lengths."""
    reference = needed_reference(subject)
    lengths = subject.lengths(ODD_LENGTHS, 16)
    parts, has_failed = [], False
    for temperature in TEMPERATURES:
        answers = await ask_all(
            subject,
            (
                (subject.prompt(number, length), params(16, seed=number, temperature=temperature))
                for number, length in enumerate(lengths)
            ),
        )
        found = compare(reference, answers)
        part = f"T={temperature:g}: {found}"
        if not found.fit(subject.tolerance):
            has_failed = True
            if temperature != 1 and compare(reference, answers, 1.0).fit(subject.tolerance):
                part += " (they are those of temperature 1)"
        parts.append(part)
    text = f"{'; '.join(parts)}; prompts of {min(lengths)} .. {max(lengths)} ids; {subject.tolerance}"
    if has_failed:
        raise CheckFailedError(text)
    return text


async def logprobs_before_top_p(subject: Subject) -> str:
    """A nucleus cut does not change the reported log-probs."""
    reference = needed_reference(subject)
    lengths = subject.lengths((3, 8, 15, 24), 16)
    answers = await ask_all(
        subject,
        (
            (subject.prompt(100 + number, length), params(16, seed=number, top_p=0.5))
            for number, length in enumerate(lengths)
        ),
    )
    found = compare(reference, answers)
    text = f"top_p=0.5 against the whole distribution: {found}; {subject.tolerance}"
    if not found.fit(subject.tolerance):
        raise CheckFailedError(f"{text}; reported after the cut, or of another model")
    return text


async def samples_follow_logprobs(subject: Subject) -> str:
    """What is sampled is drawn from the whole distribution: nothing cuts its tail off.

    Of all tokens, those outside the smallest set of most likely ones with mass p are counted, and compared
    with the mass that the reference gives them, token by token (a martingale, so the normal bound holds).
    """
    reference = needed_reference(subject)
    lengths = subject.lengths((2, 5, 11, 23) * 6, 32)
    answers = await ask_all(
        subject,
        (
            (subject.prompt(200 + number, length), params(32, seed=1000 + number))
            for number, length in enumerate(lengths)
        ),
    )
    counted = dict.fromkeys(NUCLEI, 0)
    mean = dict.fromkeys(NUCLEI, 0.0)
    variance = dict.fromkeys(NUCLEI, 0.0)
    for answer in answers:
        for cut, (is_outside, mass) in _tails(reference, answer).items():
            counted[cut] += sum(is_outside)
            mean[cut] += sum(mass)
            variance[cut] += sum(share * (1 - share) for share in mass)
    parts, worst = [], 0.0
    for cut in NUCLEI:
        if mean[cut] < MIN_EXPECTED:
            continue
        score = abs(counted[cut] - mean[cut]) / math.sqrt(variance[cut])
        worst = max(worst, score)
        parts.append(f"outside {cut:g}: {counted[cut]} of {mean[cut]:.1f} expected")
    if not parts:
        raise CheckSkippedError("the model is so certain that hardly anything is sampled from a tail")
    text = f"{'; '.join(parts)}; worst {worst:.1f} standard deviations, limit {MAX_Z:g}"
    if worst > MAX_Z:
        raise CheckFailedError(f"{text}; the engine does not sample from the distribution that it reports")
    return text


def _tails(reference: Reference, answer: Answer) -> dict[float, tuple[list[bool], list[float]]]:
    """Return, per nucleus, whether each token is outside it, and the probability of that."""
    row, first = answer.row, len(answer.prompt)
    probabilities = reference.logprobs(row, first, answer.params.temperature)[:-1].exp()
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    tokens = torch.tensor(row[first:])[:, None]
    found = {}
    for cut in NUCLEI:
        is_tail = before >= cut
        mass = (ordered * is_tail).sum(-1)
        is_outside = (is_tail & (order == tokens)).any(-1)
        found[cut] = (is_outside.tolist(), mass.tolist())
    return found


async def stop_ids(subject: Subject) -> str:
    """A stop id ends a completion and is part of it; without one the completion has its full length."""
    reference = needed_reference(subject)
    num_stopped = num_full = num_tokens = 0
    for number, length in enumerate(subject.lengths((4, 9, 14, 19), 24)):
        prompt = subject.prompt(300 + number, length)
        likely = reference.logprobs(prompt, length, 1.0)[-1].topk(min(MAX_STOP_IDS, subject.vocab_size // 4))
        wanted = likely.indices.tolist()
        answers = await ask_all(
            subject,
            (
                (prompt, params(24, seed=10 * number + i, stop_ids=wanted if i % 2 else wanted[-3:]))
                for i in range(8)
            ),
        )
        for answer in answers:
            tokens = answer.completion.token_ids
            num_tokens += len(tokens)
            if answer.completion.finish == "stop":
                num_stopped += 1
            elif len(tokens) == answer.params.max_tokens:
                num_full += 1
            else:
                raise CheckFailedError(
                    f'finish "length" after {len(tokens)} of {answer.params.max_tokens} ids, with no stop id'
                )
    if num_stopped == 0:
        raise CheckFailedError(f"none of {num_full} completions ended at a likely stop id")
    return f"{num_stopped} ended with their stop id, {num_full} had none and full length; {num_tokens} ids"


async def own_eos_does_not_stop(subject: Subject) -> str:
    """The model's own end token is an ordinary one unless it is among the stop ids."""
    reference = needed_reference(subject)
    eos_ids = sorted(token for token in subject.eos_ids if 0 <= token < subject.vocab_size)
    if not eos_ids:
        raise CheckSkippedError("the model's files name no end token")
    prompt, temperature, chance = _likely_eos(subject, reference, eos_ids)
    other = next(token for token in range(subject.vocab_size) if token not in eos_ids)
    num_seen = num_tokens = 0
    for attempt in range(EOS_TRIES):
        answers = await ask_all(
            subject,
            (
                (prompt, params(8, seed=5000 + i, temperature=temperature, stop_ids=[other] if i % 2 else []))
                for i in range(EOS_REQUESTS * attempt, EOS_REQUESTS * (attempt + 1))
            ),
        )
        for answer in answers:
            tokens, asked = answer.completion.token_ids, answer.params
            num_tokens += len(tokens)
            if answer.completion.finish != "stop" and len(tokens) < asked.max_tokens:
                raise CheckFailedError(
                    f"a completion ended after {len(tokens)} of {asked.max_tokens} ids with {tokens[-1]}, "
                    "which was no stop id of the request; the server must ignore its own end tokens"
                )
            num_seen += sum(token in eos_ids for token in tokens[:-1])
        if num_seen >= 2:
            break
    if num_seen == 0:
        raise CheckSkippedError(f"none of {eos_ids} was sampled in {num_tokens} ids (chance {chance:.2g})")
    return f"{num_seen} end tokens in {num_tokens} ids (T={temperature:g}), and generation went on"


def _likely_eos(
    subject: Subject, reference: Reference, eos_ids: Sequence[int]
) -> tuple[list[int], float, float]:
    """Search random prompts for one after which an end token is likely; return it, the temperature and the
    probability.
    """
    best: tuple[list[int], float, float] = ([], 1.0, -1.0)
    length = subject.lengths((24,), 8)[0]
    for number in range(8):
        row = subject.prompt(400 + number, length)
        for temperature in (1.0, 2.0, 4.0):
            chances = reference.logprobs(row, 1, temperature)[:, list(eos_ids)].exp().sum(-1)
            place = int(chances.argmax())
            if float(chances[place]) > best[2]:
                best = (row[: place + 1], temperature, float(chances[place]))
    return best


async def length_limit(subject: Subject) -> str:
    """Without stop ids a completion has exactly ``max_tokens`` ids."""
    wanted = [1, 2, 7, 33]
    room = subject.engine.max_context_tokens - 6
    wanted = [count for count in wanted if count <= room]
    for count in wanted:
        answer = await ask(subject, subject.prompt(500, 5), params(count, seed=count))
        found = len(answer.completion.token_ids)
        if found != count or answer.completion.finish != "length":
            raise CheckFailedError(f'{found} ids of {count}, finish "{answer.completion.finish}"')
    return f"max_tokens {', '.join(map(str, wanted))}: as many ids each"


async def context_limit(subject: Subject) -> str:
    """A row may fill the context; a prompt that leaves no room is refused, and the engine goes on."""
    engine, limit = subject.engine, subject.engine.max_context_tokens
    await _refused(subject, [0] * limit, "a prompt as long as the context")
    text = f"a prompt of {limit} ids is refused"
    if LAST_TOKENS < limit <= subject.max_full_context_tokens:
        length = limit - LAST_TOKENS  # servers keep some of the last places for themselves
        answer = await ask(subject, subject.prompt(600, length), params(LAST_TOKENS, seed=1))
        if len(answer.completion.token_ids) != LAST_TOKENS:
            raise CheckFailedError(
                f"{length} ids and {LAST_TOKENS} more fill the context of {limit}, "
                f"but {len(answer.completion.token_ids)} came"
            )
        text += f", {length} ids and {LAST_TOKENS} more fit"
    await ask(subject, subject.prompt(601, 3), params(2, seed=2))
    return f"{text}, and the engine goes on (version {engine.version})"


async def foreign_ids(subject: Subject) -> str:
    """Ids outside the vocabulary and empty prompts are refused before they can do harm."""
    wrong: tuple[list[int], ...] = (
        [subject.vocab_size],
        [1, -1],
        [0, subject.vocab_size + 1000],
        [1 << 40],
        [],
    )
    for prompt in wrong:
        await _refused(subject, prompt, f"the prompt {prompt}", must_not_be_sent=True)
    await ask(subject, subject.prompt(700, 3), params(2, seed=3))
    return f"{len(wrong)} impossible prompts refused, and the engine goes on"


async def _refused(
    subject: Subject, prompt: Sequence[int], what: str, *, must_not_be_sent: bool = False
) -> None:
    """Send what cannot be answered; refusing it is the only right thing to do.

    ``must_not_be_sent``: not even a server's refusal will do, because another release may crash over it.
    """
    try:
        await subject.engine.generate(prompt, params(1, seed=0))
    except (EngineDownError, EngineClosedError) as error:
        raise CheckFailedError(f"{what} took the engine down: {error}") from error
    except EngineRefusedError as error:
        if must_not_be_sent:
            raise CheckFailedError(f"{what} was sent to the server, which refused it: {error}") from error
        return
    except EngineError:
        return
    raise CheckFailedError(f"{what} was answered, not refused")
