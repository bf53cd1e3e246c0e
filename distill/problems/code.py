"""Short functions composed of steps, in Python and C, with hidden tests.

The answer folds all steps into one expression; the chain grows that expression a step a line. Expected outputs
come from composing Python callables, not from the answer's text, so a test that runs the answer proves both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from distill.problems.drawing import Task, draw, order_words, told_in_order
from pipeline.records import Check, Problem

TESTS = 5
SUM, PRODUCT, MINUS, POWER, ATOM = range(5)  # how tightly an expression binds, loosest first


def generate(count: int, seed: int, skills: Sequence[str] | None = None) -> Iterator[Problem]:
    """Up to `count` distinct code problems; see `drawing.draw`."""
    return draw("code", SKILLS, count, seed, skills)


@dataclass(frozen=True)
class Expression:
    text: str
    binding: int

    def at_least(self, binding: int) -> str:
        return self.text if self.binding >= binding else f"({self.text})"


@dataclass(frozen=True)
class Step:
    """One operation on an integer: the words for it, on a number and on each of a list, its text and its value."""

    kind: str
    words: str
    each: str
    write: Callable[[Expression], Expression]
    compute: Callable[[int], int]


def _step(rng: Random, kind: str) -> Step:
    k = rng.randint(1, 20) if kind in ("add", "subtract") else rng.randint(2, 9)
    if kind == "add":
        return Step(kind, f"add {k}", f"add {k} to each",
                    lambda e: Expression(f"{e.at_least(SUM)} + {k}", SUM), lambda x: x + k)
    if kind == "subtract":
        return Step(kind, f"subtract {k}", f"subtract {k} from each",
                    lambda e: Expression(f"{e.at_least(SUM)} - {k}", SUM), lambda x: x - k)
    if kind == "multiply":
        return Step(kind, f"multiply by {k}", f"multiply each by {k}",
                    lambda e: Expression(f"{e.at_least(PRODUCT)} * {k}", PRODUCT), lambda x: x * k)
    if kind == "square":
        return Step(kind, "square", "square each",
                    lambda e: Expression(f"{e.at_least(ATOM)} ** 2", POWER), lambda x: x * x)
    return Step(kind, "negate", "negate each",
                lambda e: Expression(f"-{e.at_least(POWER)}", MINUS), lambda x: -x)


ARITHMETIC = ("add", "subtract", "multiply")


def _steps(rng: Random, count: int, kinds: Sequence[str] = (*ARITHMETIC, "square", "negate"),
           weights: Sequence[int] = (5, 5, 4, 1, 1)) -> list[Step]:
    """`count` steps, neighbours of different kinds, at most one square (values stay inside a C int)."""
    steps: list[Step] = []
    while len(steps) < count:
        kind = rng.choices(kinds, weights[:len(kinds)])[0]
        used = {step.kind for step in steps}
        if not (steps and steps[-1].kind == kind) and not (kind == "square" and kind in used):
            steps.append(_step(rng, kind))
    return steps


def _fold(steps: list[Step]) -> tuple[Expression, list[str]]:
    """The expression of all steps on x, and a line `when: expression so far` for each."""
    expression, lines = Expression("x", ATOM), []
    for when, step in zip(order_words(len(steps)), steps, strict=True):
        expression = step.write(expression)
        lines.append(f"{when}: {expression.text}")
    return expression, lines


def _run(steps: list[Step], x: int) -> int:
    for step in steps:
        x = step.compute(x)
    return x


def _task(prompt: str, lines: list[str], code: str, cases: list[tuple[object, object]], language: str) -> Task:
    tests = json.dumps([{"args": [given], "expected": expected} for given, expected in cases])
    return Task(prompt=prompt, solution="\n".join([*lines, f"Check: all {len(lines)} steps are there."]),
                answer=f"```{language}\n{code}\n```",
                check=Check(kind="code", language=language, entry_point="f", tests=tests))


def python_int(rng: Random) -> Task:
    """Three steps on one integer."""
    return _integer_task(_steps(rng, 3, ARITHMETIC), rng, "f(x) in Python", "def f(x):\n    return {}", "python")


def c_int(rng: Random) -> Task:
    """Three steps on one int, in C."""
    return _integer_task(_steps(rng, 3, ARITHMETIC), rng, "int f(int x) in C",
                         "int f(int x) {{\n    return {};\n}}", "c")


def _integer_task(steps: list[Step], rng: Random, what: str, code: str, language: str) -> Task:
    expression, lines = _fold(steps)
    cases = [(x, _run(steps, x)) for x in _inputs(rng, (0, -1))]
    told = told_in_order([step.words for step in steps])
    return _task(f"Write {what}: {told}.", lines, code.format(expression.text), cases, language)


def python_branch(rng: Random) -> Task:
    """One of two steps, chosen by comparing with a bound."""
    bound, above = rng.randint(-9, 20), rng.random() < 0.5
    yes, no = _steps(rng, 2)
    comparison = f"x {'>' if above else '<'} {bound}"
    then, otherwise = (step.write(Expression("x", ATOM)).text for step in (yes, no))
    cases = [(x, (yes if (x > bound if above else x < bound) else no).compute(x))
             for x in _inputs(rng, (bound, bound + 1, bound - 1))]
    return _task(f"Write a Python function f(x): if x is {'above' if above else 'below'} {bound} {yes.words}, "
                 f"else {no.words}, return the result.",
                 [f"if: {comparison}", f"{yes.words}: {then}", f"else {no.words}: {otherwise}"],
                 f"def f(x):\n    if {comparison}:\n        return {then}\n    return {otherwise}", cases, "python")


def _inputs(rng: Random, edges: tuple[int, ...]) -> list[int]:
    others = [x for x in range(-30, 31) if x not in edges]
    return [*edges, *rng.sample(others, TESTS - len(edges))]


FILTERS: dict[str, tuple[str, Callable[[int, int], bool]]] = {
    "even numbers": ("x % 2 == 0", lambda x, k: x % 2 == 0),
    "odd numbers": ("x % 2 == 1", lambda x, k: x % 2 == 1),
    "numbers above {k}": ("x > {k}", lambda x, k: x > k),
    "numbers below {k}": ("x < {k}", lambda x, k: x < k),
}
REDUCERS: dict[str, tuple[str, Callable[[list[int]], object]]] = {
    "sum": ("sum({e} for x in xs if {test})", sum),
    "list": ("[{e} for x in xs if {test}]", list),
    "sorted list": ("sorted({e} for x in xs if {test})", sorted),
    "largest or 0": ("max(({e} for x in xs if {test}), default=0)", lambda xs: max(xs, default=0)),
}


def python_list(rng: Random) -> Task:
    """Filter a list, map two steps over it, reduce it."""
    what, (test, keeps) = rng.choice(list(FILTERS.items()))
    k = rng.randint(-5, 9)
    what, test = what.format(k=k), test.format(k=k)
    returned, (call, reduce) = rng.choice(list(REDUCERS.items()))
    steps = _steps(rng, 2)
    expression, lines = _fold(steps)
    near = [k - 1, k, k + 1, -2, 3]
    # a lone number that the filter takes out shows at once when an answer forgot the filter
    alone = next(x for x in range(k - 3, k + 4) if not keeps(x, k) and _run(steps, x))
    lists = [[], [alone], near,
             *([rng.randint(-12, 15) for _ in range(rng.randint(4, 7))] for _ in range(TESTS - 3))]
    cases = [(xs, reduce([_run(steps, x) for x in xs if keeps(x, k)])) for xs in lists]
    words = ", ".join(step.each for step in steps)
    return _task(f"Write a Python function f(xs): keep the {what}, {words}, return the {returned}.",
                 [f"keep: {test}", *lines, f"return: {returned}"],
                 f"def f(xs):\n    return {call.format(e=expression.text, test=test)}", cases, "python")


SKILLS = {"python_int": python_int, "python_list": python_list, "python_branch": python_branch, "c_int": c_int}
