"""Drawing distinct problems from skills: round robin, one random stream per skill, no prompt twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from distill.prompts import prompt_key
from pipeline.records import Check, Problem

NAMES = ("Ann", "Bob", "Cid", "Dan", "Eve", "Fay", "Gus", "Ida")
ORDER = ("first", "then", "next")
GIVE_UP = 500  # repeats in a row after which a skill counts as exhausted


@dataclass(frozen=True)
class Task:
    """What a skill's maker returns. `solution` is the worked chain, `answer` what the user sees."""

    prompt: str
    check: Check
    solution: str
    answer: str


def order_words(count: int) -> tuple[str, ...]:
    """A word of its own for each of two to four moves to be found by: first, then, next, last."""
    return (*ORDER[:count - 1], "last")


def told_in_order(moves: Sequence[str]) -> str:
    """Two to four moves as `first A, then B, next C, last D`."""
    return ", ".join(f"{when} {move}" for when, move in zip(order_words(len(moves)), moves, strict=True))


def draw(domain: str, makers: Mapping[str, Callable[[Random], Task]], count: int, seed: int,
         skills: Sequence[str] | None = None) -> Iterator[Problem]:
    """Yield up to `count` problems with pairwise different prompts; split is "" until `splits.assign`.

    The same seed and skills give the same stream, and a smaller count its beginning. When all skills are
    exhausted the stream ends early. Raises ValueError for an unknown skill.
    """
    names = list(skills) if skills is not None else list(makers)
    unknown = sorted(set(names) - set(makers))
    if unknown or not names:
        raise ValueError(f"{domain} has no skills {unknown}; choose from {', '.join(makers)}")
    streams = {name: Random(f"{seed}:{domain}:{name}") for name in names}
    seen: set[str] = set()
    made = 0
    while streams:
        for name in list(streams):
            if made == count:
                return
            problem = _fresh(domain, name, makers[name], streams[name], seen)
            if problem is None:
                del streams[name]
            else:
                made += 1
                yield problem


def _fresh(domain: str, skill: str, maker: Callable[[Random], Task], rng: Random, seen: set[str]) -> Problem | None:
    for _ in range(GIVE_UP):
        task = maker(rng)
        messages = ({"role": "user", "content": task.prompt},)
        key = prompt_key(messages)
        if key not in seen:
            seen.add(key)
            return Problem(id=Problem.make_id(messages, task.check), domain=domain, skill=skill, messages=messages,
                           check=task.check, source=f"generated:{domain}", split="", solution=task.solution,
                           answer=task.answer)
    return None
