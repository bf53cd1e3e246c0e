import pytest

from pipeline.records import Status
from rewards.exact import compare
from rewards.math import verify_math

MATRIX = r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"
CASES = r"\begin{cases} x & x \ge 0 \\ -x & x < 0 \end{cases}"


@pytest.mark.parametrize(("reference", "value"), [
    ("(1, 2)", "x=1, y=2"), ("(1, 2)", "y = 2, x = 1"), ("(1, 2)", "(x, y) = (1, 2)"), ("x=1, y=2", "(1, 2)"),
    (r"\{1, 2\}", "2, 1"), (r"\{1, 2\}", r"x = 2 \text{ or } x = 1"), ("1, 2", r"\{2, 1\}"), (r"\{6\}", "6"),
    (r"\pm 7", "7, -7"), (r"2 \pm \frac12", r"\{2.5, 1.5\}"), (r"\{0, \pm 2\}", "-2, 0, 2"),
    ("(3,0),(-3,0)", r"(\pm 3, 0)"), ("[2, 5)", r"2 \le x < 5"), ("[2, 5)", r"x \in [2, 5)"), ("[2, 5)", "[2, 5["),
    ("x > 3", r"(3, \infty)"), ("x > 3", "3<x"), (r"(-\infty, -1) \cup (1, \infty)", r"x > 1 \text{ or } x < -1"),
    (r"(-\infty, -1) \cup (1, \infty)", "|x| > 1"), (r"(-\infty, 0) \cup (0, \infty)", r"x \neq 0"),
    (r"\mathbb{R} \setminus \{1, -1\}", r"x \ne \pm 1"), (r"(3,4) \cup (4,5]", r"(3, 5] \setminus \{4\}"),
    (r"(-\infty, \infty)", r"\text{all real numbers}"), (r"\{x \mid x > 9\}", "x > 9"),
    ("-2 < x < 7", r"-2 < x \text{ and } x < 7"), (r"\emptyset", r"\text{no solution}"),
    (MATRIX, MATRIX.replace("pmatrix", "bmatrix")), (MATRIX, "[[1,2],[3,4]]"), (MATRIX, rf"A = {MATRIX}"),
    (MATRIX, r"\left[\begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array}\right]"),
    (MATRIX, rf"\frac12{MATRIX}".replace( "1 & 2", "2 & 4").replace("3 & 4", "6 & 8")),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\langle 1, 2 \rangle"),
    (CASES, r"\begin{cases} -x, & \text{if } x < 0 \\ x, & \text{if } x \geq 0 \end{cases}"), ("3:4", "6 : 8"),
    ("3:4", r"\frac34"), (r"n \equiv 3 \pmod 7", r"10 \pmod{7}"), ("P(7, -7)", "(7, -7)"), ("f(n) = n^2", "f(x) = x^2"),
    ("y = 2x", "2x"), (r"\text{(C)}", "C"), (r"\textbf{(C)}\ 144", "144"), ("101_2", "(101)_{2}"),
    (r"60^\circ", r"\frac{\pi}{3}"), (r"\frac{5\pi}{4}", r"225^\circ"), (r"3 \text{ hours}", r"180 \text{ minutes}"),
    (r"\$0.85", r"85 \text{ cents}"), (r"40\%", "0.4"), ("204", r"\text{two hundred four}"), ("1,000,000", "10^6"),
    (r"\text{parabola}", r"\text{a parabola}"), (r"5:30 \text{ p.m.}", r"5:30 \text{ PM}"),
    ("f(2) < f(1)", "f(1) > f(2)"),
])
def test_one_value_in_two_notations_is_equal_without_algebra(reference, value):
    assert compare(reference, value) is True


@pytest.mark.parametrize(("reference", "value"), [
    ("(1, 2)", "[1, 2]"), ("(1, 2)", "(2, 1)"), ("(1, 2)", "x=2, y=1"), ("(1, 2)", r"\{1, 2\}"),
    ("(1, 2)", "1 < x \\le 2"), ("x=1, y=2", "x=2, y=1"), ("x = 1", "y = 1, x = 2"), (r"\{1, 2\}", "1"),
    (r"\{1, 2\}", "1, 2, 3"), ("1, 1, 2", "1, 2"), (r"\pm 7", "7"), ("7", r"\pm 7"), ("42", "42, 42"),
    ("42", r"\{41, 42\}"), ("x > 3", r"x \ge 3"), ("x > 3", "y > 3"), (r"(0,1) \cup (2,3)", "(0, 3)"),
    (r"(3,4) \cup (4,5]", "(3, 5]"), (r"\emptyset", "0"), (MATRIX, MATRIX.replace("pmatrix", "vmatrix")),
    (MATRIX, r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}"), (MATRIX, "(1, 2, 3, 4)"), ("3:4", "4:3"),
    (r"n \equiv 3 \pmod 7", r"n \equiv 4 \pmod 7"), (r"n \equiv 3 \pmod 7", r"n \equiv 3 \pmod 8"),
    (r"\text{(C)}", "D"), (r"\textbf{(C)}\ 144", r"\textbf{(D)}\ 144"), ("101_2", "101_3"), ("101_2", "5_{10}"),
    (r"\frac{5\pi}{4}", r"\frac{5\pi}{4}^\circ"), (r"5 \text{ cm}^2", r"5 \text{ cm}"),
    (r"8 \text{ apples}", r"8 \text{ oranges}"), (r"30\text{ mph}", r"30 \text{ kph}"),
    (r"\$3", r"\$3 \text{ million}"), (r"40\%", "4"), (r"66\frac23\%", r"66\%"),
    (r"0.\overline{36}", r"0.\overline{63}"), (r"\text{Bob, Alice}", r"\text{Alice, Bob}"),
    (r"5:30 \text{ p.m.}", r"5:30 \text{ a.m.}"), ("2^{2019}", "2^{2019}+1"), ("12", r"\text{isosceles}"),
])
def test_values_that_only_look_alike_are_different_without_algebra(reference, value):
    assert compare(reference, value) is False


@pytest.mark.parametrize(("reference", "value"), [
    ("4a^2b^3", "(2ab)^2 b"), (r"\pi r^2 h", r"\pi h r^2"), ("5t^2-10t", "5t(t-2)"), (r"\frac{1-2i}{5}", "0.2-0.4i"),
    ("(1+i)^{10}", "32i"), (r"e^{i\pi/4}", r"\frac{1+i}{\sqrt2}"), (r"\sin 20^\circ", r"\cos 70^\circ"),
    ("(n-1)!", r"\frac{n!}{n}"), ("y=2x+1", "4x-2y+2=0"), (r"\frac{x^2}{9}+\frac{y^2}{4}=1", "4x^2+9y^2=36"),
    ("y \\le 2x+1", r"2x+1 \ge y"), (r"\frac{5\pm\sqrt{13}}{6}", r"\frac56\pm\frac{\sqrt{13}}{6}"),
    (r"(\sqrt2, \pi)", r"2^{1/2} < x < \pi"), (r"\ln(x^2)", r"2\ln x"),
    (r"6\sqrt3\text{ cm}", r"\frac{18}{\sqrt3}\text{ cm}"), ("x=2, y=\\sqrt8", r"(2, 2\sqrt2)"),
])
def test_one_value_in_two_notations_is_equal_by_algebra(pool, reference, value):
    assert verify_math(rf"\boxed{{{value}}}", reference, pool).status is Status.CORRECT


@pytest.mark.parametrize(("reference", "value"), [
    ("5t^2-10t", "5t^2-10"), (r"\pi r^2 h", r"\pi r^2"), (r"\sin 20^\circ", r"\sin 20"), ("|x-3|", "x-3"),
    ("x", r"\sqrt{x^2}"), ("y=2x+1", "x=2y+1"), ("x^2+y^2=25", "x^2+y^2=5"), ("y \\le 2x+1", r"y \ge 2x+1"),
    (r"\sqrt2", "1.414214"), (r"(\sqrt2, \pi)", r"2^{1/2} \le x < \pi"), (r"6\sqrt3\text{ cm}", r"6\sqrt3\text{ m}"),
    ("AB", "ab"), ("x=5", "y=5"), ("x > 3", "x < 3"), (CASES, CASES.replace("<", ">")),
    (r"60^\circ", r"60 \text{ radians}"), ("f(2) < f(1)", "f(1) < f(2)"),
])
def test_values_that_only_look_alike_are_different_by_algebra(pool, reference, value):
    assert verify_math(rf"\boxed{{{value}}}", reference, pool).status is Status.WRONG


@pytest.mark.parametrize(("reference", "value"), [
    ("42", "42 or 42"), ("42", "x = 42 or x = 43"), (r"\{-3, 3\}", r"\{3\} = \{-3, 3\}"), ("1, 2", "3 = 1, 2"),
    ("42", "42 > 41"), ("(2, 5]", r"\text{either } (2, 5], (2, 6]"), ("42", r"x \ne 42"), ("1, 2", r"x = 3 = 1, y = 2"),
])
def test_more_notations_are_no_way_to_say_two_things(pool, reference, value):
    assert verify_math(rf"\boxed{{{value}}}", reference, pool).status is Status.MALFORMED


@pytest.mark.parametrize(("reference", "value"), [
    (r"\{-3, 3\}", r"\{3\} \text{ or } \{-3, 3\}"), ("(2, 5]", r"[2, 5] \text{ or } (2, 5]"),
    ("1, 2", r"1, 2 \text{ or } 1, 3"), ("(1, 2)", r"1 \text{ or } 2"), (r"(-\infty, 3)", r"x < 3 \text{ or } x > 5"),
])
def test_alternatives_to_a_reference_of_several_values_are_wrong(pool, reference, value):
    assert verify_math(rf"\boxed{{{value}}}", reference, pool).status is Status.WRONG
