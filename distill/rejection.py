"""Rejection sampling: of the samples of each problem keep the shortest that are right (DeepSeek-V3, section 5.1).

The report wants data that keeps "the strengths of DeepSeek-R1 while producing responses that are concise and
effective"; so among the correct, well-formed answers the shortest wins.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from distill.review import REVIEWER
from pipeline.recipe import RejectConfig
from pipeline.records import UNSCORED, Problem, Sample, Status
from pipeline.stage import StageError
from rewards.extract import split_thinking

Rejected = list[tuple[Sample, str]]
Funnel = dict[str, dict]


def reject(samples: Iterable[Sample], problems: Iterable[Problem],
           config: RejectConfig) -> tuple[list[Sample], Rejected, Funnel]:
    """Samples to keep, the others each with a reason, and the funnel per domain.

    Reasons: reviewer, no_verdict, infra_error, abstain, malformed, timeout, wrong, judge_score, truncated, too_long,
    bad_thinking, no_thinking, empty_answer, duplicate, not_shortest. A sample of the original form may think unasked:
    RL teaches an expert to bring its reasoning where no system prompt calls for it (section 5.1). Raises StageError,
    with the funnel, when a domain ends empty, and ValueError for a sample whose problem is unknown.
    """
    by_id = {problem.id: problem for problem in problems}
    rejected: Rejected = []
    groups: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    funnel: Funnel = {}
    for sample in samples:
        funnel.setdefault(sample.domain, {"in": 0, "out": 0, "lost": {}})["in"] += 1
        if sample.problem_id not in by_id:
            raise ValueError(f"sample {sample.id}: its problem {sample.problem_id} is not among the problems given")
        reason = unfit(sample, by_id[sample.problem_id], config)
        if reason is None:
            groups[sample.problem_id, sample.form].append(sample)
        else:
            rejected.append((sample, reason))
    kept: list[Sample] = []
    for group in groups.values():
        best, others = _shortest(group, config.keep)
        kept += best
        rejected += others
    count_funnel(funnel, kept, rejected)
    stop_when_empty(funnel, "rejection", "train the expert longer, sample more or relax reject.max_tokens")
    return kept, rejected, funnel


def unfit(sample: Sample, problem: Problem, config: RejectConfig) -> str | None:
    """Why a sample cannot be trained on whatever the others look like, or None."""
    verdict = sample.verdict
    if verdict is None:
        return "no_verdict"
    if verdict.verifier == REVIEWER and verdict.status is not Status.CORRECT:
        return REVIEWER
    if verdict.status in UNSCORED:
        return verdict.status.value
    if problem.check.kind == "principles":
        if verdict.status in (Status.MALFORMED, Status.TIMEOUT):
            return verdict.status.value
        if verdict.score is None or verdict.score < config.min_judge_score:
            return "judge_score"
    elif verdict.status is not Status.CORRECT:
        return verdict.status.value
    if sample.finish_reason != "stop":
        return "truncated"
    if sample.tokens > config.max_tokens:
        return "too_long"
    parts = split_thinking(sample.completion)
    if not parts.well_formed:
        return "bad_thinking"
    if sample.form == "reasoning" and not parts.thought:
        return "no_thinking"
    return None if parts.answer else "empty_answer"


def _shortest(group: list[Sample], keep: int) -> tuple[list[Sample], Rejected]:
    """The `keep` shortest different completions; where a judge scored them, the best scored come first.

    What a reviewer let through comes before all others, and stays whatever `keep` is.
    """
    reviewed = {s.id for s in group if s.verdict is not None and s.verdict.verifier == REVIEWER}
    judged = any(s.verdict is not None and s.verdict.verifier == "judge" for s in group)
    group = sorted(group, key=lambda s: (s.id not in reviewed, -(s.verdict.score or 0.0) if judged else 0.0, s.tokens,
                                         s.id))
    chosen: list[Sample] = []
    others: Rejected = []
    seen: set[str] = set()
    for sample in group:
        if sample.completion in seen:
            others.append((sample, "duplicate"))
        elif len(chosen) >= keep and sample.id not in reviewed:
            others.append((sample, "not_shortest"))
        else:
            chosen.append(sample)
        seen.add(sample.completion)
    return chosen, others


def count_funnel(funnel: Funnel, kept: Iterable[Sample], lost: Rejected) -> None:
    """Add what was kept and lost, by reason, to the rows of a funnel that hold every domain."""
    for sample, reason in lost:
        reasons = funnel[sample.domain]["lost"]
        reasons[reason] = reasons.get(reason, 0) + 1
    for sample in kept:
        funnel[sample.domain]["out"] += 1


def stop_when_empty(funnel: Funnel, what: str, remedy: str) -> None:
    """Raise StageError, with the funnel of every domain, when a domain has nothing left (or there is no sample)."""
    empty = [domain for domain, row in funnel.items() if row["out"] == 0]
    if empty or not funnel:
        raise StageError(f"{what} leaves nothing for {', '.join(empty) or 'any domain'}:\n{render_funnel(funnel)}\n"
                         f"{remedy}")


def render_funnel(funnel: Funnel) -> str:
    """One line a domain: `  math: 40 in, 0 out; lost wrong 38, truncated 2`."""
    lines = []
    for domain, row in funnel.items():
        lost = ", ".join(f"{reason} {count}" for reason, count in sorted(row["lost"].items(), key=lambda x: -x[1]))
        lines.append(f"  {domain}: {row['in']} in, {row['out']} out" + (f"; lost {lost}" if lost else ""))
    return "\n".join(lines)
