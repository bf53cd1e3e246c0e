"""The stage contract: a named, pure function of a recipe section and input artifacts.

A stage's fingerprint is the hash of its name, the source of the packages it declares, its section of the
recipe, the seed and the fingerprints of its inputs. `run` gets a `StageContext`, writes its files into
`context.out` and returns a `StageResult`; the runner commits the folder by one rename.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


class StageError(RuntimeError):
    """A stage that cannot go on for a reason the user can mend; the message says how."""


class Progress(Protocol):
    """Where a stage reports how far it is. `advance` is cheap and may be called for every row."""

    def start(self, total: int | None, unit: str, done: int = 0) -> None:
        """Begin (or begin again) a count of `total` `unit`s, `done` of them already there."""

    def advance(self, count: int = 1, **metrics: float) -> None:
        """Count work done; `metrics` (loss, reward, tokens) are shown beside the bar."""

    def note(self, text: str) -> None:
        """One line for the person watching."""


@dataclass
class StageContext:
    """What a stage may touch.

    config: its section (a pydantic model, or a dict of sections, as declared in `Stage.config`).
    inputs: committed artifact folder of each input stage, by stage name.
    out: folder to fill; committed when `run` returns.
    work: folder for checkpoints and request logs; survives a crash, deleted after the commit.
    """

    name: str
    config: Any
    inputs: dict[str, Path]
    out: Path
    work: Path
    seed: int
    progress: Progress


@dataclass
class StageResult:
    """What the manifest keeps beside the files.

    counts: rows in and out. `counts["funnel"]`, where present, is
        {domain: {"in": int, "out": int, "lost": {reason: int}}}.
    metrics: numbers worth a line in `status`; `key_metric` names the one shown there.
    """

    counts: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    key_metric: str | None = None


@dataclass(frozen=True)
class Stage:
    name: str
    run: Callable[[StageContext], StageResult]
    config: Any
    inputs: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()  # packages and modules whose source is part of the fingerprint
    files: tuple[str, ...] = ()  # files and folders outside the run that the stage reads; their content is too
    title: str = ""  # one line for --dry-run and the report
