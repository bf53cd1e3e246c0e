"""A text as a reader sees it: whoever looks for a phrase must not be fooled by letters that only look like others.

What is invisible is left out, compatibility forms become the letters they stand for, and every kind of line end is one.
"""

from __future__ import annotations

import unicodedata

# letters of no width: Hangul fillers, the blank Braille pattern, Khmer's inherent vowels
_BLANK = frozenset("\u115f\u1160\u2800\u17b4\u17b5")
_BREAKS = frozenset("\x85\u2028\u2029\r\v\f")
_TAGS = 0xE0000  # a second, invisible ASCII, which language models read
_LATIN = str.maketrans(
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0458\u0455\u051b\u0501\u0432\u043a\u043c\u043d\u0442\u04bb"
    "\u0410\u0412\u0415\u041a\u041c\u041d\u041e\u0420\u0421\u0422\u0425\u0406\u0408\u0405\u0423"
    "\u03b1\u03bf\u03c1\u03bd\u03b9\u03ba\u03c5\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4"
    "\u03a5\u03a7\u0131\u0261\u0251\u217c\u01c3",
    "aeopcyxijsqdbkmhth" "ABEKMHOPCTXIJSY" "aopvikuABEZHIKMNOPTYX" "igal!")


def plain(text: str) -> str:
    """The text without what cannot be seen, in one form of each letter, lines ended by newlines alone."""
    text = unicodedata.normalize("NFKC", "".join(_seen(c) for c in text)).replace("\u2019", "'")
    return "".join(" " if unicodedata.category(c) == "Zs" else "\n" if c in _BREAKS else c
                   for c in text if unicodedata.category(c) != "Cf" and c not in _BLANK)


def latin(text: str) -> str:
    """A plain text with Cyrillic and Greek look-alikes as Latin letters, and without accents; for searching alone."""
    folded = unicodedata.normalize("NFKD", text.translate(_LATIN))
    return "".join(c for c in folded if not unicodedata.combining(c))


def _seen(character: str) -> str:
    return chr(ord(character) - _TAGS) if _TAGS + 0x20 <= ord(character) < _TAGS + 0x7F else character
