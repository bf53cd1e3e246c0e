"""Commands of `posttrain` beside those of a run: rewards alone (score, serve, audit), checkpoints (convert), review."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column, Table

Isolation = Literal["bubblewrap", "rlimits"]
ISOLATION = ("Of code under test; rlimits, for machines without namespaces, leaves it the network and every readable "
             "file, and each verdict says so.")


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog="[cyan]posttrain score --input answers.jsonl --output verdicts.jsonl[/]")(score)
    app.command(epilog="[cyan]posttrain serve --math --code --judge runs/tiny/stages/reward-model/*/checkpoint[/]")(
        serve)
    app.command("audit-rewards", epilog="[cyan]posttrain audit-rewards --reward my_rewards:math_reward[/]")(
        audit_rewards)
    app.command(epilog="[cyan]posttrain convert DeepSeek-V3-Base base-bf16 --to bfloat16[/]   for transformers\n\n"
                       "[cyan]posttrain convert runs/v3/stages/rl/*/checkpoint final --to fp8[/]   for vLLM")(convert)
    app.command(epilog="[cyan]posttrain review runs/tiny[/]   then "
                       "[cyan]posttrain run tiny reject.reviews=runs/tiny/reviews.jsonl[/]")(review)


def score(source: Annotated[Path, typer.Option("--input", "-i", help="Items to score, a JSON object a line.")],
          target: Annotated[Path, typer.Option("--output", "-o", help="Where their results go, in the same order.")],
          judge: Annotated[Path | None, typer.Option(help="Checkpoint folder of a judge, for principles and match.")
                           ] = None,
          votes: Annotated[int, typer.Option(min=1, help="Judgements averaged for each answer.")] = 1,
          workers: Annotated[int, typer.Option(min=1, help="Sandboxes and math workers at a time.")] = 2,
          isolation: Annotated[Isolation, typer.Option(help=ISOLATION)] = "bubblewrap") -> None:
    """Score answers of a JSONL file; the same command goes on where it stopped.

    An item has id, kind (math, exact, code, principles or match), completion and what its check needs: reference, tests
    with language and entry_point, or principles; prompt is what was asked. A result has id, status, score (null where
    the verifier cannot tell), reason and evidence, from a judge votes, agreement and critique too.
    """
    from contextlib import ExitStack

    from pipeline.records import JUDGED_KINDS
    from pipeline.stage import StageError
    from rewards.registry import Verifier
    from rewards.sandbox import SandboxUnavailable
    from rewards.scoring import ScoringError
    from rewards.scoring_file import read_items, score_file

    try:
        with ExitStack() as opened:
            items = read_items(source)
            needed = [item for item in items if item.kind in JUDGED_KINDS]
            if needed and judge is None:
                raise ScoringError(f"item {needed[0].id!r} is of kind {needed[0].kind}, which needs a judge: "
                                   "--judge MODEL_DIR")
            asked = None
            if needed and judge:
                from workflows.serving import judge_settings

                settings = judge_settings(judge, votes=votes)
                opened.enter_context(_ray())
                asked = settings()
            verifier = opened.enter_context(Verifier(asked, workers=workers, isolation=isolation))
            verifier.run_canaries(sorted({item.kind for item in items}), sorted({item.language for item in items}))
            columns = TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            bar = opened.enter_context(Progress(*columns))
            task = bar.add_task("scored", total=len(items))
            before = score_file(items, target, verifier, lambda scored: bar.update(task, completed=scored))
    except (ScoringError, SandboxUnavailable, StageError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{len(items) - before} items scored into {target}" + (f"; {before} were there" if before else ""))


def serve(recipe: Annotated[str | None, typer.Option(help="Take engine, votes and constitution from this recipe; "
                                                          "starts math, code and, with --judge, the judge.")] = None,
          math: Annotated[bool, typer.Option("--math", help="Score mathematics and exact answers.")] = False,
          code: Annotated[bool, typer.Option("--code", help="Run code.")] = False,
          judge: Annotated[Path | None, typer.Option(help="Checkpoint folder of a judge, for principles and match.")
                           ] = None,
          host: Annotated[str, typer.Option(help="Another than loopback needs a token.")] = "127.0.0.1",
          port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
          token_file: Annotated[Path | None, typer.Option(
              help="File with the bearer token that requests must carry; or set POSTTRAIN_TOKEN.")] = None,
          workers: Annotated[int, typer.Option(min=1, help="Math workers, and sandboxes, of each replica.")] = 2,
          replicas: Annotated[int, typer.Option(min=1, help="Replicas of each part, spread over the cluster.")] = 1,
          isolation: Annotated[Isolation | None, typer.Option(help=ISOLATION)] = None,
          queue: Annotated[int, typer.Option(min=1, help="Calls that may wait for a part; more get 429.")] = 64,
          log: Annotated[Path, typer.Option(help="A line for each request.")] = Path("posttrain-serve.log")) -> None:
    """Serve the rewards over HTTP, for any trainer; /docs shows every route."""
    import signal
    import threading

    from pipeline.recipe_file import load_recipe
    from pipeline.stage import StageError
    from pipeline.workflow_lookup import find_recipe

    try:
        if not (recipe or math or code or judge):
            raise StageError("nothing to serve: give --math, --code, --judge MODEL_DIR or --recipe RECIPE")
        token = _token(token_file)
        _check_address(host, port, token)
        from rewards.service.deploy import Parts, start, stop
        from rewards.service.gate import Rules
        from workflows.serving import judge_settings

        loaded = load_recipe(find_recipe(recipe)) if recipe else None
        if loaded and judge is None and any(domain.judged for domain in loaded.domains.values()):
            raise StageError(f"{recipe} has judged domains: give --judge RUN_DIR/stages/reward-model/*/checkpoint")
        parts = Parts(math=bool(recipe) or math, code=bool(recipe) or code, workers=workers, replicas=replicas,
                      queue=queue, isolation=isolation or (loaded.isolation if loaded else "bubblewrap"),
                      judge=judge_settings(judge, loaded) if judge else None)
        constitution = tuple(dict.fromkeys(text for domain in (loaded.domains.values() if loaded else ())
                                           for text in domain.principles))
        ended = threading.Event()
        with _ray():
            start(parts, host, port, Rules(token), log.absolute(), constitution)
            for number in (signal.SIGINT, signal.SIGTERM):  # only now: Ray sets handlers of its own when it starts
                signal.signal(number, lambda *_: ended.set())
            typer.echo(f"rewards ({', '.join(parts.names())}) at http://{host}:{port}/v1/score, documentation at "
                       f"/docs; a line for each request in {log}; Ctrl-C ends")
            ended.wait()
            stop()
    except StageError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None


def _token(file: Path | None) -> str | None:
    """The bearer token. Not an option of its own: a command line is seen by every user of the machine."""
    from pipeline.stage import StageError

    if file is None:
        return os.environ.get("POSTTRAIN_TOKEN") or None
    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(f"--token-file {file}: {error}") from None
    if len(token) < 16:
        raise StageError(f"--token-file {file}: a token needs 16 characters or more; openssl rand -hex 32 makes one")
    return token


def _check_address(host: str, port: int, token: str | None) -> None:
    import ipaddress
    import socket

    from pipeline.stage import StageError

    try:
        address = ipaddress.ip_address(socket.gethostbyname(host))
        if not address.is_loopback and not token:
            raise StageError(f"--host {host} can be reached from other machines: give --token-file, or set "
                             "POSTTRAIN_TOKEN")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise StageError(f"cannot listen at {host}:{port}: {error}; give another --host or --port") from None


def _ray(say: Callable[[str], None] = typer.echo) -> AbstractContextManager[None]:
    from pipeline.ray_session import ray_session

    return ray_session("rewards", Path.cwd(), say)


def audit_rewards(
        reward: Annotated[str | None, typer.Option(help="module:function to audit in place of the project's own, in "
                                                        "TRL's form: f(prompts, completions, **columns)")] = None,
        family: Annotated[str | None, typer.Option(
            help="Only this family: math, code, sandbox, judge or api. A reward of --reward is put before math and "
                 "code unless another is named: the programs of sandbox attack the machine that runs them.")] = None,
        judge: Annotated[Path | None, typer.Option(
            help="Checkpoint folder of a judge: put the family judge before it, in place of a scripted judge that "
                 "believes all it reads.")] = None,
        compare: Annotated[bool, typer.Option(help="Also audit math-verify alone, TRL's accuracy reward, and a naive "
                                                   "grader of code and one around the judge.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Every finding, for scripts.")] = False) -> None:
    """Which answers made to be paid does a reward pay, and which honest ones does it refuse?

    Exit code 1 when an exploit is paid, or more than 5 % of the honest twins are refused.
    """
    from contextlib import ExitStack

    from pipeline.stage import StageError
    from rewards.adversarial import audit
    from rewards.adversarial.cases import FAMILIES, all_cases
    from rewards.adversarial.credulous import VOTES, credulous_judge
    from rewards.judge import Judge
    from rewards.registry import Verifier
    from rewards.sandbox import Limits, Sandbox
    from rewards.scoring import ScoringError

    known = [name for name in FAMILIES if not (reward and name == "api")]
    if judge and (reward or family not in (None, "judge")):
        typer.echo("--judge: goes with the family judge alone, and not with --reward", err=True)
        raise typer.Exit(2)
    if family not in (None, *known):
        typer.echo(f"--family: must be {', '.join(known)} (got {family})", err=True)
        raise typer.Exit(2)
    chosen = [family] if family else ["judge"] if judge else ["math", "code"] if reward else known
    cases = [case for case in audit.present(all_cases()) if case.family in chosen]
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
        with ExitStack() as opened:
            asked = Judge(credulous_judge, VOTES)
            if judge:
                from workflows.serving import judge_settings

                settings = judge_settings(judge)
                opened.enter_context(_ray(lambda text: typer.echo(text, err=True)))
                asked = settings()
            if compare:
                found["naive judge grader"] = audit.audit(cases, audit.naive_judge(asked.generate))
            if not reward:
                verifier = opened.enter_context(Verifier(asked, limits=limits))
                found = {"posttrain": audit.audit(cases, audit.our_reward(verifier)), **found}
    except (ScoringError, StageError) as error:
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
    shown = {name: found for name, found in rows.items()
             if found is first or any(row["told"] for row in found.values())}
    fixed = (Column(name, no_wrap=True) for name in ("family", "exploit", "cases"))
    table = Table(*fixed, *shown, box=None, header_style="bold", pad_edge=False)
    for (family, kind), row in first.items():
        cells = [found[family, kind] for found in shown.values()]
        table.add_row(family, kind, str(row["cases"]),
                      *(f"{cell['paid']} / {cell['refused']}" if cell["told"] else "-" for cell in cells),
                      style="bold" if kind == "all" else None)
    typer.echo("exploits paid / honest twins refused; - where a reward has no word")
    Console().print(table)


def convert(source: Annotated[Path, typer.Argument(help="Checkpoint folder of a DeepSeek-V3.", show_default=False)],
            target: Annotated[Path, typer.Argument(help="New folder; written aside, renamed when it is whole.",
                                                   show_default=False)],
            to: Annotated[Literal["fp8", "bfloat16", "float32"], typer.Option(
                help="fp8 is DeepSeek's layout, pairs of values and scales; the others are what transformers trains.")],
            shard_gb: Annotated[float, typer.Option(min=0.001, help="Size of a weight file, in 10^9 bytes.")] = 5.0
            ) -> None:
    """Convert a checkpoint between FP8, BF16 and FP32, tensor by tensor; FP8 comes back byte for byte."""
    from pipeline.stage import StageError
    from policy.checkpoint import convert as convert_checkpoint

    try:
        with Progress(TextColumn("[bold]{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                      TimeRemainingColumn()) as bar:
            task = bar.add_task("converted", total=None)
            done = convert_checkpoint(source, target, to, int(shard_gb * 10**9),
                                      lambda read, total: bar.update(task, completed=read, total=total))
    except (StageError, FileNotFoundError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    pairs = f"; FP8 pairs: {done.kept} kept byte for byte, {done.made} quantised" if done.kept or done.made else ""
    typer.echo(f"{done.tensors} tensors, {done.bytes / 10**6:,.1f} MB, in {target}, digest {done.digest}{pairs}")


def review(directory: Annotated[Path, typer.Argument(help="The directory of a run.", show_default=False)],
           out: Annotated[Path | None, typer.Option(help="File of decisions; default DIR/reviews.jsonl.")] = None,
           reviewer: Annotated[str | None, typer.Option(help="Who decides; default the name of the account.")] = None,
           port: Annotated[int, typer.Option(min=1, max=65535)] = 8765) -> None:
    """Accept, edit or reject the samples a judge was least sure about, on a page that this machine alone can open.

    Each decision is on disk before the next sample is shown. The run applies them with reject.reviews=FILE.
    """
    import getpass
    import socket

    import uvicorn

    from distill.review_page import ReviewFile, build_app, read_queue
    from pipeline.sample_set import problems_of
    from pipeline.show import committed_manifest
    from pipeline.stage import StageError
    from pipeline.workflow_lookup import existing_run

    run = existing_run(directory)
    manifest = committed_manifest(run, "reject")
    try:
        rows = read_queue(run.stage_folder("reject", manifest["fingerprint"]) / "review/queue.parquet")
        kept = ReviewFile(out or directory / "reviews.jsonl")
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", port))
            listening.listen()
        except OSError as error:
            raise StageError(f"cannot listen at 127.0.0.1:{port}: {error.strerror}; give another --port") from None
    except StageError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    problems = problems_of(run, manifest["inputs"], [row["problem_id"] for row in rows])
    left = sum(row["id"] not in kept.decisions for row in rows)
    typer.echo(f"{left} of {len(rows)} samples to decide, at http://127.0.0.1:{port}/; decisions go to {kept.path}; "
               "Ctrl-C ends")
    app = build_app(rows, problems, kept, reviewer or getpass.getuser())
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False))
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    typer.echo(f"{len(kept.decisions)} decisions in {kept.path}; apply them with: posttrain run RECIPE "
               f"--run-dir {directory} reject.reviews={kept.path}")
