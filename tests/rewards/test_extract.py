import pytest

from rewards.extract import code_block, last_box, single_value, split_thinking
from rewards.reasons import Reason


def test_a_think_block_is_split_from_the_answer():
    assert split_thinking("<think>\na b\n</think>\nc") == ("a b", "c", True)
    assert split_thinking("just an answer") == (None, "just an answer", True)


@pytest.mark.parametrize("text", [
    "<think>never closed \\boxed{42}",
    "no opening</think>42",
    "words first <think>t</think>42",
    "<think>t</think>42<think>u</think>",
    "<think><think>t</think></think>42",
    "</think>42<think>",
    "<think>t</think>4</think>2",
])
def test_unclosed_repeated_and_misplaced_thinking_is_malformed(text):
    assert not split_thinking(text).well_formed


def test_nothing_of_an_unclosed_thought_becomes_the_answer():
    assert split_thinking("<think>so it is \\boxed{42}").answer == ""


@pytest.mark.parametrize(("answer", "value"), [
    (r"It is \boxed{42}.", "42"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed {\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{42} and again \boxed{ 42 }", "42"),
    (r"The number is not even, so the answer is \boxed{3}", "3"),
])
def test_the_last_box_is_read_with_its_braces_matched(answer, value):
    assert last_box(answer).value == value


@pytest.mark.parametrize(("answer", "reason"), [
    ("42", Reason.NO_BOX),
    (r"\boxed{42", Reason.UNCLOSED_BOX),
    (r"\boxed{}", Reason.EMPTY_BOX),
    (r"\boxed{41} or \boxed{42}", Reason.DIFFERING_BOXES),
    (r"definitely not \boxed{42}", Reason.NEGATED_BOX),
    (r"It isn't $\boxed{42}$", Reason.NEGATED_BOX),
    (r"$\boxed{42}$ is wrong", Reason.NEGATED_BOX),
    (r"\boxed{42} is certainly not the answer", Reason.NEGATED_BOX),
])
def test_answers_that_do_not_commit_to_one_box_are_refused(answer, reason):
    assert last_box(answer) == (None, reason)


def test_a_box_in_an_echoed_prompt_does_not_count():
    prompt = r"How much is 6*7? Answer like \boxed{42}."
    assert last_box(f"{prompt}\n", prompt).reason is Reason.NO_BOX
    assert last_box(f"{prompt}\nSo \\boxed{{41}}", prompt).value == "41"


@pytest.mark.parametrize("box", [r"42 \text{ is wrong}", r"\neq 42", "not 42", "41 or 42", "maybe 42", "42?", "≠ 42",
                                 r"\approx 42", r"41 \lor 42"])
def test_hedges_and_negations_in_the_box_are_refused(box):
    assert single_value(box, "42").reason is Reason.HEDGED_BOX


@pytest.mark.parametrize("box", ["41 = 42", "6*7 = 42", "x = 6*7 = 42", "x = y = 42", "x ="])
def test_chains_in_the_box_are_refused(box):
    assert single_value(box, "42").reason is Reason.CHAIN_IN_BOX


def test_a_named_value_and_a_wanted_alternative_are_accepted():
    assert single_value("x = 42", "42").value == "42"
    assert single_value("f(x) = 2x", "2x").value == "2x"
    assert single_value("y = 2x + 1", "y = 2x + 1").value == "y = 2x + 1"


def test_code_is_read_from_exactly_one_block_of_its_language():
    block = "```python\nx = 1\n```"
    assert code_block(f"Here:\n{block}\nDone.", ("python",)).value == "x = 1\n"
    for text in ("x = 1", f"{block}\n{block}", "```python\nx = 1\n", "```\nx = 1\n```", block.replace("python", "c"),
                 "```python\n\n```"):
        assert code_block(text, ("python",)).reason is Reason.NO_CODE_BLOCK
    assert code_block("```c\nint x;\n```", ("c",)).value == "int x;\n"
