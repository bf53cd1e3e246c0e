"""Commands of `posttrain` about rewards alone: no recipe, no run, no Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog="[cyan]posttrain score --input answers.jsonl --output verdicts.jsonl[/]")(score)


def score(source: Annotated[Path, typer.Option("--input", "-i", help="Items to score, a JSON object a line.")],
          target: Annotated[Path, typer.Option("--output", "-o", help="Where their results go, in the same order.")],
          workers: Annotated[int, typer.Option(min=1, help="Sandboxes and math workers at a time.")] = 2) -> None:
    """Score answers of a JSONL file by rule; the same command goes on where it stopped.

    An item has id, kind (math, exact or code), completion and what its check needs: reference, or tests with language
    and entry_point; prompt is what was asked. A result has id, status, score (null where the verifier cannot tell),
    reason and evidence.
    """
    from pipeline.stage import StageError
    from rewards.registry import Verifier
    from rewards.sandbox import SandboxUnavailable
    from rewards.scoring import ScoringError, read_items, score_file

    try:
        items = read_items(source)
        columns = TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Verifier(workers=workers) as verifier, Progress(*columns) as bar:
            verifier.run_canaries(sorted({item.kind for item in items}), sorted({item.language for item in items}))
            task = bar.add_task("scored", total=len(items))
            before = score_file(items, target, verifier, lambda scored: bar.update(task, completed=scored))
    except (ScoringError, SandboxUnavailable, StageError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{len(items) - before} items scored into {target}" + (f"; {before} were there" if before else ""))
