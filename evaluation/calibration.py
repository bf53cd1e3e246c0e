"""How well a generative judge does on held-out pairs, before it may be a reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pipeline.records import Check, Problem, Status
from rewards.judge import Judge

LabelledPair = tuple[Problem, str, str, float]  # problem, A, B, how much better A is (never 0)
MatchCase = tuple[Problem, str, bool]  # problem with a reference, answer, whether they match


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
    ranked: list[tuple[float, float]] = []
    for (_, _, _, gap), a, b in zip(pairs, judge.score(problems, first), judge.score(problems, second), strict=True):
        credit = _credit(a.score, b.score, gap)
        pointwise += credit
        if a.score is not None and b.score is not None:
            ranked.append((0.5 + abs(a.score - b.score) / 2, credit))
    n = len(pairs)
    return {"n": n, "truth": truth, "accuracy": pointwise / n if n else None,
            "pairwise_accuracy": pairwise / n if n else None,
            "consistency": consistent / (n - abstained) if n > abstained else None,
            "abstain_rate": abstained / n if n else None, "ece": expected_calibration_error(ranked)}


def clear_cases(judge: Judge, pairs: Sequence[LabelledPair], count: int = 4) -> list[tuple[Problem, str, Status]]:
    """Answers of the first pairs that the judge finds right and wrong as it should: its canaries from then on."""
    cases = [(problem, text, gap * sign > 0) for problem, a, b, gap in pairs[:16 * count]
             for text, sign in ((a, 1), (b, -1))]
    verdicts = judge.score([problem for problem, _, _ in cases], [text for _, text, _ in cases])
    clear: dict[Status, list[tuple[float, int]]] = {Status.CORRECT: [], Status.WRONG: []}
    for index, ((_, _, better), found) in enumerate(zip(cases, verdicts, strict=True)):
        if found.score is not None and found.status in clear and (found.status is Status.CORRECT) == better:
            clear[found.status].append((-abs(found.score - 0.5), index))
    # the most decided ones: another batch, whose sums round otherwise, must not turn them over
    return [(*cases[index][:2], status) for status, rows in clear.items() for _, index in sorted(rows)[:count // 2]]


def calibrate_match(judge: Judge, cases: Sequence[MatchCase]) -> dict[str, Any]:
    """How often the judge is right about whether an answer matches its reference; an abstention counts as wrong."""
    verdicts = judge.score([replace(problem, check=Check("match", problem.check.reference)) for problem, _, _ in cases],
                           [answer for _, answer, _ in cases])
    right = sum((found.status is Status.CORRECT) == truth for found, (_, _, truth) in zip(verdicts, cases, strict=True)
                if found.score is not None)
    return {"match_n": len(cases), "match_accuracy": right / len(cases),
            "match_abstain_rate": sum(found.score is None for found in verdicts) / len(cases)}


def expected_calibration_error(ranked: Sequence[tuple[float, float]], bins: int = 10) -> float | None:
    """Mean distance of accuracy from confidence over equal bins of [0.5, 1], weighted by their (confidence, credit)."""
    binned: dict[int, list[tuple[float, float]]] = {}
    for confidence, credit in ranked:
        binned.setdefault(min(int((confidence - 0.5) * 2 * bins), bins - 1), []).append((confidence, credit))
    return sum(abs(sum(credit - confidence for confidence, credit in rows)) for rows in binned.values()) / len(
        ranked) if ranked else None


def _credit(score_a: float | None, score_b: float | None, gap: float) -> float:
    if score_a is None or score_b is None:
        return 0.0
    lead = (score_a - score_b) * gap
    return 0.5 if lead == 0 else float(lead > 0)
