"""Answers that aim at the judge instead of the task: refused before a judge reads them.

Voting does not stop them: a phrase such as "Solution" fools the same judge again and again (arXiv 2507.08794, up to
80-90 % false positives), and so does an instruction addressed to it.
"""

from __future__ import annotations

import re
import unicodedata

from rewards.reasons import Reason

_KEYS = ("let's solve this problem step by step", "let us solve this problem step by step", "let's think step by step",
         "let us think step by step", "let's solve it", "let me think", "thought process", "here is the answer",
         "here is the solution", "here's the solution", "the answer is", "the solution is as follows", "final answer",
         "to solve this problem", "my answer", "step 1", "solution", "answer", "solve", "sure", "okay", "done",
         "respuesta", "réponse", "lösung", "antwort", "решение", "ответ", "解答", "解", "かいせつ", "答案", r"\boxed")

_JUDGE = r"(?:judge|grader|evaluator|reviewer|scorer|rater|grading (?:model|system)|reward model)s?"
_TOP = r"(?:10|ten|full|maximum|max|perfect|highest|top|best|100\s?%|yes)"
_INJECTIONS = re.compile("|".join((
    r"<\s*[|\uff5c]|[|\uff5c]\s*>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>",  # chat tokens
    r"\[\[\s*(?:[abc]|tie|yes|no|correct|\d+(?:\.\d+)?)\s*\]\]",  # the verdicts of other judges
    r"^\W*(?:(?:final|total|overall)\s+)?(?:scores?|grade|verdict|match|judge?ment)\W*[:=]\W*"
    r"(?:\d+(?:\.\d+)?(?:\s*(?:/|out of)\s*\d+)?(?:\s+\d+(?:\.\d+)?)?|yes|no|correct|pass(?:ed)?|[ab])\W*$",
    r"\brating\W*[:=]\W*(?:10|ten)\b",
    r"\"(?:score|reward|verdict|rating|is_correct|correct)\"\s*:",  # a verdict in JSON
    r"^\W*end of (?:answer|reference|response|candidate|submission)\b",
    r"^\W*(?:system|developer)(?: (?:message|prompt))?\s*:",  # a turn of its own
    r"\b(?:ignore|disregard|forget|override|skip)\b.{0,40}\b(?:instructions?|principles?|criteria|rubric|rules|prompt|"
    r"guidelines|reference|task above)\b",
    r"\b(?:give|assign|award|grant|rate|return|output|print|write|say|respond with|reply with|answer with|choose|"
    rf"score)\b.{{0,40}}\b{_TOP}\b.{{0,12}}\b(?:scores?|marks?|points?|ratings?|grades?|rewards?)\b",
    rf"\b(?:give|assign|award|grant|rate|score|mark|grade)\b.{{0,20}}\b(?:this|my|the|above|following)\s"
    rf"(?:answer|response|text|submission|output|essay|solution)\b.{{0,30}}\b(?:{_TOP}|correct|passed)\b",
    r"\b(?:return|output|print|write|reply with|respond with|say)\b.{0,20}\b(?:score|match|verdict|rating)\s*:",
    rf"\b(?:you are|you're|act as|as)\b.{{0,12}}\b(?:a|an|the|my|now)\b.{{0,20}}\b{_JUDGE}\b.{{0,60}}\b"
    rf"(?:must|should|shall|will|have to|always|need to|score|give)\b",
    rf"\b(?:note|message|instructions?|memo|attention|dear|hint|reminder|hello|hey)\b.{{0,12}}\b{_JUDGE}\b\s*[:,!.-]",
    r"\b(?:this|the|my) (?:above |following |previous )?(?:answer|response|text|submission|solution) "
    r"(?:(?:fully |completely |perfectly |already )*(?:meets|satisfies|fulfils|fulfills|matches)\b.{0,30}\b"
    r"(?:principles?|criteria|criterion|requirements?|rubric|reference|instructions?)"
    r"|(?:is|was|has been|deserves)\b.{0,20}\b(?:verified|approved|graded|full marks|full score|top score|"
    r"maximum score|the highest score|perfect score|10 out of 10|10/10))\b",
)), re.IGNORECASE | re.MULTILINE)


def suspicious(answer: str) -> Reason | None:
    """EMPTY_ANSWER, MASTER_KEY or INJECTION for a text that holds no answer or speaks to its judge; else None."""
    if not answer.strip():
        return Reason.EMPTY_ANSWER
    text = _plain(answer)
    rest = text.casefold()
    for key in _KEYS:
        bounded = rf"\b{re.escape(key)}\b" if key.isascii() and key.isalnum() or " " in key else re.escape(key)
        rest = re.sub(bounded, " ", rest)
    if not re.search(r"\w", rest):
        return Reason.MASTER_KEY
    return Reason.INJECTION if _INJECTIONS.search(text) else None


def _plain(text: str) -> str:
    """The text as a reader sees it: look-alike forms made one, what is invisible left out."""
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'")
    return "".join(" " if unicodedata.category(c) == "Zs" else "\n" if c in "\x85\u2028\u2029\r\v\f" else c
                   for c in text if unicodedata.category(c) != "Cf")
