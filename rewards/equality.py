"""Equality of answers by their shape; what decides about the scalars and equations inside is handed in.

Strict about what brackets say: an open end is not a closed one, a tuple has an order and a set has none, a missing
element is missing. Lenient about what only the problem says: the name of the answer, and braces around its solutions.
Every answer is True, False or None, "cannot tell": exact comparison cannot tell where algebra is needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Protocol

from rewards import structure
from rewards.notation import normalise, squeeze
from rewards.shapes import (
    Cases,
    Collection,
    Congruence,
    Matrix,
    Named,
    Ratio,
    Relation,
    Scalar,
    Sequence,
    Shape,
    Union,
)


class Scalars(Protocol):
    """Equality of two normalised scalar texts, and of two equations."""

    def scalar(self, reference: str, value: str) -> bool | None: ...

    def relation(self, reference: Relation, value: Relation) -> bool | None: ...


def same(reference: str, value: str, scalars: Scalars) -> bool | None:
    """Whether two answers as they were written are equal."""
    reference, value = normalise(reference), normalise(value)
    if squeeze(reference) == squeeze(value):
        return True
    return same_shape(structure.read(reference), structure.read(value), scalars)


def same_shape(reference: Shape, value: Shape, scalars: Scalars) -> bool | None:
    """Whether two shapes are equal."""
    if isinstance(reference, Scalar) and isinstance(value, Scalar):
        return scalars.scalar(reference.text, value.text)
    if isinstance(reference, (Named, Relation)) and isinstance(value, (Named, Relation)):
        return _same_equation(reference, value, scalars)
    names, others = _record(reference), _record(value)
    if names or others:
        return _same_record(names, others, reference, value, scalars)
    reference, value = _unnamed(reference), _unnamed(value)
    if isinstance(reference, Scalar) and isinstance(value, Scalar):
        return scalars.scalar(reference.text, value.text)
    left, right = _unordered(reference), _unordered(value)
    if left is not None and right is not None:
        if isinstance(reference, Sequence) and isinstance(value, Sequence) and _words(reference):
            return _each(reference.items, value.items, scalars)
        return _match(_distinct(reference, left, scalars), _distinct(value, right, scalars), scalars)
    for one, other in ((reference, value), (value, reference)):
        if isinstance(one, Collection) and one.braces and len(one.items) == 1 and _unordered(other) is None:
            pair = (one.items[0], other) if one is reference else (other, one.items[0])
            return same_shape(*pair, scalars)
    return _same_kind(reference, value, scalars)


def _same_kind(reference: Shape, value: Shape, scalars: Scalars) -> bool | None:
    match reference, value:
        case Sequence(), Sequence():
            brackets = {reference.brackets or "()", value.brackets or "()"}
            return len(brackets) == 1 and _each(reference.items, value.items, scalars)
        case Union(), Union():
            if reference.variable and value.variable and reference.variable != value.variable:
                return False
            return _match(reference.parts, value.parts, scalars)
        case (Union(parts=[part]), Sequence()):
            return same_shape(part, value, scalars)
        case (Sequence(), Union(parts=[part])):
            return same_shape(reference, part, scalars)
        case Matrix(), Matrix():
            return (reference.determinant == value.determinant and len(reference.rows) == len(value.rows)
                    and _all(_each(*rows, scalars) for rows in zip(reference.rows, value.rows, strict=True)))
        case (Matrix(), Sequence()):
            return _same_matrix(reference, value, scalars, swapped=False)
        case (Sequence(), Matrix()):
            return _same_matrix(value, reference, scalars, swapped=True)
        case Cases(), Cases():
            rows = [[Sequence("case", row) for row in shape.rows] for shape in (reference, value)]
            return _match(rows[0], rows[1], scalars)
        case Ratio(), Ratio():
            (first, *left), (base, *right) = reference.terms, value.terms
            return len(left) == len(right) and _all(
                scalars.scalar(_fraction(one, first), _fraction(other, base))
                for one, other in zip(left, right, strict=True))
        case Ratio(terms=[top, bottom]), Scalar():
            return scalars.scalar(_fraction(top, bottom), value.text)
        case Scalar(), Ratio(terms=[top, bottom]):
            return scalars.scalar(reference.text, _fraction(top, bottom))
        case Congruence(), Congruence():
            names = {name for name in (reference.name, value.name) if name}
            return (reference.residue, reference.modulus) == (value.residue, value.modulus) and len(names) < 2
        case Scalar(), Sequence():
            return _point(reference, value, scalars, swapped=False)
        case Sequence(), Scalar():
            return _point(value, reference, scalars, swapped=True)
    return False


def _same_equation(reference: Named | Relation, value: Named | Relation, scalars: Scalars) -> bool | None:
    """Named values by name and value, other equations as such."""
    if isinstance(reference, Named) and isinstance(value, Named):
        if reference.name == value.name:
            return same_shape(reference.value, value.value, scalars)
        functions = [re.fullmatch(r"\w\(([a-z])\)|y", shape.name) for shape in (reference, value)]
        if functions[0] and functions[1] and "(" in reference.name + value.name:  # f(n) = n^2 is y = x^2
            values = [_renamed(shape, function.group(1))
                      for shape, function in zip((reference, value), functions, strict=True) if function]
            return same_shape(values[0], values[1], scalars)
        if reference.parts or value.parts or not re.fullmatch(r"\\?[a-zA-Z]+", reference.name):
            names, others = _record(reference), _record(value)
            return _same_record(names, others, reference, value, scalars) if names or others else False
    left, right = _equation(reference), _equation(value)
    if left is None or right is None or left.operator != right.operator:
        return False
    if "|" in left.operator:
        return left.left == right.left
    return scalars.relation(left, right)


def _equation(shape: Named | Relation) -> Relation | None:
    if isinstance(shape, Relation):
        return shape
    return Relation(shape.name, "=", shape.value.text) if isinstance(shape.value, Scalar) else None


def _renamed(function: Named, argument: str | None) -> Shape:
    """The value of a function as one of x."""
    if not isinstance(function.value, Scalar) or argument in (None, "x"):
        return function.value
    return Scalar(re.sub(r"\\[a-zA-Z]+|.", lambda match: "x" if match.group() == argument else match.group(),
                         function.value.text))


def _record(shape: Shape) -> dict[str, Shape] | None:
    """{"x": 1, "y": 2} of "x = 1, y = 2" and of "(x, y) = (1, 2)"."""
    if isinstance(shape, Named) and isinstance(shape.value, Sequence) and len(shape.parts) == len(shape.value.items):
        return dict(zip(shape.parts, shape.value.items, strict=True))
    if isinstance(shape, (Sequence, Collection)) and len(shape.items) > 1:
        names = [item.name for item in shape.items if isinstance(item, Named)]
        letters = {name.partition("_")[0] for name in names}
        if len(letters) == len(shape.items):
            return {item.name: item.value for item in shape.items if isinstance(item, Named)}
    return None


def _same_record(names: dict[str, Shape] | None, others: dict[str, Shape] | None, reference: Shape, value: Shape,
                 scalars: Scalars) -> bool | None:
    """By name; by the alphabet where one side is a tuple."""
    if names and others:
        return names.keys() == others.keys() and _all(same_shape(names[name], others[name], scalars) for name in names)
    known, plain = (names or others or {}), _unnamed(value if names else reference)
    if not isinstance(plain, Sequence) or plain.brackets not in ("()", "") or len(plain.items) != len(known):
        return False
    ordered = [known[name] for name in sorted(known)]
    return _each(ordered, plain.items, scalars) if names else _each(plain.items, ordered, scalars)


def _unnamed(shape: Shape) -> Shape:
    """A value without its name, and so each of a list."""
    if isinstance(shape, Named):
        return _unnamed(shape.value)
    if isinstance(shape, Collection):
        return Collection(tuple(_unnamed(item) for item in shape.items), shape.braces)
    if isinstance(shape, Sequence):
        return Sequence(shape.brackets, tuple(_unnamed(item) for item in shape.items))
    return shape


def _unordered(shape: Shape) -> tuple[Shape, ...] | None:
    """The items of a set or bare list."""
    return shape.items if isinstance(shape, Collection) or isinstance(shape, Sequence) and not shape.brackets else None


def _words(shape: Sequence) -> bool:
    """Lists of words are in an order: who came first, second, third."""
    return all(isinstance(item, Scalar) and re.fullmatch(r"[a-zA-Z ]+", item.text) for item in shape.items)


def _distinct(shape: Shape, items: Iterable[Shape], scalars: Scalars) -> list[Shape]:
    """A set holds an element once."""
    if not (isinstance(shape, Collection) and shape.braces):
        return list(items)
    kept: list[Shape] = []
    for item in items:
        if not any(item == other or same_shape(other, item, scalars) for other in kept):
            kept.append(item)
    return kept


def _match(left: Iterable[Shape], right: Iterable[Shape], scalars: Scalars) -> bool | None:
    """Whether two collections hold the same elements as often."""
    left, rest, unsure = list(left), list(right), False
    if len(left) != len(rest):
        return False
    for item in left:
        verdicts = [item == other or same_shape(item, other, scalars) for other in rest]
        if True in verdicts:
            rest.pop(verdicts.index(True))
        elif None in verdicts:
            unsure = True
        else:
            return False
    return None if unsure else True


def _each(left: Iterable[Shape], right: Iterable[Shape], scalars: Scalars) -> bool | None:
    left, right = list(left), list(right)
    return len(left) == len(right) and _all(same_shape(*pair, scalars) for pair in zip(left, right, strict=True))


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    unsure = False
    for found in verdicts:
        if found is False:
            return False
        unsure |= found is None
    return None if unsure else True


def _same_matrix(matrix: Matrix, other: Sequence, scalars: Scalars, swapped: bool) -> bool | None:
    """A column or row as a tuple, a matrix as a list of rows."""
    if other.brackets == "()" and (len(matrix.rows) == 1 or all(len(row) == 1 for row in matrix.rows)):
        cells = [cell for row in matrix.rows for cell in row]
        return _each(other.items, cells, scalars) if swapped else _each(cells, other.items, scalars)
    rows = [row.items for row in other.items if isinstance(row, Sequence) and row.brackets == "[]"]
    if other.brackets != "[]" or len(rows) != len(other.items):
        return False
    listed = Matrix(tuple(rows))
    return _same_kind(*((listed, matrix) if swapped else (matrix, listed)), scalars)


def _point(named: Scalar, point: Sequence, scalars: Scalars, swapped: bool) -> bool | None:
    """P(1, 2) is the point (1, 2)."""
    match = re.fullmatch(r"[A-Z]\s*(\(.*,.*\))", named.text)
    shape = structure.read(match.group(1)) if match else named
    if not isinstance(shape, Sequence):
        return False
    return same_shape(*((point, shape) if swapped else (shape, point)), scalars)


def _fraction(top: str, bottom: str) -> str:
    return rf"\frac{{{top}}}{{{bottom}}}"
