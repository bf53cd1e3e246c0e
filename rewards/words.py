"""English words: numbers such as "twenty-one", "two hundred and four", "three fourths", and what is a word at all."""

from __future__ import annotations

import re
from fractions import Fraction

_SMALL = {word: value for value, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen".split())}
_TENS = {word: 10 * value for value, word in enumerate(
    "twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {"half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7,
          "eighth": 8, "ninth": 9, "tenth": 10, "hundredth": 100}


def spoken(text: str) -> Fraction | None:
    """The value of a number in words, None if any word is not part of one."""
    words = re.findall(r"[a-z]+", text.lower())
    if not words or len(words) > 12 or not re.fullmatch(r"[a-zA-Z\s-]+", text):
        return None
    if words[0] == "a":
        words[0] = "one"
    if words[0] in ("negative", "minus"):
        value = spoken(" ".join(words[1:]))
        return None if value is None else -value
    part = _PARTS.get(words[-1], _PARTS.get(words[-1].removesuffix("s")))
    if part and len(words) > 1:
        count = _whole(words[:-1])
        return None if count is None else Fraction(count, part)
    whole = _whole(words)
    return None if whole is None else Fraction(whole)


def _whole(words: list[str]) -> int | None:
    total = group = 0
    last = ""
    for word in words:
        if word in _SMALL and (not last or last in SCALES or last in _TENS and 0 < _SMALL[word] < 10 or last == "and"):
            group += _SMALL[word]
        elif word in _TENS and (not last or last in SCALES or last == "and"):
            group += _TENS[word]
        elif word == "hundred" and last in _SMALL:
            group *= 100
        elif word in SCALES and word != "hundred" and last and last != "and":
            total, group = total + group * SCALES[word], 0
        elif not (word == "and" and last in SCALES):
            return None
        last = word
    return None if last == "and" else total + group


def is_words(text: str) -> bool:
    """Whether letters are words: "odd" and "No" are, "xyz" and "ab" (a product, in the order of the alphabet) not."""
    return " " in text or len(text) > 4 or len(text) > 1 and (text[0].isupper() and text[1:].islower() or (
        len(text) > 2 and text != "".join(sorted(set(text))) and bool(re.search("[aeiouy]", text))))
