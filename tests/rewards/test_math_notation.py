from fractions import Fraction

import pytest

from rewards.arithmetic import number
from rewards.notation import cut, normalise, same_text, squeeze
from rewards.structure import _COMMA
from rewards.units import split_unit
from rewards.words import is_words, spoken


@pytest.mark.parametrize(("one", "other"), [
    (r"\dfrac12", r"\frac {1}{2}"), (r"\frac 59", r"\tfrac{5}9"), (r"\sqrt2", r"\sqrt{2}"), (r"x\leqslant 2", "x ≤ 2"),
    (r"x >= 2", r"x\ge2"), (r"\left( 1,\, 2 \right)", "(1,2)"), (r"{10 \choose 3}", r"\dbinom{10}{3}"),
    (r"60^{\circ}", "60°"), (r"1{,}000", r"1,\!000"), (r"\mathbf{29}", r"\mbox{29}"), (r"\text{\textbf{Ann}}", "Ann"),
    (r"(0,+\infty)", r"(0, \infty)"), (r"\R\backslash\{1\}", r"\mathbb{R}\setminus \{1\}"),
    (r"0.\dot{3}", r"0.\overline{3}"), (r"$58$", "58."), (r"{\frac{8}{15}}", r"\frac{8}{15}"), ("x_{1}^{2}", "x_1^2"),
])
def test_spellings_of_one_answer_become_one_text(one, other):
    assert squeeze(normalise(one)) == squeeze(normalise(other)) and same_text(one, other)


@pytest.mark.parametrize(("one", "other"), [
    (r"2^{2}3", r"2^{23}"), (r"\frac{1}{23}", r"\frac{12}{3}"), ("x_{12}", "x_1 2 3"), (r"1 \\ 2", "1 2"),
    (r"\cdots", r"\cdot s"), (r"\sin x", "sinx"), (r"\emptyset", "0"),
])
def test_spellings_of_two_answers_stay_two_texts(one, other):
    assert not same_text(one, other)


def test_texts_are_cut_outside_of_brackets_and_environments_only():
    assert cut("(1,2),[3,4),{5,6}", _COMMA) == ["(1,2)", "[3,4)", "{5,6}"]
    assert cut(r"\begin{matrix}1,2\end{matrix}, 3", _COMMA) == [r"\begin{matrix}1,2\end{matrix}", "3"]


@pytest.mark.parametrize(("text", "value"), [
    ("1,234,567", 1234567), ("1 000 000", 1000000), (r"3\frac{1}{2}", Fraction(7, 2)), (r"-2\frac38", Fraction(-19, 8)),
    (r"0.1\overline{6}", Fraction(1, 6)), (r"0.\overline{36}", Fraction(4, 11)), (r"0.555\ldots", Fraction(5, 9)),
    ("10!", 3628800), (r"\binom{10}{3}", 120), (r"\frac{52}{\binom{9}{2}}", Fraction(13, 9)), ("-5^2", -25),
    ("(-5)^2", 25), ("2^{-3}", Fraction(1, 8)), (r"3.2 \times 10^{5}", 320000), ("1.5e3", 1500), (r"\sqrt{49}", 7),
    (r"40\%", Fraction(2, 5)), ("6!5!", 86400), (r"6 \cdot 7", 42), (r"\text{twenty-one}", 21), ("2(3+4)", 14),
])
def test_arithmetic_has_its_exact_value(text, value):
    assert number(normalise(text)) == value


@pytest.mark.parametrize("text", ["x", "4 2 1", "2x", r"\pi", "1/0", "9^{9^9}", "10^{999999}", "99999!", "5!!",
                                  "2^{9^9}", "", "(" * 200 + "1" + ")" * 200, r"\sqrt{2}", "1+", "0.123\\ldots",
                                  "3..4", "1,23", "!"])
def test_what_is_no_bounded_arithmetic_has_no_value(text):
    assert number(normalise(text)) is None


@pytest.mark.parametrize(("text", "value"), [
    ("two hundred and four", 204), ("negative eighteen", -18), ("three fourths", Fraction(3, 4)), ("a dozen", 12),
    ("one half", Fraction(1, 2)), ("ninety-nine thousand one", 99001), ("zero", 0), ("three million", 3000000),
])
def test_numbers_in_words_have_a_value(text, value):
    assert spoken(text) == value


@pytest.mark.parametrize("text", ["ten four", "and", "two and", "hundred", "twenty thirty", "one apple", "half",
                                  "minus"])
def test_words_that_are_no_number_have_none(text):
    assert spoken(text) is None


def test_words_are_told_from_products_of_letters():
    assert all(map(is_words, ("odd", "No", "Ann", "ellipse", "no solution")))
    assert not any(map(is_words, ("x", "ab", "xyz", "abc", "AB")))


@pytest.mark.parametrize(("text", "value"), [
    (r"5 \text{ cm}", "5"), (r"\$7", "7"), (r"9.8\,\text{m}/\text{s}^2", "9.8"),
    (r"25\pi \text{ square inches}", r"25\pi"), (r"60^\circ", "60"), (r"18 \text{ students}", "18"),
    (r"3\text{ h}", "3"), (r"45 \text{ miles per hour}", "45"),
])
def test_a_stated_unit_is_split_from_its_value(text, value):
    found, unit = split_unit(normalise(text))
    assert found == value and unit


@pytest.mark.parametrize("text", ["5m", "2xyz", r"2\sin x", "3 or 4", r"7 \text{ million}", r"\sin 20^\circ", "x",
                                  "12"])
def test_variables_functions_and_words_about_the_value_are_no_units(text):
    assert split_unit(normalise(text))[1] is None


def test_units_of_one_dimension_are_convertible():
    (_, metres), (_, centimetres) = split_unit("4 meters"), split_unit("400 cm")
    assert metres.powers == centimetres.powers and metres.factor == 100 * centimetres.factor
    assert split_unit("4 cm^2")[1].powers != centimetres.powers
