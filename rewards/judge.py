"""The generative judge: short prompts, strict parsers, votes.

A judge reads principles, criticises, then scores (DeepSeek-V3 section 5.2.1: a reward model with a chain of
thought). The prompts are short so that a very small model can learn them. Known attacks and what meets them:
phrases that fool judges ("Solution", ":", empty text) never reach the model; a candidate cannot close its own
section or write a verdict line; an output counts only if it ends in exactly one verdict line; pairs are judged
in both orders. Padding and flattery are the training data's business.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.records import Message, Problem, Status, Verdict
from rewards.extract import split_thinking
from rewards.reasons import Reason, verdict

MAX_SCORE = 10.0
Generate = Callable[[list[list[Message]], int, int], list[list[str]]]
"""(conversations, n, seed) -> per conversation n texts."""

_MARKERS = re.compile(r"^\W*(end\s+of\s+answer(\s+[ab])?|answer(\s+[ab])?|task|principles|judge(\s+the\s+answer)?|"
                      r"judge\s+two\s+answers|(final\s+)?scores?|[ab])\b\W*(:|\.|$)", re.IGNORECASE)


def pointwise_messages(problem: Problem, candidate: str) -> list[Message]:
    """The prompt that asks for "critique lines, then `Score: N`" on one answer (thinking already removed)."""
    return [{"role": "user", "content": f"Judge the answer.\n{_task(problem)}\nAnswer:\n{quote(candidate)}\n"
                                        "End of answer."}]


def pairwise_messages(problem: Problem, a: str, b: str) -> list[Message]:
    """The prompt that asks for "A: critique, B: critique, `Scores: N M`" on two answers."""
    return [{"role": "user", "content": f"Judge two answers.\n{_task(problem)}\nAnswer A:\n{quote(a)}\nEnd of answer A."
                                        f"\nAnswer B:\n{quote(b)}\nEnd of answer B."}]


def _task(problem: Problem) -> str:
    task = next((message["content"] for message in reversed(problem.messages) if message["role"] == "user"), "")
    numbered = "\n".join(f"{i}. {principle}" for i, principle in enumerate(problem.check.principles, start=1))
    return f"Task: {task.strip()}\nPrinciples:\n{numbered}"


def quote(candidate: str) -> str:
    """A candidate's text so that no line of it can be taken for a line of the prompt or a chat token."""
    text = re.sub(r"<(?=[|\uff5c]|/?think>)", "< ", candidate)
    return "\n".join(f"| {line}" if _MARKERS.match(line) else line for line in text.strip().splitlines())


_KEYS = ("let's solve this problem step by step", "let us solve this problem step by step", "let's think step by step",
         "let us think step by step", "thought process", "here is the answer", "the answer is", "final answer",
         "solution", "answer", "solve", "sure")


def unanswered(answer: str) -> Reason | None:
    """EMPTY_ANSWER or MASTER_KEY when a text holds nothing but phrases known to fool judges."""
    if not answer.strip():
        return Reason.EMPTY_ANSWER
    text = answer.casefold().replace("\u2019", "'")
    for key in _KEYS:
        text = re.sub(rf"\b{re.escape(key)}\b", " ", text)
    return None if re.search(r"\w", text) else Reason.MASTER_KEY


_NUMBER = r"(\d{1,2}(?:\.\d+)?)"
_VERDICT_LINE = re.compile(r"^\W*(final\s+)?scores?\b\s*:", re.IGNORECASE)


def parse_pointwise(text: str) -> float | None:
    """The score (0 to 10) of an output whose last line, and no other, is `Score: N`; else None."""
    lines = _judgement(text)
    match = re.fullmatch(rf"Score: {_NUMBER}", lines[-1]) if lines else None
    if match is None or len(lines) < 2 or sum(bool(_VERDICT_LINE.match(line)) for line in lines) != 1:
        return None
    return _score(match.group(1))


def parse_pairwise(text: str) -> tuple[float, float] | None:
    """The scores (0 to 10) of A and B, from critiques "A: ...", "B: ..." and one last line `Scores: N M`."""
    lines = _judgement(text)
    match = re.fullmatch(rf"Scores: {_NUMBER} {_NUMBER}", lines[-1]) if lines else None
    if match is None or sum(bool(_VERDICT_LINE.match(line)) for line in lines) != 1:
        return None
    if [line[:2] for line in lines if line[:2] in ("A:", "B:")] != ["A:", "B:"]:
        return None
    first, second = _score(match.group(1)), _score(match.group(2))
    return None if first is None or second is None else (first, second)


def _judgement(text: str) -> list[str]:
    """Lines of the output after its thinking; none when the thinking is malformed."""
    thinking = split_thinking(text)
    return [line.rstrip() for line in thinking.answer.split("\n") if line.strip()] if thinking.well_formed else []


def _score(text: str) -> float | None:
    score = float(text)
    return score if score <= MAX_SCORE else None


@dataclass(frozen=True)
class Comparison:
    """Both orders of a pair. Scores are means over parsed votes (0 to 10), None when an order has none.

    consistent: both orders prefer the same answer (or both call it a tie); outputs: what the judge wrote,
    those with A first, then those with B first.
    """

    score_a: float | None
    score_b: float | None
    asked: int
    parsed: int
    consistent: bool
    outputs: tuple[str, ...]


class Judge:
    """Turns a model into verdicts. `generate` must be ready to be called with many conversations at once."""

    def __init__(self, generate: Generate, votes: int = 1, seed: int = 0) -> None:
        self.generate, self.votes, self.seed = generate, votes, seed

    def score(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Verdict]:
        """A verdict per completion: the mean vote as score in [0, 1], CORRECT from one half upwards.

        MALFORMED (score 0) without asking for broken thinking, empty answers and master keys; ABSTAIN when no
        vote can be parsed.
        """
        began = time.monotonic()
        verdicts: list[Verdict | None] = []
        asked: list[list[Message]] = []
        for problem, completion in zip(problems, completions, strict=True):
            thinking = split_thinking(completion)
            reason = unanswered(thinking.answer) if thinking.well_formed else Reason.BAD_THINKING
            verdicts.append(verdict(Status.MALFORMED, reason, "judge", began) if reason else None)
            if not reason:
                asked.append(pointwise_messages(problem, thinking.answer))
        outputs = iter(self.generate(asked, self.votes, self.seed) if asked else [])
        return [found or self._count(next(outputs), began) for found in verdicts]

    def _count(self, outputs: list[str], began: float) -> Verdict:
        scores = [score for output in outputs if (score := parse_pointwise(output)) is not None]
        if not scores:
            return verdict(Status.ABSTAIN, Reason.NO_VOTE, "judge", began, outputs[0] if outputs else "")
        mean = sum(scores) / len(scores) / MAX_SCORE
        critique = next(output for output in outputs if parse_pointwise(output) is not None)
        return verdict(Status.CORRECT if mean >= 0.5 else Status.WRONG, Reason.JUDGED, "judge", began,
                       split_thinking(critique).answer, score=mean)

    def compare(self, problems: Sequence[Problem], a: Sequence[str], b: Sequence[str], votes: int) -> list[Comparison]:
        """Judge pairs of answers (thinking is removed) in both orders, half of the votes each.

        Raises ValueError for an odd number of votes.
        """
        if votes < 2 or votes % 2:
            raise ValueError(f"votes must be even, half for each order (got {votes})")
        first = [split_thinking(text).answer for text in a]
        second = [split_thinking(text).answer for text in b]
        forward = [pairwise_messages(*row) for row in zip(problems, first, second, strict=True)]
        backward = [pairwise_messages(*row) for row in zip(problems, second, first, strict=True)]
        outputs = self.generate(forward + backward, votes // 2, self.seed) if forward else []
        return [_combine(outputs[i], outputs[len(forward) + i]) for i in range(len(forward))]


def _combine(forward: list[str], backward: list[str]) -> Comparison:
    ahead = [scores for output in forward if (scores := parse_pairwise(output))]
    behind = [scores[::-1] for output in backward if (scores := parse_pairwise(output))]
    asked, parsed, outputs = len(forward) + len(backward), len(ahead) + len(behind), (*forward, *backward)
    if not ahead or not behind:
        # one order alone would let the position decide
        return Comparison(None, None, asked, parsed, False, outputs)
    means = [[sum(scores[side] for scores in votes) / len(votes) for side in (0, 1)] for votes in (ahead, behind)]
    gaps = [mean[0] - mean[1] for mean in means]
    consistent = gaps[0] * gaps[1] > 0 or gaps == [0, 0]
    score_a, score_b = ((means[0][side] + means[1][side]) / 2 for side in (0, 1))
    return Comparison(score_a, score_b, asked, parsed, consistent, outputs)
