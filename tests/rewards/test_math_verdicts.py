import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.records import Status
from rewards import exact
from rewards.math import MathPool, verify_exact, verify_math, verify_math_batch
from rewards.reasons import Reason


def boxed(value):
    return f"<think>t</think>\nIt is \\boxed{{{value}}}."


@pytest.mark.parametrize(("value", "reference"), [
    ("42", "42"), ("42.0", "42"), (r"\frac{1}{2}", "0.5"), ("1/2", r"\dfrac{1}{2}"), ("1,234", "1234"),
    (r"50\%", "50"), ("0.5", r"50\%"), (r"5 \text{ cm}", r"5\text{ cm}"), ("5", r"5 \text{ cm}"), (r"\$7", "7"),
    ("-3", "−3"), (r"\text{Odd}", "odd"), ("007", "7"),
])
def test_plain_values_are_equal_without_algebra(value, reference):
    assert exact.compare(reference, value) or exact.same_text(reference, value)


@pytest.mark.parametrize(("value", "reference"), [
    ("41", "42"), ("0.333", "1/3"), (r"5 \text{ m}", r"5\text{ cm}"), ("1,23", "123"), ("4 2", "43"), ("5 kg", "5 g"),
])
def test_other_plain_values_are_not_equal(value, reference):
    assert not exact.compare(reference, value)


@pytest.mark.parametrize("text", ["9^9^9^9", "3^{10^9}", "2^{100000}", "x^(99999)", "9**9**9", "170!", "(" * 101,
                                  "1" * 2001, r"\frac{1}{" * 101 + "1" + "}" * 101])
def test_towers_factorials_depth_and_length_are_refused_before_algebra(text):
    assert exact.too_complex(text)


@pytest.mark.parametrize("text", ["2^{3}3^{2}", "x^{2}y^{2}", "e^{x^{2}}", "10^{20}", r"\frac{1}{\frac{1}{2}}"])
def test_ordinary_expressions_are_not_too_complex(text):
    assert not exact.too_complex(text)


@pytest.mark.parametrize(("value", "reference", "status", "reason"), [
    ("(x+1)^2", "x^2+2x+1", Status.CORRECT, Reason.EQUAL_SYMBOLIC),
    (r"2\sqrt{2}", r"\sqrt{8}", Status.CORRECT, Reason.EQUAL_SYMBOLIC),
    ("(1,2)", "[1,2]", Status.WRONG, Reason.DIFFERENT),
    ("x+2", "x+1", Status.WRONG, Reason.DIFFERENT),
    ("41 = 42", "42", Status.MALFORMED, Reason.CHAIN_IN_BOX),
    (r"42 \text{ is wrong}", "42", Status.MALFORMED, Reason.HEDGED_BOX),
    (r"\neq 42", "42", Status.MALFORMED, Reason.HEDGED_BOX),
    ("9^9^9^9", "42", Status.WRONG, Reason.TOO_COMPLEX),
    ("1" * 5000, "42", Status.WRONG, Reason.TOO_COMPLEX),
    ("odd", "ddo", Status.WRONG, Reason.DIFFERENT),
    ("3", "9^9^9^9", Status.ABSTAIN, Reason.REFERENCE_UNREADABLE),
])
def test_boxed_values_get_the_verdict_they_deserve(pool, value, reference, status, reason):
    found = verify_math(boxed(value), reference, pool)
    assert (found.status, found.reason) == (status, reason.value)


def test_a_box_that_is_only_in_the_thinking_earns_nothing(pool):
    found = verify_math(r"<think>\boxed{42}</think> It is 42.", "42", pool)
    assert (found.status, found.reason) == (Status.MALFORMED, "no_box")


def test_a_comparison_that_hangs_is_killed_and_the_next_one_works(pool):
    began = time.monotonic()
    for value in ("e^{e^{e^{e^x}}}", r"\sin(" * 90 + "x" + ")" * 90):
        found = verify_math(boxed(value), "x+1", pool)
        assert (found.status, found.score) == (Status.TIMEOUT, 0.0)
    assert verify_math(boxed("1+x"), "x+1", pool).status is Status.CORRECT
    assert time.monotonic() - began < 20  # killed by CPU time, of which there may be little


def test_a_worker_that_was_killed_is_replaced_without_importing_again():
    with MathPool(size=1, cpu_seconds=0.3) as pool:
        assert pool.compare("x+1", "1+x") == "equal"
        worker = pool._workers.queue[0]
        first = worker.process
        assert pool.compare("x", "e^{e^{e^{e^x}}}") == "time_limit"
        assert pool.compare("x+1", "1+x") == "equal" and worker.process is first


@pytest.mark.parametrize(("value", "reference"), [
    (r"\binom{9999}{4999}+1", r"\binom{9999}{4999}"), ("99!x" * 50 + "+1", "99!x" * 50), ("2^{3000}x+1", "2^{3000}x"),
    (r"0.\overline{" + "1" * 400 + "}+1", r"0.\overline{" + "1" * 400 + "}"),
])
def test_neighbours_of_large_values_are_not_taken_for_them(pool, value, reference):
    assert verify_math(boxed(value), reference, pool).status is not Status.CORRECT


def test_verification_works_from_many_threads(pool):
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda k: verify_math(boxed(f"x+{k}"), f"{k}+x", pool), range(8)))
    assert all(verdict.status is Status.CORRECT for verdict in found)
    assert [v.score for v in verify_math_batch([(boxed("x"), "y", ""), (boxed("2"), "2", "")], pool)] == [0.0, 1.0]


def test_a_worker_that_cannot_start_is_an_infrastructure_error_and_no_zero(monkeypatch):
    monkeypatch.setattr("rewards.math.sys.executable", "/bin/false")
    with MathPool(size=1) as broken:
        found = verify_math(boxed("x+1"), "1+x", broken)
    assert found.status is Status.INFRA_ERROR and found.score is None


def test_exact_text_ignores_case_and_space_and_nothing_else():
    assert verify_exact(boxed("ANN ,  bob"), "Ann, Bob").status is Status.CORRECT
    assert verify_exact(boxed("Bob, Ann"), "Ann, Bob").status is Status.WRONG
    assert verify_exact(boxed("Ann or Bob"), "Ann").status is Status.WRONG
    assert verify_exact("Ann", "Ann").status is Status.MALFORMED
