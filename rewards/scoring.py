"""Score rows of a JSONL file: the same items and results that any caller of `Verifier` sees, one a line.

An item names its check (`kind`) and brings what that check needs; a result says what the verifier found. An answer
that could not be verified has a score of null, never 0.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.records import Check, Problem, Verdict, content_id
from rewards.languages import LANGUAGES
from rewards.registry import Verifier

BATCH = 64


class ScoringError(ValueError):
    """A file that cannot be scored; the message names the line and the remedy."""


class Item(BaseModel):
    """One completion and how to check it.

    reference: the right answer, for math and exact. tests: a list of {"args", "expected"} for a function
    `entry_point`, {"stdin", "expected"} for whole programs, or one {"assert_code"}. prompt: what was asked, so that an
    answer that repeats it gains nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    kind: Literal["math", "exact", "code"]
    completion: str
    prompt: str = ""
    reference: str | None = None
    tests: list[dict[str, Any]] | None = None
    language: Literal[tuple(LANGUAGES)] = "python"  # type: ignore[valid-type]
    entry_point: str | None = Field(None, description="the function that tests with args call")

    @model_validator(mode="after")
    def _consistent(self) -> Item:
        needed = "tests" if self.kind == "code" else "reference"
        if not getattr(self, needed):
            raise ValueError(f"an item of kind {self.kind} needs {needed}")
        return self

    def problem(self) -> Problem:
        """The item as a verifier takes it."""
        check = Check(self.kind, self.reference) if self.kind != "code" else Check(
            "code", language=self.language, entry_point=self.entry_point, tests=json.dumps(self.tests))
        messages = ({"role": "user", "content": self.prompt},)
        return Problem(content_id(messages, vars(check)), "scored", self.kind, messages, check, "scored", "rl")


def result(item: Item, verdict: Verdict) -> dict[str, Any]:
    """What is written for an item: the verdict, with its time in milliseconds."""
    return {"id": item.id, "status": verdict.status.value, "score": verdict.score, "reason": verdict.reason,
            "evidence": verdict.evidence, "verifier": verdict.verifier, "version": verdict.version,
            "latency_ms": round(verdict.seconds * 1000, 2)}


def read_items(path: Path) -> list[Item]:
    """The items of a JSONL file. Raises ScoringError naming every line that is none (the first five)."""
    items, wrong = [], []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ScoringError(f"{path}: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            items.append(Item.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            wrong.append(f"line {number}: {f'{where}: ' if where else ''}{first['msg'].removeprefix('Value error, ')}")
    if wrong:
        more = f"\n  and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ScoringError(f"{path}: {len(wrong)} of {len(lines)} lines are no items; nothing was scored\n  "
                           + "\n  ".join(wrong[:5]) + more)
    return items


def score_file(items: Sequence[Item], target: Path, verifier: Verifier, done: Callable[[int], None]) -> int:
    """Score items into `target`, in order; goes on after the results that are there already.

    `done(scored so far)` is called at the start and after each batch. Returns how many results stood there before.
    Raises ScoringError when `target` holds results of other items.
    """
    with open(target, "a+b") as file:
        before = _resume(file, target, items)
        done(before)
        for start in range(before, len(items), BATCH):
            part = items[start:start + BATCH]
            for line in _scored(part, verifier):
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            done(start + len(part))
    return before


def _resume(file: Any, target: Path, items: Sequence[Item]) -> int:
    """Count the whole results in `file`, cut off a torn last one, and leave it at its end."""
    file.seek(0)
    whole = kept = 0
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
            break
        try:
            found = json.loads(line)["id"]
        except (ValueError, KeyError, TypeError):
            found = None
        if number > len(items) or found != items[number - 1].id:
            wanted = f"{items[number - 1].id!r}" if number <= len(items) else "no more"
            raise ScoringError(f"{target}, line {number}: holds the result of {found!r} where the input has {wanted}; "
                               "give another --output, or remove the file to score anew")
        whole, kept = whole + len(line), number
    file.truncate(whole)
    file.seek(0, os.SEEK_END)
    return kept


def _scored(items: Sequence[Item], verifier: Verifier) -> list[dict[str, Any]]:
    verdicts = verifier.verify_batch([item.problem() for item in items], [item.completion for item in items])
    return [result(item, verdict) for item, verdict in zip(items, verdicts, strict=True)]
