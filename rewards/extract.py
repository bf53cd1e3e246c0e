r"""Read the answer out of a completion, and refuse whatever does not commit to one.

A grader that searches for something that looks right pays for "41 = 42", "42 is wrong" or a box that only
occurs in the thinking. So an answer counts only in one form: a single value in the last \boxed{...} of the
text after the thinking, or a single fenced code block.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from rewards.reasons import Reason

OPEN, CLOSE = "<think>", "</think>"


class Thinking(NamedTuple):
    thought: str | None
    answer: str
    well_formed: bool


class Extracted(NamedTuple):
    """Either a value or the reason why there is none."""

    value: str | None
    reason: Reason | None


def split_thinking(text: str) -> Thinking:
    """Split "<think>...</think>answer"; text without any tag is all answer and well formed.

    Unclosed, repeated or misplaced tags are malformed; the answer is then what follows the last closing tag.
    """
    opens, closes = text.count(OPEN), text.count(CLOSE)
    if not opens and not closes:
        return Thinking(None, text.strip(), True)
    if opens == closes == 1 and text.lstrip().startswith(OPEN) and text.index(OPEN) < text.index(CLOSE):
        thought, _, answer = text.lstrip()[len(OPEN):].partition(CLOSE)
        return Thinking(thought.strip(), answer.strip(), True)
    before, found, after = text.rpartition(CLOSE)
    thought = before if found else text
    return Thinking(thought.replace(OPEN, "").strip(), after.replace(OPEN, "").strip() if found else "", False)


_BOX = re.compile(r"\\boxed\s*\{")
# words that take the box back, with nothing but a few words between them and it
_NOT_BEFORE = re.compile(r"(\b(not|never|cannot|neither|nor|except|wrong|incorrect)|n't)\b"
                         r"([ \t]+[\w']+){0,3}[\s$\\(\[*]*$", re.IGNORECASE)
_NOT_AFTER = re.compile(r"[\s$\\)\]*]*(is|was|would be|seems|looks)(n't|\s+\w+){0,2}?"
                        r"(n't|\s+(not|wrong|incorrect|false))\b", re.IGNORECASE)


def last_box(answer: str, prompt: str = "") -> Extracted:
    r"""Content of the one \boxed{...} of an answer (thinking already stripped), braces matched.

    Several boxes are accepted when they hold the same text. Boxes inside a copy of `prompt` do not count.
    """
    if len(prompt.strip()) >= 8:
        answer = answer.replace(prompt.strip(), "")
    contents: list[str] = []
    position = 0
    while match := _BOX.search(answer, position):
        end = _closing_brace(answer, match.end())
        if end is None:
            return Extracted(None, Reason.UNCLOSED_BOX)
        before, after = answer[max(0, match.start() - 80):match.start()], answer[end + 1:end + 60]
        if _NOT_BEFORE.search(before) or _NOT_AFTER.match(after):
            return Extracted(None, Reason.NEGATED_BOX)
        contents.append(answer[match.end():end].strip())
        position = end + 1
    if not contents:
        return Extracted(None, Reason.NO_BOX)
    if len({re.sub(r"\s+", "", content) for content in contents}) > 1:
        return Extracted(None, Reason.DIFFERING_BOXES)
    if not contents[-1]:
        return Extracted(None, Reason.EMPTY_BOX)
    return Extracted(contents[-1], None)


def _closing_brace(text: str, start: int) -> int | None:
    """Index of the brace that closes the one before `start`; escaped braces are text."""
    depth, position = 1, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if not depth:
                return position
        position += 1
    return None


_HEDGES = re.compile(r"\b(or|either|neither|not|isn't|maybe|perhaps|possibly|probably|about|approximately|roughly|"
                     r"wrong|incorrect|unknown|unsure|guess|is|any|something)\b|\?|\\neq?\b|\\not\b|≠|!=|\\neg\b|\\lnot\b|"
                     r"\\approx|≈|\\sim\b|\\boxed|\\lor\b|\\vee\b|∨", re.IGNORECASE)
_NAME = re.compile(r"\\?[a-zA-Z]+(_\{?\w+\}?)?(\s*\([a-z]\))?")


_RELATION = re.compile(r"[<>\u2264\u2265]|\\[gl](eq?|t|eqslant)\b")


def single_value(box: str, reference: str) -> Extracted:
    """The value a mathematical box commits to.

    A leading "x =" is dropped. Hedges, negations and other "=" are refused, unless the reference has them too, and so
    are inequalities, unless the reference is one or an interval.
    """
    if _RELATION.search(box) and not (_RELATION.search(reference) or "," in reference or "\\infty" in reference):
        return Extracted(None, Reason.HEDGED_BOX)
    for match in _HEDGES.finditer(box):
        if match.group().lower() not in reference.lower():
            return Extracted(None, Reason.HEDGED_BOX)
    equals = box.count("=")
    if equals and "=" not in reference:
        name, _, value = box.partition("=")
        if equals > 1 or not value.strip() or not _NAME.fullmatch(name.strip()):
            return Extracted(None, Reason.CHAIN_IN_BOX)
        return Extracted(value.strip(), None)
    if equals > max(1, reference.count("=")):
        return Extracted(None, Reason.CHAIN_IN_BOX)
    return Extracted(box, None)


_FENCE = re.compile(r"^[ \t]*```(.*)$", re.MULTILINE)


def code_block(answer: str, names: Collection[str]) -> Extracted:
    """The code of the one fenced block of an answer; it must carry one of the language's names."""
    fences = list(_FENCE.finditer(answer))
    if len(fences) != 2 or fences[1].group(1).strip() or fences[0].group(1).strip().lower() not in names:
        return Extracted(None, Reason.NO_CODE_BLOCK)
    code = answer[fences[0].end() + 1:fences[1].start()]
    return Extracted(code, None) if code.strip() else Extracted(None, Reason.NO_CODE_BLOCK)
