r"""Units stated after an answer: told from variables, and converted exactly.

A unit counts where it follows a value and is a word: "5 m" may be five times m, "5 \text{ m}" is five metres (see
`notation`). Words that are no unit of measure ("18 students") are units of their own.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from rewards.arithmetic import MAX_TEXT
from rewards.words import SCALES, is_words

_TABLE: dict[str, dict[str, Fraction | int]] = {
    "length": {"mm millimeter millimetre": Fraction(1, 1000), "cm centimeter centimetre": Fraction(1, 100),
               "m meter metre": 1, "km kilometer kilometre": 1000, "in inch inche": Fraction(254, 10000),
               "ft feet foot": Fraction(3048, 10000), "yd yard": Fraction(9144, 10000),
               "mi mile": Fraction(1609344, 1000)},
    "mass": {"mg milligram": Fraction(1, 10**6), "g gram": Fraction(1, 1000), "kg kilogram": 1,
             "lb pound": Fraction(45359237, 10**8), "oz ounce": Fraction(45359237, 16 * 10**8)},
    "volume": {"ml milliliter millilitre": Fraction(1, 1000), "l liter litre": 1},
    "time": {"s sec second": 1, "min minute": 60, "h hr hour": 3600, "d day": 86400, "wk week": 604800},
    "year": {"yr year": 1}, "month": {"month": 1},
    "money": {"dollar": 1, "cent": Fraction(1, 100)}, "euro": {"euro": 1},
    "degree": {"degree": 1}, "radian": {"rad radian": 1}, "unit": {"unit": 1},
}
_UNITS = {name: (dimension, Fraction(factor)) for dimension, names in _TABLE.items()
          for spelt, factor in names.items() for name in spelt.split()}
_SPEEDS = {"mph": "mile per hour", "kph": "km per hour", "kmh": "km per hour"}
# after a value these change it, or say something about it
_NO_UNIT = frozenset(
    "and or to if is not of plus minus times over point percent squared cubed more less than least most mod negative "
    "by divided half halves third thirds quarter quarters but for when where with either only about choose wrong "
    "incorrect maybe solution solutions cis sin cos tan log ln pi sqrt frac pmod bmod equiv infinity am pm noon".split()
) | SCALES.keys()
_WORDS = re.compile(r"^(.*?[\d)}\]!|]|.*?\\pi|.*?\d\.)\s*((?<![\\a-zA-Z])[a-zA-Z][a-zA-Z .]*"
                    r"(?:\s*\^\s*\{?[23]\}?)?(?:\s*/\s*[a-zA-Z]+\s*(?:\^\s*\{?[23]\}?)?)?)$")
_ANGLE_OF = re.compile(r"sin|cos|tan|cot|sec|csc|cis|\^\s*\\circ.*\^\s*\\circ")  # its degrees are inside the value


class Unit(NamedTuple):
    """Powers of dimensions, and the factor to their base units."""

    powers: tuple[tuple[str, int], ...]
    factor: Fraction

    @property
    def name(self) -> str:
        return self.powers[0][0] if len(self.powers) == 1 else ""


def split_unit(text: str) -> tuple[str, Unit | None]:
    """("5", centimetres) for normalised "5 cm"; (text, None) where no unit is stated."""
    if text.isdigit() or len(text) > MAX_TEXT:
        return text, None
    if match := re.fullmatch(r"(-?)\s*\$\s*(-?.+?)(\s+per\s+[a-z]+)?", text):
        return _scaled(match.group(1) + match.group(2)), read_unit(f"dollar{match.group(3) or ''}")
    if (match := re.fullmatch(r"(.*[\d}).i])\s*\^\s*\\circ", text)) and not _ANGLE_OF.search(text):
        return match.group(1), read_unit("degree")
    if not text[-1:].isalpha() and text[-1:] not in ("2", "3", "}"):
        return text, None
    if match := _WORDS.fullmatch(text):
        value, words = match.group(1).strip(), match.group(2)
        if words.strip() == "percent":
            return value + "%", None
        unit = read_unit(words)
        # letters right behind a number are its variables unless they are a unit of measure
        if unit and (text[len(match.group(1))].isspace() or all(name in _TABLE for name, _ in unit.powers)):
            return value, unit
        head, _, rest = words.strip().partition(" ")
        if head in SCALES:  # "3 million dollars"
            return _scaled(f"{value} {head}"), read_unit(rest) if rest else None
    elif (match := re.fullmatch(r"([a-zA-Z\s-]+?)\s+([a-z]+)", text)) and match.group(2).rstrip("s") in _UNITS:
        return match.group(1), read_unit(match.group(2))  # "two dollars"
    return text, None


def _scaled(text: str) -> str:
    """ "3 million" as arithmetic."""
    head, _, word = text.rpartition(" ")
    return f"({head})*{SCALES[word]}" if head and word in SCALES else text


@lru_cache(maxsize=1024)
def read_unit(text: str) -> Unit | None:
    """The unit `text` names, None where it is no unit: one letter, or words that belong to the value."""
    text = re.sub(r"[{}.]", "", text).strip()
    text = _SPEEDS.get(text, text.replace(" sq ", " square ").replace(" per ", "/").replace(" old", ""))
    over, _, under = text.replace(" per ", "/").partition("/")
    powers: dict[str, int] = {}
    factor = Fraction(1)
    for part, sign in ((over, 1), (under, -1)):
        if not (part := part.strip()):
            continue
        power = 1
        if match := re.search(r"\s*\^\s*([23])$", part):
            power, part = int(match.group(1)), part[:match.start()]
        head, _, rest = part.partition(" ")
        if head in ("square", "sq", "cubic", "cu") and rest:
            power, part = 2 if head in ("square", "sq") else 3, rest
        found = _one(part.strip(), alone=not under)
        if found is None:
            return None
        dimension, own = found
        powers[dimension] = powers.get(dimension, 0) + sign * power
        factor *= own ** (sign * power)
    return Unit(tuple(sorted(powers.items())), factor) if powers else None


def _one(word: str, alone: bool) -> tuple[str, Fraction] | None:
    for name in (word, word.lower(), word.lower().removesuffix("s"), word.lower().removesuffix("es")):
        if name in _UNITS and (len(word) > 1 or not alone):
            return _UNITS[name]
    words = word.lower().split()
    if not is_words(word) or len(words) > 3 or any(len(part) < 3 or part in _NO_UNIT for part in words):
        return None
    return " ".join(part.removesuffix("s") for part in words), Fraction(1)
