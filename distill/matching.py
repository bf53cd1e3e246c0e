"""Demonstrations of matching an answer with its reference, from answers whose truth a rule has already told.

A judge that compares free-form answers (DeepSeek-V3 section 5.2.1) learns it where the comparison is known: verified
samples of problems with a reference, right and wrong ones alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

from pipeline.records import Message, Problem, Sample, Status, content_id
from rewards.extract import last_box, split_thinking
from rewards.judge_prompts import match_messages

SHOWN_WORDS = 20
Demonstration = tuple[str, list[Message], str]  # id, prompt, judgement


def match_cases(samples: Sequence[Sample], problems: Mapping[str, Problem], count: int, seed: int
                ) -> list[tuple[Problem, str, bool]]:
    """At most `count` (problem, answer, right) of problems with a math or exact reference, half of them right.

    Each answer of a problem comes once, thinking removed. Fewer come back where either side runs out.
    """
    sides: dict[bool, dict[tuple[str, str], tuple[Problem, str, bool]]] = {True: {}, False: {}}
    for sample in samples:
        problem, verdict = problems[sample.problem_id], sample.verdict
        if problem.check.kind not in ("math", "exact") or verdict is None:
            continue
        if verdict.status in (Status.CORRECT, Status.WRONG):
            answer, right = split_thinking(sample.completion).answer.strip(), verdict.status is Status.CORRECT
            sides[right][problem.id, answer] = (problem, answer, right)
    rng = Random(f"{seed}:matching")
    drawn = []
    for side in sides.values():
        rows = list(side.values())
        rng.shuffle(rows)
        drawn.append(rows[:count // 2])
    return [case for pair in zip(*drawn, strict=False) for case in pair]


def match_demonstration(problem: Problem, answer: str, right: bool) -> Demonstration:
    """The judgement a judge should write: what either says, then the verdict."""
    said = last_box(answer, "").value or " ".join(answer.split()[:SHOWN_WORDS])
    judgement = (f"The reference says {problem.check.reference}. The answer says {said}.\n"
                 f"Match: {'yes' if right else 'no'}")
    messages = match_messages(problem, answer)
    return content_id(messages, judgement), messages, judgement
