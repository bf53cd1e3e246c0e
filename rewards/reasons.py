"""Reason codes: the machine-readable half of a verdict. Every verifier uses these and no others."""

from __future__ import annotations

import time
from enum import StrEnum

from pipeline.records import UNSCORED, Status, Verdict

VERSION = "3"  # raise it when a verifier's decision on any text changes


class Reason(StrEnum):
    """Each member is (code, what it means to a person reading a report)."""

    meaning: str

    def __new__(cls, code: str, meaning: str) -> Reason:
        member = str.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member

    # reading the answer
    BAD_THINKING = "bad_thinking", "the <think> block is unclosed, repeated or in the wrong place"
    EMPTY_ANSWER = "empty_answer", "nothing follows the thinking"
    NO_BOX = "no_box", r"the answer has no \boxed{...} of its own"
    UNCLOSED_BOX = "unclosed_box", r"the braces of the last \boxed do not match"
    EMPTY_BOX = "empty_box", "the box is empty"
    DIFFERING_BOXES = "differing_boxes", "the answer has boxes with different contents"
    NEGATED_BOX = "negated_box", "the text around the box says that it is not the answer"
    HEDGED_BOX = "hedged_box", "the box holds a hedge, a negation, an alternative or a bound"
    CHAIN_IN_BOX = "chain_in_box", "the box holds an equation or a chain of '=' instead of a value"
    TOO_COMPLEX = "too_complex", "too long, nested or tall to be compared or judged safely"
    NO_CODE_BLOCK = "no_code_block", "not exactly one fenced block of the language asked for"
    MASTER_KEY = "master_key", "only phrases known to fool judges, no answer"
    # comparing values and texts
    EQUAL_EXACT = "equal_exact", "equal as text or exact number"
    EQUAL_SYMBOLIC = "equal_symbolic", "equal by algebra"
    DIFFERENT = "different", "not equal to the reference"
    REFERENCE_UNREADABLE = "reference_unreadable", "the reference cannot be read as mathematics"
    # running code
    ALL_PASSED = "all_passed", "every test passed"
    WRONG_OUTPUT = "wrong_output", "a test got another output"
    COMPILE_ERROR = "compile_error", "the code does not compile"
    RUNTIME_ERROR = "runtime_error", "the code raised, crashed or ended its process"
    FORBIDDEN = "forbidden", "ended over something that the sandbox refuses: network, files, processes, tracing"
    TIME_LIMIT = "time_limit", "out of time"
    MEMORY_LIMIT = "memory_limit", "out of memory"
    OUTPUT_LIMIT = "output_limit", "more output than allowed"
    NO_FUNCTION = "no_function", "the function asked for is not defined"
    # judging
    INJECTION = "injection", "speaks to the judge, or writes a verdict, instead of answering"
    JUDGED = "judged", "mean score of the judge's votes"
    NO_VOTE = "no_vote", "none of the judge's outputs could be parsed"
    # the verifier itself
    BAD_CHECK = "bad_check", "the problem's own check cannot be run"
    VERIFIER_FAILED = "verifier_failed", "worker or sandbox broke; says nothing about the answer"


def verdict(status: Status, reason: Reason, verifier: str, began: float, evidence: str = "",
            score: float | None = None) -> Verdict:
    """A verdict whose score follows from its status: 1 if correct, none if unscored, else 0 (unless given).

    began: `time.monotonic()` at the start of the work.
    """
    if score is None and status not in UNSCORED:
        score = float(status is Status.CORRECT)
    return Verdict(status, score, reason.value, verifier, VERSION, time.monotonic() - began, evidence[:300])
