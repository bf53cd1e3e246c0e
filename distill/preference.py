"""Preference data that carries its reasoning (DeepSeek-V3 section 5.2.1; DeepSeek-R1 supplement).

Each pair is judged in both orders and the scores are averaged; a pair stays when the gap is clear, both orders
agree and the answers are of comparable length, so that length is not what the reward model learns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.problems import writing
from pipeline.records import Message, Problem, Sample, content_id
from rewards.extract import split_thinking
from rewards.judge import Comparison
from rewards.judge_prompts import pairwise_messages, parse_pairwise, pointwise_messages

MAX_LENGTH_RATIO = 2.0
_CRITIQUES = re.compile(r"^A: (?P<a>.*?)\nB: (?P<b>.*?)\nScores:", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Pair:
    """Two answers to one problem, thinking removed."""

    problem: Problem
    a: str
    b: str


def pairs_of(problems: Sequence[Problem], samples: Sequence[Sample]) -> tuple[list[Pair], dict[str, int]]:
    """One pair per problem from its first two samples, and how many were lost by reason."""
    answers: dict[str, list[str]] = {}
    for sample in samples:
        thinking = split_thinking(sample.completion)
        if thinking.well_formed and thinking.answer.strip() and sample.finish_reason == "stop":
            answers.setdefault(sample.problem_id, []).append(thinking.answer.strip())
    pairs, lost = [], {}
    for problem in problems:
        found = answers.get(problem.id, [])
        reason = "malformed" if len(found) < 2 else "same_answer" if found[0] == found[1] else None
        if reason:
            lost[reason] = lost.get(reason, 0) + 1
        else:
            pairs.append(Pair(problem, found[0], found[1]))
    return pairs, lost


def keep_pair(pair: Pair, comparison: Comparison, min_gap: float) -> str | None:
    """None when a judged pair may be trained on, else why not."""
    if comparison.score_a is None or comparison.score_b is None:
        return "abstained"
    if not comparison.consistent:
        return "orders_disagree"
    if abs(comparison.score_a - comparison.score_b) < min_gap:
        return "small_gap"
    short, long = sorted((len(pair.a), len(pair.b)))
    return "length" if long > MAX_LENGTH_RATIO * max(short, 1) else None


def labelled(pairs: Sequence[Mapping[str, Any]], problems: Mapping[str, Problem]
             ) -> tuple[list[tuple[Problem, str, str, float]], str]:
    """Pairs whose better answer is known, as (problem, A, B, lead of A), and where that knowledge comes from.

    "measured" where a program can measure the principles, otherwise "votes": the average of the SFT model's own
    judgements, so that accuracy is agreement with them. Ties are left out.
    """
    known, sources = [], set()
    for pair in pairs:
        problem = problems[pair["problem_id"]]
        if writing.measurable(problem):
            lead = float(writing.score(problem, pair["a"]) - writing.score(problem, pair["b"]))
            sources.add("measured")
        else:
            lead = 0.0 if pair["score_a"] is None else pair["score_a"] - pair["score_b"]
            sources.add("votes")
        if lead:
            known.append((problem, pair["a"], pair["b"], lead))
    return known, "+".join(sorted(sources))


def training_rows(pairs: Sequence[Mapping[str, Any]], problems: Mapping[str, Problem]
                  ) -> list[tuple[str, list[Message], str]]:
    """(id, prompt, judgement) rows from kept pairs: each vote that agrees with the average, pairwise and split.

    The half about one answer, with its score, is a pointwise judgement: the form in which the reward is asked for.
    """
    rows: dict[str, tuple[str, list[Message], str]] = {}
    for pair in pairs:
        problem, half = problems[pair["problem_id"]], len(pair["outputs"]) // 2
        for index, output in enumerate(pair["outputs"]):
            swapped = index >= half
            scores = parse_pairwise(output)
            if scores is None:
                continue
            first, second = (pair["b"], pair["a"]) if swapped else (pair["a"], pair["b"])
            gap = scores[0] - scores[1]
            if gap * (pair["score_a"] - pair["score_b"]) * (-1 if swapped else 1) <= 0:
                continue
            judgement = split_thinking(output).answer.strip()
            _add(rows, pairwise_messages(problem, first, second), judgement)
            critiques = _CRITIQUES.search(judgement)
            if critiques:
                for answer, key, score in ((first, "a", scores[0]), (second, "b", scores[1])):
                    _add(rows, pointwise_messages(problem, answer), f"{critiques[key].strip()}\nScore: {score:g}")
    return list(rows.values())


def _add(rows: dict[str, tuple[str, list[Message], str]], messages: list[Message], judgement: str) -> None:
    row_id = content_id(messages, judgement)
    rows[row_id] = (row_id, messages, judgement)
