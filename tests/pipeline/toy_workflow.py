"""A workflow of small stages that write text; and a driver that runs two of them, for tests to kill."""

import os
import sys
import time
from pathlib import Path

from rich.console import Console

from pipeline.recipe import Recipe
from pipeline.stage import Stage, StageContext, StageError, StageResult


def recipe(**values) -> Recipe:
    return Recipe.model_validate({
        "name": "toy", "workflow": "toy",
        "model": {"source": {"type": "tiny"}, "dtype": "float32", "max_length": 64},
        "domains": {"math": {"source": {"type": "generated", "generator": "math"}, "splits": {"sft": 4}}},
        "generate": {"max_tokens": 64}, "evaluation": {"max_tokens": 64},
        "expert": {"rl": {"max_completion_length": 64}}, "rl": {"max_completion_length": 64}, **values})


def write(context: StageContext) -> StageResult:
    """The names of the inputs and the config, as one file."""
    lines = [f"{name}: {(path / 'text.txt').read_text()!r}" for name, path in context.inputs.items()]
    (context.out / "text.txt").write_text(f"{context.name} {context.config} {lines}\n")
    return StageResult(counts={"in": len(lines), "out": 1}, metrics={"lines": len(lines)}, key_metric="lines")


def count_rows(context: StageContext) -> StageResult:
    """Rows in work/rows.txt, resumed; pauses for ever at `pause_at` unless a file `go` lies beside the run."""
    rows = context.work / "rows.txt"
    done = len(rows.read_text().splitlines()) if rows.exists() else 0
    context.progress.start(total=context.config["rows"], unit="rows", done=done)
    for row in range(done, context.config["rows"]):
        while row == context.config["pause_at"] and not Path(context.config["go"]).exists():
            time.sleep(0.05)
        with open(rows, "a") as file:
            file.write(f"{row} {os.getpid()}\n")
        context.progress.advance(loss=1 / (row + 1))
    context.progress.note(f"resumed after {done} rows")
    (context.out / "rows.txt").write_text(rows.read_text())
    return StageResult(counts={"out": context.config["rows"], "resumed_from": done})


def refuse(context: StageContext) -> StageResult:
    raise StageError("the fuel is missing; bring some")


def die(context: StageContext) -> StageResult:
    os._exit(9)


def chain(first: dict, second: dict, third: dict) -> list[Stage]:
    return [Stage("first", write, first, modules=("toy_workflow",), title="the first"),
            Stage("second", write, second, inputs=("first",), modules=("toy_workflow",)),
            Stage("third", write, third, inputs=("second",), modules=("toy_workflow",))]


def build(recipe: Recipe) -> list[Stage]:
    return chain({"rows": recipe.sft.save_steps}, recipe.rl, {"k": recipe.evaluation.k})


if __name__ == "__main__":
    import toy_workflow  # by name, so that Ray's worker imports it instead of unpickling __main__

    from pipeline.runner import StageFailed, run

    run_dir = Path(sys.argv[1])
    last = {"ok": toy_workflow.write, "refuse": toy_workflow.refuse, "die": toy_workflow.die}[sys.argv[2]]
    slow = {"rows": 40, "pause_at": 20, "go": str(run_dir.with_name("go"))}
    stages = [Stage("prepare", toy_workflow.write, {}, modules=("toy_workflow",)),
              Stage("count", toy_workflow.count_rows, slow, inputs=("prepare",), modules=("toy_workflow",)),
              Stage("last", last, {}, inputs=("prepare",), modules=("toy_workflow",))]
    try:
        run(toy_workflow.recipe(), stages, run_dir, console=Console(force_terminal=False))
    except StageFailed as error:
        print(error)
        sys.exit(1)
