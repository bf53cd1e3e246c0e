r"""Exact comparison of answers: structure, then text, units and `Fraction`. No sympy, microseconds.

Most boxed answers are decided here; only what is left needs algebra.
"""

from __future__ import annotations

import re
from fractions import Fraction

from rewards import equality
from rewards.arithmetic import number
from rewards.notation import same_text, squeeze
from rewards.shapes import Relation
from rewards.units import split_unit
from rewards.words import is_words

MAX_LENGTH = 2000  # characters of a box
MAX_NESTING = 100  # open brackets
MAX_EXPONENT = 4  # digits of an exponent

__all__ = ["MAX_LENGTH", "Exact", "compare", "number", "same_text", "too_complex"]

_SIMPLE = re.compile(r"-?\d+(\.\d+)?")
_NUMERAL = re.compile(r"\(?([0-9A-Z,]*[0-9][0-9A-Z,]*)\)?(?:_\{?([a-z]+|\d{1,2})\}?)?")
_BASES = {name: base for base, name in enumerate(
    "two three four five six seven eight nine ten eleven twelve".split(), 2)} | {"sixteen": 16}
_CHOICE = re.compile(r"\(([A-J])\)\s*(.*)|([A-J])\.?()")
_CLOCK = re.compile(r"(\d{1,2}):(\d\d)\s*(?:([ap])\.?\s*m\.?)?", re.IGNORECASE)
_SMALL_BEFORE = re.compile(r"(?<![\d.^])\d{1,2}$|(?<![a-zA-Z\\^])[a-z]$|"
                           r"(?<!\^)[({](?:\d{0,2}[a-z]|\d{1,2}|\s|[+-])*+[)}]$")
_WORDS = re.compile(r"[a-zA-Z]+( [a-zA-Z]+)*")


def too_complex(text: str) -> bool:
    """Whether comparing `text` could cost unbounded time: length, nesting, power towers, large factorials."""
    if len(text) > MAX_LENGTH:
        return True
    depth = deepest = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        deepest = max(deepest, depth)
    powers = text.replace("**", "^")
    exponents = _exponents(powers)
    tall = re.search(rf"\^[\s{{(+-]*\d{{{MAX_EXPONENT + 1},}}", powers)
    tower = re.search(r"\^\s*[-+]?(\d[\d.]*|[a-zA-Z])\s*\^", powers) or any(
        "^" in exponent and not re.search("[a-zA-Z]", exponent) for exponent in exponents)
    return bool(deepest > MAX_NESTING or tower or tall or _large_factorial(text, exponents))


def _large_factorial(text: str, exponents: list[str]) -> bool:
    """Factorials of long numbers, of anything but sums of small numbers and letters, repeated or in exponents."""
    if "factorial" in text or "\\Gamma" in text or any("!" in exponent for exponent in exponents):
        return True
    for match in re.finditer(r"(?<=[\w)}\]])\s*!(?!=)", text):
        before = text[max(0, match.start() - 24):match.start()]
        if not _SMALL_BEFORE.search(before) or text[match.end():match.end() + 1] == "!":
            return True
    return False


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


def compare(reference: str, value: str) -> bool | None:
    """True or False when the two can be compared exactly, None when it takes algebra.

    Units: 5 cm is not 5 m; a unit that only one side has is ignored.
    """
    if _SIMPLE.fullmatch(reference) and _SIMPLE.fullmatch(value):
        return reference == value or len(value) < 4000 and Fraction(reference) == Fraction(value)
    return equality.same(reference, value, Exact())


class Exact:
    """Scalars and equations that can be told without algebra."""

    def relation(self, reference: Relation, value: Relation) -> bool | None:
        sides = [{squeeze(side.left), squeeze(side.right)} if side.operator == "=" else
                 (squeeze(side.left), squeeze(side.right)) for side in (reference, value)]
        return True if sides[0] == sides[1] else None

    def scalar(self, reference: str, value: str) -> bool | None:
        """Whether two normalised scalars are equal."""
        if squeeze(reference) == squeeze(value):
            return True
        for tell in (_numerals, _choices, _clocks, self._units, _numbers, _texts):
            found = tell(reference, value)
            if found is not None:
                return found
        return None

    def _units(self, reference: str, value: str) -> bool | None:
        (left, unit), (right, other) = split_unit(reference), split_unit(value)
        if left == reference and right == value:
            return None
        if unit and other and unit.powers == other.powers and unit.factor != other.factor:
            return self.scalar(_times(left, unit.factor), _times(right, other.factor))
        kinds = (unit.name if unit else "", other.name if other else "")
        if kinds in (("degree", "radian"), ("degree", "")):
            return self._degrees(left, right, explicit=bool(kinds[1]))
        if kinds in (("radian", "degree"), ("", "degree")):
            return self._degrees(right, left, explicit=bool(kinds[0]), swapped=True)
        if unit and other and unit.powers != other.powers:
            return False
        return self.scalar(left, right)

    def _degrees(self, degrees: str, other: str, explicit: bool, swapped: bool = False) -> bool | None:
        r"""60° is \pi/3, and is 60 where nothing says what 60 counts."""
        if not explicit and "\\pi" not in other:
            return self.scalar(other, degrees) if swapped else self.scalar(degrees, other)
        if "\\pi" in degrees:
            return False
        radians = rf"\frac{{({degrees})\pi}}{{180}}"
        return self.scalar(other, radians) if swapped else self.scalar(radians, other)


def _times(text: str, factor: Fraction) -> str:
    return rf"({text})\cdot\frac{{{factor.numerator}}}{{{factor.denominator}}}"


def _numerals(reference: str, value: str) -> bool | None:
    """101_2: equal digits in an equal base; a base that only one side states is ignored. 101_2 is not called 5_{10},
    as converting is the problem."""
    if "_" not in reference and "_" not in value:
        return None
    numerals = []
    for text in (reference, value):
        match = _NUMERAL.fullmatch(text.replace(" ", ""))
        if not match:
            return None
        digits, base = match.group(1).replace(",", ""), match.group(2)
        if base is not None and base not in _BASES and not base.isdigit():
            return None
        numerals.append((digits.lstrip("0"), int(base) if base and base.isdigit() else _BASES.get(base)))
    (digits, base), (others, other) = numerals
    return digits == others and (base is None or other is None or base == other)


def _choices(reference: str, value: str) -> bool | None:
    """(C), C, and "(C) 144", whose letter or content may be left out."""
    left, right = _CHOICE.fullmatch(reference), _CHOICE.fullmatch(value)
    if left and right:
        letters = {match.group(1) or match.group(3) for match in (left, right)}
        contents = [match.group(2) or "" for match in (left, right)]
        return len(letters) == 1 and (not all(contents) or Exact().scalar(*contents) is True)
    if left and left.group(2) and not left.group(3):
        return Exact().scalar(left.group(2), value)
    return None


def _clocks(reference: str, value: str) -> bool | None:
    """Times of day: morning is not evening."""
    times = [_CLOCK.fullmatch(text) for text in (reference, value)]
    if not times[0] or not (times[0].group(3) or times[0].group(2).startswith("0")):
        return None
    return bool(times[1]) and [(int(time[1]), time[2], (time[3] or "").lower()) for time in times if time].count(
        (int(times[0][1]), times[0][2], (times[0][3] or "").lower())) == 2


def _numbers(reference: str, value: str) -> bool | None:
    left, right = number(reference), number(value)
    if left is not None and right is not None:
        if ("%" in reference) != ("%" in value):
            # "what percentage" may be answered "50", "50%" or 0.5
            share, plain = (left, right) if "%" in reference else (right, left)
            return plain in (share, share * 100)
        return left == right
    left, right = _multiple_of_pi(reference), _multiple_of_pi(value)
    return None if left is None or right is None else left == right


def _multiple_of_pi(text: str) -> Fraction | None:
    r"""5/4 for \frac{5\pi}{4}."""
    if text.count("\\pi") != 1:
        return None
    none, one, two = (number(text.replace("\\pi", f"({count})")) for count in range(3))
    return one if none == 0 and one is not None and two == 2 * one else None


def _texts(reference: str, value: str) -> bool | None:
    """Words are compared as text: algebra would read them as products of letters."""
    if not any(_WORDS.fullmatch(text) and is_words(text) for text in (reference, value)):
        return None
    left, right = (re.sub(r"^(a|an|the) |\W", "", text.casefold()) for text in (reference, value))
    return left == right
