"""Demonstrations of matching an answer with its reference, from answers whose truth is known.

A judge that compares free-form answers (DeepSeek-V3 section 5.2.1) learns it where the comparison is known: samples
that a rule has verified, right and wrong ones alike, and worked answers, each of which matches its own reference alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

from pipeline.records import Message, Problem, Sample, Status, content_id
from rewards.extract import last_box, split_thinking
from rewards.judge_prompts import match_messages

Case = tuple[Problem, str, bool]  # problem, answer, whether they match
SHOWN_WORDS = 20
Demonstration = tuple[str, list[Message], str]  # id, prompt, judgement


def worked_cases(problems: Sequence[Problem]) -> list[Case]:
    """(problem, answer, right) of free-form problems: each with its own worked answer, and with that of the next."""
    problems = [problem for problem in problems if problem.check.kind == "match" and problem.answer]
    cases = []
    for problem, other in zip(problems, problems[1:] + problems[:1], strict=True):
        cases.append((problem, problem.answer or "", True))
        if other.check.reference != problem.check.reference:
            cases.append((problem, other.answer or "", False))
    return cases


def verified_cases(samples: Sequence[Sample], problems: Mapping[str, Problem], count: int, seed: int) -> list[Case]:
    """At most `count` (problem, answer, right) of problems with a math or exact reference, half of them right.

    Each answer of a problem comes once, thinking removed. Fewer come back where either side runs out.
    """
    sides: dict[bool, dict[tuple[str, str], Case]] = {True: {}, False: {}}
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
