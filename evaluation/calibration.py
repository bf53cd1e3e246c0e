"""How well a generative judge does on held-out pairs, before it may be a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.records import Problem
from rewards.judge import Judge

LabelledPair = tuple[Problem, str, str, float]  # problem, A, B, how much better A is (never 0)


def calibrate(judge: Judge, pairs: Sequence[LabelledPair], truth: str) -> dict[str, Any]:
    """Accuracy, pairwise accuracy, consistency and abstentions over pairs whose better answer is known.

    `truth` says where the labels come from and is passed on. `accuracy` compares the scores given one at a time, the
    form of the reward; `pairwise_accuracy` those of both orders together. Equal scores count half, so that a judge
    that knows nothing gets one half; an abstention counts as wrong. None without pairs.
    """
    problems, first, second = ([pair[i] for pair in pairs] for i in range(3))
    abstained = consistent = 0
    pairwise = pointwise = 0.0
    for (_, _, _, gap), comparison in zip(pairs, judge.compare(problems, first, second, votes=2), strict=True):
        if comparison.score_a is None or comparison.score_b is None:
            abstained += 1
            continue
        consistent += comparison.consistent
        pairwise += _credit(comparison.score_a, comparison.score_b, gap)
    for (_, _, _, gap), a, b in zip(pairs, judge.score(problems, first), judge.score(problems, second), strict=True):
        pointwise += _credit(a.score, b.score, gap)
    n = len(pairs)
    return {"n": n, "truth": truth, "accuracy": pointwise / n if n else None,
            "pairwise_accuracy": pairwise / n if n else None,
            "consistency": consistent / (n - abstained) if n > abstained else None,
            "abstain_rate": abstained / n if n else None}


def _credit(score_a: float | None, score_b: float | None, gap: float) -> float:
    if score_a is None or score_b is None:
        return 0.0
    lead = (score_a - score_b) * gap
    return 0.5 if lead == 0 else float(lead > 0)
