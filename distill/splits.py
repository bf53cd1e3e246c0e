"""Splits that never share a problem: corpus, sft, preference, rl, heldout.

Two problems count as the same when their normalised prompts are (`prompts.prompt_key`), whatever their ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from random import Random

from distill.prompts import prompt_key
from pipeline.recipe import SPLITS, DomainConfig
from pipeline.records import Problem
from pipeline.stage import StageError


def assign(problems: Mapping[str, list[Problem]], domains: Mapping[str, DomainConfig], seed: int) -> list[Problem]:
    """Problems with `split` set, exactly as many per split as `domains[name].splits` asks for.

    Problems that come with split "heldout" (a held-out file) feed that split alone, and where a domain has any,
    nothing else does; a training row with the same prompt as one of them, in any domain, is left out. The
    draw depends on the seed and the set of problems, not on their order. Raises StageError naming domain, split
    and counts when there are too few.
    """
    reserved = {prompt_key(p.messages) for rows in problems.values() for p in rows if p.split == "heldout"}
    seen: set[str] = set()
    assigned: list[Problem] = []
    for name, config in domains.items():
        held, open_rows, repeats = [], [], 0
        for problem in sorted(problems.get(name, []), key=lambda p: p.id):
            key = prompt_key(problem.messages)
            if key in seen or (problem.split != "heldout" and key in reserved):
                repeats += 1
                continue
            seen.add(key)
            (held if problem.split == "heldout" else open_rows).append(problem)
        rng = Random(f"{seed}:{name}")
        rng.shuffle(held)
        rng.shuffle(open_rows)
        # the held-out rows are drawn first, so that asking for more training rows never changes them
        for split in ("heldout", *(s for s in SPLITS if s != "heldout")):
            wanted = config.splits.get(split, 0)
            rows = held if split == "heldout" and held else open_rows
            if len(rows) < wanted:
                raise StageError(_too_few(name, split, wanted, len(rows), config, len(problems.get(name, [])), repeats))
            assigned += [dataclasses.replace(problem, split=split) for problem in rows[:wanted]]
            del rows[:wanted]
    check_disjoint(assigned)
    return assigned


def check_disjoint(problems: list[Problem]) -> None:
    """Raise StageError when two problems of different splits have the same prompt."""
    owner: dict[str, Problem] = {}
    for problem in problems:
        other = owner.setdefault(prompt_key(problem.messages), problem)
        if other.split != problem.split:
            raise StageError(f"problem {problem.id} ({problem.domain}, {problem.split}) has the prompt of {other.id} "
                             f"({other.domain}, {other.split}): splits must not share a problem")


def _too_few(name: str, split: str, wanted: int, left: int, config: DomainConfig, total: int, repeats: int) -> str:
    asked = ", ".join(f"{s} {n}" for s, n in config.splits.items())
    return (f"domains.{name}.splits.{split}: {wanted} problems wanted, {left} left of the {total} the source gave "
            f"({repeats} of them repeats; asked for in all: {asked}); lower the splits or give the source more "
            f"rows or skills")
