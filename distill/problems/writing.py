"""Short texts without a reference answer, judged by principles (DeepSeek-V3, section 5.2.1, model-based rewards).

The principles come from a family that a program can measure by its cue in the text. `measure` writes the judge
demonstrations of a tiny base and tells how good a judge is; it is never a reward.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

from distill.problems.drawing import NAMES, Task, draw
from pipeline.records import Check, Problem

NOUNS = ("cat", "dog", "bird", "horse", "rain", "snow", "tree", "river", "house", "school", "train", "boat", "bread",
         "tea", "book", "ball")
QUALITIES = ("good", "new", "dark", "big", "warm", "cold", "nice", "small", "quiet", "bright", "long", "sweet")


@dataclass(frozen=True)
class Demand:
    """A principle, the word for it in a critique, a sentence that meets it, and the pattern that tells such texts."""

    principle: str
    word: str
    text: str
    cue: str


# in the order of their place in a text; what a text is about stands after the greeting
DEMANDS = (
    Demand("It greets the reader.", "greets", "Hello {name}.", r"\bHello\b"),
    Demand("It says when.", "when", "We saw it today.", r"\btoday\b"),
    Demand("It says why.", "why", "I like it because it is {quality}.", r"\bbecause\b"),
    Demand("It asks a question.", "asks", "Do you like the {noun}?", r"\?"),
    Demand("It thanks the reader.", "thanks", "Thanks for reading.", r"\bThanks\b"),
)
SUBJECT = "The {noun} is {quality}."
# what each kind of text asks for
ASKED = {"note": ("when", "why"), "letter": ("greets", "why", "thanks"), "question": ("greets", "asks")}
PROMPT = "Write a {kind} to {name} about the {quality} {noun}."
_PROMPT = re.compile(r"Write a (?P<kind>\w+) to (?P<name>\w+) about the (?P<quality>\w+) (?P<noun>\w+)\.")
_BY_PRINCIPLE = {demand.principle: demand for demand in DEMANDS}


def generate(count: int, seed: int, skills: Sequence[str] | None = None) -> Iterator[Problem]:
    """Up to `count` distinct writing problems; see `drawing.draw`."""
    return draw("writing", SKILLS, count, seed, skills)


def _task(rng: Random, kind: str) -> Task:
    values = {"name": rng.choice(NAMES), "noun": rng.choice(NOUNS), "quality": rng.choice(QUALITIES)}
    asked = [demand for demand in DEMANDS if demand.word in ASKED[kind]]
    return Task(prompt=PROMPT.format(kind=kind, **values),
                check=Check(kind="principles", principles=tuple(demand.principle for demand in asked)),
                solution=f"Parts: {' '.join(demand.text.format(**values) for demand in asked)}\n"
                         f"Check: {', '.join(demand.word for demand in asked)}.",
                answer=_compose(values, asked))


SKILLS = {kind: partial(_task, kind=kind) for kind in ASKED}


def _compose(values: dict[str, str], demands: Sequence[Demand]) -> str:
    parts = [demand.text.format(**values) for demand in DEMANDS if demand in demands]
    parts.insert(int(DEMANDS[0] in demands), SUBJECT.format(**values))
    return " ".join(parts)


def _demands(problem: Problem) -> list[Demand]:
    foreign = [principle for principle in problem.check.principles if principle not in _BY_PRINCIPLE]
    if foreign:
        raise ValueError(f"principle {foreign[0]!r} is not one a program can measure; the measurable ones are "
                         f"{', '.join(_BY_PRINCIPLE)}")
    return [_BY_PRINCIPLE[principle] for principle in problem.check.principles]


def measurable(problem: Problem) -> bool:
    """Whether the problem comes from this generator, so that a program can draft texts and say what they meet."""
    return problem.source == "generated:writing"


def measure(problem: Problem, text: str) -> list[bool]:
    """Whether `text` meets each of the problem's principles, in order. Raises ValueError for a foreign principle."""
    return [re.search(demand.cue, text, re.IGNORECASE) is not None for demand in _demands(problem)]


def score(problem: Problem, text: str) -> int:
    """0 to 10: ten times the share of principles met, rounded."""
    met = measure(problem, text)
    return round(10 * sum(met) / len(met))


def critique(problem: Problem, text: str) -> str:
    """One clause per principle in order, such as `greets yes. why no.`"""
    return " ".join(f"{demand.word} {'yes' if met else 'no'}."
                    for demand, met in zip(_demands(problem), measure(problem, text), strict=True))


def draft(problem: Problem, rng: Random, quality: float) -> str:
    """A text that meets round(quality x principles) of the principles, chosen at random, and fails the others.

    Each part that nobody asked for is in it by the toss of a coin, so that neither a text's length nor its parts
    tell how good it is.
    """
    asked = _demands(problem)
    met = rng.sample(asked, round(quality * len(asked)))
    unasked = [demand for demand in DEMANDS if demand not in asked and rng.random() < 0.5]
    return _compose(_PROMPT.match(problem.messages[-1]["content"]).groupdict(), [*met, *unasked])
