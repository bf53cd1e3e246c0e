"""Score the rows of a JSONL file, resumably: a torn last line is cut off, and what stands there is not scored again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rewards.registry import Verifier
from rewards.scoring import Item, ScoringError, first_error, score

BATCH = 64


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
            wrong.append(f"line {number}: {first_error(error)}")
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
            for found in score(part, verifier):
                file.write(found.model_dump_json().encode() + b"\n")
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
