"""The graph of stages: order, and what a run directory already holds of it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.artifacts import RunDirectory
from pipeline.fingerprint import GraphError, changes, fingerprint, stage_parts
from pipeline.stage import Stage

DONE, RUNNING, INTERRUPTED, STALE, WAITING = "done", "running", "interrupted", "stale", "waiting"


@dataclass(frozen=True)
class PlannedStage:
    """A stage with its fingerprint and its state in a run directory.

    state: done (committed), running (a live process works on it), interrupted (half done; will resume),
        stale (committed only with other inputs), waiting (never run).
    reason: one line for a person; empty when done.
    """

    stage: Stage
    fingerprint: str
    parts: dict[str, Any]
    state: str
    reason: str


def order(stages: Sequence[Stage]) -> list[Stage]:
    """Stages with inputs before their users, else as given; raises GraphError on unknown inputs and cycles."""
    by_name = {stage.name: stage for stage in stages}
    if len(by_name) != len(stages):
        names = [stage.name for stage in stages]
        raise GraphError(f"two stages are named {next(name for name in names if names.count(name) > 1)}")
    for stage in stages:
        for name in stage.inputs:
            if name not in by_name:
                raise GraphError(f"stage {stage.name} wants input {name}, which no stage makes"
                                 f"{did_you_mean(name, by_name)}")
    ordered: list[Stage] = []
    placed: set[str] = set()
    waiting = list(stages)
    while waiting:
        ready = next((stage for stage in waiting if placed.issuperset(stage.inputs)), None)
        if ready is None:
            raise GraphError("these stages wait for each other in a circle: " + _circle(waiting))
        ordered.append(ready)
        placed.add(ready.name)
        waiting.remove(ready)
    return ordered


def _circle(waiting: list[Stage]) -> str:
    by_name = {stage.name: stage for stage in waiting}
    path = [waiting[0].name]
    while True:
        following = next(name for name in by_name[path[-1]].inputs if name in by_name)
        if following in path:
            return " <- ".join([*path[path.index(following):], following])
        path.append(following)


def did_you_mean(name: str, known: Sequence[str] | dict[str, Any]) -> str:
    """The end of an error about an unknown name: the nearest known one, or all of them."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f" (known: {', '.join(known) or 'none'})"


def find_stage(stages: Sequence[Stage], name: str) -> Stage:
    for stage in stages:
        if stage.name == name:
            return stage
    raise GraphError(f"no stage is named {name}{did_you_mean(name, [stage.name for stage in stages])}")


def plan(stages: Sequence[Stage], seed: int, directory: RunDirectory) -> list[PlannedStage]:
    """Every stage in order with its fingerprint, state and reason, from the files of the run directory alone."""
    holder = directory.lock_holder()
    planned: list[PlannedStage] = []
    fingerprints: dict[str, str] = {}
    states: dict[str, str] = {}
    for stage in order(stages):
        parts = stage_parts(stage, seed, fingerprints)
        print_ = fingerprints[stage.name] = fingerprint(parts)
        state, reason = _state(stage, print_, parts, directory, holder, states)
        states[stage.name] = state
        planned.append(PlannedStage(stage, print_, parts, state, reason))
    return planned


def _state(stage: Stage, print_: str, parts: dict[str, Any], directory: RunDirectory, holder: Any,
           states: dict[str, str]) -> tuple[str, str]:
    if directory.is_committed(stage.name, print_):
        return DONE, ""
    if directory.work_folder(stage.name, print_).exists():
        if holder is not None and holder.working_on == directory.work_folder(stage.name, print_).name:
            return RUNNING, f"process {holder.pid} is working on it"
        return INTERRUPTED, "stopped half way; resumes from its last checkpoint or row"
    newest = directory.newest_manifest(stage.name)
    if newest is not None:
        return STALE, "; ".join(changes(newest["parts"], parts)) or "its artifact was removed"
    missing = [name for name in stage.inputs if states[name] != DONE]
    return WAITING, f"needs {', '.join(missing)}" if missing else "ready to run"


def why(stages: Sequence[Stage], seed: int, directory: RunDirectory, name: str) -> list[str]:
    """Why a stage would run or not: each changed part, followed back through changed inputs to their cause."""
    find_stage(stages, name)
    by_name = {item.stage.name: item for item in plan(stages, seed, directory)}
    lines: list[str] = []
    seen: set[str] = set()

    def explain(stage_name: str, depth: int) -> None:
        if stage_name in seen:
            return
        seen.add(stage_name)
        item, pad = by_name[stage_name], "  " * depth
        newest = directory.newest_manifest(stage_name)
        if item.state == DONE:
            lines.append(f"{pad}{stage_name} is done ({item.fingerprint[:12]}): nothing it depends on changed")
            return
        if newest is None:
            lines.append(f"{pad}{stage_name} is {item.state}: {item.reason}")
            return
        lines.append(f"{pad}{stage_name} is {item.state}; changed since its artifact {newest['fingerprint'][:12]}:")
        found = changes(newest["parts"], item.parts)
        lines.extend(f"{pad}  {line}" for line in found or ["nothing (its artifact was removed)"])
        for line in found:
            cause = line.removeprefix("input ").partition(":")[0]
            if line.startswith("input ") and cause in by_name and "->" in line:
                explain(cause, depth + 1)

    explain(name, 0)
    return lines
