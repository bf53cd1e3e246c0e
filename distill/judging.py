"""Judge demonstrations: judgements whose truth is known, so that the policy can judge before it has a judge.

The preference stage needs an SFT model that can criticise and score. For problems of the writing generator the
principles can be measured; where answers are matched with a reference, a problem's worked answer matches and that of
another problem does not. Other judged domains start from what the base model can do.
"""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

from distill.corpus import DRAFT_QUALITIES, pairwise_judgement, pointwise_judgement
from distill.matching import match_demonstration, worked_cases
from distill.problems import writing
from pipeline.records import Message, Problem, content_id
from rewards.judge_prompts import pairwise_messages, pointwise_messages

Demonstration = tuple[str, list[Message], str]  # id, prompt, judgement


def judge_demonstrations(problems: Iterable[Problem], seed: int) -> list[Demonstration]:
    """One pointwise and one pairwise demonstration per measurable problem.

    And one right and one wrong match per problem with a free-form reference and a worked answer.
    """
    problems = list(problems)
    rows = [match_demonstration(*case) for case in worked_cases(problems)]
    for problem in problems:
        if not writing.measurable(problem):
            continue
        rng = Random(f"{seed}:judging:{problem.id}")
        first, second = (writing.draft(problem, rng, quality) for quality in rng.sample(DRAFT_QUALITIES, 2))
        rows += [_row(pointwise_messages(problem, first), pointwise_judgement(problem, first)),
                 _row(pairwise_messages(problem, first, second), pairwise_judgement(problem, first, second))]
    return rows


def _row(messages: list[Message], judgement: str) -> Demonstration:
    return content_id(messages, judgement), messages, judgement
