r"""One spelling for the many LaTeX spellings of an answer, and the cuts at its outer level.

Everything that compares answers works on `normalise`d text: `\dfrac12`, `\frac {1}{2}` and `\tfrac{1}2` are one text,
and so are `\leqslant` and `≤`. Only spelling goes; nothing here knows what a text means.
"""

from __future__ import annotations

import re
from functools import lru_cache

_LETTER_UNITS = {"m": "meters", "s": "seconds", "g": "grams", "h": "hours", "l": "liters", "L": "liters"}
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|textsf|mathrm|mathbf|mathit|mathsf|textnormal|"
                   r"emph|boldsymbol|bm|mbox|operatorname|underline|boxed)\*?\s*\{([^{}]*)\}")
_NOTHING = re.compile(r"\\(?:left|right)\s*\.|\\(?:left|right|bigl?|bigr|Bigl?|Bigr|displaystyle|textstyle|quad|qquad|"
                      r"limits|bf|rm)(?![a-zA-Z])|(?<!\\)\\[,;:!>]|(?<!\\)\{\}|(?<=\\\\)\s*\[\d+\w+\]")
_SYNONYMS = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), r"\frac"), **dict.fromkeys(("dbinom", "tbinom"), r"\binom"),
    **dict.fromkeys(("leq", "leqslant", "leqq"), r"\le"), **dict.fromkeys(("geq", "geqslant", "geqq"), r"\ge"),
    "neq": r"\ne", "lt": "<", "gt": ">", "times": r"\cdot", "div": "/", "varnothing": r"\emptyset", "bigcup": r"\cup",
    "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "colon": ":", "backslash": r"\setminus",
    **dict.fromkeys(("dots", "cdots", "dotsc", "dotsb"), r"\ldots"), **dict.fromkeys(("mid", "vert"), "|"),
    **dict.fromkeys(("lvert", "rvert"), "|"), **dict.fromkeys(("lor", "vee"), " or "), "degree": r"^\circ",
    "bar": r"\overline", "R": r"\mathbb{R}", "vec": r"\vec", "land": " and ", "wedge": " and ", "tg": r"\tan",
}
_SYNONYM = re.compile(r"\\(" + "|".join(sorted(_SYNONYMS, key=len, reverse=True)) + r")(?![a-zA-Z])\s*")
_CHARACTERS = str.maketrans({
    "−": "-", "–": "-", "×": r"\cdot ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ", "≤": r"\le ",
    "≥": r"\ge ", "≠": r"\ne ", "∞": r"\infty ", "∪": r"\cup ", "∈": r"\in ", "∅": r"\emptyset ", "±": r"\pm ",
    "°": r"^\circ ", "θ": r"\theta ", "ℝ": r"\mathbb{R}", "…": r"\ldots ", "~": " ", "\u00a0": " ", "∨": " or ",
})
_ASCII = {"<=": r"\le ", ">=": r"\ge ", "!=": r"\ne "}
_ASCII_RELATION = re.compile("|".join(_ASCII))
_OPENING, _CLOSING = "([{", ")]}"


@lru_cache(maxsize=4096)
def normalise(text: str) -> str:
    """`text` without delimiters, sizes, spacing and text commands, its synonyms spelt one way."""
    text = _ASCII_RELATION.sub(lambda match: _ASCII[match.group()], text.strip().strip("$").strip())
    if not ("\\" in text or "{" in text or not text.isascii()):
        return re.sub(r"\s+", " ", text).rstrip(".").strip()
    text = re.sub(r"(?<!\\)\\(?=[ $%])", "", text.translate(_CHARACTERS))
    text = _NOTHING.sub("", text.replace("{,}", ","))
    for _ in range(4):  # text commands nest, but not deeply
        text, found = _TEXT.subn(_words, text)
        if not found:
            break
    text = text.replace("\\$", "$").replace("{:}", ":")
    text = _SYNONYM.sub(lambda match: _SYNONYMS[match.group(1)] + " ", text)
    text = re.sub(r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}", r"\\binom{\1}{\2}", text)
    text = re.sub(r"(\.\d*)\\dot\s*\{?(\d)\}?", r"\1\\overline{\2}", text)
    text = re.sub(r"(?<![\\a-zA-Z])infinity\b", r"\\infty ", text)
    text = re.sub(r"\^\s*\{\s*\\circ\s*\}", r"^\\circ", text)
    text = re.sub(r"\\(frac|binom)\s*", r"\\\1", text)
    text = re.sub(r"\\(frac|binom)(\d)\s*(\d)", r"\\\1{\2}{\3}", text)
    text = re.sub(r"\\(frac|binom)(\d)\s*\{", r"\\\1{\2}{", text)
    text = re.sub(r"(\\(?:frac|binom)\{[^{}]*\})\s*(\d)", r"\1{\2}", text)
    text = re.sub(r"\\sqrt\s*(\d|[a-z](?![a-z]))", r"\\sqrt{\1}", text)
    text = re.sub(r"(^|[(\[,=<>]|\\le|\\ge)\s*\+\s*(?=\\infty)", r"\1", text)
    text = re.sub(r"\s+", " ", text).strip().rstrip(".,;").strip()
    while text.startswith("{") and closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def _words(match: re.Match[str]) -> str:
    """The content of a text command; a unit of one letter in full, as it would be a variable outside."""
    content = match.group(1)
    return f" {_LETTER_UNITS.get(content.strip(), content)} "


def squeeze(text: str) -> str:
    """Normalised text for comparing as text: no spaces, no braces around single characters."""
    return re.sub(r"([\^_])\{(\w)\}(?!\w)", r"\1\2", re.sub(r"\s+", "", text))


def same_text(reference: str, value: str) -> bool:
    """Equality of texts, ignoring case, white space, text commands and a final full stop."""
    return squeeze(normalise(reference)).casefold() == squeeze(normalise(value)).casefold()


def closing(text: str, start: int) -> int | None:
    """Index of the bracket that closes the one at `start`, whatever its type (half-open intervals mix them)."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] in _OPENING) - (text[position] in _CLOSING)
        if not depth:
            return position
    return None


def cut(text: str, separator: re.Pattern[str]) -> list[str]:
    """`text` cut at every match of `separator` outside of all brackets and environments."""
    depths, depth = [], 0
    for match in re.finditer(r"\\langle|\\begin\b|\\rangle|\\end\b|.", text, re.DOTALL):
        token = match.group()
        depth -= token in _CLOSING or token in ("\\rangle", "\\end")
        depths += [depth] * len(token)
        depth += token in _OPENING or token in ("\\langle", "\\begin")
    pieces, begin = [], 0
    for match in separator.finditer(text):
        if match.end() > match.start() and depths[match.start()] == 0:
            pieces.append(text[begin:match.start()].strip())
            begin = match.end()
    return [*pieces, text[begin:].strip()]
