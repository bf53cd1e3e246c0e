"""Verdicts on code: the sandbox gets the code and the inputs, the expected outputs stay here.

Graders that run the tests inside the candidate's process pay for objects that equal everything, for patched
builtins and for programs that read the expected values out of frames. Here outputs come back as JSON and are
compared type-strictly; assert-style tests run in a second process that calls the first.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from pipeline.records import Check, Status, Verdict
from rewards.extract import code_block, split_thinking
from rewards.languages import LANGUAGES, NoFunction, java_main, java_program
from rewards.reasons import Reason, verdict
from rewards.sandbox import Job, Outcome, Sandbox, SandboxFailure

# what the kernel says to a refused call, in the words of each language; it tells reasons apart and decides nothing
_REFUSED = re.compile(r"PermissionError|Permission denied|Operation not permitted|Read-only file system|Network is "
                      r"unreachable|\b(?:EPERM|EACCES|EROFS|ENETUNREACH)\b|\[Errno (?:1|13|30|101)\]")
_STATUS = {Reason.ALL_PASSED: Status.CORRECT, Reason.TIME_LIMIT: Status.TIMEOUT, Reason.BAD_CHECK: Status.INFRA_ERROR}


@dataclass(frozen=True)
class Work:
    """A candidate ready to run, and what its outputs must be."""

    job: Job
    expected: tuple[Any, ...]


def prepare(completion: str, check: Check) -> Work | Verdict:
    """Read the code block and pair it with the tests; a verdict when there is nothing to run."""
    began = time.monotonic()
    thinking = split_thinking(completion)
    if not thinking.well_formed:
        return verdict(Status.MALFORMED, Reason.BAD_THINKING, "code", began)
    language = check.language or "python"
    if language not in LANGUAGES:
        return verdict(Status.INFRA_ERROR, Reason.BAD_CHECK, "code", began,
                       f"check cannot be run: language {language!r} is not one of {', '.join(LANGUAGES)}")
    if tool := LANGUAGES[language].missing():
        return verdict(Status.INFRA_ERROR, Reason.VERIFIER_FAILED, "code", began,
                       f"{tool} is missing; apt-get install {LANGUAGES[language].package}")
    block = code_block(thinking.answer, LANGUAGES[language].fences)
    if block.value is None:
        return verdict(Status.MALFORMED, Reason.NO_CODE_BLOCK, "code", began, thinking.answer[:120])
    try:
        return work_of(block.value, language, check)
    except (ValueError, KeyError, TypeError) as error:
        return verdict(Status.INFRA_ERROR, Reason.BAD_CHECK, "code", began, f"check cannot be run: {error!r}")
    except NoFunction as error:
        return verdict(Status.WRONG, Reason.NO_FUNCTION, "code", began, str(error))


def work_of(code: str, language: str, check: Check) -> Work:
    """A program paired with its tests.

    Raises ValueError, KeyError or TypeError for a check that cannot be run, and NoFunction for a program that lacks the
    function.
    """
    tests = json.loads(check.tests or "null")
    nonce = secrets.token_hex(8)
    if isinstance(tests, dict):
        tests = [tests]
    if not tests:
        raise ValueError("no tests")
    if "assert_code" in tests[0]:
        if language != "python" or not _is_name(check.entry_point) or len(tests) != 1:
            raise ValueError("assert_code is one test, for Python, with the name of a function as entry_point")
        return Work(Job("python", "asserts", code, (), check.entry_point, nonce, tests[0]["assert_code"]), ())
    if "stdin" in tests[0]:
        inputs = [test["stdin"] for test in tests]
        expected = tuple(test["expected"] for test in tests)
        if not all(isinstance(text, str) for text in (*inputs, *expected)):
            raise ValueError("stdin and expected must be texts")
        return Work(program_job(code, language, inputs), expected)
    if not _is_name(check.entry_point):
        raise ValueError(f"entry_point {check.entry_point!r} is not a name")
    inputs, expected = [test["args"] for test in tests], tuple(test["expected"] for test in tests)
    call = LANGUAGES[language].call
    if call is None:
        return Work(Job(language, "calls", code, inputs, check.entry_point, nonce), expected)
    if not re.search(rf"\b{check.entry_point}\b", code):
        raise NoFunction(f"no function {check.entry_point}")
    return Work(Job(language, "programs", call(code, check.entry_point, inputs, nonce), [json.dumps(inputs)],
                    check.entry_point, nonce, main="PosttrainCall"), expected)


def _is_name(entry_point: str | None) -> TypeGuard[str]:
    return bool(entry_point and re.fullmatch(r"[A-Za-z_]\w*", entry_point))


def program_job(code: str, language: str, inputs: Sequence[str]) -> Job:
    """A whole program and the texts for its stdin, one process each. Raises NoFunction for Java without a main."""
    if language == "java":
        return Job(language, "programs", java_program(code), inputs, main=java_main(code))
    return Job(language, "programs", code, inputs)


def verify_code(completion: str, check: Check, sandbox: Sandbox) -> Verdict:
    """Run the code block of a completion against `check.tests`.

    Correct when every test passes; a broken sandbox is INFRA_ERROR, never a wrong answer.
    """
    return verify_code_batch([(completion, check)], sandbox)[0]


def verify_code_batch(items: Sequence[tuple[str, Check]], sandbox: Sandbox) -> list[Verdict]:
    """`verify_code` for many candidates in one sandbox; they cannot meet (see `sandbox_driver.py`)."""
    prepared = [prepare(completion, check) for completion, check in items]
    works = [work for work in prepared if isinstance(work, Work)]
    outcomes = iter(_run(works, sandbox))
    return [verdict_on(next(outcomes), item, sandbox.isolation) if isinstance(item, Work) else item
            for item in prepared]


def _run(works: Sequence[Work], sandbox: Sandbox) -> list[Outcome | SandboxFailure]:
    """All jobs together; when that sandbox breaks, each alone, so that one cannot cost the others."""
    if not works:
        return []
    try:
        return list(sandbox.run([work.job for work in works]))
    except SandboxFailure as failure:
        if len(works) == 1:
            return [failure]
    return [outcome for work in works for outcome in _run([work], sandbox)]


def verdict_on(outcome: Outcome | SandboxFailure, work: Work, isolation: str = "bubblewrap") -> Verdict:
    """What the outcome of `work.job` says about the program."""
    if isinstance(outcome, SandboxFailure):
        return verdict(Status.INFRA_ERROR, Reason.VERIFIER_FAILED, "code", time.monotonic(), str(outcome))
    reason, evidence = _finding(outcome, work)
    if isolation != "bubblewrap":
        evidence = f"[isolation: {isolation}] {evidence}"
    return verdict(_STATUS.get(reason, Status.WRONG), reason, "code", time.monotonic() - outcome.seconds, evidence)


def _finding(outcome: Outcome, work: Work) -> tuple[Reason, str]:
    if outcome.status == "lost":
        return Reason.RUNTIME_ERROR, "the program killed or starved the process that watches it"
    if outcome.status != "done":
        return Reason(outcome.status), f"limit of the sandbox after {outcome.seconds:.1f} s"
    if outcome.compile is not None:
        return Reason.COMPILE_ERROR, _error_lines(outcome.compile["stderr"])
    if work.job.mode == "asserts":
        return _asserts_finding(outcome, work)
    for run in outcome.runs:
        if reason := _death(run, work):
            return reason, _last_words(run, work)
    if work.job.mode == "programs" and not work.job.nonce:
        for run, expected in zip(outcome.runs, work.expected, strict=True):
            if _lines(run["stdout"]) != _lines(expected):
                return Reason.WRONG_OUTPUT, f"{run['stdout'][:100]!r} instead of {expected[:100]!r}"
        return Reason.ALL_PASSED, f"{len(work.expected)} tests"
    try:
        return _compare_calls(outcome.runs[0], work)
    except RecursionError:
        return Reason.WRONG_OUTPUT, "a result is nested too deeply"


def _death(run: dict[str, Any], work: Work) -> Reason | None:
    """Why a process ended early, as far as its end alone tells."""
    if run["output_limit"]:
        return Reason.OUTPUT_LIMIT
    if run["signal"] == signal.SIGXCPU or (run["signal"] == signal.SIGKILL and run["cpu_seconds"] > 1):
        return Reason.TIME_LIMIT
    reports = work.job.language == "python" or work.job.nonce
    report = next(iter(_reports(run["channel"], work.job.nonce)[-1:]), {}) if reports else {}
    if "error" in report:
        if report.get("stage") == "compile":
            return Reason.COMPILE_ERROR
        if report.get("stage") == "find":
            return Reason.NO_FUNCTION
        if report.get("stage") == "value":
            return Reason.WRONG_OUTPUT
        if report["error"] == "MemoryError":
            return Reason.MEMORY_LIMIT
        said = f"{report['error']}: {report.get('detail', '')}"
        return Reason.FORBIDDEN if _REFUSED.search(said) else Reason.RUNTIME_ERROR
    if run["exit"] != 0:
        return Reason.FORBIDDEN if _REFUSED.search(run["stderr"][-4000:]) else Reason.RUNTIME_ERROR
    return None


def _compare_calls(run: dict[str, Any], work: Work) -> tuple[Reason, str]:
    values = [_plain(report["value"]) for report in _reports(run["channel"], work.job.nonce) if "value" in report]
    if len(values) < len(work.expected):
        return Reason.RUNTIME_ERROR, f"ended after {len(values)} of {len(work.expected)} results"
    for index, (value, expected) in enumerate(zip(values, work.expected, strict=False)):
        if not same_value(value, expected, LANGUAGES[work.job.language].one_number_type):
            return Reason.WRONG_OUTPUT, f"test {index}: {value!r:.100} instead of {expected!r:.100}"
    return (Reason.ALL_PASSED, f"{len(values)} tests") if len(values) == len(work.expected) else \
        (Reason.WRONG_OUTPUT, f"{len(values)} results for {len(work.expected)} tests")


def _asserts_finding(outcome: Outcome, work: Work) -> tuple[Reason, str]:
    assert outcome.candidate is not None
    tester = next(iter(_reports(outcome.runs[0]["channel"], work.job.nonce)), {})
    if tester.get("outcome") == "all_passed":
        return Reason.ALL_PASSED, "asserts passed"
    if tester.get("outcome") == "bad_check":
        return Reason.BAD_CHECK, str(tester.get("detail"))
    if reason := _death(outcome.candidate, work):
        return reason, _last_words(outcome.candidate, work)
    if "outcome" in tester:
        return Reason(tester["outcome"]), str(tester.get("detail"))
    # the tester ended without a word: drowned in what the candidate returned, or waiting for it
    return _death(outcome.runs[0], work) or Reason.RUNTIME_ERROR, "the asserts did not finish"


def _reports(channel: str, nonce: str) -> list[dict[str, Any]]:
    """The lines that carry this run's nonce: a stray write to the channel is not a result."""
    reports = []
    for line in channel.split("\n"):
        if line.startswith(nonce + " "):
            try:
                report = json.loads(line[len(nonce) + 1:])
            except (ValueError, RecursionError):
                continue
            if isinstance(report, dict):
                reports.append(report)
    return reports


def _plain(value: Any) -> Any:
    """The harness's tagged JSON as JSON data; a bare object, equal to nothing, for what JSON cannot express."""
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (kind, items), = value.items()
        if kind in ("list", "tuple") and isinstance(items, list):
            return [_plain(item) for item in items]
        if kind == "dict" and isinstance(items, list) and all(
                isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in items):
            return {key: _plain(item) for key, item in items}
    return object()


def same_value(value: Any, expected: Any, one_number_type: bool = False) -> bool:
    """Type-strict equality of JSON data: True is not 1, 1 is not 1.0; floats to 1e-9 relative.

    one_number_type: 1 and 1.0 are the same, for languages that know no other.
    """
    if one_number_type and {type(value), type(expected)} == {int, float}:
        return bool(value == expected)  # not through float(): a candidate's integer may be too long for one
    if type(value) is not type(expected):
        return False
    if isinstance(value, float):
        return math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(value, list):
        return len(value) == len(expected) and all(same_value(a, b, one_number_type)
                                                   for a, b in zip(value, expected, strict=True))
    if isinstance(value, dict):
        return value.keys() == expected.keys() and all(same_value(value[key], expected[key], one_number_type)
                                                       for key in value)
    return bool(value == expected)


def _lines(text: str) -> list[str]:
    """Output lines without trailing blanks."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _last_words(run: dict[str, Any], work: Work) -> str:
    """What a person would want to read about a process that ended early."""
    for report in _reports(run["channel"], work.job.nonce)[-1:]:
        if "error" in report:
            return f"{report['error']}: {report.get('detail', '')}"
    return _error_lines(run["stderr"])


def _error_lines(stderr: str) -> str:
    errors = [line for line in stderr.split("\n") if "error:" in line] or stderr.strip().split("\n")[-2:]
    return " ".join(errors)[:250]
