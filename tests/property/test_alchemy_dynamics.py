"""Alchemy-Random against second implementations that share no code with it.

World drawing is written again as one flat function in the order of the published rules; the game is written
again on multisets; shortest syntheses are found again by breadth-first search over what one owns. Random
options, seeds and answers must give equal worlds, inventories, endings and numbers of rounds.
"""

from __future__ import annotations

import asyncio
import random
import string
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cod_async.envs.alchemy_random import SPEC
from cod_async.envs.alchemy_random.env import AlchemyRandom
from cod_async.envs.alchemy_random.options import parse_options
from cod_async.envs.alchemy_random.planning import shortest_plan
from cod_async.envs.alchemy_random.world import draw_world
from cod_async.envs.base import TaskSpec

SEEDS = st.integers(0, (1 << 64) - 1)


def ranges(low: float, high: float) -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(low, high), min_size=2, max_size=2).map(sorted)


def counts(low: int, high: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(low, high), min_size=2, max_size=2).map(sorted)


RULES = st.fixed_dictionaries(
    {
        "num_tiers": counts(2, 5),
        "num_base": counts(1, 8),
        "shrink": ranges(0.2, 1),
        "num_recipes": counts(1, 4),
        "cross_tier_prob": ranges(0, 1),
        "noise_ratio": ranges(0, 1.5),
        "max_tier_gap": st.integers(1, 4),
        "num_noise_rounds": st.integers(0, 4),
    }
)


def options_of(rules: dict[str, Any], **changes: Any) -> dict[str, Any]:
    options = SPEC.options("hard")
    for key, value in rules.items():
        if isinstance(value, list):
            options[f"{key}_min"], options[f"{key}_max"] = value
        else:
            options[key] = value
    return {**options, **changes}


def drawn_again(rules: dict[str, Any], seed: int, pack_size: int) -> tuple[Any, Any, Any]:
    """The published draws in one go; returns tiers, recipes and targets."""
    r = random.Random(seed)
    k, base = r.randint(*rules["num_tiers"]), r.randint(*rules["num_base"])
    shrink, cross, noise = (r.uniform(*rules[key]) for key in ("shrink", "cross_tier_prob", "noise_ratio"))
    taken: list[str] = []

    def name() -> str:
        word = "".join(r.choices(string.ascii_lowercase, k=r.randint(3, 5)))
        if word in taken:
            return name()
        taken.append(word)
        return word

    tiers, size = [[name() for _ in range(base)]], base
    for _ in range(1, k):
        size = max(1, round(size * shrink))
        tiers.append([name() for _ in range(size)])
    book: dict[str, str] = {}

    def recipe(t: int, product: str) -> bool:
        for _ in range(50):
            a = r.choice(tiers[t - 1])
            lower = list(range(max(0, t - rules["max_tier_gap"]), t - 1))
            crosses = r.random() < cross and t >= 2 and lower
            b = r.choice(tiers[r.randint(lower[0], lower[-1])] if crosses else tiers[t - 1])
            key = "+".join(sorted([a, b]))
            if key not in book:
                book[key] = product
                return True
        return False

    for t in range(1, k):
        for product in tiers[t]:
            for _ in range(r.randint(*rules["num_recipes"])):
                recipe(t, product)
    real = [list(tier) for tier in tiers]
    for d in range(rules["num_noise_rounds"] if noise > 0 else 0):
        fresh: list[list[str]] = [[] for _ in range(k)]
        for t in range(1, k):
            number = round(len(real[t]) * noise)
            for _ in range(round(number / 2) if d else number):
                word = name()
                if recipe(t, word):
                    fresh[t].append(word)
        for t in range(1, k):
            tiers[t] += fresh[t]
    pools = {t: list(real[t]) for t in range(1, k)}
    targets: list[str] = []
    while len(targets) < pack_size and any(pools.values()):
        open_tiers = [t for t in pools if pools[t]]
        t = r.choices(open_tiers, weights=[t + 1 for t in open_tiers])[0]
        targets.append(pools[t].pop(pools[t].index(r.choice(pools[t]))))
    r.shuffle(targets)
    return tiers, book, targets


@settings(max_examples=150, deadline=None)
@given(rules=RULES, seed=SEEDS, pack_size=st.integers(1, 12))
def test_worlds(rules: dict[str, Any], seed: int, pack_size: int) -> None:
    world = draw_world(parse_options(options_of(rules, parity=True)), seed, pack_size)
    tiers, book, targets = drawn_again(rules, seed, pack_size)
    assert [list(names) for names in world.tiers] == tiers
    assert {"+".join(pair): product for pair, product in world.recipes.items()} == book
    assert list(world.targets) == targets
    # What the prompt says of every world: products are of a higher tier than both inputs.
    for pair, product in world.recipes.items():
        assert world.tier_of(product) > max(map(world.tier_of, pair))


def test_worlds_of_the_presets() -> None:
    for preset in ("easy", "hard"):
        options = SPEC.options(preset)
        ranges_of = ("num_tiers", "num_base", "shrink", "num_recipes", "cross_tier_prob", "noise_ratio")
        rules = {key: [options[f"{key}_min"], options[f"{key}_max"]] for key in ranges_of}
        rules.update({key: options[key] for key in ("max_tier_gap", "num_noise_rounds")})
        for seed in range(200):
            world = draw_world(parse_options(options), seed, 8)
            tiers, book, targets = drawn_again(rules, seed, 8)
            assert [list(names) for names in world.tiers] == tiers and list(world.targets) == targets
            assert list(world.recipes.values()) == list(book.values())


def task(seed: int, pack_seed: int, position: int) -> TaskSpec:
    return TaskSpec("alchemy_random", "hard", {}, {"seed": seed}, pack_seed, position, 8)


def replay(
    game: AlchemyRandom, answers: list[tuple[str, str]], book: dict[str, str], is_limited: bool, budget: int
) -> list[tuple[dict[str, int], str | None]]:
    """Play on a multiset; return (what is at hand, ending or None) after each answer."""
    stock = Counter(game.inventory)
    history: list[tuple[dict[str, int], str | None]] = []
    for count, (a, b) in enumerate(answers, start=1):
        needed = Counter([a, b]) if is_limited else Counter({a, b})
        if needed <= stock:
            if is_limited:
                stock -= needed
            made = book.get("+".join(sorted([a, b])))
            if made and (is_limited or not stock[made]):
                stock[made] += 1
        if stock[game.target] > 0:
            ending: str | None = "success"
        elif is_limited and stock.total() < 2:
            ending = "failure"
        else:
            ending = "out_of_steps" if count == budget else None
        history.append((dict(+stock), ending))
        if ending:
            break
    return history


@settings(max_examples=150, deadline=None)
@given(
    preset=st.sampled_from(["easy", "hard"]),
    seeds=st.tuples(SEEDS, SEEDS),
    position=st.integers(0, 7),
    choices=st.lists(
        st.tuples(st.integers(0, 99), st.integers(0, 99), st.booleans()), min_size=15, max_size=15
    ),
)
def test_dynamics(
    preset: str, seeds: tuple[int, int], position: int, choices: list[tuple[int, int, bool]]
) -> None:
    game = AlchemyRandom(SPEC.options(preset))
    game.reset(task(*seeds, position))
    book = {f"{a}+{b}": product for a, b, product in game.hidden()["recipes"]}
    names = sorted(name for tier in game.tiers for name in tier)
    pairs = [key.split("+") for key in book]
    # Half of the answers are pairs that make something (if they are at hand), the others any two names.
    answers = [
        (pairs[i % len(pairs)][0], pairs[i % len(pairs)][1])
        if is_recipe
        else (names[i % len(names)], names[j % len(names)])
        for i, j, is_recipe in choices
    ]
    expected = replay(game, answers, book, preset == "hard", game.max_steps)

    async def play() -> None:
        for (first, second), (stock, ending) in zip(answers, expected, strict=False):
            result = await game.step(f"<answer>{second.upper()} + {first}</answer>")
            assert game.inventory == stock
            assert result.is_done == (ending is not None)
            if ending:
                assert result.finish == ending and result.raw_reward == (ending == "success")

    asyncio.run(play())


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60), wrap=st.booleans(), preset=st.sampled_from(["easy", "hard"]))
def test_no_text_raises(text: str, wrap: bool, preset: str) -> None:
    game = AlchemyRandom(SPEC.options(preset, {"is_last_result_told": True, "has_attempt_lists": True}))
    game.reset(task(0, 0, 0))
    result = asyncio.run(game.step(f"<answer>{text}</answer>" if wrap else text))
    assert not result.is_done or result.finish == "format_error"
    (result.observation + game.feedback()).encode()


def fewest_rounds(
    book: dict[tuple[str, str], str], start: dict[str, int], target: str, is_limited: bool, most: int
) -> int | None:
    """Breadth-first search over everything that can be at hand; rounds that make nothing never help."""
    layer = {frozenset(start.items())}
    seen = set(layer)
    for rounds in range(1, most + 1):
        following = set()
        for state in layer:
            for (a, b), product in book.items():
                stock = Counter(dict(state))
                needed = Counter([a, b]) if is_limited else Counter({a, b})
                if not needed <= stock or (not is_limited and product in stock):
                    continue
                if product == target:
                    return rounds
                if is_limited:
                    stock -= needed
                stock[product] += 1
                following.add(frozenset((+stock).items()))
        layer = following - seen
        seen |= layer
    return None


@settings(max_examples=150, deadline=None)
@given(
    seed=SEEDS,
    is_limited=st.booleans(),
    copies=st.integers(1, 3),
    extra=st.lists(st.integers(0, 20), max_size=2),
    most=st.integers(1, 6),
    gap=st.integers(1, 3),
)
def test_plans_are_shortest(
    seed: int, is_limited: bool, copies: int, extra: list[int], most: int, gap: int
) -> None:
    rules = {"num_base": [2, 3], "shrink": [0.5, 1], "num_recipes": [1, 2], "cross_tier_prob": [0.3, 0.7]}
    changes = {"max_tier_gap": gap, "num_tiers_max": 4, "noise_ratio_max": 0.0}
    world = draw_world(parse_options(options_of(rules, **changes)), seed, 4)
    start = dict.fromkeys(world.tiers[0], copies if is_limited else 1)
    products = [name for tier in world.tiers[1:] for name in tier]
    for index in extra:  # products from earlier rounds may be at hand
        start[products[index % len(products)]] = 1
    for target in products:
        if target in start:
            continue
        plan = shortest_plan(
            world.recipes, world.tiers, start, target, is_limited=is_limited, max_rounds=most
        )
        assert (None if plan is None else len(plan)) == fewest_rounds(
            world.recipes, start, target, is_limited, most
        )
        stock = Counter(start)
        for pair in plan or []:  # every pair is at hand when its turn comes
            needed = Counter(pair) if is_limited else Counter(set(pair))
            assert needed <= stock
            stock = stock - needed if is_limited else stock
            stock[world.recipes[pair]] += 1
        assert plan is None or stock[target]
