"""Run what is not done yet: one Ray actor works through the stages, the driver shows and commits.

The driver commits, not the worker: a worker that outlives a killed driver can then never put an artifact
in place behind the back of the next run.
"""

from __future__ import annotations

import contextlib
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
from pipeline.recipe import Recipe, dump_recipe
from pipeline.stage import Stage, StageError, StageResult
from pipeline.worker import StageOrder, StageWorker

POLL_SECONDS = 0.25
MEMORY_SECONDS = 1.0
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
        self.peak_rss = 0
        self._memory_read = 0.0

    def run_all(self, todo: Sequence[PlannedStage]) -> dict[str, float]:
        import ray

        total_gpus = ray.cluster_resources().get("GPU", 0)
        # a GPU of its own where the engine leaves one, else trainer and engine share
        gpus = 1 if total_gpus - self.recipe.engine.gpus >= 1 else 0
        actor = ray.remote(StageWorker)
        worker, seconds = None, {}
        for number, item in enumerate(todo, start=1):
            if worker is None:
                worker = actor.options(name=f"stage-worker-{os.getpid()}-{number}", num_cpus=0, num_gpus=gpus).remote()
            seconds[item.stage.name] = self.run_one(worker, item, f"{number} of {len(todo)}")
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
        self.peak_rss, self._memory_read = 0, 0.0
        started, began = now(), time.monotonic()
        try:
            self._check_sources(item)
            # the call itself may raise too: an actor whose process has died refuses new work at once
            reference = worker.run_stage.options(name=f"stage:{stage.name}").remote(
                StageOrder(stage, inputs, work, log, self.recipe.seed))
            result = self._watch(reference, work)
            seconds = time.monotonic() - began
            directory.commit(stage.name, item.fingerprint, item.parts, result, title=stage.title, timings={
                "started": started, "seconds": round(seconds, 3), "peak_rss_gib": round(self.peak_rss / 2**30, 3)})
        except StageError as error:
            raise StageFailed(f"stage {stage.name}: {error}\n  log: {log}") from error
        directory.set_working_on("")
        key = result.metrics.get(result.key_metric) if result.key_metric else None
        shown = f"{result.key_metric} {key:.4g}" if isinstance(key, int | float) else ""
        self.display.stage_finished("  ".join(filter(None, (
            f"done in {duration(seconds)}", f"{self.peak_rss / 2**30:.1f} GiB", counts_line(result.counts), shown))))
        return seconds

    def _watch(self, reference: Any, work: Path) -> StageResult:
        """Wait for the stage, showing its progress. Raises StageError in place of Ray's errors."""
        import ray
        from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

        try:
            while True:
                finished, _ = ray.wait([reference], timeout=POLL_SECONDS)
                self._read_memory()
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

    def _read_memory(self) -> None:
        """Resident memory of Ray's workers and what they started; shared pages count once per process."""
        if time.monotonic() - self._memory_read < MEMORY_SECONDS:
            return
        self._memory_read = time.monotonic()
        total = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process().children(recursive=True)
            for raylet in (process for process in below if process.name() == "raylet"):
                total = sum(_resident(process) for process in raylet.children(recursive=True))
        self.peak_rss = max(self.peak_rss, total)


def _resident(process: psutil.Process) -> int:
    """Bytes; 0 for Ray's own agents and for a process that has just ended."""
    try:
        own = process.name().startswith(("ray::IDLE", "ray::Dashboard", "ray::Runtime"))
        return 0 if own else process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def _publish_evaluation(stages: Sequence[Stage], seed: int, directory: RunDirectory) -> None:
    """Copy the last evaluation of the graph to DIR/evaluation.json, where scripts look for it."""
    for item in reversed(plan(stages, seed, directory)):
        source = directory.stage_folder(item.stage.name, item.fingerprint) / "evaluation.json"
        if item.state == DONE and source.is_file():
            write_atomically(directory.root / "evaluation.json", source.read_text())
            return


def _last_lines(error: Any) -> str:
    """What a stage's exception was and the end of its traceback."""
    cause = error.cause if error.cause is not None else error
    # Ray's text starts with frames of Ray itself; the end is where the stage broke
    lines = str(error).strip().splitlines()[-TRACEBACK_LINES:]
    return f"{type(cause).__name__}: {_first_line(cause)}\n" + "\n".join(f"    {line}" for line in lines)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
