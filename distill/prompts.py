"""The two sample forms of DeepSeek-V3 section 5.1, as chat messages and as worked completions.

For each problem the report keeps `<problem, original response>` and `<system prompt, problem, R1 response>`,
the system prompt asking for reflection and verification. Here they are the forms "original" and "reasoning".
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable

from pipeline.records import Message, Problem

FORMS = ("original", "reasoning")


def prompt_messages(problem: Problem, form: str, reflective: str | None = None) -> tuple[Message, ...]:
    """The prompt as sent: the problem alone, or the system prompt `reflective` (`model.reflective_prompt`) before it.

    A system message the problem already has follows the reflective one in the same message. Raises ValueError for the
    form "reasoning" without a reflective prompt.
    """
    if form == "original":
        return problem.messages
    if form != "reasoning":
        raise ValueError(f"form {form!r}: expected one of {', '.join(FORMS)}")
    if not reflective:
        raise ValueError("the form 'reasoning' needs the reflective prompt")
    system, rest = reflective, problem.messages
    if rest and rest[0]["role"] == "system":
        system, rest = f"{system}\n{rest[0]['content']}", rest[1:]
    return ({"role": "system", "content": system}, *rest)


def worked_completion(problem: Problem, form: str) -> str | None:
    """The reference completion in `form`, or None where the problem has no worked chain or no answer text."""
    if form not in FORMS:
        raise ValueError(f"form {form!r}: expected one of {', '.join(FORMS)}")
    if problem.answer is None or (form == "reasoning" and problem.solution is None):
        return None
    return problem.answer if form == "original" else f"<think>\n{problem.solution}\n</think>\n{problem.answer}"


def normalise(text: str) -> str:
    """Text with case, Unicode width and runs of white space levelled; punctuation stays, it carries meaning in code."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_key(messages: Iterable[Message]) -> str:
    """Hash of the normalised user and assistant turns: equal for the same task whatever its id or system prompt."""
    text = "\x1f".join(f"{m['role']}:{normalise(m['content'])}" for m in messages if m["role"] != "system")
    return hashlib.sha256(text.encode()).hexdigest()[:16]
