"""The shapes an answer can have. Scalars stay text; everything else holds shapes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scalar:
    text: str


@dataclass(frozen=True)
class Sequence:
    """Ordered items in brackets: a tuple, point, vector or interval; "" as brackets for a bare list."""

    brackets: str  # "()", "[)", "" ...
    items: tuple[Shape, ...]


@dataclass(frozen=True)
class Collection:
    """Items in any order: a set in braces, or solutions joined by "or" and "and" or by ±."""

    items: tuple[Shape, ...]
    braces: bool = False


@dataclass(frozen=True)
class Union:
    """Parts of the number line in any order, of the variable that was named (if any)."""

    parts: tuple[Shape, ...]
    variable: str = ""


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple[Shape, ...], ...]
    determinant: bool = False


@dataclass(frozen=True)
class Cases:
    """(value, condition) pairs in any order."""

    rows: tuple[tuple[Shape, Shape], ...]


@dataclass(frozen=True)
class Ratio:
    terms: tuple[str, ...]


@dataclass(frozen=True)
class Congruence:
    name: str
    residue: int
    modulus: int


@dataclass(frozen=True)
class Named:
    """name = value; `parts` are the names in the brackets of (x, y) = ..."""

    name: str
    value: Shape
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Relation:
    """An equation or inequality between expressions; operators are =, <, <= (turned that way). "|" is a set-builder
    that says no interval, all of it on the left."""

    left: str
    operator: str
    right: str


Shape = Scalar | Sequence | Collection | Union | Matrix | Cases | Ratio | Congruence | Named | Relation
