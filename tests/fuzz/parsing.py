"""The parsers themselves under hostile text: no exception but their own, no result larger than its input.

Each target feeds one parser, or a few that read the same text, and checks what comes out: read again it means
the same, it holds nothing that the text does not hold, and its size is bounded.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable
from typing import Any

from cod_async.envs.learn2ask.judging import MAX_NOTE_CHARS, is_leaking, parse_facts, parse_scores, quoted
from cod_async.envs.learn2ask.records import FIELDS, MAX_FACT_CHARS, MAX_FACTS
from cod_async.envs.learn2ask.rules import facts_by_rules, judge_by_rules
from cod_async.envs.optimal_control.dynamics import ControlTask, RolloutError, World, simulate
from cod_async.envs.optimal_control.env import controller_xml, read_controller
from cod_async.envs.optimal_control.evaluation import EvaluationError
from cod_async.envs.optimal_control.syntax import (
    MAX_CHARS,
    VARIABLES,
    ExpressionSyntaxError,
    parse_expression,
)
from cod_async.envs.pde_discovery.arguments import (
    LIST_TAGS,
    ArgumentMistake,
    preferred_equation,
    regression_request,
)
from cod_async.envs.pde_discovery.basis import TERMS
from cod_async.envs.pde_discovery.equation import as_written, has_symbols, parse, read_support, render
from cod_async.envs.pde_discovery.prompting import PdePrompts
from cod_async.envs.pde_discovery.state import DataSet
from cod_async.envs.terminal.shell import (
    MAX_EXPANDED_CHARS,
    MAX_LINE_CHARS,
    Dialect,
    ShellError,
    clean,
    expand_text,
    split_line,
    words_of,
)
from cod_async.envs.xml_action import MAX_ANSWER_CHARS, ActionParseError, parse_action
from cod_async.lifecycle.hint import HintPrompts, prompts_for
from cod_async.lifecycle.parsing import extract_between

from .answers import control, expression, learn2ask, pde, terminal
from .mutations import mutate
from .playing import Failure, RunawayError, Tally, check, watched

_HINTS: tuple[HintPrompts, ...] = (prompts_for("full"), prompts_for("terse"), PdePrompts())
_SCOPE_VALUES = (0.0, 1.0, -1.0, 0.5, -2.5, 1e200, -1e308, 5e-324, math.inf, -math.inf, math.nan, 12.0)
_DATA = (DataSet(name="ds_t1_1", task=1, x=(0.5,), t=(0.0,), u=(0.7,), y=(0.3,)),)
_TASK = ControlTask(
    x0=1.0, v0=0.5, x_target=3.0, v_target=0.0, horizon=12, effort_weight=0.03, process_noise_std=0.0, seed=0
)


def _size(value: Any) -> int:
    """Return how many characters a parsed action holds; recursion is bounded by the parser."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(name) + _size(inner) for name, inner in value.items())
    check(isinstance(value, list), f"a parsed action holds a {type(value).__name__}")
    return sum(map(_size, value))


def check_actions(text: str) -> None:
    """The XML reader: its value is never larger than the answer, and white space around it is free."""
    for list_tags in (frozenset[str](), LIST_TAGS):
        try:
            tag, value = parse_action(text, list_tags)
        except ActionParseError as error:
            check(len(str(error)) < len(text) + 300, "a complaint is longer than the text")
            continue
        check(len(tag) + _size(value) <= MAX_ANSWER_CHARS, "an action is larger than its answer")
        check(parse_action(f"So:\n{text} ", list_tags) == (tag, value), "text around the answer matters")


def _count(text: str, key: str) -> int:
    """Return how often a key occurs; occurrences may overlap."""
    return sum(1 for _ in re.finditer(f"(?={re.escape(key)})", text))


def check_cuts(text: str) -> None:
    """The one rule for delimiters, restated by counting."""
    for start, end in (("<answer>", "</answer>"), ("=== HINTS BEGIN ===", "=== HINTS END ==="), ("[", "]")):
        is_there = _count(text, start) == 1 == _count(text, end)
        is_there = is_there and text.index(start) + len(start) <= text.index(end)
        found = extract_between(text, start, end)
        check((found is not None) == is_there, f"{start} {end}: found {found!r:.80}")
        check(found is None or f"{start}{found}{end}" in text, "what was cut out is not in the text")


def check_hints(text: str) -> None:
    """Update responses of all styles."""
    for prompts in _HINTS:
        hint = prompts.parse(text)
        if hint is not None:
            check(
                hint.startswith(prompts.label) and len(hint) <= len(prompts.label) + len(text), "a hint grew"
            )
            check(0 <= prompts.num_facts(hint) <= len(text), "a hint has more facts than characters")
            body = hint.removeprefix(prompts.label).strip()
            check(
                prompts.parse(f"{prompts.start}\n{body}\n{prompts.end}") == hint, "a hint is not read again"
            )


def check_controllers(text: str) -> None:
    """Controllers: parsed, evaluated in awkward states, rolled out, written and read again."""
    for is_parity in (False, True):
        try:
            found = read_controller(text, is_parity)
        except (ActionParseError, ExpressionSyntaxError):
            continue
        check(0 < len(found.text) <= MAX_CHARS, "an expression is too long")
        check(parse_expression(found.text, is_parity).root == found.root, "an expression is not read again")
        again = read_controller(f"<answer>{controller_xml(found.text)}</answer>", is_parity)
        check(again == found, "a controller is not read again")
        for shift in range(len(_SCOPE_VALUES)):
            values = _SCOPE_VALUES[shift:] + _SCOPE_VALUES[:shift]
            try:
                value = found.control(dict(zip(VARIABLES, values, strict=False)))
            except EvaluationError:
                continue
            check(type(value) is float and math.isfinite(value), f"a control is {value!r}")
        try:
            rollout = simulate(_TASK, World(a=1.1, b=-0.7), found.control)
        except RolloutError:
            continue
        check(0.0 <= rollout.reward <= 1.0 and all(abs(u) <= 1.0 for u in rollout.us), "a rollout is off")


def check_equations(text: str) -> None:
    """Equations and the arguments of the actions of PDE Discovery."""
    found = parse(text)
    support = read_support(text)
    has_symbols(text)
    if found is not None:
        check(set(found) <= set(TERMS) and all(map(math.isfinite, found.values())), "an equation is off")
        check(support == tuple(found), "an equation has other terms than its support")
        written = as_written(found)
        check(not written or parse(render(found)) == written, "an equation is not read again")
    check(support is None or set(support) <= set(TERMS), "a support has other terms")
    try:
        tag, value = parse_action(text, LIST_TAGS)
    except ActionParseError:
        return
    if isinstance(value, dict):
        try:
            if tag == "run_sparse_regression":
                request = regression_request(value, _DATA, 3, has_alpha=True)
                check(0 < len(request.supports) <= 575, f"{len(request.supports)} supports")
            else:
                preferred_equation(value)
        except ArgumentMistake as mistake:
            check(len(str(mistake)) < 600, "a complaint is long")


def check_judging(text: str) -> None:
    """Turns and replies of judges in Learn2Ask."""
    scores = parse_scores(text)
    check(scores is None or {scores.format, scores.content} <= {0.0, 0.5, 1.0}, "a score is off")
    check(scores is None or len(scores.note) <= MAX_NOTE_CHARS, "a note is long")
    facts = parse_facts(text)
    check(facts is None or len(facts) <= MAX_FACTS, "too many facts")
    for fact in facts or []:
        check(len(fact) <= MAX_FACT_CHARS and fact.partition(":")[0] in FIELDS, f"a fact is {fact!r:.80}")
    shown = quoted(text)
    check(
        all(line.startswith("> ") for line in shown.split("\n")) or not shown, "a turn leaves its quotation"
    )
    shown.encode("utf-8")
    ruled = judge_by_rules(text, ["symptom: fever", "location: left ear"])
    check({ruled.format, ruled.content} <= {0.0, 0.5, 1.0}, "a ruled score is off")
    is_leaking(text, ["symptom: fever"], text)
    facts_by_rules([f"doctor: {text[:20_000]}"])


def check_shell(text: str) -> None:
    """Command lines in all dialects."""
    line = clean(text[:MAX_LINE_CHARS])
    check(all(char.isprintable() or char in "\n\t" for char in line), "a clean line is not clean")
    dialects: tuple[Dialect, ...] = ("unix", "cmd", "cmd_parity")
    variables = {"HOME": "/home/user", "PWD": "/" + "d" * 900, "USER": "user"}
    for dialect in dialects:
        for is_parity in (False, True):
            try:
                expanded = expand_text(line, dialect, variables)
                check(len(expanded) <= MAX_EXPANDED_CHARS, "variables make a line too long")
                for operator, piece in split_line(line, dialect, is_parity):
                    check(operator in ("&&", ";") and piece in line, "a command is not in its line")
                    words = words_of(piece, dialect, None if is_parity else variables)
                    check(sum(map(len, words)) <= MAX_EXPANDED_CHARS, "words are too long")
            except ShellError:
                continue


def _hint_text(rng: random.Random) -> str:
    start, end = rng.choice((("=== HINTS BEGIN ===\n", "\n=== HINTS END ==="), ("[ ", " ]")))
    return f"Well.\n{start}- direction 1 is up\n- 2=Left{end}"


def _reply(rng: random.Random) -> str:
    score = rng.choice(("0", "0.5", "1", "1.0", ".5", "2"))
    facts = rng.choice(('["symptom: fever"]', '["location: left", "x"]', "[[[", '[1, "a"]', "[" * 3_000))
    return (
        f"<format_score>{score}</format_score><content_score>1</content_score><advice>Ask more.</advice>\n"
        f"Output: {facts}"
    )


def _action(rng: random.Random) -> str:
    inner = rng.choice((pde, control))(rng)
    return f"<answer>{inner}</answer>"


def _equation(rng: random.Random) -> str:
    body = pde(rng)
    kind = rng.random()
    if kind < 0.5:
        return f"<answer>{body}</answer>"
    num = rng.choice((1, 2, 3, 40))
    return "f(u) = " + " - ".join(f"{rng.choice(('0.5*', '', 'c1*'))}{rng.choice(TERMS)}" for _ in range(num))


PARSERS: dict[str, tuple[Callable[[str], None], Callable[[random.Random], str]]] = {
    "delimiters": (check_cuts, lambda rng: rng.choice((_hint_text, _reply, _action))(rng)),
    "hints": (check_hints, _hint_text),
    "actions": (check_actions, _action),
    "controllers": (check_controllers, lambda rng: f"<answer>{control(rng)}</answer>"),
    "expressions": (
        check_controllers,
        lambda rng: f"<answer>{controller_xml(expression(rng))}</answer>",
    ),
    "equations": (check_equations, _equation),
    "judging": (check_judging, lambda rng: rng.choice((_reply, learn2ask))(rng)),
    "command_lines": (check_shell, terminal),
}
"""Target -> (what to call and check, where its texts come from before they are mutated)."""


class ParserTarget:
    """One parser.

    Args:
        parser: a name in :data:`PARSERS`.
        seed: of everything.
        slow_s: CPU seconds beyond which a call is a finding; None: times are only recorded.
    """

    def __init__(self, parser: str, seed: int, slow_s: float | None) -> None:
        self.name = f"parser/{parser}"
        self._check, self._make = PARSERS[parser]
        self._seed = seed
        self._slow_s = slow_s
        self._rng = random.Random(f"{seed}/{self.name}")
        self.tally = Tally()

    def run(self, num_bad: int) -> Failure | None:
        """Feed texts until ``num_bad`` are done; return what broke, if anything."""
        rng = self._rng
        while self.tally.num_bad < num_bad:
            text = self._make(rng)
            if rng.random() < 0.75:
                text, _ = mutate(rng, text)
                self.tally.num_mutated += 1
            else:
                self.tally.num_hostile += 1
            problem = self.feed(text)
            if problem:
                seed = f"{self._seed}, text {self.tally.num_bad}"
                return Failure(problem, self.name, {}, ((text,),), seed)
        return None

    def feed(self, text: str) -> str:
        """Feed one text; return what broke, or nothing."""
        self.tally.digest.update(text.encode("utf-8", "surrogatepass"))
        began = time.thread_time()
        try:
            with watched(self._slow_s is not None):
                self._check(text)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        except RunawayError as error:
            return str(error)
        took_s = self.tally.timed(began, text)
        if self._slow_s is not None and took_s > self._slow_s:
            return f"it took {took_s:.1f} s of CPU time"
        return ""
