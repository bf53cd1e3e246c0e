"""Run what is not done yet: one Ray actor works through the stages, the driver shows and commits.

The driver commits, not the worker: a worker that outlives a killed driver can then never put an artifact
in place behind the back of the next run.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from pipeline.artifacts import RunDirectory, RunError, disk_full_explained, disk_full_message, now, write_atomically
from pipeline.fingerprint import changes, fingerprint, stage_parts
from pipeline.graph import DONE, PlannedStage, find_stage, order, plan
from pipeline.progress import Display, counts_line, duration, make_display, read_progress
from pipeline.ray_session import ray_session
from pipeline.recipe import Recipe
from pipeline.recipe_file import dump_recipe
from pipeline.stage import Stage, StageError, StageResult
from pipeline.worker import StageOrder, StageWorker

POLL_SECONDS = 0.25
MEMORY_SECONDS = 2.0
WORKER_SHARE = 0.25  # of the machine's memory: a worker that holds more after a stage gives way to a new one
TRACEBACK_LINES = 12


class StageFailed(RuntimeError):
    """A stage did not finish. The message is for the person who ran it: what, where, how to go on."""


@dataclass(frozen=True)
class RunSummary:
    """What a run did: the stages it ran now, by name, with the seconds each took."""

    ran: dict[str, float]
    plan: list[PlannedStage]


def run(recipe: Recipe, stages: Sequence[Stage], run_dir: Path, *, until: str | None = None, only: str | None = None,
        console: Console | None = None) -> RunSummary:
    """Run the recipe's stages in `run_dir` as far as they are not done.

    until: stop after this stage and what it needs. only: run this stage alone; its inputs must be done.
    Raises RunError (directory in use, another recipe's, inputs missing), GraphError, StageFailed.
    """
    directory = RunDirectory(run_dir.absolute())
    wanted = _wanted(stages, until, only)
    display = make_display(console or Console())
    directory.check_owner(recipe.name)
    try:
        with directory.lock():
            directory.claim(recipe.name, dump_recipe(recipe))
            planned = plan(wanted, recipe.seed, directory)
            for item in planned:
                directory.remove_committed_work(item.stage.name, item.fingerprint)
            todo = [item for item in planned if item.state != DONE]
            if only is not None:
                _check_inputs(todo, only)
                todo = [item for item in todo if item.stage.name == only]
            seconds: dict[str, float] = {}
            if todo:
                with ray_session(recipe.name, directory.root, display.say):
                    seconds = _Driver(directory, recipe, display).run_all(todo)
            else:
                display.say("nothing to do: every stage asked for is done")
            with disk_full_explained(directory.root):
                _publish_evaluation(stages, recipe.seed, directory)
    except StageError as error:  # a disk that fills up between stages
        raise StageFailed(str(error)) from error
    finally:
        display.close()
    return RunSummary(seconds, plan(stages, recipe.seed, directory))


def _wanted(stages: Sequence[Stage], until: str | None, only: str | None) -> list[Stage]:
    """The stages up to `until` or `only`: that stage and everything it needs, in order."""
    ordered = order(stages)
    last = until or only
    if last is None:
        return ordered
    by_name = {stage.name: stage for stage in ordered}
    needed: set[str] = set()
    pending = [find_stage(ordered, last).name]
    while pending:
        name = pending.pop()
        if name not in needed:
            needed.add(name)
            pending += by_name[name].inputs
    return [stage for stage in ordered if stage.name in needed]


def _check_inputs(todo: Sequence[PlannedStage], only: str) -> None:
    missing = [f"{item.stage.name} ({item.state})" for item in todo if item.stage.name != only]
    if missing:
        raise RunError(f"stage {only} needs {', '.join(missing)} first; run it with them: posttrain run ... "
                       f"--until {only}")


class _Driver:
    """Gives stages to the worker one by one and watches: progress, memory, death."""

    def __init__(self, directory: RunDirectory, recipe: Recipe, display: Display) -> None:
        self.directory = directory
        self.recipe = recipe
        self.display = display
        self.peak_memory = 0
        self._memory_read = 0.0

    def run_all(self, todo: Sequence[PlannedStage]) -> dict[str, float]:
        import ray
        from ray.exceptions import RayActorError

        total_gpus = ray.cluster_resources().get("GPU", 0)
        # a GPU of its own where the engines leave one, else trainer and engine share
        gpus = 1 if total_gpus - self.recipe.engine.gpus * self.recipe.engine.replicas >= 1 else 0
        actor = ray.remote(StageWorker)
        worker, seconds = None, {}
        for number, item in enumerate(todo, start=1):
            if worker is None:
                worker = actor.options(name=f"stage-worker-{os.getpid()}-{number}", num_cpus=0, num_gpus=gpus).remote()
            seconds[item.stage.name] = self.run_one(worker, item, f"{number} of {len(todo)}")
            with contextlib.suppress(RayActorError):  # a worker that has just died says so at the next stage
                if ray.get(worker.resident.remote()) > WORKER_SHARE * psutil.virtual_memory().total:
                    ray.kill(worker)  # its engines end with it; both start again where a stage needs them
                    worker = None
        return seconds

    def run_one(self, worker: Any, item: PlannedStage, position: str) -> float:
        """One stage from start to commit; returns its seconds. Raises StageFailed."""
        stage, directory = item.stage, self.directory
        inputs = {name: directory.stage_folder(name, item.parts["inputs"][name]) for name in stage.inputs}
        work, log = directory.work_folder(stage.name, item.fingerprint), directory.log_file(stage.name)
        directory.set_working_on(work.name)
        self.display.stage_started(stage.name, position, stage.title)
        self._memory_read = 0.0
        # what earlier, killed attempts of this stage took counts as well
        spent, self.peak_memory = _read_spent(work)
        started, began = now(), time.monotonic() - spent
        try:
            self._check_sources(item)
            # the call itself may raise too: an actor whose process has died refuses new work at once
            reference = worker.run_stage.options(name=f"stage:{stage.name}").remote(
                StageOrder(stage, inputs, work, log, self.recipe.seed))
            result = self._watch(reference, work, began)
            seconds = time.monotonic() - began
            directory.commit(stage.name, item.fingerprint, item.parts, result, title=stage.title, timings={
                "started": started, "seconds": round(seconds, 3),
                "peak_memory_gib": round(self.peak_memory / 2**30, 3)})
        except StageError as error:
            raise StageFailed(f"stage {stage.name}: {error}\n  log: {log}") from error
        directory.set_working_on("")
        key = result.metrics.get(result.key_metric) if result.key_metric else None
        shown = f"{result.key_metric} {key:.4g}" if isinstance(key, int | float) else ""
        self.display.stage_finished("  ".join(filter(None, (
            f"done in {duration(seconds)}", f"{self.peak_memory / 2**30:.1f} GiB", counts_line(result.counts), shown))))
        return seconds

    def _watch(self, reference: Any, work: Path, began: float) -> StageResult:
        """Wait for the stage, showing its progress. Raises StageError in place of Ray's errors."""
        import ray
        from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

        try:
            while True:
                finished, _ = ray.wait([reference], timeout=POLL_SECONDS)
                self._read_memory(work, began)
                self.display.update(read_progress(work / "progress.json"))
                if finished:
                    return ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, StageError):
                raise StageError(str(error.cause)) from None
            # some writers (safetensors, torch) report a full disk as errors of their own
            if "No space left on device" in str(error):
                raise StageError(disk_full_message(self.directory.root)) from None
            raise StageError(_last_lines(error)) from None
        except (RayActorError, OutOfMemoryError) as error:
            raise StageError(f"the worker process died ({_first_line(error)}). Often the kernel or Ray ended it for "
                             "want of memory. What it had saved is kept: the same command resumes") from None

    def _check_sources(self, item: PlannedStage) -> None:
        """Source edited since the run began would put a result under the fingerprint of other code."""
        parts = stage_parts(item.stage, self.recipe.seed, item.parts["inputs"])
        if fingerprint(parts) != item.fingerprint:
            raise StageError("changed since this run began: " + "; ".join(changes(item.parts, parts)) +
                             ". Give the same command again to run the new version")

    def _read_memory(self, work: Path, began: float) -> None:
        """Memory of this process and all it started (Ray, workers, engines), and what the stage has taken so far."""
        if time.monotonic() - self._memory_read < MEMORY_SECONDS:
            return
        own = psutil.Process()
        self.peak_memory = max(self.peak_memory, sum(map(_held, [own, *own.children(recursive=True)])))
        self._memory_read = time.monotonic()
        with contextlib.suppress(OSError):  # a full disk is the stage's to report
            (work / "spent.json").write_text(json.dumps([self._memory_read - began, self.peak_memory]))


def _held(process: psutil.Process) -> int:
    """Bytes, a page shared by n processes counted as 1/n in each; 0 for a process that has just ended."""
    try:
        return process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def _read_spent(work: Path) -> tuple[float, int]:
    """Seconds and peak memory of a stage's attempts so far."""
    try:
        seconds, memory = json.loads((work / "spent.json").read_text())
        return seconds, memory
    except (OSError, ValueError):
        return 0.0, 0


def _publish_evaluation(stages: Sequence[Stage], seed: int, directory: RunDirectory) -> None:
    """Copy the last evaluation of the graph to DIR/evaluation.json, where scripts look for it; none, none."""
    for item in reversed(plan(stages, seed, directory)):
        source = directory.stage_folder(item.stage.name, item.fingerprint) / "evaluation.json"
        if item.state == DONE and source.is_file():
            write_atomically(directory.root / "evaluation.json", source.read_text())
            return
    (directory.root / "evaluation.json").unlink(missing_ok=True)


def _last_lines(error: Any) -> str:
    """What a stage's exception was and the end of its traceback."""
    cause = error.cause if error.cause is not None else error
    # Ray's text starts with frames of Ray itself; the end is where the stage broke
    lines = str(error).strip().splitlines()[-TRACEBACK_LINES:]
    return f"{type(cause).__name__}: {_first_line(cause)}\n" + "\n".join(f"    {line}" for line in lines)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
