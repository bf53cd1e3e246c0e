"""Equality of scalars and equations by sympy; runs in the math worker only, under its limits.

Expressions are evaluated to many digits, at several points where they have variables: two that agree everywhere are
equal, and no simplification is needed to see it. What cannot be evaluated is left to math-verify's own comparison.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from latex2sympy2_extended import NormalizationConfig, latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import verify
from sympy import Basic, Derivative, E, Expr, I, Integral, Limit, Product, Rational, Sum, Symbol

from rewards.exact import Exact
from rewards.shapes import Relation

DIGITS = 30
LARGEST = 10**2000
_BOUND = (Sum, Product, Integral, Derivative, Limit)  # evaluating these at a point can take for ever
# units off: they take the h of "\pi r^2 h" for hours
_SPELLING = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
_MEANING = ConversionConfig(interpret_as_mixed_fractions=False, interpret_contains_as_eq=False, lowercase_symbols=False)
_DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)(?![\d\\])")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?|\([^()]*\)|\b[a-z]|\\[a-z]+)\s*\^\s*\\circ")
# values for the variables: of both signs, and none that an expression is likely to be special at
_POINTS = tuple(tuple(Rational(sign * (7 * row + 3 * column + 2), 5 + 2 * column) + Rational(1, 97 + row)
                      for column, sign in enumerate(signs))
                for row, signs in enumerate(([1] * 12, [-1] * 12, [1, -1] * 6, [-1, 1] * 6, [1] * 12, [-1, -1, 1] * 4)))


class Unreadable(ValueError):
    """The reference is not mathematics that can be read."""


class Algebra(Exact):
    """What exact comparison cannot tell, told by algebra."""

    def scalar(self, reference: str, value: str) -> bool:
        found = super().scalar(reference, value)
        if found is not None:
            return found
        left = _expression(reference)
        if left is None:
            raise Unreadable(reference)
        right = _expression(value)
        return right is not None and equal(left, right)

    def relation(self, reference: Relation, value: Relation) -> bool:
        """Equations with one set of solutions: their differences of sides are in a constant ratio."""
        if super().relation(reference, value):
            return True
        sides = [_expression(text) for text in (reference.left, reference.right, value.left, value.right)]
        if sides[0] is None or sides[1] is None:
            raise Unreadable(reference.left)
        if not all(isinstance(side, Expr) for side in sides):
            return False
        return _proportional(sides[0] - sides[1], sides[2] - sides[3], reference.operator == "=")


@lru_cache(maxsize=256)
def _expression(text: str) -> Basic | None:
    """Normalised LaTeX as sympy understands it, None if it does not."""
    text = _DECIMAL.sub(lambda match: rf"{{\frac{{{int(match[1] + match[2])}}}{{1{'0' * len(match[2])}}}}}", text)
    text = _DEGREES.sub(r"(\\frac{\1\\pi}{180})", text)
    try:
        found = latex2sympy(text, normalization_config=_SPELLING, conversion_config=_MEANING)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # the parser raises whatever its tree walk met
        return None
    if isinstance(found, Expr):
        constants = {Symbol("i"): I, Symbol("e"): E}
        return found.subs(constants) if constants.keys() & found.free_symbols else found
    return found if isinstance(found, Basic) else None


def equal(left: Basic, right: Basic) -> bool:
    """Whether two sympy objects are equal."""
    if left == right:
        return True
    if isinstance(left, Expr) and isinstance(right, Expr):
        pairs = _values(left, right)
        if pairs is None:
            return False
        if pairs:
            return all(_close(*pair) for pair in pairs)
    return verify(left, right, timeout_seconds=None)


def _proportional(left: Expr, right: Expr, any_sign: bool) -> bool:
    pairs = _values(left, right)
    if not pairs or len(pairs) < 2 or not all(one and other for one, other in pairs):
        return False
    ratios = [one / other for one, other in pairs]
    return all(_close(ratio, ratios[0]) for ratio in ratios) and (any_sign or ratios[0] > 0)


def _values(left: Expr, right: Expr) -> Sequence[tuple[Expr, Expr]] | None:
    """Both at points where they have values: real ones if there are any, as the variables of problems are real.

    None if a number is too large to be told from its neighbours.
    """
    if left.has(*_BOUND) or right.has(*_BOUND):
        return []
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    if len(symbols) > len(_POINTS[0]):
        return []
    real, complex_ = [], []
    for point in _POINTS if symbols else _POINTS[:1]:
        values = dict(zip(symbols, point, strict=False))
        pair = _digits(left, values), _digits(right, values)
        if any(value is not None and abs(value) > LARGEST for value in pair):
            return None
        if None not in pair:
            (real if all(value.is_real for value in pair) else complex_).append(pair)
    return real or complex_


def _digits(expression: Expr, values: dict) -> Expr | None:
    """The value at a point to 30 digits behind its leading one, or to all digits of a large number."""
    try:
        found = expression.evalf(DIGITS, subs=values)
        if found.is_number and found.is_finite and abs(found) > 10 ** (DIGITS // 2):
            found = expression.evalf(DIGITS + len(str(int(min(abs(found), LARGEST)))), subs=values)
    except (ValueError, TypeError, ArithmeticError, AttributeError, NotImplementedError):
        return None
    return found if found.is_number and found.is_finite and not found.has(Symbol) and len(
        found.atoms()) <= 4 else None


def _close(left: Expr, right: Expr) -> bool:
    return bool(abs(left - right) <= Rational(1, 10 ** (DIGITS - 8)) * min(1, max(abs(left), abs(right))))
