"""open-instruct's code rewards: `--code_api_url http://HOST/test_program`, and `/test_program_stdio`."""

from __future__ import annotations

import ast
import builtins
import json
import math
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from pipeline.records import Check
from rewards.code import Work, verdict_on, work_of
from rewards.sandbox import Limits
from rewards.scoring import ScoringError, Text
from rewards.service.answers import read_json
from rewards.service.backend import Unavailable

router = APIRouter()
MAX_TESTS = 1000


class ProgramRequest(BaseModel):
    """tests: a list, or its JSON text. A pickle, which open-instruct also knows, is refused: reading one runs code.

    max_execution_time: seconds of processor time for each test.
    """

    program: Text
    tests: list[Any] | str
    max_execution_time: Annotated[float, Field(gt=0, le=60)] = 1.0


class ProgramResponse(BaseModel):
    """1 or 0 for each test, and its seconds; -1 where it failed."""

    results: list[int]
    runtimes: list[float]


@router.post("/test_program")
async def test_program(asked: ProgramRequest, request: Request) -> ProgramResponse:
    """Asserts about the functions of a Python program, each in a process of its own, which calls one of them."""
    tests = _tests(asked.tests, str)
    defined = _defined(asked.program)
    if defined is None:
        return ProgramResponse(results=[0] * len(tests), runtimes=[-1.0] * len(tests))
    works: list[Work | None] = []
    for index, test in enumerate(tests):
        name = _called(test, defined, index)
        if name is None:
            works.append(None)
            continue
        lines = "\n".join(f"    {line}" for line in (f"{name} = candidate", *test.strip().splitlines()))
        works.append(work_of(asked.program, "python", Check("code", entry_point=name, tests=json.dumps(
            {"assert_code": f"def check(candidate):\n{lines}"}))))
    return await _run(works, asked.max_execution_time, request)


@router.post("/test_program_stdio")
async def test_program_stdio(asked: ProgramRequest, request: Request) -> ProgramResponse:
    """A Python program and {"input", "output"} texts for its stdin and stdout."""
    tests = _tests(asked.tests, dict)
    if not all(isinstance(test.get("input"), str) and isinstance(test.get("output"), str) for test in tests):
        raise ScoringError('tests: each must be {"input": text, "output": text}')
    works: list[Work | None] = [work_of(asked.program, "python", Check("code", tests=json.dumps(
        [{"stdin": test["input"], "expected": test["output"]}]))) for test in tests]
    return await _run(works, asked.max_execution_time, request)


async def _run(tests: list[Work | None], seconds: float, request: Request) -> ProgramResponse:
    """Run what there is to run; None is a test of something that the program does not define."""
    works = [work for work in tests if work]
    limits = Limits(cpu_seconds=math.ceil(seconds), wall_seconds=2 * math.ceil(seconds) + 4)
    outcomes = await request.app.state.backend.run([work.job for work in works], limits) if works else []
    found = iter([verdict_on(outcome, work) for outcome, work in zip(outcomes, works, strict=True)])
    verdicts = [next(found) if work else None for work in tests]
    for index, verdict in enumerate(verdicts):
        if verdict and verdict.score is None:
            raise Unavailable(f"tests.{index}: {verdict.reason}: {verdict.evidence}")
    return ProgramResponse(results=[int(verdict.score or 0) if verdict else 0 for verdict in verdicts],
                           runtimes=[verdict.seconds if verdict and verdict.score else -1.0 for verdict in verdicts])


def _tests(given: list[Any] | str, kind: type) -> list[Any]:
    if isinstance(given, str):
        try:
            given = read_json(given)
        except ValueError:
            raise ScoringError("tests: a text must be JSON; compressed pickles are not read, as reading one runs code"
                               ) from None
    if not isinstance(given, list) or len(given) > MAX_TESTS or not all(isinstance(test, kind) for test in given):
        raise ScoringError(f"tests: must be a list of at most {MAX_TESTS} {'texts' if kind is str else 'objects'}")
    return given


def _defined(program: str) -> set[str] | None:
    """Names that the program defines at its top level; None when it is no Python."""
    try:
        body = ast.parse(program).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)} | {
        target.id for node in body if isinstance(node, ast.Assign) for target in node.targets
        if isinstance(target, ast.Name)}


def _called(test: str, defined: set[str], index: int) -> str | None:
    """The function of the program that a test calls; None where the program does not define what the test calls."""
    try:
        called = [node.func.id for node in ast.walk(ast.parse(test))
                  if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ScoringError(f"tests.{index}: is no Python: {test[:80]!r}") from None
    own = sorted({name for name in called if name in defined})
    if len(own) > 1:
        raise ScoringError(f"tests.{index}: calls {', '.join(own)}; a test may call one function of the program")
    if not own and not set(called) - set(dir(builtins)):
        raise ScoringError(f"tests.{index}: calls no function of a program: {test[:80]!r}")
    return own[0] if own else None
