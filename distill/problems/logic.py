"""Places in a line, state tracking, ordering and truth values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from distill.problems.drawing import NAMES, Task, draw
from distill.problems.math import LARGEST, tally
from pipeline.records import Check, Problem

COLORS = ("red", "blue", "green", "black", "white", "pink")
RANKS = ("tallest", "second tallest", "third tallest", "shortest")
ASK = "Answer in \\boxed{}."

Tree = bool | tuple  # True | ("not", tree) | ("and" | "or", tree, tree)


def generate(count: int, seed: int, skills: Sequence[str] | None = None) -> Iterator[Problem]:
    """Up to `count` distinct logic problems; see `drawing.draw`."""
    return draw("logic", SKILLS, count, seed, skills)


def _task(prompt: str, lines: list[str], result: str) -> Task:
    return Task(prompt=f"{prompt} {ASK}", check=Check(kind="exact", reference=result), solution="\n".join(lines),
                answer=f"The answer is \\boxed{{{result}}}.")


def swaps(rng: Random) -> Task:
    """Three people exchange what they hold; the chain writes everyone's color after each swap."""
    people = rng.sample(NAMES, 3)
    holds = dict(zip(people, rng.sample(COLORS, 3), strict=True))
    prompt = [", ".join(f"{name} has {color}" for name, color in holds.items()) + "."]
    lines, last = [f"Start: {_held(holds)}"], None
    for _ in range(rng.randint(2, 3)):
        pair = last
        while pair == last:  # the same pair twice in a row would undo itself
            pair = sorted(rng.sample(people, 2))
        last, (a, b) = pair, pair
        holds[a], holds[b] = holds[b], holds[a]
        prompt.append(f"{a} and {b} swap.")
        lines.append(f"Swap {a} and {b}: {_held(holds)}")
    asked = rng.choice(people)
    lines.append(f"Check: {asked} {holds[asked]}.")
    return _task(" ".join(prompt) + f" What does {asked} have?", lines, holds[asked])


def _held(holds: dict[str, str]) -> str:
    return ", ".join(f"{name} {color}" for name, color in holds.items())


def ordering(rng: Random) -> Task:
    """Four people compared in pairs, told in any order; the chain lines the pairs up."""
    people = rng.sample(NAMES, 4)
    pairs = list(zip(people, people[1:], strict=False))
    told = [f"{a} is taller than {b}." if rng.random() < 0.5 else f"{b} is shorter than {a}."
            for a, b in rng.sample(pairs, 3)]
    rank = rng.randrange(4)
    lines = [f"First {people[0]}.", *(f"{a} > {b}" for a, b in pairs), f"Order: {', '.join(people)}",
             f"Check: {RANKS[rank]} {people[rank]}."]
    return _task(" ".join(told) + f" Who is the {RANKS[rank]}?", lines, people[rank])


def queue(rng: Random) -> Task:
    """A place in a line that others join and leave further ahead; the chain writes the place after each change."""
    who, *others = rng.sample(NAMES, 5)
    start = rng.randint(4, LARGEST - 3)
    moves, chain, check, place = tally(rng, start, "?" * rng.randint(3, 4), lowest=1)
    words = ", ".join(f"{other} {'brings' if sign == '+' else 'takes'} {count}"
                      for other, (sign, count) in zip(others, moves, strict=False))
    return _task(f"Find {who}'s new number in line: {start}, {words}.", [chain, check], str(place))


def truth(rng: Random) -> Task:
    """A nested expression of true, false, and, or, not; the chain rewrites one innermost part a line."""
    tree = _tree(rng, 4)
    while _operations(tree) > 5:  # longer chains do not fit the thinking of a tiny model
        tree = _tree(rng, 4)
    prompt, lines = f"Evaluate: {_render(tree)}.", []
    while not isinstance(tree, bool):
        tree, _ = _reduce(tree)
        lines.append(_render(tree))
    result = _render(tree)
    lines.append(f"Check: one value, {result}.")
    return _task(prompt, lines, result)


def _tree(rng: Random, leaves: int) -> Tree:
    if leaves == 1:
        tree: Tree = rng.random() < 0.5
    else:
        left = rng.randint(1, leaves - 1)
        tree = (rng.choice(("and", "or")), _tree(rng, left), _tree(rng, leaves - left))
    return ("not", tree) if rng.random() < 0.2 else tree


def _operations(tree: Tree) -> int:
    return 0 if isinstance(tree, bool) else 1 + sum(_operations(part) for part in tree[1:])


def _render(tree: Tree) -> str:
    if isinstance(tree, bool):
        return "true" if tree else "false"
    if tree[0] == "not":
        return f"not {_operand(tree[1])}"
    return f"{_operand(tree[1])} {tree[0]} {_operand(tree[2])}"


def _operand(tree: Tree) -> str:
    return f"({_render(tree)})" if isinstance(tree, tuple) and tree[0] != "not" else _render(tree)


def _reduce(tree: Tree) -> tuple[Tree, bool]:
    """The tree with its leftmost innermost operation done, and whether there was one to do."""
    if isinstance(tree, bool):
        return tree, False
    parts = list(tree[1:])
    for i, part in enumerate(parts):
        parts[i], done = _reduce(part)
        if done:
            return (tree[0], *parts), True
    if tree[0] == "not":
        return not parts[0], True
    return (all(parts) if tree[0] == "and" else any(parts)), True


SKILLS = {"queue": queue, "swaps": swaps, "ordering": ordering, "truth": truth}
