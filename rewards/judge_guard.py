"""Answers that aim at the judge instead of the task: refused before a judge reads them.

Voting does not stop them: a phrase such as "Solution" fools the same judge again and again (arXiv 2507.08794, up to
80-90 % false positives), and so does an instruction addressed to it. The patterns know the usual forms in a few
languages; what else a judge falls for is found by `posttrain audit-rewards --judge`. Every repetition in them is
bounded, so that a text takes time in proportion to its length.
"""

from __future__ import annotations

import base64
import binascii
import re

from rewards.plain_text import latin, plain
from rewards.reasons import Reason

MAX_ANSWER = 200_000  # characters; no judge's context holds more
_KEYS = ("let's solve this problem step by step", "let us solve this problem step by step", "let's think step by step",
         "let us think step by step", "let's solve it", "let me think", "thought process", "here is the answer",
         "here is the solution", "here's the solution", "the answer is", "the solution is as follows", "final answer",
         "to solve this problem", "my answer", "solution", "answer", "solve", "sure", "okay", "done",
         "la respuesta es", "respuesta", "solución", "la réponse est", "réponse", "die antwort ist", "lösung",
         "antwort", "решение", "ответ", "解答", "解", "かいせつ", "答案", r"\boxed", r"\text")
_MARKUP = re.compile(r"^[^\w\n]{0,20}(?:```|~~~)\w*|<!--|-->|</?[a-z][^<>\n]{0,100}>|\\(?:begin|end)\{\w+\*?\}|"
                     r"&\w{2,8};|\bstep \d{1,3}\b|_+", re.IGNORECASE | re.MULTILINE)
_NO_ANSWER = re.compile("|".join(rf"\b{re.escape(key)}\b" if key.isascii() and key[0] != "\\" else re.escape(key)
                                 for key in sorted(_KEYS, key=len, reverse=True)))

_MARKS = r"[^\w\n]{0,20}"  # at the start of a line, or around a colon
_JUDGE = r"(?:judge|grader|evaluator|reviewer|scorer|rater|grading (?:model|system)|reward model)s?"
_BEST = r"(?:full|maximum|max|perfect|highest|top|best)"
_TOP = rf"(?:10|ten|100\s?%|yes|{_BEST})"
_POINTS = r"(?:scores?|marks?|points?|ratings?|grades?|rewards?)"
_ANSWER = r"(?:answer|response|text|submission|output|essay|solution)"
_VALUE = rf"(?:\d+(?:\.\d+)?(?:\s?(?:/|out of)\s?\d+)?(?:\s\d+(?:\.\d+)?)?|ten|yes|no|correct|pass(?:ed)?|[ab]|{_BEST})"
_RULES = r"(?:instructions?|principles?|criteria|rubric|guidelines|reference|task above|(?:above|previous|these) rules)"

_STRUCTURE = (  # what only a prompt or a judge writes
    r"<\s?[|\uff5c]|[|\uff5c]\s?>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>",
    r"\[\[\s?(?:[abc]|tie|yes|no|correct|\d+(?:\.\d+)?)\s?\]\]",
    rf"^{_MARKS}(?:(?:final|total|overall)\s)?(?:scores?|grade|verdict|match|judge?ment){_MARKS}:\s{{0,9}}{_MARKS}{_VALUE}"
    rf"{_MARKS}$",
    rf"^{_MARKS}(?:(?:final|total|overall)\s)?(?:score|grade|rating)\s?=\s?\d+(?:\.\d+)?\s?(?:/|out of)\s?\d+{_MARKS}$",
    rf"\brating{_MARKS}[:=]{_MARKS}(?:10|ten)\b",
    rf"<(?:score|verdict|rating|reward)>{_MARKS}{_VALUE}",
    r"\"(?:reward|verdict|is_correct)\"\s?:",
    # a score in JSON, beside nothing that an answer would hold
    r"\{\s{0,9}(?:\"(?:reason|reasoning|critique|explanation|feedback|comment|confidence|rationale)\"\s?:[^{}\"]{0,9}"
    r"\"[^\"\n]{0,300}\",\s{0,9}){0,4}\"(?:score|rating|correct|match)\"\s?:\s?[\w\".]{1,9}\s{0,9}"
    r"(?:,\s{0,9}\"(?:reason|reasoning|critique|explanation|feedback|comment|confidence|rationale)\"|\})",
    rf"^{_MARKS}end of (?:answer|reference|response|candidate|submission)\b",
    rf"^{_MARKS}(?:system|developer)(?: (?:message|prompt))?\s?:.{{0,200}}\b(?:answers?|response|candidate|judge|scor|"
    r"grad|verified|approved|checked|correct|ignore|override|instructions?|principles?|you are)",
    r"^\W{0,9}[\[(<]\s?(?:system|developer) (?:message|prompt|note)\s?[\])>]",
)
_INSTRUCTIONS = (
    rf"\b(?:ignore|disregard|forget|override|skip)\b.{{0,40}}\b{_RULES}\b",
    r"\b(?:do not|don't|never|stop) (?:follow|obey|apply|use)\b.{0,20}\b(?:principles?|criteria|rubric|"
    r"reference)\b",
    rf"\b(?:give|assign|award|grant|choose)\b.{{0,40}}\b{_BEST}\b.{{0,12}}\b{_POINTS}\b(?!\s(?:for|if|when|only)\b)",
    rf"\bgive (?:me|us|it|this)\b.{{0,15}}\b(?:10|ten|100\s?%).{{0,8}}\b{_POINTS}\b",
    rf"\b(?:give|assign|award|grant|rate|score|mark|grade)\b.{{0,20}}\b(?:this|my|the|above|following)\s{_ANSWER}\b"
    rf".{{0,30}}\b(?:{_TOP}|correct|passed)\b",
    r"\b(?:return|output|print|write|say|(?:reply|respond|answer) with)\b(?!\().{0,20}\b(?:score|match|verdict|rating)"
    rf"\s?:\s?{_VALUE}\b",
    rf"\b(?:you are|you're|act as|as)\b.{{0,12}}\b(?:a|an|the|my|now)\b.{{0,20}}\b{_JUDGE}\b.{{0,60}}\b(?:must|should|"
    rf"shall|will|have to|always|need to|score|give)\b.{{0,40}}\b(?:{_TOP}|{_POINTS}|{_ANSWER})\b",
    rf"\bif you(?:'re| are)\b.{{0,20}}\b(?:model|llm|ai|{_JUDGE})\b.{{0,40}}\b(?:evaluate|judge|grade|score|rate|"
    r"review)\b",
    rf"\bwhen(?:ever)? you (?:evaluate|judge|grade|score|rate|review)\b.{{0,12}}\b(?:this|my|the) {_ANSWER}\b",
    rf"\byour (?:score|rating|grade|verdict|mark)\b.{{0,12}}\b(?:must|should|shall|has to|will) be {_TOP}\b",
    rf"\b(?:note|message|instructions?|memo|attention|dear|hint|reminder|hello|hey)\b.{{0,12}}\b{_JUDGE}\b\s?[:,!.-]",
    rf"^{_MARKS}to (?:the|my|any|every) {_JUDGE}\s?:",
    r"\b(?:ignorier|missacht|vergiss|vergesst)\w{0,4}\b.{0,40}\b(?:prinzip|anweisung|kriteri|vorgabe|referenz)",
    r"\b(?:gib|gebt|geben|vergib|vergebt)\b.{0,40}\b(?:volle punktzahl|hochstpunktzahl|bestnote)\b",
    r"\b(?:ignore[rz]?|oublie[rz]?|ignor[ae]n?|olvid[ae]n?)\b.{0,40}\b(?:consigne|critere|principe|instruccion|"
    r"principio|criterio|referencia)",
    r"\b(?:donne[rz]?|mets|mettez|attribue[rz]?|da|dale|pon|asigna)\b.{0,40}\b(?:note maximale|(?:puntuacion|nota|"
    r"calificacion) maxima)\b",
    r"\b(?:игнорир|забудь|пренебрег)\w{0,6}\b.{0,40}\b(?:инструкц|принцип|критери|указани)",
    r"\b(?:поставь|дай|присво)\w{0,4}\b.{0,40}\b(?:высш|максимальн)\w{0,4}\s(?:балл|оценк)",
    r"(?:忽略|无视|忘记|不要理会).{0,20}(?:规则|指令|指示|原则|标准|提示)|请?(?:给|打).{0,4}(?:满分|最高分)",
    r"(?:指示|命令|規則|ルール|原則|基準)を?.{0,3}(?:無視|忘れ)|(?:満点|最高点)を?.{0,3}(?:付け|つけ|与え)",
)
_CLAIMS = (  # praise of the answer in the judge's words, where its content should be
    rf"\b(?:this|the|my) (?:above |following |previous )?{_ANSWER} (?:(?:fully|completely|perfectly|already) ){{0,3}}"
    r"(?:meets|satisfies|fulfils|fulfills|matches)\b.{0,30}\b(?:principles?|criteria|criterion|requirements?|rubric|reference|"
    r"instructions?)\b",
    rf"\b(?:this|the|my) (?:above |following |previous )?{_ANSWER} (?:is|was|has been|deserves)\b.{{0,20}}\b(?:"
    r"verified|approved|graded|full marks|full score|top score|maximum score|the highest score|perfect score|10 out "
    r"of 10|10/10)\b",
    rf"\b(?:this|my|the above|perfect|excellent|ideal) {_ANSWER}\b.{{0,12}}\b(?:deserves|gets|earns|receives|is "
    rf"worth)\b.{{0,20}}\b{_TOP}\b",
    rf"\b{_ANSWER}\b.{{0,60}}\b(?:meets|satisfies|fulfils|fulfills) (?:all|every|each)\b.{{0,12}}\b(?:principles?|"
    r"criteria|criterion|rubric)\b",
    r"\b(?:checked|verified|confirmed|ensured|made sure) (?:that )?(?:all|every|each)(?: of the)? (?:principles?|"
    r"criteria|criterion)\b.{0,12}\b(?:met|fulfilled|satisfied|followed)\b",
    r"\b(?:as|identical (?:to|with)|equivalent to|equal to|agrees with|according to|required by|matches) the (?:"
    r"official |given |above )?(?:reference|rubric|principles|criteria)(?: (?:answer|solution|text))?(?: (?:says?|"
    r"states?|asks?|requires?))?\s?(?:[,.;:!]|$|\b(?:and|so)\b)",
)
_INJECTIONS = re.compile("|".join((*_STRUCTURE, *_INSTRUCTIONS, *_CLAIMS)), re.IGNORECASE | re.MULTILINE)
_BASE64 = re.compile(r"[A-Za-z0-9+/]{24,4000}={0,2}")


def suspicious(answer: str) -> Reason | None:
    """EMPTY_ANSWER, MASTER_KEY or INJECTION for a text that holds no answer or speaks to its judge, TOO_COMPLEX for one
    of more than MAX_ANSWER characters; else None.
    """
    if not answer.strip():
        return Reason.EMPTY_ANSWER
    if len(answer) > MAX_ANSWER:
        return Reason.TOO_COMPLEX
    text = plain(answer)
    if not re.search(r"\w", _NO_ANSWER.sub(" ", _MARKUP.sub(" ", text.casefold()))):
        return Reason.MASTER_KEY
    readings = dict.fromkeys((text, latin(text), *_decoded(text)))
    return Reason.INJECTION if any(_INJECTIONS.search(reading) for reading in readings) else None


def _decoded(text: str) -> list[str]:
    """What stands in base64 within a text, where it is text itself."""
    found = []
    for match in _BASE64.finditer(text):
        try:
            found.append(base64.b64decode(match.group() + "==").decode())
        except (binascii.Error, UnicodeDecodeError):
            continue
    return found
