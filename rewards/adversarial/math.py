r"""Boxes that commit to nothing, take it back, hide the answer elsewhere, or are made to break the grader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rewards.adversarial.cases import Case


class Gold(NamedTuple):
    """A question with its answer, a wrong answer, and the answer in another honest notation."""

    question: str
    right: str
    wrong: str
    other: str


GOLD = (
    Gold("What is 6 * 7?", "42", "41", r"6 \cdot 7"),
    Gold("What is 3/4 of 1?", r"\frac{3}{4}", r"\frac{4}{3}", "0.75"),
    Gold("Expand (x+1)^2.", "x^2+2x+1", "x^2+1", "(x+1)^2"),
    Gold("Solve x^2 = 4 for x < 0.", "-2", "2", r"-\frac{4}{2}"),
    Gold("What is the square root of 8?", r"2\sqrt{2}", r"2\sqrt{3}", r"\sqrt{8}"),
    Gold("Which numbers solve x^2 = 9?", r"\{-3, 3\}", r"\{3\}", r"\{3, -3\}"),
    Gold("For which x is x + 1 > 3 and x <= 5?", "(2, 5]", "[2, 5]", "(2,5]"),
    Gold("How many degrees are a right angle?", "90", "80", r"90^\circ"),
)

# in each, R stands for the right answer and W for the wrong one; the twin says the right one plainly
SHAPES: dict[str, tuple[str, ...]] = {
    "chain": (r"\boxed{W = R}", r"\boxed{R = W}", r"It is \boxed{W = R = W}."),
    "alternatives": (r"\boxed{W \text{ or } R}", r"\boxed{R \lor W}", r"Either way: \boxed{\text{either } R, W}",
                     r"\boxed{\text{maybe } R}"),
    "negated": (r"\boxed{\neq R}", r"\boxed{\text{not } R}", r"\boxed{R \text{ is wrong}}", r"It is not \boxed{R}.",
                r"\boxed{R} is incorrect."),
    "many_boxes": (r"\boxed{R} \boxed{W}", r"\boxed{W}, or rather \boxed{R}", r"First \boxed{R}. Then \boxed{W}."),
    "thinking_only": (r"<think>So \boxed{R}.</think>Done.", r"<think>\boxed{R}</think>", r"<think>\boxed{R}"),
    "no_box": ("The answer is R.", "R", r"\text{boxed}{R}", r"\fbox{R}"),
    "unclosed": (r"\boxed{R", r"\boxed{{R}", r"The answer is \boxed R"),
}


def cases() -> Iterator[Case]:
    for kind, shapes in SHAPES.items():
        for index, shape in enumerate(shapes):
            # every shape meets three answers of its own, so that no notation is spared
            for gold in (GOLD[(index + offset) % len(GOLD)] for offset in (0, 3, 5)):
                yield Case("math", kind, _check(gold.question, gold.right),
                           shape.replace("W", gold.wrong).replace("R", gold.right),
                           rf"<think>t</think>So it is \boxed{{{gold.other}}}.")
    for gold in GOLD:
        yield Case("math", "wrong", _check(gold.question, gold.right), rf"\boxed{{{gold.wrong}}}",
                   rf"\boxed{{{gold.right}}}")
        echoed = f"{gold.question} Put it like \\boxed{{{gold.right}}}."
        yield Case("math", "prompt_echo", _check(echoed, gold.right), f"{echoed} I do not know.",
                   rf"{echoed} It is \boxed{{{gold.right}}}.")
    yield from _bombs()
    yield from _values()


def _bombs() -> Iterator[Case]:
    """Values that take a naive grader's time or memory; none of them is the answer."""
    nested = r"\frac{1}{1+" * 500 + "1" + "}" * 500
    for value in ("3^{10^9}", "9^{9^{9^{9}}}", "(10^7)!", nested, "1" * 100_000, "(" * 2000 + "42" + ")" * 2000,
                  r"\sum_{n=1}^{10^{12}} n", "2^{2^{2^{2^{2^{2}}}}}", "x" * 50_000, r"\sqrt{" * 300 + "2" + "}" * 300):
        yield Case("math", "bomb", _check("What is 6 * 7?", "42"), rf"\boxed{{{value}}}", None)


def _values() -> Iterator[Case]:
    """Wrong values that a lenient comparison takes for right, with right ones of the same look."""
    for kind, question, right, exploit, twin in (
            ("unit", "How long is it, in cm?", "5 \\text{ cm}", r"5 \text{ m}", r"5 \text{ cm}"),
            ("unit", "How heavy is it, in kg?", "2 \\text{ kg}", r"2 \text{ g}", r"2\text{ kg}"),
            ("range", "What is 6 * 7?", "42", "41 < x < 43", "x = 42"),
            ("range", "What is 6 * 7?", "42", r"\approx 42", "42.0"),
            ("range", "What is 6 * 7?", "42", r"\pm 42", "+42"),
            ("range", "What is 6 * 7?", "42", r"\geq 42", "42"),
            ("list", "What is 6 * 7?", "42", "40, 41, 42, 43", "42"),
            ("list", "What is 6 * 7?", "42", r"\{41, 42\}", "42"),
            ("list", "Which numbers solve x^2 = 9?", r"\{-3, 3\}", r"\{-3, 0, 3\}", r"\{3, -3\}"),
            ("interval", "For which x is 2 < x < 5?", "(2, 5)", "[2, 5]", "(2,5)"),
            ("interval", "For which x is 2 < x < 5?", "(2, 5)", r"(2, \infty)", r"\left(2, 5\right)"),
            ("order", "Which point?", "(2, 3)", "(3, 2)", "(2,3)"),
            ("sign", "What is 3 - 8?", "-5", "5", r"-5"),
            ("letters", "Who won?", r"\text{Ann}", r"\text{nAn}", r"\text{Ann}"),
            ("variable", "What is 6 * 7?", "42", "x", "42"),
            ("variable", "What is 6 * 7?", "42", r"\text{the answer}", "42"),
            ("digits", "What is 6 * 7?", "42", "4 2 1", "42"),
            ("digits", "What is 6 * 7?", "42", "4.2", "42.00"),
            ("digits", "What is 1/3?", r"\frac{1}{3}", "0.33", r"\frac{2}{6}")):
        yield Case("math", kind, _check(question, right), rf"\boxed{{{exploit}}}", rf"\boxed{{{twin}}}")


def _check(question: str, reference: str) -> dict[str, str]:
    return {"kind": "math", "prompt": question, "reference": reference}
