"""Held-out accuracy of one model: greedy pass@1, pass@k, and win rate where no rule can check."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evaluation.statistics import pass_at_k, wilson
from pipeline.records import Problem, Sample, Status
from rewards.extract import split_thinking
from rewards.judge import Judge

ALL = "all"


def accuracy(greedy: Sequence[Sample], sampled: Sequence[Sample], k: int) -> dict[str, Any]:
    """Row of evaluation.json from verified samples of one model and domain.

    n counts problems with a verdict: an infra_error or abstain says nothing about the answer and leaves n.
    """
    judged = [sample for sample in greedy if sample.verdict is not None and sample.verdict.score is not None]
    right = sum(sample.verdict.status is Status.CORRECT for sample in judged)
    tries: dict[str, list[bool]] = {}
    for sample in sampled:
        if sample.verdict is not None and sample.verdict.score is not None:
            tries.setdefault(sample.problem_id, []).append(sample.verdict.status is Status.CORRECT)
    whole = [sum(results) for results in tries.values() if len(results) == k]
    return row(right, len(judged), pass_at_k(whole, k, k) if whole else None)


def row(successes: float, n: int, pass_at_k: float | None) -> dict[str, Any]:
    return {"n": n, "accuracy": successes / n if n else None, "ci95": list(wilson(successes, n)),
            "pass_at_k": pass_at_k}


def pooled(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The extra domain "all": checkable domains together, each problem with the same weight; pass@k is their mean."""
    n = sum(found["n"] for found in rows.values())
    right = sum(found["accuracy"] * found["n"] for found in rows.values() if found["n"])
    known = [found["pass_at_k"] for found in rows.values() if found["pass_at_k"] is not None]
    return row(right, n, sum(known) / len(known) if known else None)


Measure = Callable[[Problem, str], float | None]
"""How good a text is by a program's account; None where no program can say."""


def win_rate(judge: Judge | None, measure: Measure, problems: Sequence[Problem], ours: Sequence[str],
             theirs: Sequence[str]) -> dict[str, Any]:
    """Share of problems on which `ours` beats `theirs`; a tie counts half.

    `measure` decides where it can: it was never a reward, so a model that learned to please its judge gains nothing.
    Elsewhere `judge` decides in both orders (disagreement is a tie, an abstention leaves n).
    An answer that is empty or whose thinking is broken loses to one that is neither.
    """
    pairs = [tuple(_shown(text) for text in pair) for pair in zip(ours, theirs, strict=True)]
    measured = [[measure(problem, text) for text in pair] for problem, pair in zip(problems, pairs, strict=True)]
    asked = [i for i, (a, b) in enumerate(pairs) if a and b and None in measured[i]]
    compared = dict(zip(asked, judge.compare([problems[i] for i in asked], [ours[i] for i in asked],
                                             [theirs[i] for i in asked], votes=2), strict=True)) if asked else {}
    leads: list[float] = []
    for i, (a, b) in enumerate(pairs):
        if not (a and b):
            leads.append(bool(a) - bool(b))
        elif i not in compared:
            leads.append(measured[i][0] - measured[i][1])
        elif compared[i].score_a is not None:
            leads.append((compared[i].score_a - compared[i].score_b) * compared[i].consistent)
    return row(sum(0.5 if lead == 0 else float(lead > 0) for lead in leads), len(leads), None)


def _shown(completion: str) -> str:
    """What a reader sees of a completion: the answer, or nothing when its thinking is broken."""
    thinking = split_thinking(completion)
    return thinking.answer.strip() if thinking.well_formed else ""
