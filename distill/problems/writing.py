"""Short notes without a reference answer, judged by principles (DeepSeek-V3, section 5.2.1, model-based rewards).

The principles come from a family that a program can measure. `measure` writes the judge demonstrations of a
tiny base and tells how good a judge is; it is never a reward.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from random import Random

from distill.problems.drawing import NAMES, Task, draw
from pipeline.records import Check, Problem

NOUNS = ("cat", "dog", "bird", "horse", "rain", "snow", "tree", "river", "house", "school", "train", "boat", "bread",
         "tea", "book", "ball")
QUALITIES = ("good", "new", "old", "big", "warm", "cold", "nice")
ABOUT_ONE = ("The {a} is {q}.", "I like the {a}.", "We saw the {a} today.", "The {a} was {q} today.")
ABOUT_TWO = ("The {a} is near the {b}.", "I like the {a} and the {b}.", "We saw the {a} and the {b}.")
ABOUT_NONE = ("It is a {q} day.", "We are happy.", "I am at home.")
SENTENCES = range(1, 5)

_MENTIONS = re.compile(r"It mentions the (\w+)\.")
_COUNT = re.compile(r"It has (\d+) sentences?\.")
_START = re.compile(r"It starts with (Dear \w+,)")
_END = re.compile(r"It ends with (Thank you, \w+\.)")


def generate(count: int, seed: int, skills: Sequence[str] | None = None) -> Iterator[Problem]:
    """Up to `count` distinct writing problems; see `drawing.draw`."""
    return draw("writing", SKILLS, count, seed, skills)


def _task(rng: Random, prompt: str, principles: tuple[str, ...], plan: str, check: str) -> Task:
    return Task(prompt=prompt, check=Check(kind="principles", principles=principles),
                solution=f"{plan}\nCheck: {check}.", answer=_draft(principles, rng, 1.0))


def note(rng: Random) -> Task:
    """A number of sentences about two things."""
    a, b = rng.sample(NOUNS, 2)
    count = rng.randint(1, 3)
    sentences = f"{count} sentence{'s' * (count > 1)}"
    return _task(rng, f"Write {sentences} about the {a} and the {b}.",
                 (f"It mentions the {a}.", f"It mentions the {b}.", f"It has {sentences}."),
                 f"Mention the {a} and the {b}. Use {sentences}.", f"{a}, {b}, {sentences}")


def letter(rng: Random) -> Task:
    """A note that opens by addressing someone."""
    (a, b), name = rng.sample(NOUNS, 2), rng.choice(NAMES)
    return _task(rng, f"Write about the {a} and the {b}. Start with: Dear {name},",
                 (f"It starts with Dear {name},", f"It mentions the {a}.", f"It mentions the {b}."),
                 f"Start with Dear {name}, and mention the {a} and the {b}.", f"Dear {name}, {a}, {b}")


def thanks(rng: Random) -> Task:
    """A note that closes by thanking someone."""
    (a, b), name = rng.sample(NOUNS, 2), rng.choice(NAMES)
    return _task(rng, f"Write about the {a} and the {b}. End with: Thank you, {name}.",
                 (f"It mentions the {a}.", f"It mentions the {b}.", f"It ends with Thank you, {name}."),
                 f"Mention the {a} and the {b}. End with Thank you, {name}.", f"{a}, {b}, Thank you, {name}")


SKILLS = {"note": note, "letter": letter, "thanks": thanks}


def _sentences(text: str) -> int:
    return len(re.findall(r"[.!?]+(?=\s|$)", text.strip()))


def _mentioned(noun: str, text: str) -> bool:
    return re.search(rf"\b{noun}\b", text, re.IGNORECASE) is not None


def _finding(principle: str, text: str) -> tuple[str, bool]:
    """What a principle looks at, in a word or two, and whether the text meets it."""
    if found := _MENTIONS.fullmatch(principle):
        return found[1], _mentioned(found[1], text)
    if found := _COUNT.fullmatch(principle):
        count = _sentences(text)
        return f"{count} sentence{'s' * (count != 1)}", count == int(found[1])
    if found := _START.fullmatch(principle):
        return "start", text.strip().startswith(found[1])
    if found := _END.fullmatch(principle):
        return "end", text.strip().endswith(found[1])
    raise ValueError(f"principle {principle!r} is not one a program can measure; the measurable ones mention a "
                     "noun, count sentences, or fix the start or the end")


def measure(problem: Problem, text: str) -> list[bool]:
    """Whether `text` meets each of the problem's principles, in order. Raises ValueError for a foreign principle."""
    return [_finding(principle, text)[1] for principle in problem.check.principles]


def score(problem: Problem, text: str) -> int:
    """0 to 10: ten times the share of principles met, rounded."""
    met = measure(problem, text)
    return round(10 * sum(met) / len(met))


def critique(problem: Problem, text: str) -> str:
    """One clause per principle in order, such as `cat yes. rain no. 3 sentences no.`"""
    findings = (_finding(principle, text) for principle in problem.check.principles)
    return " ".join(f"{what} {'yes' if met else 'no'}." for what, met in findings)


def draft(problem: Problem, rng: Random, quality: float) -> str:
    """A text that meets round(quality x principles) of the principles, chosen at random, and fails the others."""
    return _draft(problem.check.principles, rng, quality)


def _draft(principles: tuple[str, ...], rng: Random, quality: float) -> str:
    met = set(rng.sample(range(len(principles)), round(quality * len(principles))))
    nouns, opening, closing, counts = [], "", "", [2, 3]
    for i, principle in enumerate(principles):
        if found := _MENTIONS.fullmatch(principle):
            nouns += [found[1]] * (i in met)
        elif found := _COUNT.fullmatch(principle):
            counts = [n for n in SENTENCES if (n == int(found[1])) == (i in met)]
        elif found := _START.fullmatch(principle):
            opening = found[1] if i in met else rng.choice(("", f"Dear {rng.choice(_others(found[1]))},"))
        elif found := _END.fullmatch(principle):
            closing = found[1] if i in met else rng.choice(("", f"Thank you, {rng.choice(_others(found[1]))}."))
        else:
            _finding(principle, "")  # raises for a foreign principle
    forbidden = {found[1] for p in principles if (found := _MENTIONS.fullmatch(p))}
    count = rng.choice(counts) - bool(closing)
    places = [rng.randrange(count) for _ in nouns]
    body = [_sentence(rng, [n for n, place in zip(nouns, places, strict=True) if place == i], forbidden)
            for i in range(count)]
    return " ".join(part for part in (opening, *body, closing) if part)


def _others(phrase: str) -> list[str]:
    return [name for name in NAMES if name not in phrase]


def _sentence(rng: Random, nouns: list[str], forbidden: set[str]) -> str:
    """A sentence with these nouns; without any, one about nothing or about a noun nobody asked for."""
    if not nouns and rng.random() < 0.5:
        nouns = [rng.choice([noun for noun in NOUNS if noun not in forbidden])]
    template = rng.choice((ABOUT_NONE, ABOUT_ONE, ABOUT_TWO)[len(nouns)])
    values = dict(zip("ab", rng.sample(nouns, len(nouns)), strict=False))
    return template.format(q=rng.choice(QUALITIES), **values)
