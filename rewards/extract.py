r"""Read the answer out of a completion, and refuse whatever does not commit to one.

A grader that searches for something that looks right pays for "41 = 42", "42 is wrong" or a box that only
occurs in the thinking. So an answer counts only in one form: a single value in the last \boxed{...} of the
text after the thinking, or a single fenced code block.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from rewards.notation import cut, normalise
from rewards.reasons import Reason
from rewards.structure import LABEL, NAMES

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
_JOINING = re.compile(r"or|\\lor|\\vee|∨", re.IGNORECASE)
_EXCLUDING = re.compile(r"\\neq?|≠|!=")
_RELATION = re.compile(r"[<>\u2264\u2265]|\\[gl](eq?|t|eqslant)\b")
# references of several values, or of a part of the line
_SEVERAL = re.compile(r"[,;<>≤≥]|\\(infty|pm|mp|cup|setminus|backslash|mathbb|lor|vee|\{|[gl](eq?|t|eqslant)\b|neq?\b)|"
                      r"\b(or|and|all)\b|±|∞|∪|≠", re.IGNORECASE)
_LINE = re.compile(r"\\(cup|setminus|backslash|neq?\b)|∪|≠")
_EQUALS = re.compile(r"(?<![<>!])=")
_JOINTS = re.compile(r"[,;]|\bor\b|\band\b")


def single_value(box: str, reference: str) -> Extracted:
    """The value a mathematical box commits to.

    A leading "x =" is dropped. Hedges, negations and other "=" are refused, unless the reference has them too, and so
    are inequalities and alternatives, unless the reference holds several values or is a part of the line.
    """
    several = bool(_SEVERAL.search(reference))
    if not several and _RELATION.search(box):
        return Extracted(None, Reason.HEDGED_BOX)
    for match in _HEDGES.finditer(box):
        hedge = match.group().lower()
        wanted = hedge in reference.lower() or several and _JOINING.fullmatch(hedge) or (
            _EXCLUDING.fullmatch(hedge) and _LINE.search(reference))
        if not wanted:
            return Extracted(None, Reason.HEDGED_BOX)
    if not _EQUALS.search(box):
        return Extracted(box, None)
    pieces = cut(normalise(box), _JOINTS) if several else [box]
    chain = max(1, *(len(_EQUALS.findall(piece)) for piece in cut(normalise(reference), _JOINTS)))
    if any(len(_EQUALS.findall(piece)) > chain for piece in pieces):
        return Extracted(None, Reason.CHAIN_IN_BOX)
    if "=" in reference:
        return Extracted(box, None)
    for piece in pieces:
        name, found, value = piece.partition("=")
        if found and (not value.strip() or not _is_name(name)):
            return Extracted(None, Reason.CHAIN_IN_BOX)
    return Extracted(box if len(pieces) > 1 else box.partition("=")[2].strip(), None)


def _is_name(text: str) -> bool:
    """Whether `text` can stand before "=" as the name of an answer."""
    text = normalise(text)
    return bool(LABEL.fullmatch(text) or NAMES.fullmatch(text))


_FENCE = re.compile(r"^[ \t]*```(.*)$", re.MULTILINE)


def code_block(answer: str, names: Collection[str]) -> Extracted:
    """The code of the one fenced block of an answer; it must carry one of the language's names."""
    fences = list(_FENCE.finditer(answer))
    if len(fences) != 2 or fences[1].group(1).strip() or fences[0].group(1).strip().lower() not in names:
        return Extracted(None, Reason.NO_CODE_BLOCK)
    code = answer[fences[0].end() + 1:fences[1].start()]
    return Extracted(code, None) if code.strip() else Extracted(None, Reason.NO_CODE_BLOCK)
