"""Hostile answers by environment: well formed enough for the first parser, meant for what lies behind.

Each function returns what might stand between the answer tags (or the whole response, where there are no
tags): expressions that are deep, long or undefined, thousand-term regressions, command lines that copy a
directory into its own copies. An environment without a function of its own is fed mutations alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from xml.sax.saxutils import escape

from cod_async.envs.pde_discovery.basis import TERMS

from .mutations import INVISIBLE, NUMBERS, PATTERNS, TEMPLATES

Answers = Callable[[random.Random], str]

_NAMES = ("x", "v", "t", "x_target", "v_target", "horizon", "remaining_steps")
_CONSTANTS = (
    "0",
    "1",
    "2",
    ".5",
    "1e308",
    "-1e308",
    "1e-320",
    "1e400",
    "0x1F",
    "3.",
    "9**9",
    "7",
    "True",
    "y",
    "1j",
)
_OPERATORS = (
    "+",
    "-",
    "*",
    "/",
    "**",
    "<",
    "<=",
    ">",
    ">=",
    "==",
    "!=",
    " and ",
    " or ",
    "//",
    "%",
    ",",
    " in ",
    "@",
)
_FUNCTIONS = (
    "abs",
    "min",
    "max",
    "pow",
    "clip",
    "ifelse",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
    "exp",
    "eval",
    "x",
)


def expression(rng: random.Random, depth: int = 6) -> str:
    """Return an expression of the controller language, or nearly one."""
    if depth == 0 or rng.random() < 0.15:
        return rng.choice(_NAMES) if rng.random() < 0.7 else rng.choice(_CONSTANTS)

    def inner() -> str:
        return expression(rng, depth - 1)

    kind = rng.random()
    if kind < 0.45:
        operator = rng.choice(_OPERATORS[:11]) if rng.random() < 0.97 else rng.choice(_OPERATORS)
        return f"{inner()}{operator}{inner()}"
    if kind < 0.6:
        return f"({inner()})"
    if kind < 0.7:
        return rng.choice(("-", "+", "not ", "- -", "~")) + inner()
    if kind < 0.78:
        return f"({inner()} if {inner()} else {inner()})"
    name = rng.choice(_FUNCTIONS[:12]) if rng.random() < 0.97 else rng.choice(_FUNCTIONS)
    return f"{name}({','.join(inner() for _ in range(rng.choice((1, 2, 2, 3, 3, 3))))})"


def _large_expression(rng: random.Random) -> str:
    num = rng.choice((10, 60, 63, 64, 65, 200, 499, 500, 1_000, 100_000))
    return rng.choice(
        (
            lambda: "(" * num + "x" + ")" * num,
            lambda: "-" * num + "x",
            lambda: "not " * num + "x",
            lambda: "**".join(["9"] * num),
            lambda: "**".join(["2", "-1"] * num),
            lambda: "+".join(["x"] * num),
            lambda: "/".join(["x"] * num),
            lambda: "<".join(["x"] * num),
            lambda: " and ".join(["x"] * num),
            lambda: "abs(" * num + "x" + ")" * num,
            lambda: "min(" + "x," * num + ")",
            lambda: "x if v else " * num + "t",
            lambda: "ifelse(x,v," * num + "t" + ")" * num,
            lambda: "x" * num,
            lambda: "1" * num,
            lambda: "1_" * num + "0",
            lambda: "#" * num + "\nx",
            lambda: "x" + "\\\n" * num,
            lambda: "(" + "\n" * num + "x)",
            lambda: "1" + "*1e300" * num,
        )
    )()


def control(rng: random.Random) -> str:
    text = expression(rng, rng.choice((2, 4, 6))) if rng.random() < 0.8 else _large_expression(rng)
    text = escape(text) if rng.random() < 0.95 else text
    return f"<controller>{text}</controller>"


def _number(rng: random.Random) -> str:
    if rng.random() < 0.1:
        return rng.choice(NUMBERS[:-3])[:2_000]
    return repr(rng.choice((rng.random(), rng.uniform(0, 0.02), 0.0, 1.0, round(rng.uniform(-0.5, 1.5), 3))))


def _point(rng: random.Random) -> str:
    x, t = _number(rng), _number(rng)
    if rng.random() < 0.15:
        return f"<p><x>{x}</x><t>{t}</t></p>"
    return f'<point x="{x}" t="{t}"/>' if rng.random() < 0.95 else f'<point x="{x}"/>'


def _sum_of_terms(rng: random.Random, num: int) -> str:
    has_numbers = rng.random() < 0.6
    text = ""
    for _ in range(num):
        term = rng.choice(TERMS)
        term = f"({term})" if "-" in term and rng.random() < 0.5 else term
        factor = rng.choice(("0.61*", "1e-13*", "1e308*", "2*", "0*", "c1*", "1e999*")) if has_numbers else ""
        text += rng.choice((" + ", " - ", "+", "+ -")) + factor + term
    return rng.choice(("", "f(u) =", "f(u)=", "u_t =")) + text.removeprefix(" + ")


def _candidates(rng: random.Random) -> str:
    sizes = (1, 1, 2, 3, 8, 15, 30, 200)
    items = "".join(
        f"<equation>{_sum_of_terms(rng, rng.choice(sizes))}</equation>"
        for _ in range(rng.choice((1, 1, 2, 8, 9, 300)))
    )
    return f"<candidate_equations>{items}</candidate_equations>"


def _dictionary(rng: random.Random) -> str:
    num = rng.choice((1, 2, 5, 15, 15, 16, 330, 1_000))
    terms = [rng.choice(TERMS).upper() if rng.random() < 0.1 else rng.choice(TERMS) for _ in range(num)]
    return "<dictionary>" + "".join(f"<term>{term}</term>" for term in terms) + "</dictionary>"


_DATA_SETS = ("merged_all", "merged", "ds_t1_1", "merged_t1_t9", "merged_t0_t999", "ds_t1_1" * 99)


def _regression(rng: random.Random) -> str:
    parts = [
        f"<dataset_id>{rng.choice(_DATA_SETS)}</dataset_id>",
        f"<threshold>{_number(rng)}</threshold>",
        f"<alpha>{_number(rng)}</alpha>",
        _candidates(rng),
        _dictionary(rng),
    ]
    chosen = [part for part in parts if rng.random() < 0.4]
    rng.shuffle(chosen)
    return f"<run_sparse_regression>{''.join(chosen)}</run_sparse_regression>"


def pde(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.35:
        points = "".join(_point(rng) for _ in range(rng.choice((1, 2, 3, 6, 7, 400))))
        return f"<sample_pde_data><point_grid>{points}</point_grid></sample_pde_data>"
    if kind < 0.75:
        return _regression(rng)
    if kind < 0.85:
        told = rng.choice(("true", "false", "TRUE", "1", "", "<a/>"))
        return (
            f"<summarize_pack_evidence><reveal_equations>{told}</reveal_equations></summarize_pack_evidence>"
        )
    rest = rng.choice(
        ("", "<note>ok</note>", "<note><a/></note>", "<uncertain_terms><i>u</i></uncertain_terms>")
    )
    equation = _sum_of_terms(rng, rng.choice((0, 1, 2, 3, 40, 300)))
    return (
        f"<update_scientific_context><preferred_equation>{equation}</preferred_equation>{rest}"
        "</update_scientific_context>"
    )


_COMMANDS = (
    "ls", "cd", "pwd", "cat", "cp", "cp -r", "mv", "rm", "rm -rf", "mkdir", "mkdir -p", "touch",
    "chmod 755", "chmod -R 7", "echo", "whoami", "tar czf", "tar xzf", "tar -cf", "tar -tf", "gzip",
    "gunzip", "zip -r", "unzip", "unzip -o", "scp", "scp -r", "rsync -a", "ssh", "exit", "dir", "copy",
    "move", "ren", "del", "ls -laR", "sudo rm -rf /", "frob",
)  # fmt: skip
_PATHS = (
    "a", "b", "a/b", "b/a", ".", "..", "/", "~", "~/a", "/home", "/opt", "/var/www/html", "C:\\",
    "C:\\Users\\user\\a", "D:\\", "a\\b", "a.zip", "b.zip", "a.tgz", "b.tar", "a.tgz.gz", "''", '"a b"',
    "$HOME", "%CD%", "${PWD}", "-", "--", "-r", "-C", "*", "a/" * 40, "x" * 300, "../" * 20, "/etc/passwd",
    "NUL", "CON",
)  # fmt: skip
_GROWTH = (
    "mkdir a b", "touch a/1 a/2 a/3 a/4 b/5", "cp -r a b", "cp -r b a", "cp -r . /opt", "cp -r /home a",
    "mv a b/c", "zip -r a.zip a b", "zip -r b.zip a.zip a", "unzip -o a.zip", "unzip -d a b.zip",
    "tar czf a.tgz .", "tar xzf a.tgz", "tar czf b.tgz a.tgz a.tgz a.tgz", "gzip a.tgz", "gunzip a.tgz.gz",
    "mkdir -p a/b/c/d/e/f/g", "ls -laR /", "cd a", "cd /", "chmod -R 755 /", "rm -rf a/b",
)  # fmt: skip


def _command(rng: random.Random, hosts: tuple[str, ...]) -> str:
    words = [rng.choice(_COMMANDS)]
    for _ in range(rng.choice((0, 1, 2, 2, 3, 8))):
        kind = rng.random()
        path = rng.choice(_PATHS)
        words.append(
            path if kind < 0.8 else f"{rng.choice(hosts)}:{path}" if kind < 0.95 else rng.choice(PATTERNS)
        )
    return " ".join(words)


def terminal(rng: random.Random) -> str:
    hosts = ("admin@192.168.1.20", "user@localhost", "ops@10.0.0.5", "a@b@c", "@")
    kind, joint = rng.random(), rng.choice((" && ", " ; ", ";", "\n", "&&"))
    if kind < 0.4:
        return joint.join(_command(rng, hosts) for _ in range(rng.choice((1, 1, 2, 4, 16, 17))))
    if kind < 0.75:
        return joint.join(rng.choice(_GROWTH) for _ in range(rng.choice((4, 15, 16))))
    if kind < 0.85:
        line = joint.join(rng.choice(_GROWTH) for _ in range(8))
        return f'ssh {rng.choice(hosts)} "{line}"'
    if kind < 0.9:
        return rng.choice(_GROWTH) + joint.join([rng.choice(_COMMANDS)] * rng.choice((100, 5_000)))
    if kind < 0.95:
        quote = rng.choice(("'", '"', "\\", "`", "$(", "${"))
        return f"echo {quote * rng.choice((1, 2, 999, 4_000))}{rng.choice(_PATHS)}"
    return f"cp {' '.join(rng.choice(_PATHS) for _ in range(rng.choice((40, 60))))}"


def grid(rng: random.Random) -> str:
    def place() -> str:
        return str(rng.randint(-2, 15)) if rng.random() < 0.85 else rng.choice(NUMBERS)

    return rng.choice(("{},{}", "{}, {}", "({},{})", "{},{},{}", "{};{}", " {} , {} \n")).format(
        place(), place(), place()
    )


def frozen_lake(rng: random.Random) -> str:
    number = str(rng.randint(1, 4)) if rng.random() < 0.7 else rng.choice(NUMBERS)
    return rng.choice(
        ("Direction {}", "direction {}", "Direction  {} x", "DIRECTION {}", "Direction{}")
    ).format(number)


def alchemy(rng: random.Random) -> str:
    def name() -> str:
        return rng.choice(
            ("abc", "ABC", "", " ", "x" * 5_000, "\u0130", "\u00df", "+", *TEMPLATES, *INVISIBLE)
        )

    return rng.choice((" + ", "+", "++", " and ")).join(name() for _ in range(rng.choice((1, 2, 2, 2, 3))))


def learn2ask(rng: random.Random) -> str:
    words = (
        "fever",
        "Where",
        "is",
        "it",
        "?",
        ".",
        "!",
        "\n",
        "<stop />",
        "\uff1f",
        "\u53d1\u70e7",
        "pain",
        "\u0130",
        "...",
    )
    return " ".join(rng.choice(words) for _ in range(rng.choice((1, 5, 20, 61, 3_000))))


def words_and_number(rng: random.Random) -> str:
    goal = rng.choice(("Right", "Left", "Up", "Down", "Attic", "right", "x" * 999, rng.choice(INVISIBLE)))
    colon, last = rng.choice((":", "::", "", "\uff1a")), rng.choice(("1", "9", "0", "gold", *NUMBERS))
    return f"{goal} {colon} {last}"


ANSWERS: dict[str, tuple[Answers, bool]] = {
    "alchemy_random": (alchemy, True),
    "frozen_lake_obscure": (frozen_lake, True),
    "grid_navigation": (grid, True),
    "hidden_buttons": (words_and_number, False),
    "hidden_matches": (words_and_number, False),
    "learn2ask": (learn2ask, False),
    "optimal_control": (control, True),
    "pde_discovery": (pde, True),
    "terminal": (terminal, True),
}
"""Environment -> (its hostile answers, whether they stand between answer tags)."""


def hostile_answer(rng: random.Random, environment: str) -> str | None:
    """Return a hostile response meant for an environment; None if there is none of its own."""
    found = ANSWERS.get(environment)
    if found is None:
        return None
    make, is_tagged = found
    return f"<answer>{make(rng)}</answer>" if is_tagged else make(rng)
