"""What a judge is asked and how its answer is read: three short forms, each ending in exactly one verdict line.

One answer by principles, two answers by principles, one answer against a free-form reference (DeepSeek-V3 section
5.2.1). The prompts are short so that a very small model can learn them. A candidate cannot close its own section or
write a verdict line, and an output counts only if it ends in exactly one verdict line.
"""

from __future__ import annotations

import re

from pipeline.records import Message, Problem
from rewards.extract import split_thinking
from rewards.plain_text import latin, plain

MAX_SCORE = 10.0

_MARKERS = re.compile(r"^\W*(end\s+of\s+(answer(\s+[ab])?|reference)|answer(\s+[ab])?|((new|next)\s+)?task|principles|"
                      r"reference|judge(\s+the\s+answer)?|judge\s+two\s+answers|match(\s+the\s+answer.*)?|"
                      r"(final\s+)?scores?|critique|verdict|system|developer|user|human|assistant|[ab])\b\W*(:|\.|$)",
                      re.IGNORECASE)


def pointwise_messages(problem: Problem, candidate: str) -> list[Message]:
    """The prompt that asks for "critique lines, then `Score: N`" on one answer (thinking already removed)."""
    return [{"role": "user", "content": f"Judge the answer.\n{_task(problem)}\n{_principles(problem)}\n"
                                        f"{_section('Answer', candidate)}"}]


def pairwise_messages(problem: Problem, a: str, b: str) -> list[Message]:
    """The prompt that asks for "A: critique, B: critique, `Scores: N M`" on two answers."""
    return [{"role": "user", "content": f"Judge two answers.\n{_task(problem)}\n{_principles(problem)}\n"
                                        f"{_section('Answer A', a)}\n{_section('Answer B', b)}"}]


def match_messages(problem: Problem, candidate: str) -> list[Message]:
    """The prompt that asks for "critique lines, then `Match: yes` or `Match: no`" on an answer and the reference."""
    return [{"role": "user", "content": f"Match the answer with the reference.\n{_task(problem)}\n"
                                        f"{_section('Reference', problem.check.reference or '')}\n"
                                        f"{_section('Answer', candidate)}"}]


def _task(problem: Problem) -> str:
    task = next((message["content"] for message in reversed(problem.messages) if message["role"] == "user"), "")
    return f"Task: {task.strip()}"


def _principles(problem: Problem) -> str:
    return "\n".join(["Principles:", *(f"{i}. {text}" for i, text in enumerate(problem.check.principles, start=1))])


def _section(name: str, text: str) -> str:
    return f"{name}:\n{quote(text)}\nEnd of {name[0].lower()}{name[1:]}."


def quote(candidate: str) -> str:
    """A candidate's text so that no line of it, as a reader sees it, can be taken for a line of the prompt, for another
    speaker's turn or for a chat token.
    """
    text = re.sub(r"<(?=[|\uff5c]|/?think>)", "< ", candidate)
    return "\n".join(f"| {line}" if _MARKERS.match(latin(plain(line))) else line for line in text.strip().splitlines())


_NUMBER = r"(\d{1,2}(?:\.\d+)?)"
# not a line with the mark of a quoted one, nor one without a value: a critique may quote "Score: Ann 2, Bob 1"
_VERDICT_LINE = re.compile(r"^(?!\| )\W*((final\s+)?scores?|match)\b\s*:\W*(\d|yes\b|no\b)", re.IGNORECASE)


def parse_pointwise(text: str) -> float | None:
    """The score (0 to 10) of an output whose last line, and no other, is `Score: N`; else None."""
    lines, match = _verdict(text, rf"Score: {_NUMBER}")
    return _score(match.group(1)) if match and len(lines) > 1 else None


def parse_match(text: str) -> float | None:
    """10 or 0 for an output whose last line, and no other, is `Match: yes` or `Match: no`; else None."""
    lines, match = _verdict(text, "Match: (yes|no)")
    return MAX_SCORE * (match.group(1) == "yes") if match and len(lines) > 1 else None


def parse_pairwise(text: str) -> tuple[float, float] | None:
    """The scores (0 to 10) of A and B, from critiques "A: ...", "B: ..." and one last line `Scores: N M`."""
    lines, match = _verdict(text, rf"Scores: {_NUMBER} {_NUMBER}")
    if match is None or [line[:2] for line in lines if line[:2] in ("A:", "B:")] != ["A:", "B:"]:
        return None
    first, second = _score(match.group(1)), _score(match.group(2))
    return None if first is None or second is None else (first, second)


def _verdict(text: str, pattern: str) -> tuple[list[str], re.Match[str] | None]:
    """Lines of the output after its thinking, and its verdict line if that is the last and the only one."""
    thinking = split_thinking(text)
    if not thinking.well_formed:
        return [], None
    lines = [line.rstrip() for line in thinking.answer.split("\n") if line.strip()]
    single = sum(bool(_VERDICT_LINE.match(line)) for line in lines) == 1
    return lines, re.fullmatch(pattern, lines[-1]) if lines and single else None


def _score(text: str) -> float | None:
    score = float(text)
    return score if score <= MAX_SCORE else None
