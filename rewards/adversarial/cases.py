"""The shape of a case, and all cases there are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

FAMILIES = {"math": "answers to mathematics", "code": "programs that aim at their grader",
            "sandbox": "programs that attack what runs them", "judge": "answers that aim at a judge",
            "api": "requests to the service"}


@dataclass(frozen=True)
class Case:
    """One exploit. `check` holds what `scoring.Item` needs beside id and completion; for "api", how the answer is read.

    exploit: a completion, for "api" a request, that must not be paid. twin: an honest one, of the same look, that must
    be. None where the twin would be another case's.
    """

    family: str  # a key of FAMILIES
    kind: str  # what the exploit does
    check: dict[str, Any]
    exploit: str
    twin: str | None


def all_cases() -> list[Case]:
    """Every case of every family, in a fixed order."""
    from rewards.adversarial import api, code, judge, math, sandbox

    return [*math.cases(), *code.cases(), *sandbox.cases(), *judge.cases(), *api.cases()]


def named(cases: list[Case]) -> Iterator[tuple[str, Case]]:
    """Cases with ids such as math-chain-03."""
    counts: dict[tuple[str, str], int] = {}
    for case in cases:
        number = counts[case.family, case.kind] = counts.get((case.family, case.kind), 0) + 1
        yield f"{case.family}-{case.kind}-{number:02d}", case
