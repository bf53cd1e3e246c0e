"""Who does the work behind the API: verifiers in this process here, replicas of Ray Serve in `deploy.py`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from rewards.registry import Verifier
from rewards.sandbox import Job, Limits, Outcome, Sandbox, SandboxFailure
from rewards.scoring import Item, Result, ScoringError, score

GROUPS = {"math": "math", "exact": "math", "code": "code", "principles": "judge", "match": "judge"}
"""Kind of check -> the part of the service that does it."""


class Overloaded(RuntimeError):
    """Queues are full; nothing was done, and the same request may be sent again."""


class Unavailable(RuntimeError):
    """The service cannot tell now; says nothing about the answer."""


class Backend(Protocol):
    """groups: the parts that are there, of "math", "code", "judge"."""

    groups: frozenset[str]

    async def score(self, items: Sequence[Item], n_votes: int | None = None) -> list[Result]:
        """A result per item, in order. Raises ScoringError, Overloaded or Unavailable."""
        ...

    async def run(self, jobs: Sequence[Job], limits: Limits) -> list[Outcome]:
        """An outcome per program, in order. Raises ScoringError, Overloaded or Unavailable."""
        ...


def refuse_missing(groups: frozenset[str], wanted: set[str]) -> None:
    """Raises ScoringError when a part of the service was not started."""
    if missing := sorted(wanted - groups):
        raise ScoringError(f"this service was started without {' and '.join(missing)}: posttrain serve "
                           + " ".join("--judge MODEL_DIR" if name == "judge" else f"--{name}" for name in missing))


class LocalBackend:
    """Verifiers of this process, in threads."""

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier
        self.groups = frozenset({"math", "code", "judge"} if verifier.judge else {"math", "code"})

    async def score(self, items: Sequence[Item], n_votes: int | None = None) -> list[Result]:
        refuse_missing(self.groups, {GROUPS[item.kind] for item in items})
        return await asyncio.to_thread(score, items, self.verifier, n_votes)

    async def run(self, jobs: Sequence[Job], limits: Limits) -> list[Outcome]:
        try:
            return await asyncio.to_thread(Sandbox(limits, self.verifier.isolation).run, jobs)
        except SandboxFailure as failure:
            raise Unavailable(str(failure)) from None
