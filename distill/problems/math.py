"""Arithmetic in several steps with boxed integer answers between 0 and 40.

Each chain writes every operation with its result and ends by undoing or bounding the last one, so that a small model
can follow a step at a time what it cannot do at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from distill.problems.drawing import NAMES, Task, draw, told_in_order
from pipeline.records import Check, Problem

LARGEST = 20  # a running total
LARGEST_AMOUNT = 4  # of one addition or subtraction to it
FRUIT = ("apples", "pears", "plums", "figs", "limes", "nuts")
THINGS = ("cards", "coins", "books", "pens", "shells", "stamps")
ASK = "Answer in \\boxed{}."


def generate(count: int, seed: int, skills: Sequence[str] | None = None) -> Iterator[Problem]:
    """Up to `count` distinct math problems; see `drawing.draw`."""
    return draw("math", SKILLS, count, seed, skills)


def _task(prompt: str, lines: list[str], result: int) -> Task:
    return Task(prompt=f"{prompt} {ASK}", check=Check(kind="math", reference=str(result)), solution="\n".join(lines),
                answer=f"The answer is \\boxed{{{result}}}.")


def tally(rng: Random, start: int, signs: str, lowest: int = 0) -> tuple[list[tuple[str, int]], str, str, int]:
    """Signed amounts ("?" leaves the sign open) with a running total in lowest..LARGEST.

    Returns the moves, the chain, its check (the last move undone) and the total.
    """
    total, moves, chain = start, [], str(start)
    for sign in signs:
        if sign == "?":
            low, high = total - lowest < LARGEST_AMOUNT, LARGEST - total < LARGEST_AMOUNT
            sign = "+" if low else "-" if high else rng.choice("+-")
        amount = rng.randint(1, min(LARGEST_AMOUNT, total - lowest if sign == "-" else LARGEST - total))
        before, total = total, total - amount if sign == "-" else total + amount
        chain += f" {sign} {amount} -> {total}"
        moves.append((sign, amount))
    return moves, chain, f"Check: {total} {'+' if sign == '-' else '-'} {amount} -> {before}.", total


def running(rng: Random) -> Task:
    """A start value and three or four additions and subtractions."""
    start = rng.randint(3, LARGEST - 3)
    moves, chain, check, total = tally(rng, start, "?" * rng.randint(3, 4))
    words = told_in_order([f"{'add' if sign == '+' else 'subtract'} {amount}" for sign, amount in moves])
    return _task(f"Start with {start}. {words.capitalize()}.", [chain, check], total)


def story(rng: Random) -> Task:
    """A sum and two differences told about one person's things."""
    who, other = rng.sample(NAMES, 2)
    thing, start = rng.choice(THINGS), rng.randint(2 * LARGEST_AMOUNT, LARGEST - LARGEST_AMOUNT)
    moves, chain, check, total = tally(rng, start, "+--")
    found, given, lost = (amount for _, amount in moves)
    return _task(f"How many {thing} are left? {who} has {start}, finds {found}, gives {given} to {other} and loses "
                 f"{lost}.", [chain, check], total)


def shopping(rng: Random) -> Task:
    """Two products, their sum, and the change."""
    first, second = rng.sample(FRUIT, 2)
    a, price_a, b, price_b = (rng.randint(2, 9) for _ in range(4))
    cost = a * price_a + b * price_b
    paid = cost + rng.randint(1, 38)
    lines = [f"{a} * {price_a} = {a * price_a}", f"{b} * {price_b} = {b * price_b}",
             f"{a * price_a} + {b * price_b} = {cost}", f"{paid} - {cost} = {paid - cost}",
             f"Check: {cost} + {paid - cost} = {paid}."]
    return _task(f"{rng.choice(NAMES)} buys {a} {first} at {price_a} each and {b} {second} at {price_b} each "
                 f"and pays {paid}. What is the change?", lines, paid - cost)


def remainder(rng: Random) -> Task:
    """A product and a sum, then what a division leaves."""
    a, b, c, divisor = rng.randint(2, 9), rng.randint(2, 9), rng.randint(10, 40), rng.randint(6, 9)
    value = a * b + c
    quotient, rest = divmod(value, divisor)
    lines = [f"{a} * {b} = {a * b}", f"{a * b} + {c} = {value}", f"{quotient} * {divisor} = {quotient * divisor}",
             f"{value} - {quotient * divisor} = {rest}", f"Check: {rest} is less than {divisor}."]
    return _task(f"What is left when {a} * {b} + {c} is divided by {divisor}?", lines, rest)


def digits(rng: Random) -> Task:
    """The digits added up, again and again, to a single one."""
    number = value = rng.randint(1000, 99999)
    lines = []
    while value > 9:
        total, *others = (int(digit) for digit in str(value))
        for digit in others:
            lines.append(f"{total} + {digit} = {total + digit}")
            total += digit
        value = total
    lines.append(f"Check: {value} is one digit.")
    return _task(f"Add the digits of {number} until one digit is left.", lines, value)


SKILLS = {"running": running, "story": story, "shopping": shopping, "remainder": remainder, "digits": digits}
