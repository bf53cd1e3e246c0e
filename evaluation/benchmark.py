"""Held-out accuracy of one model: greedy pass@1, pass@k, and win rate where no rule can check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.statistics import pass_at_k, wilson
from pipeline.records import Sample, Status
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


def win_rate(judge: Judge, problems: Sequence[Any], ours: Sequence[str], theirs: Sequence[str]) -> dict[str, Any]:
    """Share of problems on which `ours` beats `theirs`, judged in both orders; a tie or disagreement counts half.

    An answer the judge is not asked about (empty, or broken thinking) loses to one it is.
    """
    from rewards.extract import split_thinking

    valid = [[bool(thinking.well_formed and thinking.answer.strip()) for thinking in map(split_thinking, texts)]
             for texts in (ours, theirs)]
    asked = [i for i in range(len(problems)) if valid[0][i] and valid[1][i]]
    compared = dict(zip(asked, judge.compare([problems[i] for i in asked], [ours[i] for i in asked],
                                             [theirs[i] for i in asked], votes=2), strict=True))
    points, n = 0.0, 0
    for i in range(len(problems)):
        if i not in compared:
            points, n = points + (0.5 if valid[0][i] == valid[1][i] else float(valid[0][i])), n + 1
        elif compared[i].score_a is not None:
            gap = compared[i].score_a - compared[i].score_b
            points, n = points + (0.5 if not compared[i].consistent or gap == 0 else float(gap > 0)), n + 1
    return row(points, n, None)
