"""Items and results: what any caller of the rewards sees, over HTTP, from a file or in Python.

An item names its check (`kind`) and brings what that check needs; a result says what was found. An answer that could
not be verified has a score of null, never 0.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from pipeline.records import JUDGED_KINDS, Check, Problem, Verdict, content_id
from rewards.judge import Judgement
from rewards.languages import LANGUAGES
from rewards.registry import Verifier

MAX_TEXT = 1 << 20  # characters of a completion or prompt
Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
Principle = Annotated[str, StringConstraints(max_length=2000)]
Kind = Literal["math", "exact", "code", "principles", "match"]


class ScoringError(ValueError):
    """Items that cannot be scored; the message names the place and the remedy."""


class Item(BaseModel):
    """One completion and how to check it.

    prompt: what was asked, so that an answer that repeats it gains nothing; a judge needs it to understand the answer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, StringConstraints(max_length=256)]
    kind: Kind
    completion: Text = Field(description="the model's turn, its <think> block included")
    prompt: Text = ""
    reference: Annotated[str, StringConstraints(max_length=20_000)] | None = Field(
        None, description="the right answer, for math, exact and match")
    tests: Annotated[list[dict[str, Any]], Field(max_length=1000)] | None = Field(
        None, description='for code: {"args", "expected"} for a function `entry_point`, {"stdin", "expected"} for '
        'whole programs, or one {"assert_code"}')
    language: Literal[tuple(LANGUAGES)] = "python"  # type: ignore[valid-type]
    entry_point: str | None = Field(None, description="the function that tests with args call")
    principles: Annotated[list[Principle], Field(max_length=50)] | None = Field(
        None, description="what the judge is to look at, for principles")

    @model_validator(mode="after")
    def _consistent(self) -> Item:
        needed = {"code": "tests", "principles": "principles"}.get(self.kind, "reference")
        if not getattr(self, needed):
            raise ValueError(f"an item of kind {self.kind} needs {needed}")
        return self

    def problem(self) -> Problem:
        """The item as a verifier takes it."""
        check = Check(self.kind, self.reference, principles=tuple(self.principles or ()))
        if self.kind == "code":
            check = Check("code", language=self.language, entry_point=self.entry_point, tests=json.dumps(self.tests))
        messages = ({"role": "user", "content": self.prompt},)
        return Problem(content_id(messages, vars(check)), "scored", self.kind, messages, check, "scored", "rl")


class Result(BaseModel):
    """What was found. Votes, agreement and critique are a judge's; the rest every verifier gives."""

    id: str
    status: Literal["correct", "wrong", "malformed", "timeout", "infra_error", "abstain"]
    score: float | None = Field(description="in [0, 1]; null where the verifier cannot tell, which is never a 0")
    reason: str = Field(description="a code of rewards/reasons.py, e.g. equal_exact, no_box, wrong_output")
    evidence: str
    verifier: str
    version: str
    votes: list[float | None] | None = Field(None, description="in [0, 1]; null for a vote that could not be read")
    agreement: float | None = Field(None, description="share of the readable votes on the side of the verdict")
    critique: str | None = None
    latency_ms: float


def score(items: Sequence[Item], verifier: Verifier, n_votes: int | None = None) -> list[Result]:
    """A result per item, in order. Raises ScoringError for items of a judged kind when the verifier has no judge."""
    judged = [item for item in items if item.kind in JUDGED_KINDS]
    ruled = [item for item in items if item.kind not in JUDGED_KINDS]
    if judged and verifier.judge is None:
        raise ScoringError(f"item {judged[0].id!r} is of kind {judged[0].kind}, which needs a judge: --judge MODEL_DIR")
    verdicts = verifier.verify_batch([item.problem() for item in ruled], [item.completion for item in ruled])
    found = iter([_result(item, verdict) for item, verdict in zip(ruled, verdicts, strict=True)])
    judgements = verifier.judge.judge([item.problem() for item in judged], [item.completion for item in judged],
                                      n_votes) if judged else []
    told = iter([_judged(item, judgement) for item, judgement in zip(judged, judgements, strict=True)])
    return [next(told if item.kind in JUDGED_KINDS else found) for item in items]


def _result(item: Item, verdict: Verdict) -> Result:
    return Result(id=item.id, status=verdict.status.value, score=verdict.score, reason=verdict.reason,
                  evidence=verdict.evidence, verifier=verdict.verifier, version=verdict.version,
                  latency_ms=round(verdict.seconds * 1000, 2))


def _judged(item: Item, judgement: Judgement) -> Result:
    return _result(item, judgement.verdict).model_copy(update={
        "votes": list(judgement.votes), "agreement": judgement.agreement, "critique": judgement.critique[:4000]})


def first_error(error: ValidationError) -> str:
    """The first thing that is wrong, with its place."""
    found = error.errors()[0]
    where = ".".join(map(str, found["loc"]))
    return f"{f'{where}: ' if where else ''}{found['msg'].removeprefix('Value error, ')}"
