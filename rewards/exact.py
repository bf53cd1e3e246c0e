r"""Exact comparison of short answers: normalised text, then `Fraction`. No sympy, microseconds.

Most boxed answers are decided here; only what is left needs math-verify.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_LENGTH = 2000  # characters of a box
MAX_NESTING = 100  # open brackets
MAX_EXPONENT = 4  # digits of an exponent

_UNITS = frozenset("mm cm m km in inch inches ft feet foot yd yards mi mile miles mg g kg lb oz ml l s sec second "
                   "seconds min minute minutes h hr hour hours day days week weeks year years degree degrees dollar "
                   "dollars cent cents euro euros mph km/h m/s cm^2 m^2 km^2 cm^3 m^3".split())
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|operatorname|mbox)\s*\{([^{}]*)\}")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")
_FRACTION = re.compile(r"(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}")
_SLASH = re.compile(r"([+-]?\d+)/(\d+)")


def too_complex(text: str) -> bool:
    """Whether comparing `text` could cost unbounded time: length, nesting, power towers, factorials."""
    if len(text) > MAX_LENGTH:
        return True
    depth = deepest = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        deepest = max(deepest, depth)
    powers = text.replace("**", "^")
    tall = re.search(rf"\^[\s{{(+-]*\d{{{MAX_EXPONENT + 1},}}", powers)
    tower = re.search(r"\^\s*[-+]?[\w.]+\s*\^", powers) or any(
        "^" in exponent and not re.search("[a-zA-Z]", exponent) for exponent in _exponents(powers))
    factorial = re.search(r"[\w)}\]]\s*!(?!=)", text) or "factorial" in text or "\\Gamma" in text
    return bool(deepest > MAX_NESTING or tower or tall or factorial)


def _exponents(text: str) -> list[str]:
    """The bracketed exponents of `text`, brackets matched."""
    found = []
    for match in re.finditer(r"\^\s*[{(]", text):
        depth = 1
        for position in range(match.end(), len(text)):
            depth += (text[position] in "{(") - (text[position] in "})")
            if not depth:
                found.append(text[match.end():position])
                break
    return found


def normalise(text: str) -> str:
    """Drop what carries no meaning: math delimiters, spacing commands, size commands, a final full stop."""
    text = text.strip().strip("$").strip()
    text = re.sub(r"\\(left|right|displaystyle|,|;|:|!|quad|qquad)(?![a-zA-Z])", "", text)
    text = text.replace("\\ ", " ").replace("~", " ").replace("−", "-").replace("\\$", "$").replace("\\%", "%")
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\cdot", "*").replace("\\times", "*")
    text = _TEXT.sub(r" \1 ", text)
    return re.sub(r"\s+", " ", text).strip().rstrip(".").strip()


def split_unit(text: str) -> tuple[str, str | None]:
    """("5", "cm") for a number or fraction with a unit; (text, None) otherwise. Takes normalised text."""
    if text.startswith("$"):
        return text[1:].strip(), "dollar"
    match = re.fullmatch(r"(.*[\d}.])\s*(?:\^\s*\{?\\circ\}?|°)", text)
    if match:
        return match.group(1), "degree"
    match = re.fullmatch(r"(.*[\d}.])\s*([a-zA-Z][a-zA-Z/]*(?:\^\{?[23]\}?)?)", text)
    if match and (unit := match.group(2).lower().replace("{", "").replace("}", "")) in _UNITS:
        return match.group(1).strip(), unit.removesuffix("s") if len(unit) > 3 else unit
    return text, None


def number(text: str) -> Fraction | None:
    """The exact value of a plain number: integer, decimal, fraction, percent, thousands separators."""
    text = text.replace("{,}", ",").replace(" ", "")
    if len(text) > 200:
        return None
    scale = Fraction(1)
    if text.endswith("%"):
        text, scale = text[:-1], Fraction(1, 100)
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if _NUMBER.fullmatch(text):
        return Fraction(text) * scale
    if match := _FRACTION.fullmatch(text):
        sign, top, bottom = match.groups()
        if int(bottom):
            return Fraction(int(top), int(bottom)) * (-1 if sign else 1) * scale
    if (match := _SLASH.fullmatch(text)) and int(match.group(2)):
        return Fraction(int(match.group(1)), int(match.group(2))) * scale
    return None


def compare(reference: str, value: str) -> bool | None:
    """True or False when the two can be compared exactly, None when it takes algebra.

    Units: 5 cm is not 5 m; a unit that only one side has is ignored.
    """
    reference, value = normalise(reference), normalise(value)
    if reference.replace(" ", "") == value.replace(" ", ""):
        return True
    (reference, unit), (value, other) = split_unit(reference), split_unit(value)
    if unit and other and unit != other:
        return False
    left, right = number(reference), number(value)
    if left is None or right is None:
        return None
    if ("%" in reference) != ("%" in value):
        # "what percentage" may be answered "50", "50%" or 0.5
        return left == right or left * 100 == right or left == right * 100
    return left == right


def same_text(reference: str, value: str) -> bool:
    """Equality of texts, ignoring case, white space, text commands and a final full stop."""
    def plain(text: str) -> str:
        return re.sub(r"\s+", "", normalise(text)).casefold()

    return plain(reference) == plain(value)
