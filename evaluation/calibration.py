"""How well a generative judge does on held-out pairs, before it may be a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.records import Problem
from rewards.judge import Judge

LabelledPair = tuple[Problem, str, str, float]  # problem, A, B, how much better A is (never 0)


def calibrate(judge: Judge, pairs: Sequence[LabelledPair], truth: str) -> dict[str, Any]:
    """Pairwise accuracy in both orders, consistency and abstentions over pairs whose better answer is known.

    `truth` says where the labels come from and is passed on. `accuracy` is None without pairs; an abstention
    counts as wrong. `pointwise_accuracy` compares the two scores given one at a time, the form of the reward.
    """
    problems, first, second = ([pair[i] for pair in pairs] for i in range(3))
    right = abstained = consistent = pointwise_right = 0
    for (_, _, _, gap), comparison in zip(pairs, judge.compare(problems, first, second, votes=2), strict=True):
        if comparison.score_a is None or comparison.score_b is None:
            abstained += 1
            continue
        consistent += comparison.consistent
        right += (comparison.score_a - comparison.score_b) * gap > 0
    for (_, _, _, gap), a, b in zip(pairs, judge.score(problems, first), judge.score(problems, second), strict=True):
        pointwise_right += a.score is not None and b.score is not None and (a.score - b.score) * gap > 0
    n = len(pairs)
    return {"n": n, "truth": truth, "accuracy": right / n if n else None,
            "pointwise_accuracy": pointwise_right / n if n else None,
            "consistency": consistent / (n - abstained) if n > abstained else None,
            "abstain_rate": abstained / n if n else None}
