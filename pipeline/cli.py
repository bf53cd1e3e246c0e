"""The command `posttrain`. Only `run` and `stage` start Ray; everything else reads files and is quick."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pipeline.artifacts import RunDirectory, RunError
from pipeline.fingerprint import GraphError
from pipeline.graph import DONE, INTERRUPTED, RUNNING, PlannedStage, find_stage, plan
from pipeline.graph import why as explain_why
from pipeline.progress import counts_line, duration, read_progress
from pipeline.recipe import Recipe, RecipeError
from pipeline.recipe_file import load_recipe
from pipeline.stage import Stage
from pipeline.visible import open_console
from pipeline.workflow_lookup import existing_run, find_recipe, load_prices, load_stages, open_run

COMMANDS = ("pipeline.data_command", "workflows.commands")  # modules that bring commands of their own
STATE_STYLES = {"done": "green", "running": "cyan", "interrupted": "yellow", "stale": "magenta", "waiting": "dim"}

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False,
    help="DeepSeek-V3's post-training, from base checkpoint and problems to an aligned model.\n\n"
         "A run is a directory of committed stages. [bold]posttrain run[/] does what is not done yet: after a crash, a "
         "[cyan]kill -9[/] or a full disk, the same command goes on where it stopped.",
    epilog="Try [cyan]posttrain run tiny --run-dir runs/tiny[/], and in a second terminal "
           "[cyan]posttrain status runs/tiny[/].")

RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the bare name of a shipped one: tiny")]
RunDirOption = Annotated[Path | None, typer.Option("--run-dir", "-d", help="Where the run lives; default runs/NAME.")]
OverridesArgument = Annotated[list[str] | None, typer.Argument(
    metavar="[KEY=VALUE]...", show_default=False, help="Recipe values to change: rl.group_size=8")]
DirArgument = Annotated[Path, typer.Argument(help="The directory of a run.", show_default=False)]
StageArgument = Annotated[str, typer.Argument(help="A stage's name, as 'posttrain status' lists them.")]


@app.command(epilog="[cyan]posttrain run tiny[/]   the tiny recipe, in runs/tiny\n\n"
                    "[cyan]posttrain run tiny --dry-run rl.steps=20[/]   which stages that change would run again\n\n"
                    "[cyan]posttrain run my.yaml -d /data/run1 --until sft[/]   stop after supervised fine-tuning")
def run(recipe: RecipeArgument, overrides: OverridesArgument = None, run_dir: RunDirOption = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, with prices.")] = False,
        until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None) -> None:
    """Run a recipe, or go on with it: stages that are done are not run again."""
    loaded = load_recipe(find_recipe(recipe), overrides or ())
    stages = load_stages(loaded)
    if until is not None:
        find_stage(stages, until)
    directory = RunDirectory(run_dir or Path("runs") / loaded.name)
    if dry_run:
        directory.check_owner(loaded.name)
        planned = plan(stages, loaded.seed, directory)
        open_console().print(_plan_table(planned))
        todo = sum(item.state != DONE for item in planned)
        if prices := load_prices(loaded):
            open_console().print("", prices, "", sep="\n")
        open_console().print(f"{todo} of {len(planned)} stages would run in {directory.root}", highlight=False)
        return
    _run_stages(loaded, stages, directory, until=until)


@app.command(epilog="[cyan]posttrain stage verify tiny --run-dir runs/tiny[/]")
def stage(name: StageArgument, recipe: RecipeArgument, overrides: OverridesArgument = None,
          run_dir: RunDirOption = None) -> None:
    """Run one stage alone; the stages it needs must be done."""
    loaded = load_recipe(find_recipe(recipe), overrides or ())
    stages = load_stages(loaded)
    find_stage(stages, name)
    _run_stages(loaded, stages, RunDirectory(run_dir or Path("runs") / loaded.name), only=name)


def _run_stages(recipe: Recipe, stages: list[Stage], directory: RunDirectory, **options: Any) -> None:
    from pipeline import runner

    console = open_console()
    again = shlex.join(["posttrain", *sys.argv[1:]])
    try:
        summary = runner.run(recipe, stages, directory.root, console=console, **options)
    except runner.StageFailed as error:
        _complain(str(error))
        _complain(f"  go on with: {again}", style="")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        _complain(f"stopped; what was done is kept. Go on with: {again}")
        raise typer.Exit(130) from None
    console.print(_status_table(directory, summary.plan, summary.ran))
    evaluation = directory.root / "evaluation.json"
    if evaluation.is_file():
        console.print(_evaluation_table(json.loads(evaluation.read_text())["models"]))
    _write_report(directory, stages, console)


def _write_report(directory: RunDirectory, stages: list[Stage], console: Console) -> None:
    from pipeline.report import write_report

    path = write_report(directory.root, stages)
    console.print(f"Report: {path}", highlight=False, soft_wrap=True)


@app.command(epilog="[cyan]posttrain status runs/tiny --json | jq '.[].state'[/]")
def status(directory: DirArgument,
           as_json: Annotated[bool, typer.Option("--json", help="One JSON list, for scripts.")] = False) -> None:
    """What is done, running, interrupted, stale or waiting. Read from the files; works during a run."""
    opened = open_run(directory)
    planned = plan(opened.stages, opened.recipe.seed, opened.directory)
    if as_json:
        print(json.dumps([_status_record(opened.directory, item) for item in planned], indent=2))
    else:
        open_console().print(_status_table(opened.directory, planned))


@app.command(epilog="[cyan]posttrain why runs/tiny rl[/]")
def why(directory: DirArgument, stage: StageArgument) -> None:
    """Why a stage is stale: the recipe key, the source file, the seed or the input that changed."""
    opened = open_run(directory)
    for line in explain_why(opened.stages, opened.recipe.seed, opened.directory, stage):
        open_console().print(line, markup=False, highlight=False, soft_wrap=True)


@app.command(epilog="[cyan]posttrain show runs/tiny pack --sample 3[/]   which tokens carry loss\n\n"
                    "[cyan]posttrain show runs/tiny rl --sample 100[/]   a rollout, its reward and verdict")
def show(directory: DirArgument, stage: StageArgument,
         sample: Annotated[int, typer.Option(help="Which row, counted from 0.", min=0)] = 0) -> None:
    """One row of what a stage made: a pack with its loss mask, a sample or rollout with its verdict."""
    from pipeline.show import show as show_row

    show_row(existing_run(directory), stage, sample, open_console())


@app.command()
def lineage(directory: DirArgument,
            sample_id: Annotated[str, typer.Argument(help="A sample's id, or its first digits (6 or more).")]) -> None:
    """Where a sample came from and what became of it: problem, expert, verdict, kept or why not, pack."""
    from pipeline.lineage import lineage as trace

    open_console().print(trace(existing_run(directory), sample_id), highlight=False, soft_wrap=True)


@app.command()
def report(directory: DirArgument) -> None:
    """Write DIR/report.html again: the data's funnel, curves, rollouts, drift, cost."""
    opened = open_run(directory)
    _write_report(opened.directory, opened.stages, open_console())


@app.command()
def doctor(directory: Annotated[Path, typer.Argument(help="Where runs would live.")] = Path()) -> None:
    """Check this machine: libraries, sandbox, Ray and the engine really start. About a minute."""
    from pipeline.doctor import report as examine

    if not examine(directory.absolute(), open_console()):
        raise typer.Exit(1)


def _plan_table(planned: list[PlannedStage]) -> Table:
    table = Table("stage", "state", "what it does", "why it would run", box=None, header_style="bold", pad_edge=False)
    for item in planned:
        table.add_row(item.stage.name, _styled(item.state), item.stage.title, item.reason)
    return table


def _status_table(directory: RunDirectory, planned: list[PlannedStage], ran: dict[str, float] | None = None) -> Table:
    """`ran`, after a run, marks the stages that were done before it."""
    table = Table("stage", "state", "fingerprint", "time", "counts", "key metric", "", box=None, header_style="bold",
                  pad_edge=False)
    table.columns[3].justify = "right"
    for item in planned:
        record = _status_record(directory, item)
        note = record["progress"] or _brief(record["reason"])
        if ran is not None and item.state == DONE and item.stage.name not in ran:
            note = "done before"
        table.add_row(item.stage.name, _styled(item.state), record["fingerprint"][:8],
                      duration(record["seconds"]) if record["seconds"] else "", counts_line(record["counts"]),
                      _key_metric(record), note)
    return table


def _evaluation_table(models: dict[str, dict[str, dict[str, Any]]]) -> Table:
    """Greedy accuracy in percent with its 95 % interval; in judged domains the win rate against the base model."""
    domains = list(dict.fromkeys(name for rows in models.values() for name in rows))
    table = Table("held-out accuracy, %", *domains, box=None, header_style="bold", pad_edge=False)
    for model, rows in models.items():
        table.add_row(model, *("" if (row := rows.get(name)) is None else "no verdict" if row["accuracy"] is None else
                               f"{100 * row['accuracy']:.1f} ({100 * row['ci95'][0]:.1f}-{100 * row['ci95'][1]:.1f})"
                               for name in domains))
    return table


def _status_record(directory: RunDirectory, item: PlannedStage) -> dict[str, Any]:
    manifest = directory.manifest(item.stage.name, item.fingerprint) or {}
    state = None
    if item.state in (RUNNING, INTERRUPTED):
        state = read_progress(directory.work_folder(item.stage.name, item.fingerprint) / "progress.json")
    return {
        "stage": item.stage.name, "state": item.state, "reason": item.reason, "fingerprint": item.fingerprint,
        "seconds": manifest.get("timings", {}).get("seconds"), "counts": manifest.get("counts", {}),
        "metrics": manifest.get("metrics", {}), "key_metric": manifest.get("key_metric"),
        "progress": state.line(state.moved) if state is not None else "",
    }


def _key_metric(record: dict[str, Any]) -> str:
    name = record["key_metric"]
    value = record["metrics"].get(name) if name else None
    return "" if value is None else f"{name} {value:.4g}" if isinstance(value, int | float) else f"{name} {value}"


def _brief(reason: str) -> str:
    """The first of several reasons; `posttrain why` gives them all."""
    first, *others = reason.split("; ")
    return f"{first}; {len(others)} more" if others else first


def _styled(state: str) -> str:
    return f"[{STATE_STYLES[state]}]{state}[/]"


def _complain(text: str, style: str = "red") -> None:
    Console(stderr=True).print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """Exit codes: 0 done, 1 a run that cannot go on, 2 a recipe or command that is wrong, 130 interrupted."""
    for name in COMMANDS:
        importlib.import_module(name).register(app)
    try:
        app()
    except (RecipeError, GraphError) as error:
        _complain(str(error))
        sys.exit(2)
    except RunError as error:
        _complain(str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
