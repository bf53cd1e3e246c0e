"""Commands of `posttrain` about rewards alone: no recipe, no run, no Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog="[cyan]posttrain score --input answers.jsonl --output verdicts.jsonl[/]")(score)
    app.command("audit-rewards", epilog="[cyan]posttrain audit-rewards --reward my_rewards:math_reward[/]")(
        audit_rewards)


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


def audit_rewards(
        reward: Annotated[str | None, typer.Option(help="module:function to audit in place of the project's own, in "
                                                        "TRL's form: f(prompts, completions, **columns)")] = None,
        family: Annotated[str | None, typer.Option(
            help="Only math, code or sandbox; the last is left out for --reward unless named, for its programs attack "
                 "the machine that runs them.")] = None,
        compare: Annotated[bool, typer.Option(help="Also audit math-verify alone, TRL's accuracy reward and a naive "
                                                   "code grader.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Every finding, for scripts.")] = False) -> None:
    """Which answers made to be paid does a reward pay, and which honest ones does it refuse?

    Exit code 1 when an exploit is paid, or more than 5 % of the honest twins are refused.
    """
    from rewards.adversarial import audit
    from rewards.adversarial.cases import all_cases
    from rewards.registry import Verifier
    from rewards.sandbox import Limits, Sandbox
    from rewards.scoring import ScoringError

    families = [family] if family else ["math", "code"] if reward else ["math", "code", "sandbox"]
    cases = [case for case in audit.present(all_cases()) if case.family in families]
    limits = Limits(cpu_seconds=1)
    found: dict[str, list[audit.Finding]] = {}
    try:
        # rewards in this process come first: they are called in forks, which do not go with threads
        if reward:
            found[reward] = audit.audit(cases, audit.users_reward(reward))
        if compare:
            found["math-verify alone"] = audit.audit(cases, audit.math_verify_alone())
            found["TRL accuracy"] = audit.audit(cases, audit.trl_accuracy())
            found["naive code grader"] = audit.audit(cases, audit.naive_code(Sandbox(limits)))
        if not reward:
            with Verifier(limits=limits) as verifier:
                found = {"posttrain": audit.audit(cases, audit.our_reward(verifier)), **found}
    except ScoringError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    rows = {name: audit.summary(findings) for name, findings in found.items()}
    audited = found[reward or "posttrain"]
    if as_json:
        typer.echo(json.dumps({name: [{"id": finding.id, "kind": finding.case.kind, "paid": finding.paid,
                                       "twin_refused": finding.refused} for finding in findings]
                               for name, findings in found.items()}, indent=2))
    else:
        _print_audit(rows)
        for finding in audited:
            if finding.paid or finding.refused:
                typer.echo(f"{finding.id}: {'paid ' + repr(finding.case.exploit[:160]) if finding.paid else ''}"
                           f"{'refused ' + repr((finding.case.twin or '')[:160]) if finding.refused else ''}")
    twins = sum(finding.case.twin is not None for finding in audited)
    if any(finding.paid for finding in audited) or sum(finding.refused for finding in audited) > 0.05 * twins:
        raise typer.Exit(1)


def _print_audit(rows: dict[str, dict[tuple[str, str], dict[str, int]]]) -> None:
    first = next(iter(rows.values()))
    table = Table("family", "exploit", "cases", *rows, box=None, header_style="bold", pad_edge=False)
    for (family, kind), row in first.items():
        cells = [found[family, kind] for found in rows.values()]
        table.add_row(family, kind, str(row["cases"]),
                      *(f"{cell['paid']} / {cell['refused']}" if cell["told"] else "-" for cell in cells),
                      style="bold" if kind == "all" else None)
    typer.echo("exploits paid / honest twins refused; - where a reward has no word")
    Console().print(table)
