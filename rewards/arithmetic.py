r"""The exact value of arithmetic without variables: fractions, powers, factorials, binomials, repeating decimals.

Exact, bounded and without sympy: what is not pure arithmetic, or is too large, has no value here.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

from rewards.words import spoken

MAX_TEXT, MAX_DEPTH, MAX_BITS, MAX_FACTORIAL = 300, 40, 100_000, 3000

_PLAIN = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}([, ]\d{3})+(\.\d+)?")
_EXPONENT = re.compile(r"([+-]?\d+(?:\.\d+)?)[eE]([+-]?\d{1,4})")
_TOKEN = re.compile(r"\s*(\d*\.?\d*\\overline\{\d+\}|\d+\.\d+\\ldots|\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])|"
                    r"\d+(?:\.\d*)?|\.\d+|\\frac|\\binom|\\sqrt|\\cdot|[-+*/^!(){}])")


class _NotArithmetic(Exception):
    """There is something else than bounded arithmetic in the text."""


def number(text: str) -> Fraction | None:
    """The value of normalised `text`, None if it is not arithmetic. "50%" is one half."""
    text = text.strip()
    if text.endswith("%"):
        value = number(text[:-1])
        return None if value is None else value / 100
    if len(text) > MAX_TEXT:
        return None
    if _PLAIN.fullmatch(text):
        return Fraction(text)
    if _THOUSANDS.fullmatch(text):
        return Fraction(text.replace(",", "").replace(" ", ""))
    if match := _EXPONENT.fullmatch(text):
        return Fraction(match.group(1)) * Fraction(10) ** int(match.group(2))
    if text[:1].isalpha():
        return spoken(text)
    try:
        return _Reader(text).all()
    except (_NotArithmetic, ZeroDivisionError, OverflowError):
        return None


class _Reader:
    """Recursive descent over sum, product, power, atom."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        position = 0
        while position < len(text):
            match = _TOKEN.match(text, position)
            if not match:
                raise _NotArithmetic
            self.tokens.append(match.group(1))
            position = match.end()
        self.at = self.depth = 0

    def all(self) -> Fraction:
        value = self.sum()
        if self.at < len(self.tokens):
            raise _NotArithmetic
        return value

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, token: str) -> bool:
        found = self.peek() == token
        self.at += found
        return found

    def sum(self) -> Fraction:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _NotArithmetic
        value = self.product()
        while self.peek() in ("+", "-"):
            sign = 1 if self.take("+") or not self.take("-") else -1
            value = _bounded(value + sign * self.product())
        self.depth -= 1
        return value

    def product(self) -> Fraction:
        if self.take("-"):
            return -self.product()
        if self.take("+"):
            return self.product()
        value = self.power()
        while True:
            if self.take("\\cdot") or self.take("*"):
                value *= self.signed()
            elif self.take("/"):
                value /= self.signed()
            elif self.peek() in ("(", "\\binom", "\\sqrt") or self.tokens[self.at - 1] in (")", "!") and self.peek()[
                    :1].isdigit():
                value *= self.power()
            else:
                return _bounded(value)
            value = _bounded(value)

    def signed(self) -> Fraction:
        return -self.power() if self.take("-") else self.power()

    def power(self) -> Fraction:
        base = self.atom()
        while self.take("!"):
            if base.denominator != 1 or not 0 <= base <= MAX_FACTORIAL or self.peek() == "!":
                raise _NotArithmetic
            base = Fraction(math.factorial(int(base)))
        if self.take("^"):
            exponent = self.signed() if self.peek() != "{" else self.atom()
            root = _root(base, exponent.denominator)
            size = max(abs(base.numerator), base.denominator).bit_length()
            if size * abs(exponent.numerator) > MAX_BITS or self.peek() == "^":
                raise _NotArithmetic
            return root ** exponent.numerator
        return base

    def atom(self) -> Fraction:
        token = self.peek()
        self.at += 1
        if token in ("(", "{"):
            value = self.sum()
            if not self.take(")" if token == "(" else "}"):
                raise _NotArithmetic
            return value
        if token == "\\frac":
            return self.braced() / self.braced()
        if token == "\\binom":
            top, bottom = self.braced(), self.braced()
            if top.denominator != 1 or bottom.denominator != 1 or not 0 <= bottom <= top <= MAX_FACTORIAL:
                raise _NotArithmetic
            return Fraction(math.comb(int(top), int(bottom)))
        if token == "\\sqrt":
            return _root(self.braced(), 2)
        if not token[:1].isdigit() and token[:1] != ".":
            raise _NotArithmetic
        value = _decimal(token)
        if token.isdigit() and self.peek() == "\\frac":  # a mixed number
            begin = self.at
            part = self.atom()
            plain = [text for text in self.tokens[begin:self.at] if text not in ("\\frac", "{", "}")]
            if not all(text.isdigit() for text in plain):
                raise _NotArithmetic
            return value + part
        return value

    def braced(self) -> Fraction:
        if self.peek() != "{":
            raise _NotArithmetic
        return self.atom()


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator).bit_length() > MAX_BITS:
        raise _NotArithmetic
    return value


def _root(value: Fraction, degree: int) -> Fraction:
    """The root where it is rational and plain to see."""
    if degree == 1:
        return value
    if value < 0 or degree != 2:
        raise _NotArithmetic
    root = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
    if root * root != value:
        raise _NotArithmetic
    return root


def _decimal(token: str) -> Fraction:
    r"""A number token; "0.1\overline{6}" and "0.166\ldots" repeat."""
    token = token.replace(",", "")
    if token.endswith("\\ldots"):
        whole, _, digits = token.removesuffix("\\ldots").partition(".")
        for length in range(1, len(digits) // 2 + 1):  # at least twice, all of the digits
            block = digits[:length]
            if (block * len(digits))[:len(digits)] == digits and len(digits) % length == 0:
                return Fraction(int(whole)) + Fraction(int(block), 10 ** length - 1)
        raise _NotArithmetic
    if "\\overline" not in token:
        return Fraction(token)
    start, _, block = token.rstrip("}").partition("\\overline{")
    whole, point, fixed = start.partition(".")
    if not point:
        raise _NotArithmetic
    scale = Fraction(1, 10 ** len(fixed))
    return Fraction(int(whole or 0)) + scale * (int(fixed or 0) + Fraction(int(block), 10 ** len(block) - 1))
